"""torch.compile for the part that repeats: the transformer blocks, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch._dynamo
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from sdxl_ray.errors import ConfigError

# Graphs that all blocks together may have. A training run has three: blocks of 640 and of 1280 channels, and the first
# block, whose input has no gradient. As many again for micro-batches of one image, which torch treats apart, and as
# many for drawing and evaluation, without gradients. torch's own limit of 8 is in their midst: beyond it torch goes on
# uncompiled, with one warning.
_GRAPH_LIMIT = 32


def compile_blocks(unet: nn.Module, *, dynamic: bool = True, backend: str | Callable[..., Any] = "inductor") -> int:
    """Have each transformer block compiled when it is first called; return how many blocks there are.

    Regional compilation: blocks of one width share a graph, so the compiler sees 3 small graphs rather than one of the
    whole U-Net. With `dynamic` a bucket's height and width are symbols, and another bucket compiles nothing; without,
    every new shape does. Call it when the model is quantised and has its adapter. Checkpointing goes with it, a block
    being compiled inside; names in the state dict stay the same.

    Source: docs.pytorch.org/tutorials/recipes/regional_compilation.html.

    Raises:
        ConfigError: there are no such blocks.
    """
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    if not blocks:
        raise ConfigError(
            f"train.compile = true, but {type(unet).__name__} has no transformer blocks. Set train.compile = false."
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPH_LIMIT)
    for block in blocks:
        block.compile(dynamic=dynamic, backend=backend)
    return len(blocks)
