import pytest
import torch

from sdxl_ray.sdxl.adapters import adapter_parameters, attach_adapter
from sdxl_ray.sdxl.components import load_text_encoders
from sdxl_ray.sdxl.text import cut, encode_prompts, encode_tokens, tokenize

CAPTIONS = [
    "a photo of a tabby cat, sitting on a wooden table!",
    "",
    "a very long caption about the red roof of an old stone house " * 12,
]


def test_equal_to_diffusers(encoders, pipeline):
    embeds, pooled, _ = encode_prompts(encoders, CAPTIONS)
    expected, _, expected_pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    assert embeds.shape == (3, 77, 64)
    assert pooled.shape == (3, 32)
    torch.testing.assert_close(embeds, expected, rtol=0, atol=0)
    torch.testing.assert_close(pooled, expected_pooled, rtol=0, atol=0)


def test_hidden_states_are_the_penultimate_without_final_norm(encoders):
    embeds, _, _ = encode_prompts(encoders, CAPTIONS[:1])
    ids = encoders.tokenizer(CAPTIONS[:1], padding="max_length", max_length=77, return_tensors="pt").input_ids
    last = encoders.text_encoder(ids).last_hidden_state
    assert (embeds[..., :32] - last).abs().max() > 0.1


def test_counts_the_tokens_that_were_not_read(encoders):
    _, _, num_tokens = encode_prompts(encoders, CAPTIONS)
    assert num_tokens[1] == 2  # the two markers
    assert num_tokens[2] == 2 + len(encoders.tokenizer.tokenize(CAPTIONS[2])) > 77
    assert num_tokens[0] == 2 + 13  # eleven words, a comma, an exclamation mark


def test_a_caption_encodes_alike_in_any_company(encoders):
    alone, pooled_alone, _ = encode_prompts(encoders, CAPTIONS[:1])
    together, pooled_together, _ = encode_prompts(encoders, CAPTIONS)
    torch.testing.assert_close(alone[0], together[0])
    torch.testing.assert_close(pooled_alone[0], pooled_together[0])


