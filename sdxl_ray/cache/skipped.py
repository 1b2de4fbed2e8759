"""Images that are left out, and how many of them are too many."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, overload

import pyarrow as pa
import pyarrow.compute as pc

from sdxl_ray.errors import DatasetError
from sdxl_ray.records import Problem

if TYPE_CHECKING:
    from sdxl_ray.cache.planning import CachePlan
    from sdxl_ray.config.schema import DatasetSection
    from sdxl_ray.storage import Folder

FILE_NAME = "skipped.csv"
_SHOWN = 20
_PIECE_BYTES = 2**20
_TRIED_AT_LEAST = 20
_ACCIDENT = 1e-6  # the probability below which it is none
_TRIED_AT_MOST = 100_000  # they tell what the others are like; more would take memory


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image that is left out: unreadable, or `by_choice` of the settings (too small, too wide)."""

    path: str
    reason: str
    dataset: str = ""
    by_choice: bool = False
    kind: Problem = ""  # of an image that is unreadable


class Sort(NamedTuple):
    """What images that are left out are counted by."""

    dataset: str
    by_choice: bool
    kind: Problem


class SkippedImages(Sequence[Skipped]):
    """All images that are left out; settings may leave out ten million. They are packed, so that each takes about as
    much as its path or less, and become objects when they are asked for, best one after another.
    """

    def __init__(self, items: Iterable[Skipped] = ()) -> None:
        self.counts: Counter[Sort] = Counter()
        self._packed: list[bytes] = []  # each of `_PACK` images
        self._new: list[Skipped] = []
        self.extend(items)

    def append(self, item: Skipped) -> None:
        self._new.append(item)
        self.counts[_sort_of(item)] += 1
        if len(self._new) == _PACK:
            self._packed.append(_packed(self._new))
            self._new = []

    def extend(self, items: Iterable[Skipped]) -> None:
        for item in items:
            self.append(item)

    def num(self, dataset: str) -> int:
        """How many of a dataset."""
        return sum(count for sort, count in self.counts.items() if sort.dataset == dataset)

    def of(self, dataset: str) -> Iterator[Skipped]:
        """Those of a dataset."""
        for batch in map(_unpacked, self._packed):
            yield from _items_of(batch.filter(pc.equal(batch.column("dataset"), dataset)))
        yield from (item for item in self._new if item.dataset == dataset)

    def unreadable(self, dataset: str) -> Iterator[Skipped]:
        """Of these those that nobody has chosen to leave out."""
        for batch in map(_unpacked, self._packed):
            chosen = pc.and_not(pc.equal(batch.column("dataset"), dataset), batch.column("by_choice"))
            yield from _items_of(batch.filter(chosen))
        yield from (item for item in self._new if item.dataset == dataset and not item.by_choice)

    def __len__(self) -> int:
        return _PACK * len(self._packed) + len(self._new)

    def __iter__(self) -> Iterator[Skipped]:
        for batch in map(_unpacked, self._packed):
            yield from _items_of(batch)
        yield from self._new

    @overload
    def __getitem__(self, place: int) -> Skipped: ...
    @overload
    def __getitem__(self, place: slice) -> list[Skipped]: ...
    def __getitem__(self, place: int | slice) -> Skipped | list[Skipped]:
        places = range(len(self))[place]
        if isinstance(places, range):
            if places.step > 0:
                return list(itertools.islice(self, places.start, places.stop, places.step))
            return [self[at] for at in places]
        piece, at = divmod(places, _PACK)
        if piece == len(self._packed):
            return self._new[at]
        return next(_items_of(_unpacked(self._packed[piece]).slice(at, 1)))

    def __eq__(self, other: object) -> bool:
        """Whether it is a sequence of the same images."""
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Skipped.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]  # as of a list


_PACK = 10_000  # few enough for numbers of 16 bits
_FEW_VALUES = pa.dictionary(pa.int16(), pa.string())
_COLUMNS = pa.schema(
    [
        ("path", pa.string()),
        ("reason", _FEW_VALUES),
        ("dataset", _FEW_VALUES),
        ("by_choice", pa.bool_()),
        ("kind", _FEW_VALUES),
    ]
)


def _packed(items: Sequence[Skipped]) -> bytes:
    columns = zip(*map(astuple, items), strict=True)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, _COLUMNS, strict=True)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _COLUMNS, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=_COLUMNS))
    return bytes(sink.getvalue().to_pybytes())


def _unpacked(pack: bytes) -> pa.RecordBatch:
    return pa.ipc.open_stream(pack).read_next_batch()


