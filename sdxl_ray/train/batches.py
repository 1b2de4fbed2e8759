"""From rows of shards to batches. Everything random is keyed by (seed, epoch, repeat, sample) and drawn here, on the
CPU, ahead of the step that needs it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from sdxl_ray.cache.shards import Location, ShardReader
from sdxl_ray.diffusion.randomness import keyed_generator, keyed_normal, keyed_uniform
from sdxl_ray.diffusion.timesteps import stratified_timesteps, uniform_timestep
from sdxl_ray.records import Batch, EncodedSample
from sdxl_ray.sdxl.conditioning import add_time_ids, zero_prompts
from sdxl_ray.sdxl.vae import sample_latents
from sdxl_ray.train.plan import MicroBatch

Item = TypeVar("Item")


class BatchBuilder:
    """Makes the batch of a micro-batch. A pure function: called twice, by any rank, it gives the same bytes."""

    def __init__(
        self,
        samples: Sequence[EncodedSample],
        locations: Mapping[str, Location],
        reader: ShardReader,
        *,
        seed: int,
        num_timesteps: int,
        caption_dropout: float,
    ) -> None:
        self.samples = samples
        self.locations = locations
        self.reader = reader
        self.seed = seed
        self.num_timesteps = num_timesteps
        self.caption_dropout = caption_dropout

    def training(self, micro_batch: MicroBatch) -> Batch:
        """A fresh draw of posterior, noise, timestep, caption and dropout for each sample of this epoch."""
        samples = [self.samples[row] for row in micro_batch.rows]
        keys = [
            (self.seed, micro_batch.epoch, repeat, sample.sample_id)
            for sample, repeat in zip(samples, micro_batch.repeats, strict=True)
        ]
        posteriors = [self.reader.read(self.locations[sample.latent_key]) for sample in samples]
        means = torch.stack([posterior["mean"] for posterior in posteriors]).float()
        stds = torch.stack([posterior["std"] for posterior in posteriors]).float()
        shape = means.shape[1:]
        captions = [
            int(keyed_generator(*key, "caption").integers(len(sample.text_keys)))
            for sample, key in zip(samples, keys, strict=True)
        ]
        drop = torch.tensor([keyed_uniform(*key, "caption_dropout") < self.caption_dropout for key in keys])
        prompt_embeds, pooled_prompt_embeds = zero_prompts(*self._text(samples, captions), drop)
        return self._batch(
            samples,
            latents=sample_latents(means, stds, torch.stack([keyed_normal(shape, *key, "posterior") for key in keys])),
            noise=torch.stack([keyed_normal(shape, *key, "noise") for key in keys]),
            timesteps=[uniform_timestep(keyed_uniform(*key, "timestep"), self.num_timesteps) for key in keys],
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
        )

    def evaluation(self, row: int, num_timesteps: int) -> Batch:
        """One held-out sample at a few fixed noise levels: always the same noise, the first caption, no dropout."""
        sample = self.samples[row]
        levels = stratified_timesteps(num_timesteps, self.num_timesteps)
        mean = self.reader.read(self.locations[sample.latent_key])["mean"].float()
        prompt_embeds, pooled_prompt_embeds = self._text([sample] * len(levels), [0] * len(levels))
        return self._batch(
            [sample] * len(levels),
            latents=mean.expand(len(levels), *mean.shape).contiguous(),
            noise=torch.stack([keyed_normal(mean.shape, "eval", sample.sample_id, level) for level in levels]),
            timesteps=levels,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
        )

    def _text(self, samples: Sequence[EncodedSample], captions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [
            self.reader.read(self.locations[sample.text_keys[caption]])
            for sample, caption in zip(samples, captions, strict=True)
        ]
        return (
            torch.stack([row["prompt_embeds"] for row in rows]),
            torch.stack([row["pooled_prompt_embeds"] for row in rows]),
        )

    def _batch(
        self,
        samples: Sequence[EncodedSample],
        *,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: Sequence[int],
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
    ) -> Batch:
        return Batch(
            sample_ids=tuple(sample.sample_id for sample in samples),
            latents=latents,
            noise=noise,
            timesteps=torch.tensor(timesteps, dtype=torch.int64),
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            add_time_ids=add_time_ids([sample.micro_conditioning for sample in samples]),
            weights=torch.ones(len(samples)),
        )


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
