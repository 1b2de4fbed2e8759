import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from sdxl_ray.cache.index import Index
from sdxl_ray.config.load import config_from_dict, with_overrides
from sdxl_ray.errors import CacheError, ConfigError, DatasetError
from sdxl_ray.records import EncodedSample
from sdxl_ray.train.data import Data, Samples, build_plan, data_order, load_data, run_identity, split
from sdxl_ray.train.holdout import split_holdout


def make_sample(number, *, dataset="cats", image=None, flip=False, target_hw=(64, 64), crops=((0, 0),)):
    """Of image number `image`; its id is a hash, as in stage 1."""
    image = number if image is None else image
    return EncodedSample(
        sample_id=hashlib.md5(f"{number}".encode()).hexdigest(),
        dataset=dataset,
        path=f"/images/{dataset}/{image}.png",
        address="",
        image_hash=hashlib.sha256(f"{image}".encode()).hexdigest(),
        verify=True,
        original_hw=target_hw,
        target_hw=target_hw,
        resized_hw=target_hw,
        crops=crops,
        flip=flip,
        mask="",
        captions=(f"image {image}",),
        scaled_jpeg=False,
        caption_bases=(0,),
        latent_keys=("0" * 32,) * len(crops),
        latent_shards=("latents/s.safetensors",) * len(crops),
        text_keys=("1" * 32,),
        text_shards=("text/s.safetensors",),
    )


def make_config(*datasets, **overrides):
    """Datasets by name, or as a table of settings."""
    sections = [{"name": each} if isinstance(each, str) else each for each in datasets] or [{"name": "cats"}]
    sections = [{"path": f"images/{section['name']}", **section} for section in sections]
    config = config_from_dict({"dataset": sections, "model": {"path": "builtin:tiny"}, "eval": {"holdout": 0.3}})
    return with_overrides(config, {key.replace("__", "."): value for key, value in overrides.items()})


def images_of(samples):
    return {sample.image_hash for sample in samples}


def data_of(config, index):
    parts = split(config, index)
    return Data(
        parts.train, parts.held_out, parts.num_left_out, parts.sections, None, {}, vae="vae", text_encoders="text"
    )


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_samples_are_rows_of_the_index():
    listed = [make_sample(number, target_hw=(64, 64 + 8 * (number % 3))) for number in range(10)]
    samples = Samples(Index.of(listed), np.array([7, 2, 5]))
    assert len(samples) == 3 and bool(samples) and not Samples(samples.whole, samples.rows[:0])
    assert list(samples) == [listed[7], listed[2], listed[5]]
    assert samples[-1] == listed[5]
    assert list(samples[1:]) == [listed[2], listed[5]]
    codes, names = samples.codes("bucket")
    assert [names[code] for code in codes] == [sample.bucket for sample in samples]
    assert names == sorted(names)
    assert samples.counts("bucket") == {"64x64": 0, "64x72": 1, "64x80": 2}
    with pytest.raises(IndexError):
        samples[3]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_digest_is_of_the_ids_in_their_order(count, monkeypatch):
    index = Index.of([make_sample(number) for number in range(5)])
    samples = Samples(index, np.arange(count))
    expected = hashlib.sha256("\n".join(sample.sample_id for sample in samples).encode()).hexdigest()[:16]
    assert samples.digest == expected
    monkeypatch.setattr("sdxl_ray.train.data._DIGEST_CHUNK", 2)
    assert samples.digest == expected
    if count > 1:
        assert Samples(index, np.arange(count)[::-1]).digest != expected


def test_a_hundred_thousand_samples_are_no_objects():
    """A list of them would hold 100 MB."""
    index = Index(Index.of([make_sample(number) for number in range(100)]).table.take(np.arange(100_000) % 100))
    parts = split(make_config(eval__holdout=0.0), index)
    assert len(parts.train) == 100_000
    held = parts.train.rows.nbytes + sum(sys.getsizeof(value) for value in vars(parts.train).values())
    assert held < 4_000_000


# ---- split -----------------------------------------------------------------------------------------------------------


