"""Every image of every dataset as one row of columns: its place in a bucket, its captions, the keys of its tensors.

    list ─▶ scan ─▶ captions ─▶ buckets ─▶ keys        in pieces of 100,000 images

Only a piece at a time is Python objects. The columns take about 280 bytes a row, and beyond half a million rows they
lie in a memory-mapped file.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_ray.cache.buckets import Placement
from sdxl_ray.cache.caption_variants import decorate, expand_variants
from sdxl_ray.cache.captions import read_captions
from sdxl_ray.cache.formats import may_be_jpeg
from sdxl_ray.cache.images import jpeg_reduction
from sdxl_ray.cache.index import PLACED
from sdxl_ray.cache.judge import DatasetRules, Mask, Tally, Used, judge
from sdxl_ray.cache.memo import Memo
from sdxl_ray.cache.ragged import Ragged
from sdxl_ray.cache.scan import ScannedFile, scan_each
from sdxl_ray.cache.shards import KEY_BYTES, latent_key, text_key
from sdxl_ray.cache.skipped import Skipped, SkippedImages
from sdxl_ray.cache.sources import list_dataset, shown_address
from sdxl_ray.cache.store import KEY_DTYPE, hex_strings, keys_from_hex
from sdxl_ray.cache.tables import PIECE, fixed_bytes, gather
from sdxl_ray.cache.text_memo import TextMemo
from sdxl_ray.records import SAMPLE_ID_VERSION, ImageRecord, Listed, bucket_key, mirrored, parse_bucket_key

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
    skipped: SkippedImages = field(default_factory=SkippedImages)
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

    def keys(self, column: str) -> Ragged:
        """Of each row, 'S16': "latent_keys" or "text_keys"."""
        chunks = self.table.column(column).chunks
        values = [fixed_bytes(chunk.flatten(), KEY_BYTES) for chunk in chunks]
        counts = [pc.list_value_length(chunk).to_numpy() for chunk in chunks]
        empty = np.empty(0, KEY_DTYPE)
        return Ragged(np.concatenate([empty, *values]), np.concatenate([np.empty(0, np.int32), *counts]))

    def rows_with(self, latent_keys: Iterable[str]) -> dict[int, str]:
        """Row -> one of these keys, of the rows that have one."""
        keys = self.keys("latent_keys")
        entries = np.flatnonzero(np.isin(keys.values, keys_from_hex(latent_keys)))
        return dict(zip(keys.rows_of(entries).tolist(), hex_strings(keys.values[entries]).to_pylist(), strict=True))

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
                    mask_hash=row["mask_hash"],
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
    collection, context = Collection(), _Context(memo, TextMemo(memo.folder), scan, encoded_with)
    pieces = (piece for section in datasets for piece in _collect_one(section, collection, context))
    try:
        collection.table = gather(pieces, SCHEMA)
    finally:  # also what an interrupted scan has found
        context.memo.write()
        context.texts.write()
    return collection


@dataclass(frozen=True)
class _Context:
    """What all datasets share."""

    memo: Memo
    texts: TextMemo
    scan: Scan
    encoded_with: EncodedWith


def _collect_one(section: DatasetSection, collection: Collection, context: _Context) -> Iterator[pa.Table]:
    """The rows of one dataset; counts and what is skipped go into `collection`."""
    rules = DatasetRules.of(section)
    tally = Tally(rules)
    for files in _pieces(list_dataset(section, context.texts)):
        scanned = _scan(files, [rules.identifies_by_listing(file) for file in files], section.max_pixels, context)
        captions = read_captions(files, rules.captions, context.texts)
        masks = _masks(files, section, context)
        rows = _Rows(rules, context.encoded_with)
        for file, image, words, mask in zip(files, scanned, captions, masks, strict=True):
            verdict = judge(file, image, words, mask, rules)
            tally.add(verdict)
            if isinstance(verdict, Skipped):
                collection.skipped.append(verdict)
            elif isinstance(verdict, Used):
                rows.add(verdict)
        yield rows.table()
    tally.check_captions()
    collection.num_images[section.name] = tally.images
    collection.captions_from += tally.captions
    collection.notes += tally.notes()


def _pieces(files: Iterator[Listed]) -> Iterator[list[Listed]]:
    while piece := list(itertools.islice(files, PIECE)):
        yield piece


def _scan(files: Sequence[Listed], by_listing: Sequence[bool], max_pixels: int, context: _Context) -> list[ScannedFile]:
    """What is known of each file, and of the others what a look at them says."""
    memo = context.memo
    known = memo.find(files, by_listing, max_pixels)
    unknown = [at for at, found in enumerate(known) if found is None]
    new, new_by_listing = [files[at] for at in unknown], [by_listing[at] for at in unknown]
    scanned: list[ScannedFile] = []
    num_handed_on, handed_on = 0, time.monotonic()

    def hand_on() -> None:
        nonlocal num_handed_on, handed_on
        rows = slice(num_handed_on, len(scanned))
        memo.add(new[rows], new_by_listing[rows], scanned[rows])
        num_handed_on, handed_on = len(scanned), time.monotonic()

    try:
        for found in context.scan(new, max_pixels=max_pixels, by_listing=new_by_listing) if new else []:
            scanned.append(found)
            if time.monotonic() - handed_on > _HAND_ON_EVERY_S:
                hand_on()
    finally:
        hand_on()
    fresh = dict(zip(unknown, scanned, strict=True))
    return [known_file or fresh[at] for at, known_file in enumerate(known)]


def _masks(files: Sequence[Listed], section: DatasetSection, context: _Context) -> list[Mask]:
    """Of each image. Mask files are always identified by their content."""
    if section.mask == "alpha":
        return [Mask("alpha", "alpha")] * len(files)
    masks = [Listed(path=file.mask_file, stamp=file.mask_stamp) for file in files if file.mask_file]
    scanned = _scan(masks, [False] * len(masks), section.max_pixels, context) if masks else []
    found = {
        mask.path: Mask(mask.path, seen.image_hash, _problem_of_mask(mask, seen))
        for mask, seen in zip(masks, scanned, strict=True)
    }
    return [found.get(file.mask_file, Mask()) for file in files]


def _problem_of_mask(mask: Listed, seen: ScannedFile) -> str:
    return f"its mask {shown_address(mask.path)}: {seen.problem}" if seen.problem else ""


class _Rows:
    """A piece of the table under construction."""

    def __init__(self, rules: DatasetRules, encoded_with: EncodedWith) -> None:
        self.rules, self.encoded_with = rules, encoded_with
        self.columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names if name != "dataset"}

    def add(self, used: Used) -> None:
        """The image in each of its sizes, as it is and mirrored."""
        captions, bases, texts = self._captions_of(used)
        seen = [decorate(caption, self.rules.captions) for caption in used.captions.texts]
        for placement, flip in itertools.product(used.placements, self.rules.flips):
            self._add_one(used, placement, flip, seen, captions=captions, caption_bases=bases, text_keys=texts)

    def _captions_of(self, used: Used) -> tuple[list[str], list[int], list[bytes]]:
        """(captions or their variants, which caption each is of, their keys) of all of an image's samples."""
        is_evaluated, encoded_with = self.rules.section.role == "eval", self.encoded_with
        captions = used.captions.texts[:1] if is_evaluated else used.captions.texts  # the first is evaluated with
        if encoded_with.text_online:
            return list(captions), list(range(len(captions))), []
        captions, bases = expand_variants(captions, self.rules.captions, used.image.image_hash)
        if is_evaluated:
            captions, bases = captions[:1], (0,)
        keys = [text_key(caption, encoded_with.text, encoded_with.num_chunks) for caption in captions]
        return list(captions), list(bases), [bytes.fromhex(key) for key in keys]

    def _add_one(self, used: Used, placement: Placement, flip: bool, seen: Sequence[str], **captions: Any) -> None:
        """One sample; `seen`: its captions as training shows them."""
        file, image = used.file, used.image
        bucket_hw, resized_hw = placement.bucket_hw, placement.resized_hw
        # So that the others are encoded with the setting as they are without it.
        scaled_jpeg = (
            self.rules.section.jpeg_scaling
            and may_be_jpeg(file.path)
            and jpeg_reduction((image.height, image.width), resized_hw) > 1
        )
        latents = [
            latent_key(
                image.image_hash,
                bucket_hw,
                resized_hw,
                crop,
                self.encoded_with.vae,
                flip=flip,
                mask_hash=used.mask.hash,
                scaled_jpeg=scaled_jpeg,
            )
            for crop in placement.crops
        ]
        told = [mirrored(crop, resized_hw[1], bucket_hw[1]) if flip else crop for crop in placement.crops]
        values = {
            "identity": sample_identity(
                image.image_hash, placement, seen, flip=flip, mask_hash=used.mask.hash, scaled_jpeg=scaled_jpeg
            ),
            "image_hash": bytes.fromhex(image.image_hash),
            "path": file.path,
            "address": file.address,
            "verify": not self.rules.identifies_by_listing(file),
            "bucket": bucket_key(bucket_hw),
            "original_height": image.height,
            "original_width": image.width,
            "resized_height": resized_hw[0],
            "resized_width": resized_hw[1],
            "crop_tops": [top for top, _ in told],
            "crop_lefts": [left for _, left in told],
            "flip": flip,
            "mask": used.mask.address,
            "mask_hash": "" if used.mask.address == "alpha" else used.mask.hash,
            "scaled_jpeg": scaled_jpeg,
            "latent_keys": [bytes.fromhex(key) for key in latents],
            **captions,
        }
        for name, value in values.items():
            self.columns[name].append(value)

    def table(self) -> pa.Table:
        num_rows = len(self.columns["path"])
        columns = {"dataset": [self.rules.section.name] * num_rows, **self.columns}
        return pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, SCHEMA)


def sample_identity(
    image_hash: str,
    placement: Placement,
    seen: Sequence[str],
    *,
    flip: bool = False,
    mask_hash: str = "",
    scaled_jpeg: bool = False,
) -> bytes:
    """The bytes of `EncodedSample.sample_id`: all that a sample is to the model, and nothing of what encodes it.

    Not the latents' keys, which would say the same and more: with another VAE, or a new format of the cache, the order
    of the data and its noise would be others, and no run could be resumed.

    Args:
        seen: the captions as training shows them.
        mask_hash: as of `latent_key`.
    """
    transform = (placement.bucket_hw, placement.resized_hw, placement.crops, flip, scaled_jpeg)
    what = (SAMPLE_ID_VERSION, image_hash, transform, mask_hash, tuple(seen))
    return hashlib.sha256(repr(what).encode()).digest()[:ID_BYTES]
