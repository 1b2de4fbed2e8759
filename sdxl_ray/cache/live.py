"""What a shard would hold, encoded when it is asked for: one image or caption at a time, so that the bits depend on
nothing else. For cache.mode = "off", for cache.text = "online", and for entries that turned out damaged."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

from sdxl_ray.cache.encode import LatentEncoder, TextEncoder, loading
from sdxl_ray.cache.images import UnreadableImage
from sdxl_ray.cache.planning import max_tokens
from sdxl_ray.cache.reading import load_image
from sdxl_ray.cache.skipped import UnreadableLimit
from sdxl_ray.errors import CacheError, StorageError
from sdxl_ray.records import EncodedSample

_CAPTIONS_KEPT = 128  # 40 MB


class LiveEntries:
    """The VAE and the text encoders on one device, for threads to share: they decode side by side and encode in turn.

    Nothing is loaded before it is needed.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str,
        variant: str,
        vae_dtype: str,
        caption_chunks: int,
        device: torch.device,
        report: Callable[[str], None],
        limits: Mapping[str, UnreadableLimit] | None = None,
    ) -> None:
        """
        Args:
            report: told in one line about each image that cannot be decoded, and once that captions are cut.
            limits: of the datasets, by name. None: any number of images may be unreadable.
        """
        self.device = device
        self.report = report
        self.limits = limits or {}
        self._max_tokens = max_tokens(caption_chunks)
        self._make_latent_encoder = lambda: LatentEncoder(
            model, dtype=vae_dtype, device=device, batch_size=1, revision=revision, variant=variant
        )
        self._make_text_encoder = lambda: TextEncoder(
            model, device=device, batch_size=1, revision=revision, variant=variant, num_chunks=caption_chunks
        )
        self._latent_encoder: LatentEncoder | None = None
        self._text_encoder: TextEncoder | None = None
        self._unreadable: set[str] = set()
        self._told_of_tiles = self._told_of_cut = False
        self._lock = threading.Lock()
        # Beside training and not behind it: on the stream of training, every result would wait for the running step.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.text = functools.lru_cache(maxsize=_CAPTIONS_KEPT)(self._text)

    def latents(self, sample: EncodedSample, variant: int) -> dict[str, torch.Tensor] | None:
        """ "mean", "std" (4, h, w) bf16, and "mask" (h, w) uint8 where the sample has one; None: it cannot be decoded,
        or its listing was trusted and it is not there.

        Raises:
            CacheError: this machine cannot read the image's file, twice, or has too little memory.
            DatasetError: of the sample's dataset, more images than its limit allows cannot be decoded.
        """
        record = sample.image_record(variant)
        try:
            pixels, mask = load_image(record)
        except UnreadableImage as error:
            with self._lock:
                is_known = record.path in self._unreadable
                self._unreadable.add(record.path)
            if not is_known:
                self.report(f"{record.path}: {error}; it does not count in training")
            with self._lock:
                self._judge(sample, str(error))
            return None
        except (OSError, StorageError) as error:
            raise CacheError(
                f"{record.path}: cannot be read on this machine ({error}), and its encoded form is not in the cache. "
                'Make the images visible to all machines that train; or set cache.mode = "disk" and encode them where '
                "they are."
            ) from None
        except MemoryError as error:
            raise CacheError(
                f"{record.path}: this machine has too little memory to decode it ({error}). Let fewer workers train "
                'there, or set cache.mode = "disk": all is encoded before training then.'
            ) from None
        with self._encoding():
            self._judge(sample)
            encoder = self._images()
            encoded = encoder.encode([pixels], [record.path])
            in_tiles = bool(encoder.tiled) and not self._told_of_tiles
            self._told_of_tiles |= in_tiles
            encoder.tiled.clear()
        if in_tiles:
            self.report(
                f"{record.path}: encoded in tiles, since {self.device} has no room for it whole; perhaps others too. "
                "Their latents differ a little from those of the cache"
            )
        entry = {name: tensor[0] for name, tensor in encoded.items()}
        return entry if mask is None else {**entry, "mask": torch.from_numpy(np.array(mask))}

    def _text(self, caption: str) -> dict[str, torch.Tensor]:
        """ "prompt_embeds" (77, 2048), 77 for each chunk, and "pooled_prompt_embeds" (1280,), bf16."""
        with self._encoding():
            encoded, (num_tokens,) = self._texts().encode([caption])
            is_first_cut = num_tokens > self._max_tokens and not self._told_of_cut
            self._told_of_cut |= is_first_cut
        if is_first_cut:
            self.report(
                f'the caption "{caption[:40]}..." has {num_tokens} tokens; what is beyond {self._max_tokens} is not '
                "seen, of this caption and perhaps others (cache.caption_chunks)"
            )
        return {name: tensor[0] for name, tensor in encoded.items()}

    # ---- inside the lock

    @contextlib.contextmanager
    def _encoding(self) -> Iterator[None]:
        with self._lock, torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            yield

    def _judge(self, sample: EncodedSample, problem: str = "") -> None:
        if sample.dataset in self.limits:
            self.limits[sample.dataset].note(sample.image_hash, sample.path, problem)

    def _images(self) -> LatentEncoder:
        if self._latent_encoder is None:
            with loading("the VAE", self.device):
                self._latent_encoder = self._make_latent_encoder()
            self._wait_for_weights()
        return self._latent_encoder

    def _texts(self) -> TextEncoder:
        if self._text_encoder is None:
            with loading("the text encoders", self.device):
                self._text_encoder = self._make_text_encoder()
            self._wait_for_weights()
        return self._text_encoder

    def _wait_for_weights(self) -> None:
        """They are copied on whichever stream loads them, and used on ours."""
        if self._stream is not None:
            torch.cuda.synchronize(self.device)
