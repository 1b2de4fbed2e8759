"""From encoded entries to batches. Everything random is keyed by (seed, epoch, repeat, sample) and drawn here, on the
CPU, ahead of the step that needs it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from sdxl_ray.diffusion.randomness import keyed_generator, keyed_normal, keyed_uniform
from sdxl_ray.diffusion.timesteps import stratified_timesteps, uniform_timestep
from sdxl_ray.records import Batch, EncodedSample
from sdxl_ray.sdxl.conditioning import add_time_ids, zero_prompts
from sdxl_ray.sdxl.vae import sample_latents
from sdxl_ray.train.entries import Entries
from sdxl_ray.train.plan import MicroBatch

Item = TypeVar("Item")


class BatchBuilder:
    """Makes the batch of a micro-batch. A pure function: called twice, by any rank, it gives the same bytes."""

    def __init__(
        self,
        samples: Sequence[EncodedSample],
        entries: Entries,
        *,
        seed: int,
        num_timesteps: int,
        caption_dropout: float,
        weights: Mapping[str, float] | None = None,
        crop_epochs: Mapping[str, int] | None = None,
    ) -> None:
        """
        Args:
            weights: how much the samples of each dataset count in training; 1 for those not named.
            crop_epochs: for how many epochs each crop of a dataset's images is used; 1 for those not named.
        """
        self.samples = samples
        self.entries = entries
        self.seed = seed
        self.num_timesteps = num_timesteps
        self.caption_dropout = caption_dropout
        self.weights = weights or {}
        self.crop_epochs = crop_epochs or {}

    def training(self, micro_batch: MicroBatch) -> Batch:
        """A fresh draw of posterior, noise, timestep, caption and dropout for each sample of this epoch.

        A sample whose image is damaged comes as zeros with weight 0: the others' draws do not depend on it.
        """
        samples = [self.samples[row] for row in micro_batch.rows]
        keys = [
            (self.seed, micro_batch.epoch, repeat, sample.sample_id)
            for sample, repeat in zip(samples, micro_batch.repeats, strict=True)
        ]
        variants = [
            micro_batch.epoch // self.crop_epochs.get(sample.dataset, 1) % len(sample.crops) for sample in samples
        ]
        found = [self.entries.latents(sample, variant) for sample, variant in zip(samples, variants, strict=True)]
        posteriors = [entry or _blank(sample) for entry, sample in zip(found, samples, strict=True)]
        means = torch.stack([posterior["mean"] for posterior in posteriors]).float()
        stds = torch.stack([posterior["std"] for posterior in posteriors]).float()
        shape = means.shape[1:]
        texts = []
        for sample, key in zip(samples, keys, strict=True):
            caption = int(keyed_generator(*key, "caption").integers(len(sample.captions)))
            texts.append(self.entries.text(sample, caption, keyed_generator(*key, "caption_variant")))
        drop = torch.tensor([keyed_uniform(*key, "caption_dropout") < self.caption_dropout for key in keys])
        prompt_embeds, pooled_prompt_embeds = zero_prompts(*_stacked(texts), drop)
        return Batch(
            sample_ids=tuple(sample.sample_id for sample in samples),
            latents=sample_latents(means, stds, torch.stack([keyed_normal(shape, *key, "posterior") for key in keys])),
            noise=torch.stack([keyed_normal(shape, *key, "noise") for key in keys]),
            timesteps=torch.tensor(
                [uniform_timestep(keyed_uniform(*key, "timestep"), self.num_timesteps) for key in keys],
                dtype=torch.int64,
            ),
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            add_time_ids=add_time_ids(
                [sample.micro_conditioning(variant) for sample, variant in zip(samples, variants, strict=True)]
            ),
            weights=torch.tensor(
                [
                    0.0 if entry is None else self.weights.get(sample.dataset, 1.0)
                    for entry, sample in zip(found, samples, strict=True)
                ]
            ),
            masks=_masks(posteriors),
        )

    def evaluation(self, row: int, num_timesteps: int) -> Batch:
        """One held-out sample at a few fixed noise levels: always the same noise, the first crop and caption, as it is,
        no dropout, weight 1 (0 where its image is damaged)."""
        sample = self.samples[row]
        levels = stratified_timesteps(num_timesteps, self.num_timesteps)
        found = self.entries.latents(sample, 0)
        posterior = found or _blank(sample)
        mean = posterior["mean"].float()
        prompt_embeds, pooled_prompt_embeds = _stacked([self.entries.text(sample, 0, None)] * len(levels))
        return Batch(
            sample_ids=(sample.sample_id,) * len(levels),
            latents=mean.expand(len(levels), *mean.shape).contiguous(),
            noise=torch.stack([keyed_normal(mean.shape, "eval", sample.sample_id, level) for level in levels]),
            timesteps=torch.tensor(levels, dtype=torch.int64),
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            add_time_ids=add_time_ids([sample.micro_conditioning(0)] * len(levels)),
            weights=torch.full((len(levels),), 0.0 if found is None else 1.0),
            masks=_masks([posterior] * len(levels)),
        )


def _blank(sample: EncodedSample) -> dict[str, torch.Tensor]:
    """In place of a damaged image's posterior: of its bucket's shape, so that the batch can be stacked."""
    height, width = sample.target_hw
    nothing = torch.zeros(4, height // 8, width // 8)
    return {"mean": nothing, "std": nothing}


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
