"""Every setting: unit, range, default and reason. The template, the documentation and the error texts come from here.

A section is a frozen model. Stages receive sections; the functions below them take plain arguments. What two settings
may not say together is in contradictions.py.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from sdxl_ray.config.units import Duration, DurationField, Warmup, WarmupField


def setting(default: Any, text: str, *, unit: str = "", more: str = "", **limits: Any) -> Any:
    """A field with its description and unit; `limits` are pydantic's (ge, gt, le, ...).

    `more`: the heading under which `sdxl-ray init` lists a setting that few need, commented out.
    """
    return Field(default=default, description=text, json_schema_extra={"unit": unit, "more": more}, **limits)


def _no_surrounding_space(text: str) -> str:
    if text != text.strip():
        raise ValueError("has spaces at its ends")
    return text


def _plain_folder_name(text: str) -> str:
    if text in (".", "..") or any(sign in text for sign in "/\\\0"):
        raise ValueError('must be the name of one folder, without "/" or ".."; where it lies is run.output')
    return text


def _plain_name(text: str) -> str:
    if any(sign in text for sign in "/\\\0"):
        raise ValueError('must be a name, without "/"; where the images lie is dataset.path')
    return text


def _no_cloud_address(text: str) -> str:
    if "://" in text:
        raise ValueError("a cloud address cannot be used here; give a folder that all machines see")
    return text


Strings = Annotated[tuple[str, ...], Field(strict=False)]  # TOML gives lists
Trimmed = Annotated[str, AfterValidator(_no_surrounding_space)]
FolderName = Annotated[Trimmed, AfterValidator(_plain_folder_name)]


def _one_or_more(value: Any) -> Any:
    """`resolution = 1024` is `resolution = [1024]`."""
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, int | float):
        return [value]
    raise ValueError("must be a number, or a list of numbers such as [512, 1024]")


FolderPath = Annotated[Trimmed, AfterValidator(_no_cloud_address)]
DatasetName = Annotated[Trimmed, AfterValidator(_plain_name)]


class Section(BaseModel):
    """Strict (no number from a string), frozen, and deaf to unknown keys never: they are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


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


_BUCKET = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")

# Headings of the file that `sdxl-ray init` writes, for the settings of a dataset that few need.
_SEVERAL = "with several datasets"
_FILES = "which images"
_TABLES = "columns of a table"
_CAPTIONS = "captions"
_TAGS = "tags"
_SIZES = "buckets and crops"
_MASKS = "masks"
_LIMITS = "what is too much"


