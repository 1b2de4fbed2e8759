"""The folder of an index: its name says what is in it."""

import errno
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sdxl_ray.cache import collection, foreseen, generations, tables
from sdxl_ray.cache.generations import begin, finish, in_use
from sdxl_ray.cache.index import Index
from sdxl_ray.cache.planning import _collection_name, drop_undecodable, find_missing, plan_cache
from sdxl_ray.cache.skipped import Skipped
from sdxl_ray.errors import StorageError
from tests.unit.cache.planned import add_image, add_images, config_of, fill, plan_of, samples_of


def finished(config, **changes):
    fill(plan_of(config, **changes))
    plan = plan_of(config, **changes)
    finish(plan)
    return plan


def content(plan):
    """Name -> (date, bytes) of what is in its folder."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(plan.folder.path).iterdir()}


def names(plan):
    return set(content(plan))


# ---- the name --------------------------------------------------------------------------------------------------------


def test_the_same_again_is_the_same_folder_however_it_is_held(config, images, monkeypatch):
    """In pieces, in a memory-mapped file; with shards that came in another order; of another process."""
    plan = finished(config)
    monkeypatch.setattr(foreseen, "PIECE", 3)
    monkeypatch.setattr(collection, "PIECE", 7)
    monkeypatch.setattr(tables, "ROWS_IN_MEMORY", 5)
    assert plan_of(config).folder.path == plan.folder.path
    again = plan_of(config)
    again.store.names.reverse()
    again.store._shards = len(again.store.names) - 1 - again.store._shards
    assert again.folder.path == plan.folder.path
    script = (
        "import json, sys; from sdxl_ray.config.load import config_from_dict; from tests.unit.cache.planned import *\n"
        "print(plan_of(config_from_dict(json.loads(sys.argv[1]))).folder.path)"
    )
    settings = json.dumps(config.model_dump(mode="json", exclude_none=True))
    there = subprocess.run([sys.executable, "-c", script, settings], check=True, capture_output=True, text=True)
    assert there.stdout.strip() == plan.folder.path


def test_whatever_the_index_or_the_manifest_say_makes_another_name(config, images):
    def path(**changes):
        return plan_of(config, **changes).folder.path

    seen = {path(), path(dataset__flip=True), path(cache__caption_chunks=2), path(validation__prompts=["trees"])}
    assert len(seen) == 3  # `plan_of` has prompts of its own
    (images / "00.txt").write_text("another caption")
    seen.add(path())
    add_image(images, "new.png", colour=900)
    seen.add(path())
    for suffix in (".png", ".txt"):
        (images / "01").with_suffix(suffix).rename((images / "renamed").with_suffix(suffix))
    seen.add(path())
    assert len(seen) == 6


def test_what_is_foreseen_has_the_name_of_what_comes_of_it(config):
    before = plan_of(config)
    fill(before)
    assert plan_of(config).folder.path == before.folder.path


def test_a_change_of_the_plan_changes_the_name(config):
    plan = plan_of(config)
    before = plan.folder.path
    drop_undecodable(plan, {samples_of(plan)[0].latent_keys[0]: Skipped("00.png", "cut")})
    find_missing(plan)
    assert plan.folder.path != before


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        (".images", "images"),
        ("..", "dataset"),
        ("写真" * 42, "写真" * 16 + "写"),
        ("a\udcffb", "ab"),
        ("x" * 252, "x" * 100),
        ("cats", "cats"),
    ],
)
def test_names_are_short_and_not_hidden(dataset, name):
    assert _collection_name([dataset]) == name
    assert _collection_name([dataset, "others"]) == f"{name}-and-1"


def test_a_folder_with_a_name_as_long_as_can_be(tmp_path, tiny_model):
    plan = finished(config_of(tmp_path, tiny_model, add_images(tmp_path / f".{'写真' * 42}", 1)))
    assert len(Index.read(plan.index_path)) == 1


# ---- what is written -------------------------------------------------------------------------------------------------


def test_the_index_comes_first_and_the_manifest_last(config):
    plan = plan_of(config)
    assert begin(plan).path == plan.folder.path
    assert names(plan) == {"index.parquet"}
    assert begin(plan_of(config)) is None  # another process, or after an interruption
    assert names(plan) == {"index.parquet", "used"}
    fill(plan)
    finish(plan)
    assert names(plan) == {"index.parquet", "used", "skipped.csv", "manifest.json"}
    manifest = json.loads(Path(plan.folder.path, "manifest.json").read_text())
    assert (manifest["num_samples"], manifest["caption_chunks"]) == (20, 1)
    assert manifest["prompts"].keys() == {"", "draw a cat"}


def test_what_is_there_is_not_written_again_but_gets_a_new_date(config):
    plan = finished(config)
    before = content(plan)
    finish(plan_of(config))
    after = content(plan)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"used"}


@pytest.mark.parametrize("damage", ["cut", "another", "gone", "no manifest"])
def test_what_is_damaged_is_written_anew(config, damage):
    plan = finished(config)
    before = {name: data for name, (_, data) in content(plan).items()}
    path = Path(plan.index_path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    if damage == "another":
        shutil.copy(finished(config, dataset__flip=True).index_path, path)
    if damage == "gone":
        path.unlink()
    if damage == "no manifest":
        path.with_name("manifest.json").unlink()
    finish(plan_of(config))
    assert {name: data for name, (_, data) in content(plan).items()} == before
    assert len(Index.read(path)) == 20


def test_the_list_of_skipped_is_that_of_the_last_run(config, images):
    plan = finished(config)
    (images / "bad.png").write_bytes(b"no image")
    again = finished(config)
    assert again.folder.path == plan.folder.path
    assert b"bad.png" in content(plan)["skipped.csv"][1]


def test_what_has_become_another_index_goes(config):
    plan = plan_of(config)
    begun = begin(plan)
    fill(plan)
    drop_undecodable(plan, {samples_of(plan)[0].latent_keys[0]: Skipped("00.png", "cut")})
    plan.store.refresh()
    find_missing(plan)
    Path(begun.path, "skipped.csv").touch()
    finish(plan, begun)
    assert not Path(begun.path).exists()
    assert names(plan) == {"index.parquet", "skipped.csv", "manifest.json"}


def test_what_another_process_has_finished_stays(config):
    theirs = plan_of(config)
    fill(theirs)
    plan = plan_of(config)
    begun = begin(plan)
    finish(plan_of(config))
    drop_undecodable(plan, {samples_of(plan)[0].latent_keys[0]: Skipped("00.png", "cut")})
    find_missing(plan)
    finish(plan, begun)
    assert {"index.parquet", "manifest.json"} <= {path.name for path in Path(begun.path).iterdir()}


def test_what_another_process_counts_on_stays(config):
    plan = plan_of(config)
    begun = begin(plan)
    assert begin(plan_of(config)) is None  # the other one, which encodes still
    fill(plan)
    drop_undecodable(plan, {samples_of(plan)[0].latent_keys[0]: Skipped("00.png", "cut")})
    plan.store.refresh()
    find_missing(plan)
    finish(plan, begun)
    assert {path.name for path in Path(begun.path).iterdir()} == {"index.parquet", "used"}


def test_jobs_that_begin_and_finish_at_once_do_each_other_no_harm(config):
    fill(plan_of(config))
    errors = []

    def work():
        try:
            plan = plan_of(config)
            begin(plan)
            finish(plan)
        except Exception as error:  # told below
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(Index.read(plan_of(config).index_path)) == 20


def test_a_full_disk_leaves_no_manifest(config, monkeypatch):
    plan = plan_of(config)
    fill(plan)
    plan = plan_of(config)
    replace = Path.replace

    def fail(path, target):
        if target.name == "skipped.csv":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(StorageError, match=r"skipped\.csv: no space left on the device"):
        finish(plan)
    assert names(plan) == {"index.parquet"}


# ---- while it is used ------------------------------------------------------------------------------------------------


def test_what_is_in_use_gets_a_new_date_now_and_then(config, monkeypatch):
    plan = finished(config)
    monkeypatch.setattr(generations, "_MARK_EVERY_S", 0.02)
    used = Path(plan.folder.path, "used")
    with in_use(plan.index_path):
        deadline = time.monotonic() + 10
        while not used.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert used.exists()
    time.sleep(0.1)
    used.unlink()
    time.sleep(0.1)
    assert not used.exists()  # it is over


def test_a_folder_that_is_gone_is_not_made_again(config, monkeypatch):
    plan = finished(config)
    monkeypatch.setattr(generations, "_MARK_EVERY_S", 0.02)
    shutil.rmtree(plan.folder.path)
    with in_use(plan.index_path):
        time.sleep(0.2)
    assert not Path(plan.folder.path).exists()


def test_another_index_alone_makes_another_name(config, images):
    """Two captions exchanged: the manifest says the same, and the prompts lie where they did."""
    fill(plan_of(config))
    before = plan_of(config)
    first, second = (images / "00.txt").read_text(), (images / "01.txt").read_text()
    (images / "00.txt").write_text(second)
    (images / "01.txt").write_text(first)
    after = plan_of(config)
    assert after.content.manifest == before.content.manifest
    assert after.folder.path != before.folder.path


@pytest.mark.parametrize(
    "change",
    [{"repeats": 3}, {"weight": 2.0}, {"end": "5 steps"}, {"crop_epochs": 2}, {"max_unreadable": 0.5}],
    ids=str,
)
def test_what_decides_about_training_alone_makes_no_other_name(config, change):
    """Else each change would leave an index of its own behind."""
    crops = {"dataset__crop": "random", "dataset__crop_variants": 2}
    ((name, value),) = change.items()
    assert plan_of(config, **crops, **{f"dataset__{name}": value}).folder.path == plan_of(config, **crops).folder.path


def test_prompts_in_another_order_make_no_other_name(config):
    """Once they are encoded; before, the shard to come is another."""

    def plan(*prompts):
        return plan_cache(config.datasets, config.model, config.cache, model_path=config.model.path, prompts=prompts)

    fill(plan("trees", "a red house"))
    assert plan("trees", "a red house").folder.path == plan("a red house", "trees").folder.path
