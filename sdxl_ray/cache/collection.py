"""Every image of every dataset as one row of columns: its place in a bucket, its captions, the keys of its tensors.

    list ─▶ scan ─▶ captions ─▶ buckets ─▶ keys        in pieces of 100,000 images

Only a piece at a time is Python objects. The columns take about 280 bytes a row, and beyond half a million rows they
lie in a memory-mapped file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_ray.cache.buckets import Geometry, Placement, Unfit, place_all
from sdxl_ray.cache.caption_variants import decorate, expand_variants
from sdxl_ray.cache.captions import NO_CAPTION, CaptionRules, no_captions_error, read_captions
from sdxl_ray.cache.images import jpeg_reduction
from sdxl_ray.cache.index import PLACED
from sdxl_ray.cache.memo import Memo
from sdxl_ray.cache.scan import ScannedFile, scan_each
from sdxl_ray.cache.shards import KEY_BYTES, latent_key, text_key
from sdxl_ray.cache.skipped import Skipped
from sdxl_ray.cache.sources import as_shares, list_dataset, shown_address
from sdxl_ray.cache.store import KEY_DTYPE, hex_strings, keys_from_hex
from sdxl_ray.cache.tables import PIECE, fixed_bytes, gather
from sdxl_ray.cache.text_memo import TextMemo
from sdxl_ray.records import ImageRecord, Listed, bucket_key, mirrored, parse_bucket_key

if TYPE_CHECKING:
    from sdxl_ray.config.schema import DatasetSection

ID_BYTES = 12
HASH_BYTES = 32

_HAND_ON_EVERY_S = 15.0  # to the memo, which writes it down now and then

# (files, max_pixels=, by_listing=): what was found of each file, in their order
Scan = Callable[..., Iterable[ScannedFile]]

SCHEMA = pa.schema(
    [
        ("identity", pa.binary(ID_BYTES)),
        ("image_hash", pa.binary(HASH_BYTES)),
        *PLACED,
        ("latent_keys", pa.list_(pa.binary(KEY_BYTES))),
        ("text_keys", pa.list_(pa.binary(KEY_BYTES))),
    ]
)


@dataclass(frozen=True, slots=True)
class EncodedWith:
    """What the keys of tensors depend on besides the images and captions."""

    vae: str  # fingerprints
    text: str
    num_chunks: int
    text_online: bool  # captions are varied and encoded while training: no keys for them


@dataclass
class Collection:
    """What was found."""

    table: pa.Table = field(default_factory=SCHEMA.empty_table)
    num_images: dict[str, int] = field(default_factory=dict)  # of each dataset, before anything was skipped
    skipped: list[Skipped] = field(default_factory=list)
    captions_from: Counter[str] = field(default_factory=Counter)  # source -> captions, as the files have them
    notes: list[str] = field(default_factory=list)  # what is not as the settings let one expect

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def keep(self, rows: np.ndarray) -> None:
        """Drop every row but those (booleans)."""
        starts = np.cumsum([0, *(batch.num_rows for batch in self.table.to_batches())])
        pieces = (
            pa.Table.from_batches([batch]).filter(pa.array(rows[start : start + batch.num_rows]))
            for start, batch in zip(starts, self.table.to_batches(), strict=False)
        )
        self.table = gather(pieces, SCHEMA)

    def keys(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """(keys of all rows one after another, 'S16'; how many each row has) of "latent_keys" or "text_keys"."""
        chunks = self.table.column(column).chunks
        values = [fixed_bytes(chunk.flatten(), KEY_BYTES) for chunk in chunks]
        counts = [pc.list_value_length(chunk).to_numpy() for chunk in chunks]
        empty = np.empty(0, KEY_DTYPE)
        return np.concatenate([empty, *values]), np.concatenate([np.empty(0, np.int32), *counts])

    def rows_with(self, latent_keys: Iterable[str]) -> dict[int, str]:
        """Row -> one of these keys, of the rows that have one."""
        keys, counts = self.keys("latent_keys")
        places = np.flatnonzero(np.isin(keys, keys_from_hex(latent_keys)))
        rows = np.searchsorted(np.cumsum(counts), places, side="right")
        return dict(zip(rows.tolist(), hex_strings(keys[places]).to_pylist(), strict=True))

    def rows(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """As dictionaries. Each piece of the table is asked for its own rows: `take` would first copy all pieces."""
        batches = self.table.to_batches()
        starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        found = []
        for row in rows:
            piece = int(np.searchsorted(starts, row, side="right")) - 1
            found += batches[piece].slice(row - int(starts[piece]), 1).to_pylist()
        return found

    def records(self, rows: Sequence[int], variants: Sequence[int]) -> list[ImageRecord]:
        """What is needed to decode these rows' images, each in one of its crops."""
        taken = self.rows(rows)
        records = []
        for row, variant in zip(taken, variants, strict=True):
            bucket_hw, resized_hw = parse_bucket_key(row["bucket"]), (row["resized_height"], row["resized_width"])
            told = row["crop_tops"][variant], row["crop_lefts"][variant]
            records.append(
                ImageRecord(
                    path=row["path"],
                    image_hash=row["image_hash"].hex(),
                    original_hw=(row["original_height"], row["original_width"]),
                    bucket_hw=bucket_hw,
                    resized_hw=resized_hw,
                    crop_top_left=mirrored(told, resized_hw[1], bucket_hw[1]) if row["flip"] else told,
                    address=row["address"],
                    flip=row["flip"],
                    mask=row["mask"],
                    verify=row["verify"],
                    scaled_jpeg=row["scaled_jpeg"],
                )
            )
        return records


