"""When encoding happens changes nothing about what is trained: cache.mode, cache.text, damaged entries, failures."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from sdxl_ray.cache.jobs import ray_jobs
from sdxl_ray.cache.jobs.pools import share_cluster
from sdxl_ray.cache.pipeline import build_cache
from sdxl_ray.config.load import dump_config, with_overrides
from sdxl_ray.errors import ClusterError, ModelError
from sdxl_ray.train.launch import FitResult, fit
from tests.s3 import answering

from .conftest import assert_same_training, flip_a_bit, must_not_connect, read_all, small_config
from .test_datasets import image_bytes, write_folder

pytestmark = pytest.mark.usefixtures("local_ray")

NUM_LATE = 8


class Web:
    """A server with eight images, which can be told to keep everybody waiting."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.go_on.set()
        self.asked = 0

    def answer(self, number: int, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked += 1
        self.go_on.wait(120)
        content = image_bytes(int(Path(path).stem))
        return 200, {"Content-Length": str(len(content))}, content


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Encoders take the cores that training leaves, and sums over two threads round differently than over one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_jobs, "share_cluster", lambda *args, **kw: replace(share_cluster(*args, **kw), threads=1))
        yield


# The same for a driver in a process of its own.
ONE_THREAD = """
from dataclasses import replace
from sdxl_ray.__main__ import main
from sdxl_ray.cache.jobs import pools, ray_jobs
ray_jobs.share_cluster = lambda *args, **kw: replace(pools.share_cluster(*args, **kw), threads=1)
main()
"""


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    server = Web()
    with answering(server.answer) as (address, _):
        server.address = address
        yield server


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model, web):
    """A folder that is needed at once, and images behind URLs that are needed from the second epoch on."""
    folder = tmp_path_factory.mktemp("modes")
    write_folder(folder / "drawings", range(10))
    with (folder / "late.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "caption", "height", "width"))
        rows.writerows((f"{web.address}/{n}.png", f"seen late, {n}", 80, 80) for n in range(50, 50 + NUM_LATE))
    write_folder(folder / "held_out", range(40, 42))
    plain = {"resolution": 64, "bucket_step": 32}
    return small_config(
        folder / "runs",
        folder / "cache",
        "disk",
        tiny_model,
        dataset=[
            {"path": str(folder / "drawings"), "flip": True, **plain},
            {"path": str(folder / "late.csv"), "start": "1 epochs", **plain},
            {"path": str(folder / "held_out"), "role": "eval", **plain},
        ],
        cache={"batch_size": 1},  # so that encoding an image once more gives the same bits
        train={"duration": "2 epochs", "num_workers": 1},
        eval={"every": "1 epochs"},
        export={"formats": ["kohya"]},
    )


@pytest.fixture(scope="module")
def disk(config) -> FitResult:
    return fit(config)


def another(config, folder: Path, name: str, **cache):
    """The same run by another name, with a cache of its own."""
    changes = {f"cache.{key}": value for key, value in cache.items()}
    return with_overrides(config, {"run.name": name, "cache.path": str(folder / "cache"), **changes})


@pytest.mark.slow
def test_on_demand_training_starts_before_encoding_ends_and_comes_to_the_same(config, disk, web, tmp_path):
    """The images of the second epoch are kept back until the first step is done."""
    config = another(config, tmp_path, "ondemand", mode="ondemand")
    images: list[tuple[int, int]] = []
    at_first_step: list[tuple[int, int]] = []

    def watch(event):
        if event["event"] == "progress" and event["stage"] == "images":
            images.append((event["done"], event["total"]))
        if event["event"] == "metrics" and event["step"] == 1:
            at_first_step.append(images[-1])
            web.go_on.set()

    web.go_on.clear()
    result = fit(config, on_event=watch)
    total = 20 + NUM_LATE + 2
    assert at_first_step and at_first_step[0][0] <= total - NUM_LATE
    assert images[-1] == (total, total)
    assert_same_training(result.run_folder, disk.run_folder)

    latents, _ = read_all(config.cache.path, str(result.run_folder / "data" / "index.parquet"))
    assert latents == total
    for mode in ("ondemand", "disk"):
        again = build_cache(with_overrides(config, {"cache.mode": mode}), connect=must_not_connect)
        assert (again.num_latents_encoded, again.num_captions_encoded, again.background) == (0, 0, None)


@pytest.mark.slow  # unit tests hold the same without Ray
def test_without_a_cache_and_with_captions_encoded_online_it_comes_to_the_same(config, disk, tmp_path):
    config = another(config, tmp_path, "off", mode="off", text="online")
    result = fit(config)
    assert_same_training(result.run_folder, disk.run_folder)
    shards = {path.parent.name for path in Path(config.cache.path).glob("**/*.safetensors")}
    assert shards <= {"text"}  # the empty prompt at most


@pytest.mark.slow
def test_damaged_entries_are_encoded_on_the_spot_with_the_same_losses(config, disk, tmp_path):
    """A flipped bit in every shard. The run says so, and the next `sdxl-ray cache` encodes these entries only."""
    config = another(config, tmp_path, "repaired")
    cache = Path(shutil.copytree(Path(disk.run_folder).parent.parent / "cache", config.cache.path))
    shards = [path.relative_to(cache).as_posix() for path in cache.glob("**/*.safetensors")]
    for shard in shards:
        flip_a_bit(cache / shard)
    lines = []
    result = fit(config, on_event=lambda event: lines.append(event.get("text", "")))
    assert_same_training(result.run_folder, disk.run_folder)
    told = [line for line in lines if "is damaged (checksum" in line]
    assert told
    assert all("For this run it is encoded anew" in line for line in told)
    named = {shard for shard in shards if any(shard in line for line in told)}
    assert len(named) == len(told)
    assert {path.relative_to(cache).as_posix() for path in cache.glob("**/*.damaged")} == {
        f"{shard}.damaged" for shard in named
    }
    again = build_cache(config)
    assert again.num_latents_encoded + again.num_captions_encoded == len(told)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "text"), [("off", "cached"), ("ondemand", "online"), ("disk", "online")])
