"""Every setting: unit, range, default and reason. The template, the documentation and the error texts come from here.

A section is a frozen model. Stages receive sections; the functions below them take plain arguments. What two settings
may not say together is in contradictions.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from sdxl_ray.config.data import CacheSection, DatasetSection
from sdxl_ray.config.fields import FolderName, FolderPath, Section, Strings, Trimmed, setting
from sdxl_ray.config.units import Duration, DurationField, Warmup, WarmupField


class RunSection(Section):
    """What the run is called and where it leaves its results."""

    name: FolderName = setting("", 'Folder under `output`. Empty: the name of this file ("my.toml" gives "my").')
    output: FolderPath = setting(
        "runs", "Where runs are kept: a folder that all machines see.", unit="path", min_length=1
    )
    seed: int = setting(0, "Fixes the order of the data, noise, timesteps and initial weights.", ge=0, lt=2**31)


class ModelSection(Section):
    """The base model: a diffusers folder, a Hub id, or "builtin:tiny" (random weights, for trying things out)."""

    path: FolderPath = setting(
        "stabilityai/stable-diffusion-xl-base-1.0", "Folder, Hub id or builtin:tiny.", min_length=1
    )
    revision: Trimmed = setting("", "Branch, tag or commit on the Hub. Empty: main.")
    variant: Trimmed = setting("", 'Weight variant on the Hub or in the folder, such as "fp16". Empty: none.')
    dtype: Literal["bf16", "fp32"] = setting("bf16", "Precision of the frozen U-Net. The adapter's masters are fp32.")


class AdapterSection(Section):
    """What is trained."""

    kind: Literal["lora"] = setting("lora", "Low-rank adaptation (arXiv:2106.09685).")
    rank: int = setting(16, "Width of the low-rank update: capacity and file size.", ge=1, le=1024)
    alpha: float = setting(0.0, "The update is scaled by alpha / rank. 0: equal to rank, which is a scale of 1.", ge=0)
    dropout: float = setting(0.0, "Share of the adapter's inputs that is zeroed in training.", ge=0, lt=1)
    targets: Literal["attention", "all-linear"] = setting(
        "attention", "attention: q, k, v, out (560 layers). all-linear: every linear layer of the blocks (722)."
    )

    @property
    def scaling_alpha(self) -> float:
        """alpha as a number to divide by rank."""
        return self.alpha or float(self.rank)


class LossSection(Section):
    """What the U-Net learns to predict, and how much each noise level counts."""

    objective: Literal["epsilon", "v_prediction"] = setting(
        "epsilon", "What the base model predicts: epsilon for SDXL base, v_prediction for models that say so."
    )
    min_snr_gamma: float = setting(
        0.0, "Min-SNR weighting (arXiv:2303.09556), usually 5. 0: every noise level counts the same.", ge=0
    )
    caption_dropout: float = setting(
        0.1, "Share of captions replaced by zeros, which is SDXL's own empty prompt.", unit="share 0-1", ge=0, le=1
    )


class TrainSection(Section):
    """Stage 2: how long, how much at once."""

    duration: DurationField = setting(Duration(2000, "steps"), 'Length of the run: "2000 steps" or "10 epochs".')
    micro_batch_size: int = setting(4, "Images per worker and forward pass.", ge=1)
    accumulation: int = setting(1, "Forward passes per worker and optimizer step.", ge=1)
    num_workers: int = setting(
        1, "Workers, one accelerator each. Global batch = micro_batch_size x accumulation x num_workers.", ge=1
    )
    gradient_checkpointing: Literal["none", "transformer", "full"] = setting(
        "none",
        "Recompute instead of keeping activations. transformer: 12 % of the memory for most of the blocks; "
        "full: least memory, about 36 % more compute.",
    )
    max_grad_norm: float = setting(1.0, "Gradients longer than this are shortened to it. 0: never.", ge=0)
    log_every: int = setting(10, "Period of progress lines and metrics.", unit="steps", ge=1)


class OptimizerSection(Section):
    """AdamW on the adapter's fp32 master weights (arXiv:1711.05101)."""

    learning_rate: float = setting(1e-4, "Peak learning rate.", gt=0, le=10)
    weight_decay: float = setting(0.01, "Decoupled weight decay.", ge=0, le=1)
    beta1: float = setting(0.9, "Decay of the mean of the gradient.", ge=0, lt=1)
    beta2: float = setting(0.999, "Decay of the mean of its square.", ge=0, lt=1)
    epsilon: float = setting(1e-8, "Added to the denominator.", gt=0)