def collect(
    datasets: Iterable[DatasetSection],
    memo: Memo,
    *,
    encoded_with: EncodedWith,
    scan: Scan = scan_each,
) -> Collection:
    """List, scan and place every image.

    Args:
        scan: how new files are scanned; the pipeline passes one that shows progress, and uses Ray for many. What it
            yields before it is interrupted is remembered.

    Raises:
        DatasetError: no images; ambiguous or missing captions.
    """
    collection, texts = Collection(), TextMemo(memo.folder)
    pieces = (
        piece for section in datasets for piece in _collect_one(section, collection, memo, texts, encoded_with, scan)
    )
    try:
        collection.table = gather(pieces, SCHEMA)
    finally:  # also what an interrupted scan has found
        memo.write()
        texts.write()
    return collection


def _collect_one(
    section: DatasetSection,
    collection: Collection,
    memo: Memo,
    texts: TextMemo,
    encoded_with: EncodedWith,
    scan: Scan,
) -> Iterator[pa.Table]:
    """The rows of one dataset; counts and what is skipped go into `collection`."""
    rules, geometries = CaptionRules.of(section), Geometry.of(section)
    # What is only evaluated is seen once, with its first crop: other ones would be encoded for nothing.
    evaluated = section.role == "eval"
    flips = (False, True) if section.flip and not evaluated else (False,)
    if evaluated:
        geometries = tuple(dataclasses.replace(geometry, crop_variants=1) for geometry in geometries)
    without: list[Listed] = []
    num_without = num_images = 0
    tally = _Tally()
    for files in _pieces(list_dataset(section, texts)):
        num_images += len(files)
        scanned = _scan(files, section, memo, scan)
        rows = _Rows(section, rules, encoded_with)
        captions, reasons, given = read_captions(files, rules, texts)
        tally.captions.update(given)
        masks = _mask_hashes(files, section, memo, scan)
        for at, (file, image) in enumerate(zip(files, scanned, strict=True)):
            problem = image.problem or reasons.get(at, "") or masks.get(file.mask_file, ("", ""))[1]
            if problem:
                collection.skipped.append(Skipped(file.path, problem, section.name, kind=image.kind))
                continue
            original_hw = (image.height, image.width)
            focus_yx = as_shares(file.focus_yx, original_hw)
            placements = place_all(original_hw, image.image_hash, geometries, focus_yx)
            if isinstance(placements, Unfit):
                collection.skipped.append(Skipped(file.path, placements.reason, section.name, by_choice=True))
                continue
            if not captions[at] and rules.skips:
                collection.skipped.append(Skipped(file.path, NO_CAPTION, section.name, by_choice=True))
                continue
            if not captions[at]:  # after the sizes: what is left out needs no caption
                num_without += 1
                without += [file] if num_without <= 10 else []
                continue
            tally.images += 1
            tally.masked += bool(file.mask_file)
            tally.pointed += focus_yx is not None
            mask, mask_hash = "", ""
            if section.mask == "alpha":
                mask = mask_hash = "alpha"
            elif file.mask_file:
                mask, mask_hash = file.mask_file, masks[file.mask_file][0]
            found = _Found(file, image, mask, mask_hash, captions[at], _trusted(file, section))
            for placement, flip in itertools.product(placements, flips):
                rows.add(found, placement, flip)
        yield rows.table()
    if num_without:
        raise no_captions_error(without, num_without, num_images, rules)
    collection.num_images[section.name] = num_images
    collection.captions_from += tally.captions
    collection.notes += tally.notes(section)


