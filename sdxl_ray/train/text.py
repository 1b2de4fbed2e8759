"""Text encoders that are trained: captions are encoded in each step, with gradients as long as an encoder learns."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from sdxl_ray.records import Batch
from sdxl_ray.sdxl.adapters import adapter_disabled, adapter_parameters
from sdxl_ray.sdxl.components import TextEncoders
from sdxl_ray.sdxl.conditioning import zero_prompts
from sdxl_ray.sdxl.text import encode_tokens, tokenize

PARTS = ("text_encoder", "text_encoder_2")


class TrainedText:
    """Both encoders, at least one of them with an adapter."""

    def __init__(self, encoders: TextEncoders, *, num_chunks: int, stops: Mapping[str, int]) -> None:
        """
        Args:
            stops: of each encoder that is trained: the last step in which it learns; 0: it learns to the end.
        """
        self.encoders = encoders
        self.num_chunks = num_chunks
        self.stops = dict(stops)
        self._lock = threading.Lock()  # a tokenizer is used by one thread at a time ("Already borrowed")

    def encoder(self, part: str) -> nn.Module:
        """The encoder called "text_encoder" or "text_encoder_2"."""
        found: nn.Module = getattr(self.encoders, part)
        return found

    def parameters(self) -> dict[str, nn.Parameter]:
        """Of the adapters, with the encoder's name in front."""
        return {
            f"{part}.{name}": parameter
            for part in self.stops
            for name, parameter in adapter_parameters(self.encoder(part)).items()
        }

    def learning(self, step: int) -> tuple[str, ...]:
        """The encoders that learn in a step."""
        return tuple(part for part, stop in self.stops.items() if not stop or step <= stop)

    def finished(self, step: int) -> tuple[str, ...]:
        """The encoders that do not learn any more."""
        return tuple(part for part in self.stops if part not in self.learning(step))

    def tokenize(self, captions: Sequence[str]) -> torch.Tensor:
        """(B, 2, chunks, 77) int64"""
        with self._lock:
            return tokenize(self.encoders, captions, self.num_chunks)[0]

    def embed(self, batch: Batch, step: int) -> Batch:
        """The batch with its embeddings, which carry gradients to the adapters that learn in this step."""
        assert batch.input_ids is not None
        with contextlib.nullcontext() if self.learning(step) else torch.no_grad():
            prompt_embeds, pooled_prompt_embeds = encode_tokens(self.encoders, batch.input_ids)
        if batch.dropped is not None:
            prompt_embeds, pooled_prompt_embeds = zero_prompts(prompt_embeds, pooled_prompt_embeds, batch.dropped)
        return dataclasses.replace(batch, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds)

    @torch.no_grad()
    def prompt(self, text: str) -> dict[str, torch.Tensor]:
        """ "prompt_embeds" (77, 2048) and "pooled_prompt_embeds" (1280,) of one text, as the encoders are now."""
        prompt_embeds, pooled_prompt_embeds = encode_tokens(
            self.encoders, self.tokenize([text]).to(next(self.encoders.text_encoder.parameters()).device)
        )
        return {"prompt_embeds": prompt_embeds[0].cpu(), "pooled_prompt_embeds": pooled_prompt_embeds[0].cpu()}

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model's encoders inside."""
        with contextlib.ExitStack() as stack:
            for part in self.stops:
                stack.enter_context(adapter_disabled(self.encoder(part)))
            yield