def _items_of(batch: pa.RecordBatch) -> Iterator[Skipped]:
    # By way of NumPy, in a fifth of the time of `to_pylist`.
    return map(Skipped, *(column.to_numpy(zero_copy_only=False).tolist() for column in batch.columns))


def _sort_of(item: Skipped) -> Sort:
    return Sort(item.dataset, item.by_choice, item.kind)


def unreadable_of(plan: CachePlan, undecodable: Mapping[str, Skipped]) -> list[Skipped]:
    """Each image with one of these latent keys once, with its dataset: it may be there in several sizes and crops."""
    rows = plan.collection.rows_with(undecodable)
    found: dict[tuple[str, str], Skipped] = {}
    for key, values in zip(rows.values(), plan.collection.rows(list(rows)), strict=True):
        item = replace(undecodable[key], path=values["path"], dataset=values["dataset"])
        found.setdefault((item.dataset, item.path), item)
    return list(found.values())


def check_readable(plan: CachePlan, datasets: Sequence[DatasetSection], *, also: Sequence[Skipped] = ()) -> None:
    """Stop before training on a fraction of the images without anybody noticing.

    Args:
        also: images that turned out damaged and are still rows of the plan.

    Raises:
        DatasetError: more than `max_unreadable` of a dataset's images were skipped, or all of them.
    """
    counts = plan.skipped.counts + Counter(map(_sort_of, also))
    for dataset in datasets:
        here = {sort: num for sort, num in counts.items() if sort.dataset == dataset.name}
        unreadable = {sort.kind: num for sort, num in here.items() if not sort.by_choice}
        num_skipped, num_unreadable = sum(here.values()), sum(unreadable.values())
        num_images = plan.collection.num_images[dataset.name]
        if num_skipped >= num_images:
            limit, num = _NOTHING_LEFT, num_skipped
            cures = [_cure("Repair what is damaged or missing.", unreadable)] if unreadable else []
            if num_skipped > num_unreadable:
                cures.append("Change the settings named here, or add images.")
            cure = " ".join(cures)
        elif num_unreadable / num_images > dataset.max_unreadable:  # not a product: 0.29 * 100 is less than 29
            limit, cure = _more_than(dataset.max_unreadable), _cure(_CURE, unreadable)
            num = num_unreadable
        else:
            continue
        write_skipped(plan, also=also)
        also_here = (item for item in also if item.dataset == dataset.name)
        shown = itertools.chain(plan.skipped.unreadable(dataset.name), also_here)
        if limit == _NOTHING_LEFT:  # some of each
            chosen = (item for item in plan.skipped.of(dataset.name) if item.by_choice)
            shown = itertools.chain(itertools.islice(chosen, _SHOWN // 2), shown, chosen)
        first = list(itertools.islice(shown, _SHOWN))
        text = _cannot_be_used(dataset.path, num, f"{num_images} images", limit, first)
        raise DatasetError(f"{text}\nThe whole list: {plan.skipped_path}\n{cure}")


class UnreadableLimit:
    """The same for a worker that decodes images while it trains (cache.mode = "off"): it sees a random part of them."""

    def __init__(self, dataset: str, max_unreadable: float, num_images: int) -> None:
        """
        Args:
            dataset: its path.
            max_unreadable: a share of its `num_images` different images.
        """
        self.dataset, self.max_unreadable, self.num_images = dataset, max_unreadable, num_images
        self._tried: set[int] = set()  # the first 8 bytes of their hashes
        self._shown: list[Skipped] = []
        self._num_unreadable = 0

    def note(self, image_hash: str, path: str, problem: str) -> None:
        """An image was tried; `problem`: why it cannot be used, or "".

        Raises:
            DatasetError: too many of all images cannot be used, or none can; or of those tried, so many cannot that it
                is no accident.
        """
        image = int(image_hash[:16], 16)
        if image in self._tried or len(self._tried) >= _TRIED_AT_MOST:
            return
        self._tried.add(image)
        if problem:
            self._num_unreadable += 1
            self._shown += [Skipped(path, problem)] if len(self._shown) < _SHOWN else []
        num, tried, limit = self._num_unreadable, len(self._tried), self.max_unreadable
        of, what, cure = f"{self.num_images} images", _more_than(limit), _CURE
        if num >= self.num_images:
            what, cure = _NOTHING_LEFT, "Repair them."
        elif num / self.num_images > limit:
            pass
        elif _is_time_to_ask(tried) and _at_least(num, tried, limit) < _ACCIDENT:
            of = f"the first {tried} images"
        else:
            return
        text = _cannot_be_used(self.dataset, num, of, what, self._shown)
        raise DatasetError(f"{text}\n{cure}")


def _is_time_to_ask(tried: int) -> bool:
    """At 20, 40, 80 and so on: asked after each image, an accident would have thousands of occasions."""
    times, rest = divmod(tried, _TRIED_AT_LEAST)
    return rest == 0 and times.bit_count() == 1


def _at_least(num: int, tried: int, share: float) -> float:
    """The probability of `num` or more among `tried`, each with the probability `share`: a binomial tail."""
    if num <= share * tried:
        return 1.0
    if share == 0.0:
        return 0.0
    log_share, log_other = math.log(share), math.log1p(-share)  # share < 1, or the first line has returned
    total = 0.0
    for count in range(num, tried + 1):
        log_ways = math.lgamma(tried + 1) - math.lgamma(count + 1) - math.lgamma(tried - count + 1)
        term = math.exp(log_ways + count * log_share + (tried - count) * log_other)
        total += term
        if term <= 1e-9 * total:  # they only get smaller
            break
    return total


_NOTHING_LEFT = "which leaves none"
_CURES_OF_SOUND: dict[Problem, str] = {
    "too_large": "Raise dataset.max_pixels, or shrink what is larger.",
    "other_size": (
        "The sizes in the table are not those of the images, as they are shown after any rotation in their EXIF: "
        "correct them, or set dataset.size_columns = [], so that the images are read."
    ),
}
_CURE = "Repair or remove them, or raise dataset.max_unreadable."


def _cure(cure: str, unreadable: Iterable[Problem]) -> str:
    """What to do about images with these problems; `cure` for those that are not sound."""
    kinds = set(unreadable)
    cures = [text for kind, text in _CURES_OF_SOUND.items() if kind in kinds]
    return " ".join([*cures, *([] if kinds <= _CURES_OF_SOUND.keys() else [cure])])


def _more_than(max_unreadable: float) -> str:
    return f"more than dataset.max_unreadable = {max_unreadable:g} allows"


def _cannot_be_used(dataset: str, num: int, of: str, limit: str, shown: Sequence[Skipped]) -> str:
    """How many images of a dataset cannot be used, and the first of them with their reasons.

    Args:
        of: what they are a part of: "20 images".
        limit: what that means: "which leaves none".
    """
    lines = [f"{dataset}: {num} of {of} cannot be used, {limit}:"]
    lines += [f"  {item.path}: {item.reason}" for item in shown[:_SHOWN]]
    lines += [f"  and {num - len(lines) + 1} more"] if num > len(lines) - 1 else []
    return "\n".join(lines)


def write_skipped(plan: CachePlan, *, also: Sequence[Skipped] = ()) -> None:
    """skipped.csv beside the index: every image left out, with its reason.

    Raises:
        StorageError: the disk is full or read-only, or the bucket refuses.
    """
    plan.folder.write_by(
        FILE_NAME,
        lambda file: file.writelines(_csv_of(itertools.chain(plan.skipped, also))),
        doing="writing the list of skipped images",
        cure="Free some space and run again: finished shards are kept.",
    )


def is_listed(plan: CachePlan) -> bool:
    """Whether skipped.csv says all this already, in any order: what turned out damaged while it was encoded is at the
    end of that run's list, and among the others in the next.

    Raises:
        OSError, StorageError: it cannot be read; FileNotFoundError, it is not there.
    """
    return _sum_of(_pieces(plan.folder)) == _sum_of(_csv_of(plan.skipped))


def _pieces(folder: Folder) -> Iterator[bytes]:
    at = 0
    while piece := folder.read_range(FILE_NAME, at, _PIECE_BYTES):
        yield piece
        at += len(piece)


def _sum_of(pieces: Iterable[bytes]) -> tuple[int, int]:
    """The number of lines and the sum of their hashes, which their order does not change."""
    num, total, rest = 0, 0, b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        num += len(lines)
        total += sum(int.from_bytes(hashlib.blake2b(line, digest_size=16).digest(), "big") for line in lines)
    return (num, total) if not rest else (-1, 0)  # cut short


def _csv_of(items: Iterable[Skipped]) -> Iterator[bytes]:
    """In pieces: all of it may be gigabytes."""
    rows = itertools.chain([("dataset", "path", "reason")], ((item.dataset, item.path, item.reason) for item in items))
    while piece := list(itertools.islice(rows, _PACK)):
        text = io.StringIO()
        csv.writer(text).writerows(piece)
        yield text.getvalue().encode()
