"""From encoded entries to batches. Everything random is keyed by (seed, epoch, repeat, sample) and drawn here, on the
CPU, ahead of the step that needs it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from sdxl_ray.diffusion.noise import NoiseRecipe, draw_noise, draw_perturbation, perturbation_amount
from sdxl_ray.diffusion.randomness import keyed_generator, keyed_normal, keyed_uniform
from sdxl_ray.diffusion.timesteps import (
    TimestepSampler,
    make_sampler,
    strata,
    stratified_timesteps,
    stratified_uniform,
)
from sdxl_ray.records import Batch, EncodedSample
from sdxl_ray.sdxl.conditioning import add_time_ids, zero_prompts
from sdxl_ray.sdxl.vae import sample_latents
from sdxl_ray.train.entries import Entries
from sdxl_ray.train.order import crop_of
from sdxl_ray.train.plan import Share

Item = TypeVar("Item")


@dataclass(frozen=True)
class Draws:
    """What is random about a sample in training, besides the VAE's posterior and which caption it gets."""

    sampler: TimestepSampler = field(default_factory=make_sampler)
    stratified: bool = False  # noise levels are spread evenly over the samples of a step, of all ranks together
    noise: NoiseRecipe = field(default_factory=NoiseRecipe)
    perturbation_end: int = 0  # the step at which the input perturbation has fallen to 0; 0: it stays
    caption_dropout: float = 0.0
    size_dropout: float = 0.0  # share of samples that are told six zeros about size and crop

    def timestep(self, u: float, place: int, permutation: np.ndarray | None) -> int:
        """Of the sample at a place among those of its step."""
        if permutation is not None:
            u = stratified_uniform(u, place, len(permutation), permutation)
        return self.sampler(u)

    def perturbation_at(self, step: int) -> float:
        """Standard deviation in a step, counted from 1."""
        return perturbation_amount(self.noise.perturbation, step - 1, self.perturbation_end)


@dataclass(frozen=True)
class Conditions:
    """How captions reach the U-Net."""

    # In place of a caption that is left out: embeddings of one entry, or None for zeros.
    dropped_text: Mapping[str, torch.Tensor] | None = None
    # Where text encoders are trained: from captions to ids (B, 2, chunks, 77), which the step encodes. Then "" is the
    # text of a caption that is left out, or, with `drop_to_zeros`, its embeddings become zeros after that.
    tokenize: Callable[[Sequence[str]], torch.Tensor] | None = None
    drop_to_zeros: bool = True


