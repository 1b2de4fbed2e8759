"""Captions to embeddings, as SDXL was trained: both CLIPs, penultimate layers, no final norm.

CLIP reads 77 tokens: 75 and two markers. A longer caption is read in pieces of 75, as A1111 and ComfyUI do, and the
U-Net sees the pieces' embeddings one after another.

    captions ──tokenize──▶ ids (B, 2, chunks, 77) ──encode_tokens──▶ embeddings and pooled vector
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdxl_ray.sdxl.components import TextEncoders

_BACKTRACK = 20  # tokens; A1111's default for `comma_padding_backtrack`


@torch.no_grad()  # not inference_mode: its tensors cannot be saved for a backward pass, and these go into training
def encode_prompts(
    encoders: TextEncoders, captions: Sequence[str], num_chunks: int = 1
) -> tuple[Tensor, Tensor, list[int]]:
    """What the U-Net reads for each caption; one chunk equals diffusers' `StableDiffusionXLPipeline.encode_prompt`.

    All captions have `num_chunks` chunks, the empty prompt where there are no tokens left, so that all have one shape
    and none depends on its batch. The pooled vector is the first chunk's, as in A1111 and ComfyUI.

    Returns:
        prompt_embeds (B, 77 * num_chunks, 768 + 1280) and pooled_prompt_embeds (B, 1280), in the encoders' dtype and on
        their device, and the number of tokens in each caption with its two markers: above 75 * num_chunks + 2 the rest
        was not read.
    """
    input_ids, num_tokens = tokenize(encoders, captions, num_chunks)
    prompt_embeds, pooled = encode_tokens(encoders, input_ids)
    return prompt_embeds, pooled, num_tokens


def tokenize(encoders: TextEncoders, captions: Sequence[str], num_chunks: int = 1) -> tuple[Tensor, list[int]]:
    """Captions as token ids, in chunks of 77 with their markers and padding. Needs the tokenizers alone.

    Returns:
        input_ids (B, 2, num_chunks, 77) int64, for encoder 1 and encoder 2, whose padding differs; and the number of
        tokens in each caption, as in `encode_prompts`.
    """
    num_tokens = [0] * len(captions)
    both = []
    for tokenizer in (encoders.tokenizer, encoders.tokenizer_2):
        whole = tokenizer(list(captions), truncation=False, padding=False).input_ids
        num_tokens = [max(before, len(ids)) for before, ids in zip(num_tokens, whole, strict=True)]
        length = tokenizer.model_max_length
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        comma = tokenizer.convert_tokens_to_ids(",</w>")
        assert isinstance(comma, int)  # a list comes from a list
        rows = []
        for ids in whole:
            for piece in cut(ids[1:-1], num_chunks, length - 2, comma):
                row = [begin, *piece, end]
                rows.append(row + [tokenizer.pad_token_id] * (length - len(row)))
        both.append(torch.tensor(rows, dtype=torch.long).view(len(captions), num_chunks, length))
    return torch.stack(both, dim=1), num_tokens


def encode_tokens(encoders: TextEncoders, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the U-Net reads for `tokenize`'s ids, with gradients to adapters of the encoders unless the caller forbids.

    The last layer of encoder 1 gets none: its penultimate hidden state is what is read, and `attach_adapter` leaves
    that layer out. Encoder 2's last layer feeds the pooled vector, and so does learn.

    Args:
        input_ids: (B, 2, chunks, 77) int64, on any device.

    Returns:
        prompt_embeds (B, 77 * chunks, 768 + 1280) and pooled_prompt_embeds (B, 1280), in the encoders' dtype and on
        their device.
    """
    num_chunks = input_ids.shape[2]
    embeds: list[Tensor] = []
    pooled = torch.empty(0)
    for number, encoder in enumerate((encoders.text_encoder, encoders.text_encoder_2)):
        ids = input_ids[:, number].flatten(0, 1).to(encoder.device)
        # No attention mask: SDXL was trained to read the padding too, and encoder 2 pads with "!" (id 0).
        output = encoder(ids, output_hidden_states=True)
        embeds.append(output.hidden_states[-2].unflatten(0, (-1, num_chunks)).flatten(1, 2))
        if encoder is encoders.text_encoder_2:
            # Not `output.text_embeds`: transformers takes that at the highest id, since SDXL's config has eos_token_id
            # 2, and tokens that were added (textual inversion) have higher ones than the end marker.
            firsts = torch.arange(0, len(ids), num_chunks, device=ids.device)
            ends = (ids[firsts] == encoders.tokenizer_2.eos_token_id).int().argmax(dim=1)
            pooled = encoder.text_projection(output.last_hidden_state[firsts, ends])
    return torch.cat(embeds, dim=-1), pooled


def cut(tokens: Sequence[int], num_chunks: int, size: int, comma: int) -> list[Sequence[int]]:
    """`num_chunks` pieces of at most `size` tokens, without markers. The last may be empty; what is over is left out.

    A piece ends after its last comma, if that is among its last 20 tokens, so that tags stay whole: A1111's rule. Not
    where the caption only fits without that.
    """
    pieces: list[Sequence[int]] = []
    start = 0
    while len(tokens) - start > size:
        end = start + size
        if tokens[end] != comma:
            end = next((at + 1 for at in range(end - 1, end - 1 - _BACKTRACK, -1) if tokens[at] == comma), end)
        pieces.append(tokens[start:end])
        start = end
    pieces.append(tokens[start:])
    if len(pieces) > num_chunks:
        pieces = [tokens[start : start + size] for start in range(0, num_chunks * size, size)]
    return [*pieces, *([[]] * (num_chunks - len(pieces)))]
