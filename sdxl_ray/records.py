"""What travels through the three stages. Read this first.

    Listed               one image of a collection, as its source lists it, unopened        (stage 1)
    ImageRecord          one image with its transform, ready to be decoded and encoded      (stage 1, no tensors)
    EncodedSample        one row of index.parquet: where a sample's tensors lie            (stage 1 -> 2)
    Batch                the tensors that one rank feeds to the U-Net at once              (stage 2)
    ExportedFile         a LoRA file that was loaded back and compared with the model      (the end)

`MicroConditioning` goes along with all of them: what SDXL is told about an image's size and crop.
Every pair of lengths here is (height, width), and its name says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # torch is slow to import, and stage 1's planning needs none of it
    import torch


# Why an image is not used, beside the reason in words:
#     damaged        its content is at fault; it stays so until the file changes
#     unreadable     it could not be read now, or on this machine; later it may be
#     too_large      it has more pixels than dataset.max_pixels
#     needs_package  Pillow reads its format with a package that is not installed
#     changed        it is not what was scanned or listed
#     other_size     its size is not what its table says
#     mask           its mask is at fault
# Empty: nothing is wrong.
Problem = Literal["", "damaged", "unreadable", "too_large", "needs_package", "changed", "other_size", "mask"]


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
class Listed:
    """One image of a collection, as its source lists it. Nothing of it has been opened.

    An address is what `cache.sources.read_bytes` takes: a path, a URI, or a part of a container (a member of a tar
    file, a row of a table).

    path          how a person finds it, unique in its dataset: /data/cat.jpg, s3://bucket/cat.jpg, /data/00.tar/cat.jpg
    stamp         changes whenever the content may have: size and modification time
    address       where its bytes are; empty: `path`
    original_hw   from a table's columns, as a person sees it; None: to be read from the header
    text_file     address of its caption file, or empty
    text_stamp    as `stamp`, of the caption file, where it is remembered: in a bucket; else empty
    texts         captions that a table's row or a tar file's .json brought along
    mask_file     address of its mask, or empty
    mask_stamp    as `stamp`, of the mask; empty where the source does not know it
    focus_yx      point of interest from a table, as shares of height and width; where one of the two is above 1, in
                  pixels, of an image whose size the table does not tell: `cache.sources.values.as_shares`
    columns       of a table's row: what columns the table has; of a tar file's sample without a caption: its .json
    beside        of an image without a caption file: names of other files that are called like it, beside it; and
                  addresses of tables that may have its caption, which have a "/"
    """

    path: str
    stamp: str
    address: str = ""
    original_hw: tuple[int, int] | None = None
    text_file: str = ""
    text_stamp: str = ""
    texts: tuple[str, ...] = ()
    mask_file: str = ""
    mask_stamp: str = ""
    focus_yx: tuple[float, float] | None = None
    columns: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image with the transform that makes it fit its bucket: all that is needed to decode it anywhere.

    `crop_top_left` is an offset in the resized image before it is flipped; what SDXL is told is `micro_conditioning`.
    """

    path: str  # for people
    image_hash: str  # sha256 of the file's bytes, hex; with dataset.identify_by = "listing" of its path and stamp
    original_hw: tuple[int, int]  # after EXIF rotation
    bucket_hw: tuple[int, int]
    resized_hw: tuple[int, int]  # covers the bucket
    crop_top_left: tuple[int, int]
    address: str = ""  # empty: `path`
    flip: bool = False  # mirrored after the crop
    mask: str = ""  # "alpha", or the address of a mask file; empty: none
    mask_hash: str = ""  # sha256 of the mask file's bytes, hex; empty: no file, or one that is taken as it is
    verify: bool = True  # whether `image_hash` is of the content, and so can be checked on decoding
    scaled_jpeg: bool = False  # a JPEG far larger than `resized_hw` may be shrunk by its decoder: dataset.jpeg_scaling

    @property
    def micro_conditioning(self) -> MicroConditioning:
        """What the U-Net is told; of a flipped image the crop's offset is mirrored too."""
        crop = self.crop_top_left
        if self.flip:
            crop = mirrored(crop, self.resized_hw[1], self.bucket_hw[1])
        return MicroConditioning(self.original_hw, crop, self.bucket_hw)


