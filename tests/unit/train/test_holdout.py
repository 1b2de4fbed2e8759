import hashlib

import pytest

from sdxl_ray.train.holdout import split_holdout as split_holdout_in_arrays


def hashes(count):
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]


NO_LIMIT = 10**9


def split_holdout(image_hashes, share, max_images):
    train, held_out = split_holdout_in_arrays(image_hashes, share, max_images)
    return train.tolist(), held_out.tolist()


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_holdout_is_a_partition_of_about_the_share(share):
    train, held_out = split_holdout(hashes(2000), share, NO_LIMIT)
    assert sorted(train + held_out) == list(range(2000))
    assert abs(len(held_out) - 2000 * share) < 5 * (2000 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_copies_stay_on_one_side_and_adding_images_moves_none(share):
    before = hashes(300)
    train, held_out = split_holdout(before, share, NO_LIMIT)
    _, held_out_later = split_holdout(before + before + hashes(400)[300:], share, NO_LIMIT)
    assert held_out_later[: len(held_out)] == held_out
    later = set(held_out_later)
    assert later.isdisjoint(train)
    assert all((row in later) == (row + 300 in later) for row in range(300))


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("share", [1e-6, 0.05, 0.5, 0.999999])
def test_small_sets_keep_something_on_both_sides(count, share):
    train, held_out = split_holdout(hashes(count), share, NO_LIMIT)
    assert train and held_out
    assert sorted(train + held_out) == list(range(count))


@pytest.mark.parametrize(
    ("image_hashes", "share"), [(hashes(5), 0.0), (hashes(1), 0.5), (hashes(1) * 3, 0.5), ([], 0.5)]
)
def test_nothing_is_held_out_without_a_share_or_with_one_image(image_hashes, share):
    assert split_holdout(image_hashes, share, NO_LIMIT) == (list(range(len(image_hashes))), [])


def test_at_most_so_many_images_are_held_out_and_the_others_are_trained_on():
    image_hashes = hashes(2000)
    _, caught = split_holdout(image_hashes, 0.3, NO_LIMIT)
    train, held_out = split_holdout(image_hashes, 0.3, 10)
    assert sorted(train + held_out) == list(range(2000))
    smallest = sorted(image_hashes[row] for row in caught)[:10]
    assert sorted(image_hashes[row] for row in held_out) == smallest
    # a copy of an image stays on its side; images are counted, not rows
    _, with_copies = split_holdout(image_hashes * 2, 0.3, 10)
    assert with_copies == held_out + [row + 2000 for row in held_out]


def test_at_the_limit_more_images_only_ever_give_images_back_to_training():
    before, later = hashes(300), hashes(600)
    _, held_out = split_holdout(before, 0.3, 10)
    train_later, held_out_later = split_holdout(later, 0.3, 10)
    assert len(held_out) == len(held_out_later) == 10
    assert {row for row in held_out_later if row < 300} <= set(held_out)
    assert set(range(300)) - set(held_out) <= set(train_later)


def test_the_limit_counts_images_whatever_lies_beside_their_copies():
    """Copies side by side, as a listing by path has them."""
    image_hashes = [digit * 64 for digit in "50033c"]
    assert split_holdout(image_hashes, 0.99, 2) == ([0, 5], [1, 2, 3, 4])


def test_hashes_that_begin_alike_are_different_images():
    image_hashes = ["0" * 64, "f" * 64, "0" * 63 + "1"]
    assert split_holdout(image_hashes, 0.5, 1) == ([1, 2], [0])


def test_where_every_image_is_caught_the_one_with_the_largest_hash_is_trained_on():
    image_hashes = [digit * 64 for digit in "301"]
    assert split_holdout(image_hashes, 0.9, NO_LIMIT) == ([0], [1, 2])