@dataclass
class _Tally:
    """Of a dataset's images that are used."""

    images: int = 0
    masked: int = 0  # with a mask file
    pointed: int = 0  # with a point of interest inside
    captions: Counter[str] = field(default_factory=Counter)  # by source

    def notes(self, section: DatasetSection) -> Iterator[str]:
        dataset = f'dataset "{section.name}"'
        if section.mask == "file" and self.masked < self.images:
            yield f"{dataset}: {self.masked} of {self.images} images have a mask; the others count whole"
        if section.crop == "focus" and self.pointed < self.images:
            yield (
                f"{dataset}: {self.pointed} of {self.images} images have a point of interest; the others are cut in "
                "the middle"
            )
        first = section.captions[0]
        if section.captions != type(section).model_fields["captions"].default and not self.captions[first]:
            found = ", ".join(f"{count} from {name}" for name, count in self.captions.items() if count)
            if found:
                yield f'{dataset}: no caption is from "{first}", the first of dataset.captions; {found}'


def _pieces(files: Iterator[Listed]) -> Iterator[list[Listed]]:
    while piece := list(itertools.islice(files, PIECE)):
        yield piece


def _trusted(file: Listed, section: DatasetSection) -> bool:
    """Whether the listing identifies the image, so that it need not be read."""
    return section.identify_by == "listing" or (section.identify_by == "auto" and file.original_hw is not None)


def _scan(files: Sequence[Listed], section: DatasetSection, memo: Memo, scan: Scan) -> list[ScannedFile]:
    trusted = [_trusted(file, section) for file in files]
    known = memo.find(files, trusted, section.max_pixels)
    unknown = [at for at, found in enumerate(known) if found is None]
    new, by_listing = [files[at] for at in unknown], [trusted[at] for at in unknown]
    scanned: list[ScannedFile] = []
    num_handed_on, handed_on = 0, time.monotonic()

    def hand_on() -> None:
        nonlocal num_handed_on, handed_on
        rows = slice(num_handed_on, len(scanned))
        memo.add(new[rows], by_listing[rows], scanned[rows])
        num_handed_on, handed_on = len(scanned), time.monotonic()

    try:
        for found in scan(new, max_pixels=section.max_pixels, by_listing=by_listing) if new else []:
            scanned.append(found)
            if time.monotonic() - handed_on > _HAND_ON_EVERY_S:
                hand_on()
    finally:
        hand_on()
    fresh = dict(zip(unknown, scanned, strict=True))
    return [known_file or fresh[at] for at, known_file in enumerate(known)]


