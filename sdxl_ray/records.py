"""What travels through the three stages. Read this first.

    ImageRecord          one image file on its way through scan, captions and buckets      (stage 1, no tensors)
    EncodedSample        one row of index.parquet: where a sample's tensors lie            (stage 1 -> 2)
    Batch                the tensors that one rank feeds to the U-Net at once              (stage 2)
    ExportedFile         a LoRA file that was loaded back and compared with the model      (the end)

`MicroConditioning` goes along with all of them: what SDXL is told about an image's size and crop.
Every pair of lengths here is (height, width), and its name says so.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is slow to import, and stage 1's planning needs none of it
    import torch


@dataclass(frozen=True, slots=True)
class MicroConditioning:
    """What really happened to the image, in pixels: SDXL section 2.2 (arXiv:2307.01952).

    original_hw    size of the image as a person sees it (after EXIF rotation)
    crop_top_left  offset of the crop in the resized image (top, left)
    target_hw      size after the crop, which is the bucket
    """

    original_hw: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_hw: tuple[int, int]

    def as_time_ids(self) -> tuple[int, int, int, int, int, int]:
        """The six numbers in the order of diffusers' `_get_add_time_ids`."""
        return (*self.original_hw, *self.crop_top_left, *self.target_hw)


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image file. Each step of stage 1 fills in what it found and passes the record on."""

    path: str
    image_hash: str  # sha256 of the file's bytes, hex
    original_hw: tuple[int, int]  # after EXIF rotation
    captions: tuple[str, ...] = ()
    bucket_hw: tuple[int, int] | None = None
    resized_hw: tuple[int, int] | None = None  # covers the bucket
    crop_top_left: tuple[int, int] | None = None

    @property
    def micro_conditioning(self) -> MicroConditioning:
        """What the U-Net is told; only once the bucket is assigned."""
        if self.bucket_hw is None or self.crop_top_left is None:
            raise ValueError(f"{self.path} has no bucket yet")
        return MicroConditioning(self.original_hw, self.crop_top_left, self.bucket_hw)


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One row of the index: an image with its captions, and the keys of its encoded tensors."""

    sample_id: str  # the same wherever the files lie, so that keyed randomness does not depend on paths
    path: str
    image_hash: str
    original_hw: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_hw: tuple[int, int]  # the bucket
    captions: tuple[str, ...]
    latent_key: str
    text_keys: tuple[str, ...]  # one per caption
    repeats: int

    @property
    def bucket(self) -> str:
        return bucket_key(self.target_hw)

    @property
    def micro_conditioning(self) -> MicroConditioning:
        return MicroConditioning(self.original_hw, self.crop_top_left, self.target_hw)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one rank feeds to the U-Net at once: B samples of one bucket, with their noise and timesteps.

    latents               (B, 4, h, w) float32, times the VAE's scaling factor
    noise                 (B, 4, h, w) float32
    timesteps             (B,) int64 in [0, 1000), 0 = nearly clean
    prompt_embeds         (B, 77, 2048) both CLIPs, penultimate layers (the tiny model is narrower)
    pooled_prompt_embeds  (B, 1280) from text encoder 2
    add_time_ids          (B, 6) float32, never bf16: it keeps 8 significant bits, and 1365 px would become 1368
    weights               (B,) float32, the share of each sample in the step's loss
    """

    sample_ids: tuple[str, ...]
    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    add_time_ids: torch.Tensor
    weights: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; copies overlap with compute where the memory is pinned."""
        tensors = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if field.name != "sample_ids"
        }
        return Batch(sample_ids=self.sample_ids, **tensors)

    def pin_memory(self) -> Batch:
        tensors = {
            field.name: getattr(self, field.name).pin_memory()
            for field in dataclasses.fields(self)
            if field.name != "sample_ids"
        }
        return Batch(sample_ids=self.sample_ids, **tensors)

    def __len__(self) -> int:
        return len(self.sample_ids)


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """One verified file; relative_error is its largest output difference over the trained model's largest output."""

    path: Path
    format: str
    relative_error: float


def bucket_key(height_width: tuple[int, int]) -> str:
    """`1024x832` is 1024 px high and 832 px wide."""
    return f"{height_width[0]}x{height_width[1]}"


def parse_bucket_key(key: str) -> tuple[int, int]:
    """The (height, width) of `bucket_key`."""
    height, width = key.split("x")
    return int(height), int(width)