class LrScheduleSection(Section):
    """The learning rate over the run: a pure function of the optimizer step."""

    name: Literal["constant", "linear", "cosine"] = setting(
        "constant", "linear and cosine fall to 0 just after the last step."
    )
    warmup: WarmupField = setting(Warmup(percent=5.0), 'Linear rise from 0: "100 steps", "1 epoch" or "5 %".')


class EvalSection(Section):
    """A stable loss on held-out images: always the same noise and timesteps, so that two values can be compared."""

    holdout: float = setting(
        0.05, "Share of the images kept out of training, chosen by content. 0: no evaluation.", ge=0, lt=1
    )
    max_images: int = setting(
        64,
        "At most this many different images are held out, however large the share; the others are trained on.",
        ge=1,
    )
    every: DurationField = setting(Duration(200, "steps"), "Period of the evaluation.")
    num_timesteps: int = setting(4, "Noise levels per image, spread evenly over 0-999.", ge=1, le=100)


class ValidationSection(Section):
    """Images drawn while training, to look at."""

    prompts: Strings = setting((), "What to draw. Empty: no images.")
    negative_prompt: str = setting("", "What to steer away from.")
    every: DurationField = setting(Duration(500, "steps"), "Period of the images; also drawn before the first step.")
    num_steps: int = setting(25, "Sampler steps per image.", ge=1, le=1000)
    guidance_scale: float = setting(5.0, "Strength of classifier-free guidance. 1: off.", ge=1, le=30)
    height: int = setting(1024, "Height of the images.", unit="pixels", ge=64, multiple_of=8)
    width: int = setting(1024, "Width of the images.", unit="pixels", ge=64, multiple_of=8)
    seed: int = setting(0, "The same noise every time, so that images can be compared.", ge=0)


class CheckpointSection(Section):
    """What a run can continue from."""

    every: DurationField = setting(Duration(500, "steps"), "Period of the checkpoints; the last step always has one.")
    keep: int = setting(3, "How many to keep; older ones are deleted.", ge=1)


class ExportSection(Section):
    """The finished LoRA."""

    formats: Annotated[tuple[Literal["kohya", "diffusers"], ...], Field(strict=False)] = setting(
        ("kohya", "diffusers"), "kohya: ComfyUI, A1111, Forge, InvokeAI. diffusers: load_lora_weights.", min_length=1
    )
    dtype: Literal["fp32", "bf16", "fp16"] = setting("fp32", "Precision of the written weights.")


class TrackingSection(Section):
    """Where metrics go besides metrics.jsonl, which is always written."""

    tensorboard: bool = setting(True, "Also write TensorBoard event files into the run's folder.")
    wandb_project: Trimmed = setting("", "Also send to this Weights & Biases project (needs sdxl-ray[wandb]).")


class ClusterSection(Section):
    """What the workers need from Ray."""

    accelerator: Literal["auto", "gpu", "cpu"] = setting("auto", "auto: GPUs if the cluster has any.")
    cpus_per_worker: float = setting(1.0, "CPU cores reserved for each training worker.", unit="cores", gt=0)
    max_failures: int = setting(3, "Restarts from the last checkpoint before the run is given up.", ge=0)