def test_every_other_combination_comes_to_the_same(config, disk, tmp_path, mode, text):
    result = fit(another(config, tmp_path, f"{mode}-{text}", mode=mode, text=text))
    assert_same_training(result.run_folder, disk.run_folder)


@pytest.mark.slow
def test_encoding_that_fails_ends_the_run_with_its_error(config, tmp_path):
    """The VAE is cut short once everything is planned, as on a node to which the model was not copied whole."""
    model = Path(shutil.copytree(config.model.path, tmp_path / "model"))
    config = with_overrides(another(config, tmp_path, "broken", mode="ondemand"), {"model.path": str(model)})

    def spoil(event):
        if event["event"] == "cache":
            weights = model / "vae" / "diffusion_pytorch_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(ModelError, match=r"model/vae"):
        fit(config, on_event=spoil)


@pytest.mark.slow
def test_an_image_that_is_gone_before_it_is_encoded_counts_nothing_and_the_run_goes_on(config, tmp_path):
    folder = Path(shutil.copytree(config.datasets[0].path, tmp_path / "drawings"))
    config = another(config, tmp_path, "gone", mode="ondemand")
    config = with_overrides(config, {"dataset.drawings.path": str(folder)})
    heard = []

    def remove(event):
        heard.append(event.get("text", ""))
        if event["event"] == "cache":
            (folder / "04.png").unlink()

    assert fit(config, on_event=remove).exports
    told = [line for line in heard if "04.png" in line]
    assert any("does not count in training" in line for line in told)
    assert any("is not there any more" in line for line in told)


@pytest.mark.slow
def test_an_image_with_damaged_pixels_counts_nothing_and_the_run_goes_on(config, tmp_path):
    folder = Path(shutil.copytree(config.datasets[0].path, tmp_path / "drawings"))
    content = (folder / "04.png").read_bytes()
    (folder / "04.png").write_bytes(content[: len(content) // 2])  # its header is whole
    config = with_overrides(config, {"dataset.drawings.path": str(folder), "dataset.drawings.flip": False})
    results, lines = {}, {}
    for mode in ("ondemand", "off"):
        heard = lines[mode] = []
        results[mode] = fit(
            another(config, tmp_path / mode, f"damaged-{mode}", mode=mode),
            on_event=lambda event, heard=heard: heard.append(event.get("text", "")),
        )
    assert_same_training(results["off"].run_folder, results["ondemand"].run_folder)
    for heard in lines.values():
        told = [line for line in heard if "04.png" in line]
        assert any("does not count in training" in line for line in told)
        assert any("cannot be decoded" in line for line in told)

    # With mode = "disk" it is left out before training.
    again = build_cache(another(config, tmp_path / "ondemand", "later"))
    assert again.num_latents_encoded == 0
    assert [(Path(item.path).name, "cannot be decoded" in item.reason) for item in again.skipped] == [("04.png", True)]


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was_with_what_was_encoded(config, disk, web, tmp_path):
    """kill -9 of the driver, its Ray and its workers in the second epoch, while half of the images are missing."""
    config = with_overrides(another(config, tmp_path, "killed", mode="ondemand"), {"checkpoint.every": "2 steps"})
    settings = tmp_path / "killed.toml"
    settings.write_text(dump_config(config))
    web.go_on.clear()
    driver = subprocess.Popen(
        [sys.executable, "-c", ONE_THREAD, "train", str(settings)],
        env={**os.environ, "RAY_ADDRESS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    alarm = threading.Timer(200, os.killpg, (driver.pid, signal.SIGKILL))
    alarm.start()
    try:
        for line in driver.stdout:
            if line.startswith("saved: checkpoint of step 4"):
                break
    finally:
        alarm.cancel()
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, 30)
        driver.wait()
        web.go_on.set()
    checkpoints = sorted((Path(config.run.output) / "killed" / "checkpoints").glob("step_*"))
    assert checkpoints, "no checkpoint in 200 s"
    encoded = {path.name: path.stat().st_mtime_ns for path in Path(config.cache.path).glob("**/*.safetensors")}
    assert encoded
    starts = []
    result = fit(
        config,
        resume=True,
        on_event=lambda event: starts.append(event["step"]) if event["event"] == "started" else None,
    )
    assert starts == [int(checkpoints[-1].name.removeprefix("step_"))]
    assert_same_training(result.run_folder, disk.run_folder)
    now = {path.name: path.stat().st_mtime_ns for path in Path(config.cache.path).glob("**/*.safetensors")}
    assert encoded.items() < now.items()


def test_without_a_core_to_spare_encoding_on_demand_is_refused_at_once(config, tmp_path):
    """Workers on every core would wait for an encoder that waits for a core."""
    import ray

    cores = int(ray.cluster_resources()["CPU"])
    config = with_overrides(another(config, tmp_path, "crowded", mode="ondemand"), {"train.num_workers": cores})
    with pytest.raises(ClusterError, match=r'cache\.mode = "ondemand" needs a CPU core beside the training workers'):
        fit(config)
