"""The micro-batch that fits, found by trying, and the accumulation that keeps the global batch. Without torch.

step ─fits_on_cuda─▶ bool ─largest_micro_batch─▶ images that fit ─global_batch─▶ (micro-batch, accumulation)
"""

from __future__ import annotations

import gc
from collections.abc import Callable

from sdxl_ray.errors import ConfigError

_HEADROOM = 0.05  # of the device: buckets of other shapes leave gaps in it, and the driver wants a little later


def largest_micro_batch(fits: Callable[[int], bool], *, limit: int) -> int:
    """The largest micro-batch in 1 .. `limit` for which `fits` is true; 0 if a single image does not fit.

    Doubling until one does not fit, then bisection: about 2 log2(n) tries for an answer of n. What fits is taken to
    fit for fewer images as well.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}, expected 1 or more")
    most, too_many, size = 0, limit + 1, 1
    while size < too_many:
        if fits(size):
            most = size
            size = min(2 * size, limit) if size < limit else too_many
        else:
            too_many = size
    while too_many - most > 1:
        size = (most + too_many) // 2
        if fits(size):
            most = size
        else:
            too_many = size
    return most


def global_batch(micro_batch: int, num_workers: int, wanted: int) -> tuple[int, int]:
    """(micro_batch_size, accumulation) with micro_batch_size * accumulation * num_workers = `wanted` exactly.

    The largest micro-batch of at most `micro_batch` images that divides one worker's share of the global batch.

    Args:
        micro_batch: how many images fit, from `largest_micro_batch`, the smallest answer of all workers.
        wanted: train.global_batch_size, images per optimizer step of all workers together.

    Raises:
        ConfigError: the workers cannot share `wanted` images evenly.
    """
    if micro_batch < 1 or num_workers < 1:
        raise ValueError(f"micro_batch is {micro_batch} and num_workers {num_workers}, expected 1 or more")
    share, left_over = divmod(wanted, num_workers)
    if not share or left_over:
        above = num_workers * (share + 1)
        nearest = f"{above}" if not share else f"{above - num_workers} or {above}"
        raise ConfigError(
            f"train.global_batch_size = {wanted} cannot be shared evenly by {num_workers} workers, which each need the "
            f"same number of images. Set train.global_batch_size = {nearest}, or change train.num_workers."
        )
    size = next(size for size in range(min(micro_batch, share), 0, -1) if share % size == 0)
    return size, share // size


def fits_on_cuda(step: Callable[[], object], *, headroom: float = _HEADROOM) -> bool:
    """Whether a training step runs on this process's GPU and leaves `headroom` of its memory free.

    `step` does forward, backward and an optimizer update with images of the bucket with the most pixels. What is left
    in its state is the caller's; of the rest nothing stays in memory for the next try.

    Only running out of memory means no; any other error is raised.
    """
    import torch

    def free() -> None:
        gc.collect()
        torch.cuda.empty_cache()

    free()
    torch.cuda.reset_peak_memory_stats()
    try:
        step()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        ran_out = True  # and no more in here: while the error is handled, its traceback holds the step's tensors
    else:
        ran_out = False
    held = torch.cuda.max_memory_reserved()
    free()
    _, total = torch.cuda.mem_get_info()
    return not ran_out and held <= (1 - headroom) * total