class SearchSpace(Section):
    """How one parameter varies: exactly one of these keys."""

    grid: tuple[Any, ...] | None = Field(default=None, strict=False, description="Every value is tried.")
    choice: tuple[Any, ...] | None = Field(default=None, strict=False, description="One value is drawn per trial.")
    uniform: tuple[float, float] | None = Field(default=None, strict=False, description="[low, high]")
    loguniform: tuple[float, float] | None = Field(default=None, strict=False, description="[low, high], both above 0")

    @model_validator(mode="after")
    def _exactly_one(self) -> SearchSpace:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise ValueError(f"needs exactly one of grid, choice, uniform, loguniform; found {found}")
        low_high = self.uniform or self.loguniform
        if low_high is not None and not low_high[0] < low_high[1]:
            raise ValueError(f"needs [low, high] with low < high, found {list(low_high)}")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform needs bounds above 0, found {list(self.loguniform)}")
        if self.values == ():
            raise ValueError("needs at least one value")
        return self

    @property
    def values(self) -> tuple[Any, ...]:
        """The values to check against the schema: all of them, or the two bounds."""
        for given in (self.grid, self.choice, self.uniform, self.loguniform):
            if given is not None:
                return given
        return ()


class SweepSection(Section):
    """Stage 3: many short runs over one cache, the bad ones stopped early."""

    parameters: dict[str, SearchSpace] = setting(
        {},
        'What varies: "optimizer.learning_rate" = { loguniform = [1e-5, 1e-3] }, "adapter.rank" = { choice = [4, 8] }.',
    )
    num_trials: int = setting(8, "Trials; with a grid, repetitions of the whole grid are not added.", ge=1)
    metric: Literal["eval/loss"] = setting("eval/loss", "What decides; lower is better.")
    max_concurrent: int = setting(1, "Trials at the same time. Each needs train.num_workers workers.", ge=1)
    grace_steps: int = setting(200, "No trial is stopped before this step.", unit="steps", ge=1)
    reduction_factor: int = setting(2, "ASHA keeps one in this many at each rung (arXiv:1810.05934).", ge=2)

    @field_validator("parameters", mode="before")
    @classmethod
    def _also_without_quotes(cls, given: Any) -> Any:
        """`adapter.rank = {...}` without quotes is a table in a table to TOML; here it means the same."""
        return _joined_keys(given) if isinstance(given, dict) else given


def _joined_keys(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, dict) and value and all(isinstance(inner, dict) for inner in value.values()):
            joined |= _joined_keys(value, f"{prefix}{key}.")
        else:
            joined[prefix + key] = value
    return joined


def _as_tables(given: Any) -> Any:
    """`[dataset]` is one `[[dataset]]`."""
    return [given] if isinstance(given, dict | DatasetSection) else given


class Config(Section):
    """One file of settings for all three stages."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    dataset: Annotated[tuple[DatasetSection, ...], BeforeValidator(_as_tables), Field(strict=False)] = Field(
        default=(DatasetSection(),), min_length=1
    )
    cache: CacheSection = CacheSection()
    adapter: AdapterSection = AdapterSection()
    loss: LossSection = LossSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    lr_schedule: LrScheduleSection = LrScheduleSection()
    eval: EvalSection = EvalSection()
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    export: ExportSection = ExportSection()
    tracking: TrackingSection = TrackingSection()
    cluster: ClusterSection = ClusterSection()
    sweep: SweepSection = SweepSection()

    @property
    def datasets(self) -> tuple[DatasetSection, ...]:
        """Those that take part. Their names are filled in and differ."""
        return tuple(dataset for dataset in self.dataset if not dataset.disabled)

    @property
    def largest_edge(self) -> int:
        """Of all datasets that take part, in pixels: what memory is estimated with."""
        return max((round(edge) for dataset in self.datasets for edge in dataset.edges), default=0)

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step."""
        return self.train.micro_batch_size * self.train.accumulation * self.train.num_workers