# Of what sample ids are made of: runs of another one cannot be resumed. Before 2 they were hashes of keys of latents,
# which changed with the VAE and with the format of the cache.
SAMPLE_ID_VERSION = 2


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One row of the index: an image with its captions, and where its encoded tensors are.

    Of several crops, epochs take turns. Of several captions, each epoch draws one, and of its variants one; the first
    is the one for evaluation.
    """

    # What the sample is to the model, hashed: the image's bytes, bucket, size, crops, flip, mask, whether its JPEG is
    # shrunk, and the captions as they are seen (24 hex digits; "-2" and so on behind those of further copies). The same
    # wherever the files lie and whatever encodes them: order, noise and timesteps are drawn from it, and stay as they
    # are with another VAE, dtype, format of the cache, or way to encode captions.
    sample_id: str
    dataset: str  # its name; role, weight and repeats are the config's
    path: str
    address: str  # empty: `path`
    image_hash: str
    verify: bool  # as in ImageRecord
    original_hw: tuple[int, int]
    target_hw: tuple[int, int]  # the bucket
    resized_hw: tuple[int, int]
    crops: tuple[tuple[int, int], ...]  # crop_top_left of each variant, as SDXL is told
    flip: bool
    mask: str  # "alpha", the address of a mask file, or empty
    scaled_jpeg: bool  # as in ImageRecord; likewise `mask_hash`
    captions: tuple[str, ...]
    caption_bases: tuple[int, ...]  # which caption each is a variant of; below 0: only for evaluation
    latent_keys: tuple[str, ...]  # one per crop
    latent_shards: tuple[str, ...]  # empty with cache.mode = "off"
    text_keys: tuple[str, ...]  # one per caption
    text_shards: tuple[str, ...]  # empty where text is encoded while training
    mask_hash: str = ""

    @property
    def bucket(self) -> str:
        return bucket_key(self.target_hw)

    def micro_conditioning(self, variant: int = 0) -> MicroConditioning:
        """Of the variant's crop."""
        return MicroConditioning(self.original_hw, self.crops[variant], self.target_hw)

    def image_record(self, variant: int = 0) -> ImageRecord:
        """What is needed to decode and encode the variant once more."""
        crop = self.crops[variant]
        if self.flip:
            crop = mirrored(crop, self.resized_hw[1], self.target_hw[1])
        return ImageRecord(
            path=self.path,
            image_hash=self.image_hash,
            original_hw=self.original_hw,
            bucket_hw=self.target_hw,
            resized_hw=self.resized_hw,
            crop_top_left=crop,
            address=self.address,
            flip=self.flip,
            mask=self.mask,
            mask_hash=self.mask_hash,
            verify=self.verify,
            scaled_jpeg=self.scaled_jpeg,
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """What one rank feeds to the U-Net at once: B samples of one bucket, with their noise and timesteps.

    latents               (B, 4, h, w) float32, times the VAE's scaling factor
    noise                 (B, 4, h, w) float32
    timesteps             (B,) int64 in [0, 1000), 0 = nearly clean
    prompt_embeds         (B, 77, 2048) both CLIPs, penultimate layers; 77 for each of cache.caption_chunks
    pooled_prompt_embeds  (B, 1280) from text encoder 2
    add_time_ids          (B, 6) float32, never bf16: it keeps 8 significant bits, and 1365 px would become 1368
    weights               (B,) float32, the share of each sample in the step's loss
    masks                 (B, 1, h, w) float32 in [0, 1], how much each latent pixel counts; None: all of them, fully
    perturbation          (B, 4, h, w) float32, noise that the U-Net sees and is not asked for; None: none
    from_parent           (B,) bool, whose target is the base model's prediction; None: no one's
    input_ids             (B, 2, chunks, 77) int64, both tokenizers' ids; None unless text encoders are trained. Then
                          prompt_embeds and pooled_prompt_embeds are empty until the step encodes these
    dropped               (B,) bool, whose embeddings are to be zeros after that
    """

    sample_ids: tuple[str, ...]
    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    add_time_ids: torch.Tensor
    weights: torch.Tensor
    masks: torch.Tensor | None = None
    perturbation: torch.Tensor | None = None
    from_parent: torch.Tensor | None = None
    input_ids: torch.Tensor | None = None
    dropped: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; copies overlap with compute where the memory is pinned."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._with(lambda tensor: tensor.pin_memory())

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors: dict[str, Any] = {
            field.name: None if (tensor := getattr(self, field.name)) is None else change(tensor)
            for field in dataclasses.fields(self)
            # from_parent stays on the CPU: the host asks it for rows, and would wait for a device's answer
            if field.name not in ("sample_ids", "from_parent")
        }
        return Batch(sample_ids=self.sample_ids, from_parent=self.from_parent, **tensors)

    def __len__(self) -> int:
        return len(self.sample_ids)


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """One verified file, or a folder of them.

    relative_error  its largest output difference over the trained model's largest output
    note            how near it comes, in the format kohya-svd; empty for files that hold what was trained exactly
    warning         the same, where it is not near; or which programs read it otherwise
    """

    path: Path
    format: str
    relative_error: float
    note: str = ""
    warning: str = ""

    def __str__(self) -> str:
        text = f"{self.path}  ({self.format}, verified: relative error {self.relative_error:.1e})"
        told = f"warning: {self.warning}" if self.warning else self.note
        return f"{text}\n      {told}" if told else text


def mirrored(crop_top_left: tuple[int, int], resized_width: int, bucket_width: int) -> tuple[int, int]:
    """A crop's offset seen in the mirror; of that again, the offset."""
    top, left = crop_top_left
    return top, resized_width - bucket_width - left


def bucket_key(height_width: tuple[int, int]) -> str:
    """`1024x832` is 1024 px high and 832 px wide."""
    return f"{height_width[0]}x{height_width[1]}"


def parse_bucket_key(key: str) -> tuple[int, int]:
    """The (height, width) of `bucket_key`."""
    height, width = key.split("x")
    return int(height), int(width)
