"""The settings of stage 1: which images, how they are prepared, where they are kept."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from sdxl_ray.config.fields import Section, Strings, Trimmed, setting
from sdxl_ray.config.units import Duration, DurationField


def _plain_name(text: str) -> str:
    if any(sign in text for sign in "/\\\0"):
        raise ValueError('must be a name, without "/"; where the images lie is dataset.path')
    return text


def _one_or_more(value: Any) -> Any:
    """`resolution = 1024` is `resolution = [1024]`."""
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, int | float):
        return [value]
    raise ValueError("must be a number, or a list of numbers such as [512, 1024]")


DatasetName = Annotated[Trimmed, AfterValidator(_plain_name)]


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
    prior_prediction: bool = setting(
        False,
        "regularization: what is learnt is not the image's noise, but what the base model predicts for the same noisy "
        "image. So the model stays as it was there, whatever the images look like.",
        more=_SEVERAL,
    )
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
        "Use at most this many images, always the same ones, chosen by name before any is skipped. 0: all.",
        unit="images",
        ge=0,
        more=_FILES,
    )
    format: Literal["auto", "folder", "webdataset", "table"] = setting(
        "auto", "auto: by what `path` holds.", more=_FILES
    )
    revision: Trimmed = setting("", "Of a Hugging Face dataset: branch, tag or commit. Empty: main.", more=_FILES)
    split: Trimmed = setting(
        "train",
        "By names of files and folders as Hugging Face has them: train-00000-of-00002.parquet, train/ beside "
        "validation/. Empty: all.",
        more=_FILES,
    )
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
        "Columns with captions, the first that is not empty; text, or a list: `caption_lists`.",
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
        ".json of a WebDataset), filename, instance_prompt. As the last: empty (no words), skip (leave the image out).",
        min_length=1,
    )
    instance_prompt: Trimmed = setting("", 'One caption for every image, when `captions` has "instance_prompt".')
    caption_extension: Trimmed = setting(".txt", "Of caption files.", min_length=2, more=_CAPTIONS)
    caption_lines: Literal["alternatives", "whole"] = setting(
        "alternatives",
        "alternatives: each line of a caption file is a caption of its own. whole: the file is one.",
        more=_CAPTIONS,
    )
    caption_lists: Literal["alternatives", "tags"] = setting(
        "alternatives",
        "A list in a column, or in the .json of a WebDataset: alternatives: each of its texts is a caption of its own. "
        "tags: together they are one, with `tag_separator` between them.",
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
    max_upscale: float = setting(
        8.0,
        "Skip images that would have to be enlarged more often than this. 0: none.",
        unit="times",
        ge=0,
        more=_SIZES,
    )
    max_cut: float = setting(
        0.8,
        "Skip images of which more than this would be cut away: long strips. 1: none.",
        unit="share 0-1",
        gt=0,
        le=1,
        more=_SIZES,
    )
    jpeg_scaling: bool = setting(
        False,
        "Let the decoder shrink JPEGs of 4.5 times their bucket's edges and more: 1.5 times as fast, 45 dB and better "
        "on photographs, but fine regular patterns (fabric, screens) may become moire.",
        more=_SIZES,
    )
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
        "-mask.png",
        "cat-mask.png is the mask of cat.jpg; white counts. Beside cat.jpg it is no picture, whatever `mask` says.",
        min_length=1,
        more=_MASKS,
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
