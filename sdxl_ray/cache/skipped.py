"""Images that are left out, and how many of them are too many."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdxl_ray.errors import DatasetError
from sdxl_ray.records import Problem

if TYPE_CHECKING:
    from sdxl_ray.cache.planning import CachePlan
    from sdxl_ray.config.schema import DatasetSection

_SHOWN = 20
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
    for dataset in datasets:
        skipped = [item for item in (*plan.skipped, *also) if item.dataset == dataset.name]
        unreadable = [item for item in skipped if not item.by_choice]
        num_images = plan.collection.num_images[dataset.name]
        if len(skipped) >= num_images:
            limit = _NOTHING_LEFT
            cure = _cure("Repair them.", unreadable) if unreadable else "Change the settings named here, or add images."
            num, shown = len(skipped), unreadable or skipped
        elif len(unreadable) / num_images > dataset.max_unreadable:  # not a product: 0.29 * 100 is less than 29
            limit, cure = _more_than(dataset.max_unreadable), _cure(_CURE, unreadable)
            num, shown = len(unreadable), unreadable
        else:
            continue
        write_skipped(plan, also=also)
        text = _cannot_be_used(dataset.path, num, f"{num_images} images", limit, shown)
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
_CURE = "Repair or remove them, or raise dataset.max_unreadable."


def _cure(cure: str, unreadable: Sequence[Skipped]) -> str:
    """What to do about these images, of which some may be sound, but too large."""
    are_large = [item.kind == "too_large" for item in unreadable]
    if not any(are_large):
        return cure
    large = "Raise dataset.max_pixels, or shrink what is larger."
    return large if all(are_large) else f"{large} {cure}"


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
    """skipped.csv beside the index: every image left out, with its reason."""
    plan.folder.write("skipped.csv", skipped_csv(plan, also=also))


def skipped_csv(plan: CachePlan, *, also: Sequence[Skipped] = ()) -> bytes:
    """Its content."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("dataset", "path", "reason"))
    writer.writerows((item.dataset, item.path, item.reason) for item in (*plan.skipped, *also))
    return text.getvalue().encode()