class DatasetSection(Section):
    """The images and their captions. A run has any number of these sections: `[[dataset]]`."""

    # ---- which images
    path: Trimmed = setting(
        "path/to/images",
        "Folder, searched recursively; WebDataset tar files (data/*.tar); tables (data/*.parquet, .csv, .jsonl); a "
        "Hugging Face dataset (hf://org/name) or its local copy; builtin:photographs. Local, or s3://, gs://, abfs://.",
        min_length=1,
    )
    name: DatasetName = setting("", "What it is called in reports. Empty: the last part of `path`.", more=_SEVERAL)
    role: Literal["train", "eval", "regularization"] = setting(
        "train",
        "eval: only for the eval loss; nothing else is held out then. regularization: trained on like train; set "
        "`weight`.",
        more=_SEVERAL,
    )
    disabled: bool = setting(False, "Leave this dataset out.", more=_SEVERAL)
    repeats: int = setting(1, "How often each image is seen in one epoch.", ge=1)
    weight: float = setting(1.0, "How much each of its images counts in the loss.", gt=0, le=1000, more=_SEVERAL)
    start: DurationField = setting(
        Duration(0, "steps"), 'Takes part from here on: "500 steps", "2 epochs".', more=_SEVERAL
    )
    end: DurationField = setting(
        Duration(0, "steps"),
        "Takes part until here. 0: to the end of the run. An epoch is cut where this is in steps.",
        more=_SEVERAL,
    )
    max_samples: int = setting(
        0,
        "Use at most this many images, always the same ones, chosen by name. 0: all.",
        unit="images",
        ge=0,
        more=_FILES,
    )
    format: Literal["auto", "folder", "webdataset", "table"] = setting(
        "auto", "auto: by what `path` holds.", more=_FILES
    )
    revision: Trimmed = setting("", "Of a Hugging Face dataset: branch, tag or commit. Empty: main.", more=_FILES)
    split: Trimmed = setting("train", "Of a Hugging Face dataset. Empty: all of its files.", more=_FILES)
    identify_by: Literal["auto", "content", "listing"] = setting(
        "auto",
        "content: the image's bytes, so that copies are encoded once. listing: address, size and date, so that nothing "
        "is opened before it is encoded. auto: listing where a table gives height and width, else content.",
        more=_FILES,
    )

    # ---- columns of a table
    image_column: Trimmed = setting(
        "image", "Column with the image: its bytes, a path beside the table, or a URL.", more=_TABLES
    )
    caption_columns: Strings = setting(
        ("caption", "text"),
        "Columns with captions, the first that is not empty; text, or a list of alternatives.",
        more=_TABLES,
    )
    size_columns: Strings = setting(
        ("height", "width"), "Columns with height and width in pixels, where there are.", more=_TABLES
    )
    focus_columns: Strings = setting(
        ("focus_y", "focus_x"),
        'Columns with the point of interest, 0-1 or in pixels, for crop = "focus".',
        more=_TABLES,
    )
    mask_column: Trimmed = setting("mask", 'Column with the mask, for mask = "file".', more=_TABLES)

    # ---- captions
    captions: Strings = setting(
        ("textfile", "column"),
        "Where captions come from, the first that has one: textfile (cat.txt beside cat.jpg), column (of a table; the "
        ".json of a WebDataset), filename, instance_prompt.",
        min_length=1,
    )
    instance_prompt: Trimmed = setting("", 'One caption for every image, when `captions` has "instance_prompt".')
    caption_extension: Trimmed = setting(".txt", "Of caption files.", min_length=2, more=_CAPTIONS)
    caption_lines: Literal["alternatives", "whole"] = setting(
        "alternatives",
        "alternatives: each line of a caption file is a caption of its own. whole: the file is one.",
        more=_CAPTIONS,
    )
    caption_replace: Annotated[tuple[Annotated[tuple[str, str], Field(strict=False)], ...], Field(strict=False)] = (
        setting(
            (),
            "Regular expressions and what takes their place, in this order: [['\\bphoto of\\b', 'picture of']].",
            more=_CAPTIONS,
        )
    )
    trigger_word: Trimmed = setting("", "Put before captions that do not contain it. Empty: none.")
    caption_prefix: str = setting("", "Put before every caption, before the trigger word too.", more=_CAPTIONS)
    caption_suffix: str = setting("", "Put after every caption.", more=_CAPTIONS)
    tag_separator: str = setting(",", "Between the tags of a caption.", min_length=1, more=_TAGS)
    shuffle_tags: bool = setting(False, "Tags in a new order in each variant of a caption.", more=_TAGS)
    keep_tags: int = setting(
        0, "This many tags at the start stay where they are, and are never dropped.", ge=0, more=_TAGS
    )
    tag_dropout: float = setting(
        0.0, "Share of the other tags left out of each variant.", unit="share 0-1", ge=0, lt=1, more=_TAGS
    )
    caption_variants: int = setting(
        1, "Shuffled or thinned variants of each caption in the cache; each epoch draws one.", ge=1, le=1000, more=_TAGS
    )

    # ---- size and crop
    resolution: Annotated[tuple[float, ...], BeforeValidator(_one_or_more), Field(strict=False)] = setting(
        (1024.0,),
        "Size of the buckets, in `resolution_unit`. Several: each image is trained at each of them.",
        min_length=1,
    )
    resolution_unit: Literal["edge", "shorter_side", "megapixels"] = setting(
        "edge",
        "edge: of the square bucket, in pixels; the others have about its area. shorter_side: of every bucket, in "
        "pixels. megapixels: area; 1.0 is 1024 x 1024.",
        more=_SIZES,
    )
    bucket_step: int = setting(
        64, "Bucket edges are multiples of this.", unit="pixels", ge=8, multiple_of=8, more=_SIZES
    )
    buckets: Strings = setting(
        (),
        'Your own list, HEIGHTxWIDTH, whatever `resolution` says: ["1024x1024", "832x1216"]. ["square"]: only the '
        "square one. Empty: automatic.",
        more=_SIZES,
    )
    upscale: bool = setting(
        True, "Whether small images are enlarged. false: they get a smaller bucket of their own size, or are skipped."
    )
    min_size: int = setting(
        0, "Skip images whose shorter edge is below this. 0: none.", unit="pixels", ge=0, more=_SIZES
    )
    max_size: int = setting(
        0, "Skip images whose longer edge is above this. 0: none.", unit="pixels", ge=0, more=_SIZES
    )
    min_aspect: float = setting(0.0, "Skip images with width / height below this. 0: none.", ge=0, more=_SIZES)
    max_aspect: float = setting(0.0, "Skip images with width / height above this. 0: none.", ge=0, more=_SIZES)
    crop: Literal["center", "random", "top_left", "top_right", "bottom_left", "bottom_right", "focus"] = setting(
        "center", "Where to cut what does not fit the bucket. focus: around the point in `focus_columns`, or center."
    )
    crop_variants: int = setting(
        1, "Random crops of each image in the cache; epochs take turns.", ge=1, le=1000, more=_SIZES
    )
    crop_epochs: int = setting(
        1, "Epochs that each random crop is used for before the next.", unit="epochs", ge=1, more=_SIZES
    )
    flip: bool = setting(False, "Each image a second time, mirrored. Not for text, logos or faces that must match.")
    mask: Literal["none", "alpha", "file"] = setting(
        "none",
        "Where each image says which parts count in the loss: its alpha channel, or a grey image beside it.",
        more=_MASKS,
    )
    mask_suffix: Trimmed = setting(
        "-mask.png", "cat-mask.png is the mask of cat.jpg; white counts.", min_length=1, more=_MASKS
    )

    # ---- what is too bad
    max_unreadable: float = setting(
        0.2, "Stop when more than this share of the images cannot be read.", unit="share 0-1", ge=0, le=1
    )
    max_pixels: int = setting(
        250_000_000, "Larger images are skipped: they may be decompression bombs.", unit="pixels", ge=1, more=_LIMITS
    )

    @property
    def own_buckets(self) -> tuple[tuple[int, int], ...]:
        """`buckets` as (height, width), without what is none; empty where `resolution` decides."""
        parsed = [_BUCKET.fullmatch(bucket) for bucket in self.buckets]
        return tuple((int(found[1]), int(found[2])) for found in parsed if found)

    @property
    def edges(self) -> tuple[float, ...]:
        """Edge of the square bucket for each resolution, in pixels; of megapixels it is seldom whole.

        With buckets of one's own, there is one: of a square as large as the largest.
        """
        if self.own_buckets:
            return (math.sqrt(max(height * width for height, width in self.own_buckets)),)
        if self.resolution_unit == "megapixels":
            return tuple(1024 * math.sqrt(megapixels) for megapixels in self.resolution)
        return self.resolution