def test_samples_are_sorted_by_id_wherever_they_lie_in_the_index():
    listed = [make_sample(number) for number in range(40)]
    config = make_config()
    parts = split(config, Index.of(listed))
    for samples in (parts.train, parts.held_out):
        ids = [sample.sample_id for sample in samples]
        assert ids == sorted(ids) and ids
    shuffled = split(config, Index.of([listed[row] for row in np.random.default_rng(0).permutation(40)]))
    assert list(shuffled.train) == list(parts.train) and list(shuffled.held_out) == list(parts.held_out)


def test_the_share_is_held_out_by_content():
    listed = [make_sample(number) for number in range(60)]
    parts = split(make_config(), Index.of(listed))
    hashes = [sample.image_hash for sample in listed]
    train, held_out = split_holdout(hashes, 0.3, 64)
    assert images_of(parts.train) == {hashes[row] for row in train}
    assert images_of(parts.held_out) == {hashes[row] for row in held_out}
    assert parts.num_left_out == 0


def test_mirrored_copies_of_held_out_images_are_on_neither_side():
    listed = [make_sample(2 * image + flip, image=image, flip=bool(flip)) for image in range(40) for flip in (0, 1)]
    parts = split(make_config(), Index.of(listed))
    assert parts.held_out and not any(sample.flip for sample in parts.held_out)
    assert images_of(parts.train).isdisjoint(images_of(parts.held_out))
    assert len(parts.train) == 2 * len(images_of(parts.train))
    assert len(images_of(parts.train)) + len(parts.held_out) == 40
    assert parts.num_left_out == 0  # of images: what is held out is no training image that was dropped


def test_a_held_out_image_is_evaluated_at_all_its_resolutions_and_counts_once():
    sizes = [(64, 64), (128, 128), (192, 192)]
    listed = [
        make_sample(3 * image + number, image=image, target_hw=size)
        for image in range(40)
        for number, size in enumerate(sizes)
    ]
    parts = split(make_config(eval__max_images=4), Index.of(listed))
    assert len(images_of(parts.held_out)) == 4
    assert {sample.target_hw for sample in parts.held_out} == set(sizes)
    assert len(parts.held_out) == 3 * 4
    assert len(parts.train) == 3 * 36


EVAL = {"name": "faces", "role": "eval"}
REGULAR = {"name": "others", "role": "regularization"}


def test_an_eval_dataset_is_held_out_whole_and_nothing_else_is():
    listed = [make_sample(number) for number in range(40)]
    faces = [make_sample(100 + number, dataset="faces") for number in range(9)]
    parts = split(make_config("cats", EVAL, eval__max_images=2), Index.of([*listed, *faces]))
    assert images_of(parts.held_out) == images_of(faces)
    assert images_of(parts.train) == images_of(listed)
    assert parts.num_left_out == 0


def test_an_image_of_an_eval_dataset_is_trained_on_nowhere():
    cats = [make_sample(number) for number in range(10)]
    others = [make_sample(50 + number, dataset="others", image=number + 5) for number in range(10)]
    faces = [make_sample(100 + number, dataset="faces", image=number + 8) for number in range(4)]  # 8, 9, 10, 11
    parts = split(make_config("cats", REGULAR, EVAL), Index.of([*cats, *others, *faces]))
    assert images_of(parts.held_out) == images_of(faces)
    assert images_of(parts.train).isdisjoint(images_of(faces))
    assert parts.train.counts("dataset") == {"cats": 8, "faces": 0, "others": 6}
    assert parts.num_left_out == 4


def test_regularization_images_are_not_held_out_and_their_copies_of_held_out_ones_are_dropped():
    cats = [make_sample(number) for number in range(40)]
    others = [make_sample(100 + number, dataset="others", image=20 + number) for number in range(40)]
    parts = split(make_config("cats", REGULAR), Index.of([*cats, *others]))
    alone = split(make_config("cats"), Index.of(cats))
    assert list(parts.held_out) == list(alone.held_out)
    copies = images_of(parts.held_out) & images_of(others)
    assert parts.num_left_out == len(copies) > 0
    assert len(parts.train) == 80 - len(parts.held_out) - len(copies)
    assert images_of(parts.train).isdisjoint(images_of(parts.held_out))


