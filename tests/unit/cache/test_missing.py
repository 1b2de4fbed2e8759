"""Keys that no shard has, cut into shards."""

from types import SimpleNamespace

import numpy as np
import pytest

from sdxl_ray.cache import missing
from sdxl_ray.cache.missing import missing_latents, missing_text, shard_length, text_ranks
from sdxl_ray.cache.ragged import Ragged


def keys_of(*letters):
    return np.array([letter.encode() * 16 for letter in letters], "S16")


def store_with(*letters):
    here = set(keys_of(*letters).tolist())
    return SimpleNamespace(find=lambda keys: np.array([0 if key in here else -1 for key in keys.tolist()], int))


def latents(keys, counts, *, buckets=(0, 0, 0, 0), masked=(0, 0, 0, 0), order=None, store=None):
    """The missing shards of rows in two buckets."""
    rows = len(counts)
    shards = missing_latents(
        Ragged(keys_of(*keys), np.array(counts)),
        np.array(buckets[:rows]),
        ["64x64", "64x128"],
        np.array(masked[:rows], bool),
        None if order is None else np.array(order),
        store or store_with(),
    )
    return ["".join(keys[entry] for entry in shard) for shard in shards]


@pytest.mark.parametrize(
    ("bucket", "length"), [("1024x1024", 32), ("512x512", 64), ("64x64", 64), ("8192x8192", 1), ("2048x512", 32)]
)
def test_shards_are_sized_by_their_pixels(bucket, length):
    assert shard_length(bucket) == length


def test_what_is_there_and_copies_are_left_out():
    assert latents("abab", [1, 1, 1, 1]) == ["ab"]
    assert latents("abab", [1, 1, 1, 1], store=store_with("a")) == ["b"]
    assert latents("abab", [1, 1, 1, 1], store=store_with("a", "b")) == []


def test_one_shape_and_one_set_of_tensors_in_each_shard():
    assert latents("abcd", [1, 1, 1, 1], buckets=(1, 0, 1, 0), masked=(0, 1, 1, 1)) == ["bd", "a", "c"]


def test_all_crops_of_a_row_lie_in_its_bucket():
    assert latents("abcde", [3, 2], buckets=(1, 0)) == ["de", "abc"]


def test_in_an_order_of_need_the_first_crops_come_first(monkeypatch):
    """Epoch 0 uses one crop of each image; until all of them are there it would wait."""
    monkeypatch.setattr(missing, "shard_length", lambda bucket: 8)  # 2 on demand
    order = [3, 6, 9, 0, 4, 7, 1, 5]  # three crops of the first row and the second, two of the third
    assert latents("abcdefgh", [3, 3, 2], order=order) == ["dg", "ae", "hb", "fc"]
    assert latents("abcdefgh", [3, 3, 2], order=order, buckets=(0, 1, 0)) == ["de", "ga", "hb", "f", "c"]


def test_captions_are_needed_with_the_first_crop_of_their_row_and_prompts_before_them():
    def ranks(latent_counts, text_counts, order, num_entries):
        captions = Ragged(np.zeros(num_entries, "S16"), np.array(text_counts, int))
        return text_ranks(np.array(latent_counts, int), captions, order).tolist()

    assert ranks([2, 1, 2], [1, 2, 1], np.array([5, 2, 4, 0, 3]), 6) == [2, 4, 4, 0, -1, -1]
    assert ranks([2, 1, 2], [1, 2, 1], None, 4) == [0, 1, 1, 2]
    assert ranks([], [], np.array([], int), 1) == [-1]


def test_captions_are_cut_in_the_order_of_their_ranks(monkeypatch):
    monkeypatch.setattr(missing, "ENTRIES_PER_SHARD", 2)
    shards = missing_text(keys_of(*"abcad"), np.array([4, 3, 2, 1, -1]), store_with("c"))
    assert [shard.tolist() for shard in shards] == [[4, 3], [1]]


def test_captions_that_are_needed_at_once_stay_in_their_order():
    """Else the same gap would make other shards with another NumPy, whose quick sort keeps no order."""
    keys = np.array([f"{number:016d}".encode() for number in range(999)], "S16")
    ranks = np.arange(999) % 3
    found = np.concatenate(missing_text(keys, ranks, store_with()))
    assert found.tolist() == [*range(0, 999, 3), *range(1, 999, 3), *range(2, 999, 3)]