class CacheSection(Section):
    """Stage 1: encoded images and captions, shared by every run that points to the same folder."""

    path: Trimmed = setting(
        "cache",
        "Where the encoded tensors are kept: a folder that all machines see, or s3://, gs://, abfs://.",
        unit="path",
        min_length=1,
    )
    mode: Literal["disk", "ondemand", "off"] = setting(
        "disk",
        "disk: everything is encoded before training. ondemand: training starts at once, and what is missing is "
        "encoded in the order in which it is needed, and kept. off: encoded by the training workers themselves, each "
        "time, never kept. The batches are the same.",
    )
    text: Literal["cached", "online"] = setting(
        "cached", "online: captions are shuffled and encoded while training, by the training workers."
    )
    caption_chunks: int = setting(
        1, "Captions are read in this many pieces of 75 tokens: 1 is 77 tokens, 3 is 225 words' worth.", ge=1, le=3
    )
    local_path: Trimmed = setting(
        "~/.cache/sdxl-ray/shards", "Where each machine keeps copies of shards when `path` is a cloud address."
    )
    local_gib: float = setting(50.0, "The least recently read copies go beyond this size.", unit="GiB", gt=0)
    vae_dtype: Literal["bf16", "fp32"] = setting("bf16", "Precision of the VAE. fp16 is not offered: SDXL's overflows.")
    batch_size: int = setting(0, "Images or captions encoded at once. 0: as many as fit, at most 32.", ge=0)
    compile: bool = setting(False, "torch.compile the VAE: pays from some thousand images per bucket, on GPUs.")
    num_encoders: int = setting(
        0, "VAE encoders working side by side. 0: one per GPU; without GPUs, one.", unit="Ray actors", ge=0
    )
    max_encoders: int = setting(0, "Grow up to this many where the cluster grows. 0: num_encoders.", ge=0)
    gpus_per_encoder: float = setting(
        1.0, "Fractions share a GPU. Ignored where there is none.", unit="GPUs", gt=0, le=1
    )
    num_text_encoders: int = setting(0, "The same for captions. 0: as for images.", unit="Ray actors", ge=0)
    gpus_per_text_encoder: float = setting(0.0, "0: as for images.", unit="GPUs", ge=0, le=1)
    accelerator_type: Trimmed = setting(
        "", 'Only on nodes with this accelerator, as Ray calls it ("L4", "A100-80G", "AMD-Instinct-MI300X-OAM").'
    )


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