def _mask_hashes(
    files: Sequence[Listed], section: DatasetSection, memo: Memo, scan: Scan
) -> dict[str, tuple[str, str]]:
    """(hash, problem) of each mask file."""
    masks = [Listed(path=file.mask_file, stamp=_mask_stamp(file)) for file in files if file.mask_file]
    if not masks:
        return {}
    scanned = _scan(masks, section.model_copy(update={"identify_by": "content"}), memo, scan)
    return {
        mask.path: (found.image_hash, f"its mask {shown_address(mask.path)}: {found.problem}" if found.problem else "")
        for mask, found in zip(masks, scanned, strict=True)
    }


def _mask_stamp(file: Listed) -> str:
    """A mask's own size and date; in a container, the image's."""
    if file.mask_stamp:
        return file.mask_stamp
    try:
        status = os.stat(file.mask_file)  # noqa: PTH116  (for every image)
    except (OSError, ValueError):
        return file.stamp
    return f"{status.st_size}-{status.st_mtime_ns}"


@dataclass(frozen=True, slots=True)
class _Found:
    """An image that will be used."""

    file: Listed
    image: ScannedFile
    mask: str  # as in ImageRecord
    mask_hash: str
    captions: tuple[str, ...]
    trusted: bool  # its listing identifies it


class _Rows:
    """A piece of the table under construction."""

    def __init__(self, section: DatasetSection, rules: CaptionRules, encoded_with: EncodedWith) -> None:
        self.section = section
        self.rules, self.encoded_with = rules, encoded_with
        self.columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names if name != "dataset"}

    def add(self, found: _Found, placement: Placement, flip: bool) -> None:
        """One sample: the image in one of its sizes, mirrored or not."""
        file, image, encoded_with = found.file, found.image, self.encoded_with
        bucket_hw, resized_hw = placement.bucket_hw, placement.resized_hw
        # So that the others are encoded with the setting as they are without it.
        scaled_jpeg = self.section.jpeg_scaling and jpeg_reduction((image.height, image.width), resized_hw) > 1
        latents = [
            latent_key(
                image.image_hash,
                bucket_hw,
                resized_hw,
                crop,
                encoded_with.vae,
                flip=flip,
                mask_hash=found.mask_hash,
                scaled_jpeg=scaled_jpeg,
            )
            for crop in placement.crops
        ]
        told = [mirrored(crop, resized_hw[1], bucket_hw[1]) if flip else crop for crop in placement.crops]
        captions = found.captions[:1] if self.section.role == "eval" else found.captions  # the first is evaluated with
        bases, texts = tuple(range(len(captions))), list[str]()
        if not encoded_with.text_online:
            captions, bases = expand_variants(captions, self.rules, image.image_hash)
            if self.section.role == "eval":
                captions, bases = captions[:1], (0,)
            texts = [text_key(caption, encoded_with.text, encoded_with.num_chunks) for caption in captions]
        seen = [decorate(caption, self.rules) for caption in found.captions]
        values = {
            "identity": hashlib.sha256(repr((latents, seen)).encode()).digest()[:ID_BYTES],
            "image_hash": bytes.fromhex(image.image_hash),
            "path": file.path,
            "address": file.address,
            "verify": not found.trusted,
            "bucket": bucket_key(bucket_hw),
            "original_height": image.height,
            "original_width": image.width,
            "resized_height": resized_hw[0],
            "resized_width": resized_hw[1],
            "crop_tops": [top for top, _ in told],
            "crop_lefts": [left for _, left in told],
            "flip": flip,
            "mask": found.mask,
            "scaled_jpeg": scaled_jpeg,
            "captions": list(captions),
            "caption_bases": list(bases),
            "latent_keys": [bytes.fromhex(key) for key in latents],
            "text_keys": [bytes.fromhex(key) for key in texts],
        }
        for name, value in values.items():
            self.columns[name].append(value)

    def table(self) -> pa.Table:
        num_rows = len(self.columns["path"])
        columns = {"dataset": [self.section.name] * num_rows, **self.columns}
        return pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, SCHEMA)