class BatchBuilder:
    """Makes the batch of a micro-batch. A pure function: called twice, by any rank, it gives the same bytes."""

    def __init__(
        self,
        samples: Sequence[EncodedSample],
        entries: Entries,
        *,
        seed: int,
        num_timesteps: int,
        draws: Draws | None = None,
        conditions: Conditions | None = None,
        weights: Mapping[str, float] | None = None,
        crop_epochs: Mapping[str, int] | None = None,
        from_parent: Collection[str] = (),
    ) -> None:
        """
        Args:
            weights: how much the samples of each dataset count in training; 1 for those not named.
            crop_epochs: for how many epochs each crop of a dataset's images is used; 1 for those not named.
            from_parent: datasets whose target is what the base model predicts.
        """
        self.samples = samples
        self.entries = entries
        self.seed = seed
        self.num_timesteps = num_timesteps
        self.draws = draws or Draws()
        self.conditions = conditions or Conditions()
        self.weights = weights or {}
        self.crop_epochs = crop_epochs or {}
        self.from_parent = frozenset(from_parent)

    def training(self, share: Share) -> Batch:
        """A fresh draw of posterior, noise, timestep, caption and dropout for each sample of this epoch.

        A sample whose image is damaged comes as zeros with weight 0: the others' draws do not depend on it.
        """
        micro_batch, draws = share.micro_batch, self.draws
        samples = [self.samples[row] for row in micro_batch.rows]
        keys = [
            (self.seed, micro_batch.epoch, repeat, sample.sample_id)
            for sample, repeat in zip(samples, micro_batch.repeats, strict=True)
        ]
        variants = [
            crop_of(micro_batch.epoch, self.crop_epochs.get(sample.dataset, 1), len(sample.crops)) for sample in samples
        ]
        found = [self.entries.latents(sample, variant) for sample, variant in zip(samples, variants, strict=True)]
        posteriors = [entry or _blank(sample) for entry, sample in zip(found, samples, strict=True)]
        means = torch.stack([posterior["mean"] for posterior in posteriors]).float()
        stds = torch.stack([posterior["std"] for posterior in posteriors]).float()
        shape = means.shape[1:]
        permutation = strata(self.seed, share.step, share.total) if draws.stratified else None
        perturbation = draws.perturbation_at(share.step)
        sizes = add_time_ids(
            [sample.micro_conditioning(variant) for sample, variant in zip(samples, variants, strict=True)]
        )
        if draws.size_dropout:
            untold = [keyed_uniform(*key, "size_dropout") < draws.size_dropout for key in keys]
            sizes[torch.tensor(untold)] = 0.0
        return Batch(
            sample_ids=tuple(sample.sample_id for sample in samples),
            latents=sample_latents(means, stds, torch.stack([keyed_normal(shape, *key, "posterior") for key in keys])),
            noise=torch.stack([draw_noise(shape, draws.noise, key) for key in keys]),
            timesteps=torch.tensor(
                [
                    draws.timestep(keyed_uniform(*key, "timestep"), share.first + place, permutation)
                    for place, key in enumerate(keys)
                ],
                dtype=torch.int64,
            ),
            **self._text(samples, keys),
            add_time_ids=sizes,
            weights=torch.tensor(
                [
                    0.0 if entry is None else self.weights.get(sample.dataset, 1.0)
                    for entry, sample in zip(found, samples, strict=True)
                ]
            ),
            masks=_masks(posteriors),
            perturbation=_stack_or_none([draw_perturbation(shape, perturbation, key) for key in keys]),
            from_parent=self._whose_target_is_the_parents(samples),
        )

    def _text(self, samples: Sequence[EncodedSample], keys: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
        """prompt_embeds and pooled_prompt_embeds; or input_ids and dropped, where text encoders are trained."""
        chosen = [
            (sample, _draw_caption(sample, key), keyed_generator(*key, "caption_variant"))
            for sample, key in zip(samples, keys, strict=True)
        ]
        drop = torch.tensor([keyed_uniform(*key, "caption_dropout") < self.draws.caption_dropout for key in keys])
        conditions = self.conditions
        if conditions.tokenize is not None:
            texts = [self.entries.caption(*each) for each in chosen]
            if not conditions.drop_to_zeros:
                texts = ["" if left_out else text for text, left_out in zip(texts, drop.tolist(), strict=True)]
                drop = torch.zeros_like(drop)
            return _to_encode(conditions.tokenize(texts), drop)
        embeds = [self.entries.text(*each) for each in chosen]
        if conditions.dropped_text is not None:
            nothing = conditions.dropped_text
            embeds = [nothing if left_out else text for text, left_out in zip(embeds, drop.tolist(), strict=True)]
            drop = torch.zeros_like(drop)
        prompt_embeds, pooled_prompt_embeds = zero_prompts(*_stacked(embeds), drop)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def _whose_target_is_the_parents(self, samples: Sequence[EncodedSample]) -> torch.Tensor | None:
        rows = [sample.dataset in self.from_parent for sample in samples]
        return torch.tensor(rows) if any(rows) else None

    def evaluation(self, row: int, num_timesteps: int) -> Batch:
        """One held-out sample at a few fixed noise levels: always the same noise, the first crop and caption, as it is,
        no dropout, weight 1 (0 where its image is damaged)."""
        sample = self.samples[row]
        levels = stratified_timesteps(num_timesteps, self.num_timesteps)
        found = self.entries.latents(sample, 0)
        posterior = found or _blank(sample)
        mean = posterior["mean"].float()
        if self.conditions.tokenize is not None:
            input_ids = self.conditions.tokenize([self.entries.caption(sample, 0, None)])
            text = _to_encode(input_ids.repeat(len(levels), 1, 1, 1), torch.zeros(len(levels), dtype=torch.bool))
        else:
            prompt_embeds, pooled_prompt_embeds = _stacked([self.entries.text(sample, 0, None)] * len(levels))
            text = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
        return Batch(
            sample_ids=(sample.sample_id,) * len(levels),
            latents=mean.expand(len(levels), *mean.shape).contiguous(),
            noise=torch.stack([keyed_normal(mean.shape, "eval", sample.sample_id, level) for level in levels]),
            timesteps=torch.tensor(levels, dtype=torch.int64),
            **text,
            add_time_ids=add_time_ids([sample.micro_conditioning(0)] * len(levels)),
            weights=torch.full((len(levels),), 0.0 if found is None else 1.0),
            masks=_masks([posterior] * len(levels)),
        )


def _draw_caption(sample: EncodedSample, key: tuple[Any, ...]) -> int:
    """One of its captions, each as likely; then one of those that stage 1 made of it."""
    base = keyed_generator(*key, "caption").integers(max(sample.caption_bases) + 1)
    variants = [place for place, of in enumerate(sample.caption_bases) if of == base]
    if len(variants) == 1:
        return variants[0]
    return variants[int(keyed_generator(*key, "cached_variant").integers(len(variants)))]


def _blank(sample: EncodedSample) -> dict[str, torch.Tensor]:
    """In place of a damaged image's posterior: of its bucket's shape, so that the batch can be stacked."""
    height, width = sample.target_hw
    nothing = torch.zeros(4, height // 8, width // 8)
    return {"mean": nothing, "std": nothing}


def _to_encode(input_ids: torch.Tensor, dropped: torch.Tensor) -> dict[str, Any]:
    nothing = torch.empty(0)
    return {
        "prompt_embeds": nothing,
        "pooled_prompt_embeds": nothing,
        "input_ids": input_ids,
        "dropped": dropped if bool(dropped.any()) else None,
    }


def _stack_or_none(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """None where there is none: it is the same for all of them."""
    return torch.stack([tensor for tensor in tensors if tensor is not None]) if tensors[0] is not None else None


def _stacked(texts: Sequence[Mapping[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """prompt_embeds (B, 77, 2048), pooled_prompt_embeds (B, 1280)"""
    return (
        torch.stack([text["prompt_embeds"] for text in texts]),
        torch.stack([text["pooled_prompt_embeds"] for text in texts]),
    )


def _masks(posteriors: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor | None:
    """(B, 1, h, w) float32 in [0, 1], ones for samples without a mask; None where no sample has one."""
    if not any("mask" in posterior for posterior in posteriors):
        return None
    return torch.stack(
        [
            posterior["mask"].float() / 255 if "mask" in posterior else torch.ones(posterior["mean"].shape[1:])
            for posterior in posteriors
        ]
    ).unsqueeze(1)


def prefetch(
    build: Callable[[Item], Batch],
    items: Iterable[Item],
    *,
    depth: int = 4,
    num_threads: int = 2,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches in the order of `items`, up to `depth` made ahead in threads (NumPy and file reads free the GIL)."""

    def make(item: Item) -> Batch:
        batch = build(item)
        return batch.pin_memory() if pin_memory else batch

    pending: deque[Future[Batch]] = deque()
    iterator = iter(items)
    threads = ThreadPoolExecutor(num_threads, thread_name_prefix="batches")
    try:
        for item in iterator:
            pending.append(threads.submit(make, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