def test_copies_in_two_training_datasets_are_held_out_together():
    cats = [make_sample(number) for number in range(40)]
    dogs = [make_sample(100 + number, dataset="dogs", image=number) for number in range(40)]
    parts = split(make_config("cats", "dogs"), Index.of([*cats, *dogs]))
    assert parts.held_out.counts("dataset")["cats"] == parts.held_out.counts("dataset")["dogs"] > 0
    assert images_of(parts.train).isdisjoint(images_of(parts.held_out))


def test_without_a_share_nothing_is_held_out():
    parts = split(make_config(eval__holdout=0.0), Index.of([make_sample(number) for number in range(5)]))
    assert (len(parts.train), len(parts.held_out)) == (5, 0)


def test_nothing_left_to_train_on_is_an_error():
    index = Index.of([make_sample(0), make_sample(1, dataset="faces", image=0)])
    text = "no image is left to train on: of 2 samples, 1 are held out for the eval loss and 1 are copies of these. "
    with pytest.raises(DatasetError) as error:
        split(make_config("cats", EVAL), index)
    assert str(error.value).startswith(text)


def test_an_index_of_another_config_is_refused():
    index = Index.of([make_sample(0), make_sample(1, dataset="dogs")])
    text = 'the index has samples of dataset "dogs", the config has cats. Run `sdxl-ray cache` with this config.'
    with pytest.raises(CacheError) as error:
        split(make_config("cats"), index)
    assert str(error.value) == text


# ---- loaded from a cache ---------------------------------------------------------------------------------------------


def test_a_cache_is_loaded_with_its_reader_and_prompts(config, index_path):
    data = load_data(config, index_path)
    assert len(data.train) + len(data.held_out) == 13
    assert data.digest == data.train.digest
    assert list(data.sections) == [config.datasets[0].name]
    for text in (*config.validation.prompts, ""):
        entry = data.reader.read(*data.prompts[text])
        assert entry["prompt_embeds"].shape == (77, 64)
    for sample in data.train:
        assert set(data.reader.read(sample.latent_shards[0], sample.latent_keys[0])) == {"mean", "std"}


def test_what_waits_for_shards_is_passed_on(config, index_path):
    def wait(shard):
        raise AssertionError

    assert load_data(config, index_path, wait=wait).reader.wait is wait


@pytest.mark.parametrize("content", [None, b"{", b'{"prompts": {"a": 1}}', b"[]"])
def test_a_missing_or_damaged_manifest_is_named(config, index_path, tmp_path, content):
    (tmp_path / "index.parquet").write_bytes(Path(index_path).read_bytes())
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(CacheError, match=r"manifest.json: cannot be read .* Run `sdxl-ray cache`: it is written anew"):
        load_data(config, tmp_path / "index.parquet")


# ---- order and plan --------------------------------------------------------------------------------------------------


def test_repeats_and_spans_are_those_of_the_datasets():
    cats = [make_sample(number) for number in range(8)]
    dogs = [make_sample(100 + number, dataset="dogs") for number in range(4)]
    config = make_config(
        {"name": "dogs", "repeats": 3, "start": "2 steps"}, "cats",
        eval__holdout=0.0, train__micro_batch_size=4, train__accumulation=2,
    )  # fmt: skip
    data = split(config, Index.of([*cats, *dogs]))
    order = data_order(config, data)
    assert [(phase.first, phase.micro_batches_per_epoch) for phase in order.phases] == [(0, 2), (4, 5)]

    def seen(epoch):
        return sorted(data.train[row].dataset for micro_batch in order.epoch(epoch) for row in micro_batch.rows)

    assert seen(0) == ["cats"] * 8
    assert seen(2) == ["cats"] * 8 + ["dogs"] * 12