def test_the_pooled_vector_is_taken_at_the_end_of_the_text(encoders):
    """Trap: encoder 2 pads with "!" (id 0), so a wrong position reads padding, the same for every caption."""
    captions = ["a red roof", "a red roof at night"]
    embeds = encoders.tokenizer_2(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
    ends = (embeds == encoders.tokenizer_2.eos_token_id).int().argmax(dim=1)
    assert ends.tolist() == [4, 6]
    output = encoders.text_encoder_2(embeds, output_hidden_states=True)
    at_end = output.last_hidden_state[torch.arange(2), ends]
    _, pooled, _ = encode_prompts(encoders, captions)
    torch.testing.assert_close(pooled, encoders.text_encoder_2.text_projection(at_end))


def test_embeddings_can_go_into_a_backward_pass(encoders):
    embeds, _, _ = encode_prompts(encoders, CAPTIONS[:1])
    weight = torch.ones(64, requires_grad=True)
    (embeds * weight).sum().backward()
    torch.testing.assert_close(weight.grad, embeds.sum(dim=(0, 1)))


# ---- long captions ---------------------------------------------------------------------------------------------------

LONG = "a red roof of an old stone house on a hill near the sea under blue clouds " * 12  # 204 tokens, no comma


def test_three_chunks_are_three_encodings_one_after_another(encoders):
    embeds, pooled, num_tokens = encode_prompts(encoders, [LONG, CAPTIONS[0]], num_chunks=3)
    assert embeds.shape == (2, 3 * 77, 64)
    assert pooled.shape == (2, 32)
    words = LONG.split()  # a token each
    assert num_tokens[0] == len(words) + 2 == 206
    pieces = [" ".join(words[start : start + 75]) for start in (0, 75, 150)]
    for row, parts in enumerate([pieces, [CAPTIONS[0], "", ""]]):
        expected, expected_pooled, _ = encode_prompts(encoders, parts)
        torch.testing.assert_close(embeds[row], expected.flatten(0, 1))
        torch.testing.assert_close(pooled[row], expected_pooled[0])


def test_the_first_chunk_of_a_long_caption_is_what_one_chunk_reads(encoders):
    one, pooled_one, count_one = encode_prompts(encoders, [LONG])
    two, pooled_two, count_two = encode_prompts(encoders, [LONG], num_chunks=2)
    torch.testing.assert_close(two[:, :77], one)
    torch.testing.assert_close(pooled_two, pooled_one)
    assert count_one == count_two


def test_a_long_caption_encodes_alike_in_any_company(encoders):
    alone, pooled_alone, _ = encode_prompts(encoders, [CAPTIONS[0]], num_chunks=2)
    together, pooled_together, _ = encode_prompts(encoders, [LONG, CAPTIONS[0], ""], num_chunks=2)
    torch.testing.assert_close(together[1], alone[0])
    torch.testing.assert_close(pooled_together[1], pooled_alone[0])


COMMA = 0


def sizes(tokens, num_chunks=3):
    pieces = cut(tokens, num_chunks, 75, COMMA)
    assert len(pieces) == num_chunks
    assert [token for piece in pieces for token in piece] == tokens[: 75 * num_chunks]
    return [len(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("num_tokens", "commas", "expected"),
    [
        (0, [], [0, 0, 0]),
        (75, [], [75, 0, 0]),
        (76, [], [75, 1, 0]),
        (200, [], [75, 75, 50]),
        (300, [], [75, 75, 75]),  # the rest is not read
        (100, [60], [61, 39, 0]),  # the tag after the comma stays whole
        (100, [55], [56, 44, 0]),  # 20 tokens before the end
        (100, [54], [75, 25, 0]),  # 21 before
        (100, [60, 70], [71, 29, 0]),
        (100, [60, 75], [75, 25, 0]),  # the piece ends where its tag does
        (200, [60, 130], [61, 70, 69]),  # the second piece would end at 136
        (225, [60], [75, 75, 75]),  # fits only without the rule
        (75, [60], [75, 0, 0]),
    ],
)
def test_where_a_caption_is_cut(num_tokens, commas, expected):
    tokens = [COMMA if at in commas else 1 + at for at in range(num_tokens)]
    assert sizes(tokens) == expected


def test_one_chunk_is_cut_at_75_tokens_whatever_the_commas():
    assert sizes([COMMA] * 100, num_chunks=1) == [75]
    assert sizes([1 + at for at in range(60)] + [COMMA] + [1] * 30, num_chunks=1) == [75]


def test_tags_stay_whole_in_both_encoders(encoders):
    """The real comma of both tokenizers is found: 37 tags of two words and a comma are 110 tokens."""
    tags = ", ".join(["red roof"] * 37)
    embeds, _, (num_tokens,) = encode_prompts(encoders, [tags], num_chunks=2)
    assert num_tokens == 110 + 2
    # 25 tags with their commas are exactly 75; with two words before them the cut is after the 24th comma
    shifted, _, _ = encode_prompts(encoders, [f"a stone {tags}"], num_chunks=2)
    first, second = ", ".join(["a stone red roof"] + ["red roof"] * 23) + ",", ", ".join(["red roof"] * 13)
    expected, _, _ = encode_prompts(encoders, [first, second])
    torch.testing.assert_close(shifted[0], expected.flatten(0, 1))
    expected, _, _ = encode_prompts(encoders, [", ".join(["red roof"] * 25) + ",", ", ".join(["red roof"] * 12)])
    torch.testing.assert_close(embeds[0], expected.flatten(0, 1))


def test_the_pooled_vector_ignores_added_tokens(tiny_model):
    """Trap: transformers pools at the highest id, which is an added token's (textual inversion) and not the end's."""
    encoders = load_text_encoders(tiny_model, dtype=torch.float32)
    for tokenizer, encoder in (
        (encoders.tokenizer, encoders.text_encoder),
        (encoders.tokenizer_2, encoders.text_encoder_2),
    ):
        tokenizer.add_tokens("<cat>")
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        weights = encoder.get_input_embeddings().weight
        with torch.no_grad():
            weights[-1] = weights[tokenizer.convert_tokens_to_ids("cat</w>")]  # means what "cat" does
    for num_chunks in (1, 2):
        for with_token, without in (("a <cat> on a roof", "a cat on a roof"), (f"<cat> {LONG}", f"cat {LONG}")):
            embeds, pooled, _ = encode_prompts(encoders, [with_token], num_chunks)
            expected, expected_pooled, _ = encode_prompts(encoders, [without], num_chunks)
            torch.testing.assert_close(embeds, expected)
            torch.testing.assert_close(pooled, expected_pooled)


# ---- two halves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_tokens_then_embeddings_are_the_prompts(encoders, num_chunks):
    captions = [*CAPTIONS, LONG]
    input_ids, num_tokens = tokenize(encoders, captions, num_chunks)
    assert input_ids.shape == (4, 2, num_chunks, 77) and input_ids.dtype == torch.int64
    embeds, pooled, expected_counts = encode_prompts(encoders, captions, num_chunks)
    assert num_tokens == expected_counts
    with torch.no_grad():
        again, pooled_again = encode_tokens(encoders, input_ids)
    assert torch.equal(again, embeds) and torch.equal(pooled_again, pooled)


def test_each_encoder_has_its_own_padding(encoders):
    input_ids, _ = tokenize(encoders, ["a red roof"])
    for number, tokenizer in enumerate((encoders.tokenizer, encoders.tokenizer_2)):
        begin, *words, end = tokenizer("a red roof").input_ids
        assert len(words) == 3
        assert input_ids[0, number, 0].tolist() == [begin, *words, end] + [tokenizer.pad_token_id] * 72
    assert encoders.tokenizer.pad_token_id != encoders.tokenizer_2.pad_token_id


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_gradients_reach_each_adapter_of_both_encoders(tiny_model, targets):
    encoders = load_text_encoders(tiny_model, dtype=torch.float32)
    expected, expected_pooled, _ = encode_prompts(encoders, CAPTIONS)
    for encoder in (encoders.text_encoder, encoders.text_encoder_2):
        attach_adapter(encoder, rank=2, alpha=2.0, targets=targets)
    embeds, pooled = encode_tokens(encoders, tokenize(encoders, CAPTIONS)[0])
    assert torch.equal(embeds, expected) and torch.equal(pooled, expected_pooled)
    generator = torch.Generator().manual_seed(0)
    (embeds * torch.randn(embeds.shape, generator=generator)).sum().backward(retain_graph=True)
    without_pooled = gradients_of_b(encoders.text_encoder_2)
    (pooled * torch.randn(pooled.shape, generator=generator)).sum().backward()
    for encoder in (encoders.text_encoder, encoders.text_encoder_2):
        gradients = gradients_of_b(encoder)
        assert gradients and all(gradient is not None and gradient.any() for gradient in gradients.values())
    # encoder 2's last layer learns from the pooled vector alone
    last = {name for name in without_pooled if ".layers.2." in name}
    assert last and all(without_pooled[name] is None for name in last)
    assert all(without_pooled[name] is not None for name in without_pooled.keys() - last)


def gradients_of_b(encoder):
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in adapter_parameters(encoder).items()
        if "lora_B" in name
    }


def test_encoder_1_is_not_adapted_where_it_is_not_read(tiny_model):
    """Its last layer comes after the penultimate hidden state, so an adapter there would never get a gradient."""
    encoders = load_text_encoders(tiny_model, dtype=torch.float32)
    for encoder, layers in ((encoders.text_encoder, {"0", "1"}), (encoders.text_encoder_2, {"0", "1", "2"})):
        attach_adapter(encoder, rank=2, alpha=2.0)
        assert {name.split("layers.")[1][0] for name in adapter_parameters(encoder)} == layers
