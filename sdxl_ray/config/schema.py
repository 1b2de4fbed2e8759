"""Every setting: unit, range, default and reason. The template, the documentation and the error texts come from here.

A section is a frozen model. Stages receive sections; the functions below them take plain arguments. What two settings
may not say together is in contradictions.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from sdxl_ray.config.data import CacheSection, DatasetSection
from sdxl_ray.config.fields import (
    Checkpointing,
    FolderName,
    FolderPath,
    MicroBatchSize,
    Section,
    Strings,
    Trimmed,
    setting,
)
from sdxl_ray.config.methods import (
    AdapterSection,
    EmaSection,
    LossSection,
    LrScheduleSection,
    OptimizerSection,
    Quantization,
    TextAdapterSection,
)
from sdxl_ray.config.units import Duration, DurationField

_QUANTIZED = "smaller weights"


ExportFormat = Literal["kohya", "diffusers", "kohya-svd", "checkpoint", "diffusers-folder"]


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
    dtype: Literal["bf16", "fp16", "fp32"] = setting(
        "bf16",
        "Precision in which the U-Net computes; what is trained has its masters in fp32. fp16: for GPUs without bf16, "
        "with a loss scale.",
    )
    quantize: Quantization = setting(
        "none", "Keep the frozen U-Net's weights in int8, int4 or fp8 (optimum-quanto).", more=_QUANTIZED
    )
    quantize_text_encoder: Quantization = setting(
        "none", "The same for text encoder 1 (CLIP-L), where it is needed while training.", more=_QUANTIZED
    )
    quantize_text_encoder_2: Quantization = setting(
        "none", "The same for text encoder 2 (OpenCLIP bigG).", more=_QUANTIZED
    )


class TrainSection(Section):
    """Stage 2: how long, how much at once."""

    duration: DurationField = setting(Duration(2000, "steps"), 'Length of the run: "2000 steps" or "10 epochs".')
    micro_batch_size: MicroBatchSize = setting(
        4, 'Images per worker and forward pass. "auto": the most that fit, tried out before the run.'
    )
    accumulation: int = setting(1, "Forward passes per worker and optimizer step.", ge=1)
    num_workers: int = setting(
        1, "Workers, one accelerator each. Global batch = micro_batch_size x accumulation x num_workers.", ge=1
    )
    global_batch_size: int = setting(
        0,
        'Images per optimizer step, for micro_batch_size = "auto": accumulation follows from it. '
        "0: micro_batch_size x accumulation x num_workers.",
        ge=0,
    )
    gradient_checkpointing: Checkpointing = setting(
        "none",
        "Recompute instead of keeping activations. transformer: 12 % of the memory for most of the blocks; "
        "full: least memory, about 36 % more compute. A number: so many of SDXL's 70 transformer blocks.",
    )
    compile: bool = setting(
        False, "Compile the transformer blocks (torch.compile): slower to start, then faster on GPUs."
    )
    max_grad_norm: float = setting(1.0, "Gradients longer than this are shortened to it. 0: never.", ge=0)
    log_every: int = setting(10, "Period of progress lines and metrics.", unit="steps", ge=1)


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

    formats: Annotated[tuple[ExportFormat, ...], Field(strict=False)] = setting(
        (),
        "kohya: ComfyUI, A1111, Forge, InvokeAI (a DoRA: LyCORIS, nearly ComfyUI and Forge). diffusers: "
        "load_lora_weights. kohya-svd: a plain LoRA that comes nearest to a DoRA, LoHa or LoKr, for programs that "
        "cannot read these. checkpoint, diffusers-folder: the whole model, with what was trained merged into it. "
        "Empty: what fits adapter.kind.",
    )
    svd_rank: int = setting(0, "kohya-svd: its rank. 0: four times the largest rank that was trained.", ge=0, le=1280)
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
    text_encoder: TextAdapterSection = TextAdapterSection()
    text_encoder_2: TextAdapterSection = TextAdapterSection()
    loss: LossSection = LossSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    lr_schedule: LrScheduleSection = LrScheduleSection()
    ema: EmaSection = EmaSection()
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
    def prompts(self) -> tuple[str, ...] | None:
        """The texts of validation images; None where they are encoded anew each time, since the encoders learn."""
        if self.text_encoder.rank or self.text_encoder_2.rank:
            return None
        return (*self.validation.prompts, self.validation.negative_prompt)

    @property
    def largest_edge(self) -> int:
        """Of all datasets that take part, in pixels: what memory is estimated with."""
        return max((round(edge) for dataset in self.datasets for edge in dataset.edges), default=0)

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step."""
        if self.train.global_batch_size:
            return self.train.global_batch_size
        return self.train.micro_batch_size * self.train.accumulation * self.train.num_workers