def test_the_order_of_the_sections_and_the_place_of_the_images_change_nothing():
    cats = [make_sample(number) for number in range(8)]
    dogs = [make_sample(100 + number, dataset="dogs", target_hw=(64, 72)) for number in range(4)]
    first, second = (
        make_config({"name": "cats", "path": "a"}, {"name": "dogs", "path": "b", "start": "1 epoch"}),
        make_config({"name": "dogs", "path": "d", "start": "1 epoch"}, {"name": "cats", "path": "c"}),
    )
    orders = [
        data_order(config, split(config, Index.of(listed)))
        for config, listed in ((first, [*cats, *dogs]), (second, [*dogs, *cats]))
    ]
    assert [list(orders[0].epoch(epoch)) for epoch in range(3)] == [list(orders[1].epoch(epoch)) for epoch in range(3)]
    identities = [run_identity(config, data_of(config, Index.of([*cats, *dogs]))) for config in (first, second)]
    assert identities[0] == identities[1]


def test_a_plan_counts_epochs_of_whatever_takes_part():
    listed = [make_sample(number) for number in range(8)]
    listed += [make_sample(100 + number, dataset="dogs") for number in range(8)]
    config = make_config(
        "cats", {"name": "dogs", "start": "2 epochs"},
        eval__holdout=0.0, train__micro_batch_size=4, train__duration="3 epochs", checkpoint__every="1 epoch",
    )  # fmt: skip
    order = data_order(config, split(config, Index.of(listed)))
    plan = build_plan(config, order, step=0, position=0, can_evaluate=False)
    assert plan.max_steps == plan.num_micro_batches == 2 + 2 + 4
    assert plan.save.steps == 2  # of the first phase
    assert order.epochs_at(plan.num_micro_batches) == 3


def test_a_run_that_outlives_its_datasets_is_refused():
    config = make_config({"name": "cats", "end": "3 epochs"}, eval__holdout=0.0, train__duration="4 epochs")
    order = data_order(config, split(config, Index.of([make_sample(0)])))
    with pytest.raises(ConfigError, match=r"(?s)from 3 epochs on no dataset takes part.*dataset \"cats\".*to 3 epochs"):
        build_plan(config, order, step=0, position=0, can_evaluate=False)


# ---- identity --------------------------------------------------------------------------------------------------------


def identity(*datasets, **overrides):
    config = make_config(*datasets, **overrides)
    listed = [make_sample(number) for number in range(8)]
    return run_identity(config, data_of(config, Index.of(listed)))


@pytest.mark.parametrize(
    ("setting", "value", "text"),
    [
        ("repeats", 3, "role train, repeats 3, weight 1, from the start to the end"),
        ("weight", 0.5, "role train, repeats 1, weight 0.5, from the start to the end"),
        ("end", "2 epochs", "role train, repeats 1, weight 1, from the start to 2 epochs"),
        ("tag_separator", ";", "role train, repeats 1, weight 1, from the start to the end, tag_separator ';'"),
        ("trigger_word", "ohwx", "role train, repeats 1, weight 1, from the start to the end, trigger_word 'ohwx'"),
    ],
)
def test_a_datasets_settings_are_part_of_a_runs_identity_in_words(setting, value, text):
    before, after = identity("cats"), identity({"name": "cats", setting: value})
    assert {key for key in after if before.get(key) != after[key]} == {'dataset "cats"'}
    assert after['dataset "cats"'] == text


def test_settings_of_reading_are_not(tmp_path):
    before = identity("cats")
    assert identity({"name": "cats", "path": "elsewhere/cats", "max_unreadable": 0.5}) == before
    assert json.dumps(before)  # it is kept in the checkpoint's state.json


def test_the_number_of_workers_is_part_of_it_where_a_border_is_in_steps():
    def changed(**section):
        few = identity({"name": "cats", **section}, train__num_workers=1)
        many = identity({"name": "cats", **section}, train__num_workers=2)
        return {key: many[key] for key in many if few.get(key) != many[key]}

    assert changed() == changed(end="9 epochs") == {}
    assert changed(end="9 steps") == {"train.num_workers x train.accumulation (a dataset starts or ends at a step)": 2}


def test_a_dataset_more_or_less_is_another_run():
    assert identity("cats")["datasets"] == "cats"
    assert identity("dogs", "cats")["datasets"] == "cats, dogs"
