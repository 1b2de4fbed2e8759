"""Where a sample's tensors come from: its shards, or encoders that run beside training.

    the index names a shard     read it                         cache.mode = "disk" and "ondemand"
    it names none               encode it now                   cache.mode = "off", cache.text = "online"
    the entry is damaged        encode it now, on the CPU       and note it: `sdxl-ray cache` will replace it
    the shard cannot be read    encode it now, on the CPU       cache.mode = "ondemand" first waits until it is there
    the shard lacks it          encode it now, on the CPU
                                None: its image is damaged      cache.mode = "ondemand"

The tensors are the same to the bit, as far as the encoder's device computes the same.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch

from sdxl_ray.cache import shards
from sdxl_ray.cache.caption_variants import decorate, draw_variant
from sdxl_ray.cache.captions import CaptionRules
from sdxl_ray.cache.live import LiveEntries
from sdxl_ray.cache.shard_reader import DamagedEntry, MissingEntry, ShardReader, UnreadableShard
from sdxl_ray.errors import StorageError
from sdxl_ray.records import EncodedSample

_REPAIRED_KEPT = 256  # 64 MiB of latents at 1024 px
_TRY_AGAIN_S = 600.0  # a shard that could not be read: a store that does not answer takes minutes to say so


class Entries(Protocol):
    """What `BatchBuilder` reads. Tensors are those of one entry, without a batch dimension."""

    def latents(self, sample: EncodedSample, variant: int) -> Mapping[str, torch.Tensor] | None:
        """ "mean", "std" (4, h, w), perhaps "mask" (h, w) uint8; None: the image is damaged, and does not count."""
        ...

    def text(self, sample: EncodedSample, caption: int, draw: np.random.Generator | None) -> Mapping[str, torch.Tensor]:
        """ "prompt_embeds" (77, 2048), "pooled_prompt_embeds" (1280,). `draw`: for a variant of it; None: as it is."""
        ...

    def caption(self, sample: EncodedSample, caption: int, draw: np.random.Generator | None) -> str:
        """The text itself, for text encoders that are trained."""
        ...


class CacheEntries:
    """`Entries` of a cache in any of its modes. Safe to share between prefetch threads."""

    def __init__(
        self,
        reader: ShardReader,
        *,
        live: LiveEntries,
        repair: LiveEntries,
        rules: Mapping[str, CaptionRules],
        report: Callable[[str], None],
        on_demand: bool = False,
    ) -> None:
        """
        Args:
            live: for what has no shard, on the worker's device.
            repair: for what is damaged or lost, on the CPU: training has taken the memory of the device.
            rules: of the datasets, by name, whose captions are varied and encoded while training.
            report: told in one line about everything that is not as it should be, once.
            on_demand: cache.mode = "ondemand", where a shard lacks the entries of damaged images.
        """
        self.reader = reader
        self.live = live
        self.repair = repair
        self.rules = rules
        self.report = reader.report = report
        self.on_demand = on_demand
        self._unreadable_until: dict[str, float] = {}  # by shard
        self._known: set[str] = set()
        self._lock = threading.Lock()
        self._repaired = functools.lru_cache(maxsize=_REPAIRED_KEPT)(repair.latents)

    def latents(self, sample: EncodedSample, variant: int) -> Mapping[str, torch.Tensor] | None:
        """See `Entries`.

        Raises:
            CacheError: neither the entry nor the image can be read.
        """
        shard = sample.latent_shards[variant] if sample.latent_shards else ""
        if not shard:
            return self.live.latents(sample, variant)
        key = sample.latent_keys[variant]
        try:
            found = self._read(shard, key)
        except MissingEntry as error:
            if self.on_demand:
                return None  # the driver, which has tried to encode it, tells of it with the reason
            self._note_loss(shard, error)
            found = None
        return self._repaired(sample, variant) if found is None else found

    def text(self, sample: EncodedSample, caption: int, draw: np.random.Generator | None) -> Mapping[str, torch.Tensor]:
        """See `Entries`."""
        text = self.caption(sample, caption, draw)
        shard = sample.text_shards[caption] if sample.text_shards else ""
        return self.prompt(text, shard, sample.text_keys[caption] if shard else "")

    def caption(self, sample: EncodedSample, caption: int, draw: np.random.Generator | None) -> str:
        """See `Entries`."""
        text = sample.captions[caption]
        rules = self.rules.get(sample.dataset)
        if rules is None:
            return text
        return decorate(text, rules) if draw is None else draw_variant(text, rules, draw)

    def prompt(self, text: str, shard: str, key: str) -> Mapping[str, torch.Tensor]:
        """A text's embeddings from where they are kept; without a `shard`, encoded now."""
        if not shard:
            return self.live.text(text)
        try:
            found = self._read(shard, key)
        except MissingEntry as error:
            self._note_loss(shard, error)
            found = None
        return self.repair.text(text) if found is None else found

    def _read(self, shard: str, key: str) -> Mapping[str, torch.Tensor] | None:
        """An entry; None where it is damaged, or its shard cannot be read.

        Raises:
            MissingEntry: the shard lacks it.
        """
        if time.monotonic() < self._unreadable_until.get(shard, 0.0):
            return None
        try:
            return self.reader.read(shard, key)
        except DamagedEntry as error:
            self._note_damage(shard, key, error)
        except UnreadableShard as error:
            self._unreadable_until[shard] = time.monotonic() + _TRY_AGAIN_S
            self._note_loss(shard, error)
        return None

    def _note_loss(self, shard: str, error: Exception) -> None:
        """A whole shard, or some of its entries: the store of the next `sdxl-ray cache` sees that by itself."""
        if self._is_new(shard):
            self.report(f"{error} For this run what it lacks is encoded anew.")

    def _note_damage(self, shard: str, key: str, error: Exception) -> None:
        if not self._is_new(key):
            return
        self.report(f"{error} For this run it is encoded anew.")
        try:
            shards.mark_damaged(self.reader.cache, shard, key)
        except (OSError, StorageError) as problem:
            self.report(f"{shard}: the damaged entry could not be noted in the cache: {problem}")

    def _is_new(self, name: str) -> bool:
        with self._lock:
            if name in self._known:
                return False
            self._known.add(name)
            return True
