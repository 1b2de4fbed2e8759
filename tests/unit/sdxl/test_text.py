import torch

from sdxl_ray.sdxl.text import encode_prompts

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
