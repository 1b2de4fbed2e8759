from collections import Counter

import pytest

from sdxl_ray.config.elsewhere import ROWS, SECTIONS, our_name, render_table
from sdxl_ray.config.keys import did_you_mean, known_keys
from sdxl_ray.config.schema import Config


def test_every_row_names_a_setting_of_ours_and_no_name_has_two_meanings():
    assert {row.ours for row in ROWS} <= set(known_keys())
    assert set(SECTIONS.values()) <= set(Config.model_fields)
    assert not [name for name, count in Counter(name for row in ROWS for name in row.theirs).items() if count > 1]
    assert len({row.ours for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("train.max_train_steps", "train.duration"),
        ("network_dim", "adapter.rank"),
        ("lora.rank", "adapter.rank"),
        ("datasets", "dataset"),
        ("dataset.keep_tokens", "dataset.keep_tags"),
        ("train.batch_size", "train.micro_batch_size"),
        ("text_encoder.lr", "text_encoder.learning_rate"),
        ("text_encoder.network_dim", "text_encoder.rank"),
        ("validation.steps", "validation.num_steps"),
        # nothing of others: the nearest of ours, in the same section first
        ("adapter.rnak", "adapter.rank"),
        ("text_encoder.rnak", "text_encoder.rank"),
        ("train.learning_rate", "optimizer.learning_rate"),
        ("optimiser", "optimizer"),
    ],
)
def test_what_somebody_may_have_meant(typed, expected):
    assert did_you_mean(typed, known_keys()) == f" Did you mean {expected}?"


def test_where_nothing_is_near_nothing_is_said():
    assert did_you_mean("probability", known_keys()) == ""
    assert did_you_mean("zzz", known_keys()) == ""
    # what a sweep cannot vary
    assert did_you_mean("max_train_steps", ["adapter.rank"]) == ""


def test_the_page():
    assert our_name("network_alpha") == "adapter.alpha"
    page = render_table()
    assert "| `dataset.shuffle_tags` | `shuffle_caption`, `shuffle_tokens` | with `caption_variants = 8`, say |" in page
