"""Images and cache in a bucket, through the command line, with a Ray that inherits the environment's keys."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdxl_ray.config.load import dump_config, with_overrides
from sdxl_ray.train.launch import fit
from tests.s3 import BUCKET, answering, filesystem, moto_server, s3_error

from .conftest import assert_same_training, small_config
from .test_cli import sdxl_ray
from .test_datasets import write_folder

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Address of an S3 server."""
    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture
def in_bucket(tmp_path, bucket, tiny_model, monkeypatch):
    """(config, its file): images and cache on S3."""
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": bucket}.items():
        monkeypatch.setenv(name, value)  # of the commands that are started from here
    drawings = write_folder(tmp_path / "drawings", range(12))
    store = filesystem(bucket)
    for path in drawings.iterdir():
        with store.open_output_stream(f"{BUCKET}/{tmp_path.name}/drawings/{path.name}") as file:
            file.write(path.read_bytes())
    address = f"s3://{BUCKET}/{tmp_path.name}"
    return config_of(tmp_path, tiny_model, f"{address}/drawings", f"{address}/cache")


def config_of(folder: Path, model: str, images: str, cache: str, name: str = "cloud"):
    config = small_config(
        folder / "runs",
        Path("unused"),
        name,
        model,
        dataset=[{"path": images, "resolution": 64, "bucket_step": 16, "flip": True}],
        cache={"path": cache, "local_path": str(folder / "copies"), "batch_size": 1, "local_gib": 2e-5},
        train={"duration": "2 epochs", "num_workers": 1},
        export={"formats": ["kohya"]},
    )
    (folder / f"{name}.toml").write_text(dump_config(config))
    return config, folder / f"{name}.toml"


def objects(bucket: str, folder: str) -> dict[str, int]:
    """name -> size of what is in a folder of the bucket."""
    from pyarrow import fs

    found = filesystem(bucket).get_file_info(
        fs.FileSelector(f"{BUCKET}/{folder}", recursive=True, allow_not_found=True)
    )
    return {info.path.removeprefix(f"{BUCKET}/{folder}/"): info.size for info in found if info.is_file}


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_run_from_a_bucket_with_its_cache_in_a_bucket_is_the_run_from_a_disk(in_bucket, bucket, tmp_path):
    config, settings = in_bucket
    done = sdxl_ray("train", str(settings), timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "encoded 24 images and 25 captions" in done.stdout
    stored = objects(bucket, f"{tmp_path.name}/cache")
    shards = {name: size for name, size in stored.items() if name.endswith(".safetensors")}
    assert {"scan.parquet", "texts.parquet"} <= set(stored)
    assert sum(name.startswith("latents/") for name in shards) > 1
    run = tmp_path / "runs" / "cloud"
    (index,) = (name for name in stored if name.endswith("index.parquet"))
    for name in ("index.parquet", "manifest.json"):
        with filesystem(bucket).open_input_stream(
            f"{BUCKET}/{tmp_path.name}/cache/{index}".replace("index.parquet", name)
        ) as file:
            assert (run / "data" / name).read_bytes() == file.read()
    copies = {path.name: path.stat().st_size for path in (tmp_path / "copies").glob("**/*.safetensors")}
    assert copies
    assert copies.items() <= {Path(name).name: size for name, size in shards.items()}.items()

    again = sdxl_ray("cache", str(settings), timeout=120)
    assert again.returncode == 0, again.stderr
    assert "nothing to encode: all of it was there" in again.stdout
    stats = sdxl_ray("cache", str(settings), "--stats")
    assert ["all", "49"] in [line.split()[:2] for line in stats.stdout.splitlines()]

    on_disk, _ = config_of(
        tmp_path, config.model.path, str(tmp_path / "drawings"), str(tmp_path / "cache"), name="on_disk"
    )
    assert_same_training(run, fit(on_disk).run_folder)


def test_a_bucket_that_denies_is_one_clear_error(tmp_path, tiny_model, monkeypatch):
    """Of the images, and of the cache; before anything is encoded."""
    write_folder(tmp_path / "drawings", range(3))
    with answering(lambda *request: s3_error(403, "AccessDenied", "Access Denied")) as (address, _):
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        for name, images, cache in (
            ("images", "s3://private/drawings", str(tmp_path / "cache")),
            ("cache", str(tmp_path / "drawings"), "s3://private/cache"),
        ):
            _, settings = config_of(tmp_path, tiny_model, images, cache, name=name)
            started = time.monotonic()
            done = sdxl_ray("cache", str(settings))
            assert done.returncode == 1, done.stdout + done.stderr
            assert time.monotonic() - started < 30
            (line,) = (line for line in done.stderr.splitlines() if "error:" in line)
            assert "s3://private/" in line
            assert "access denied" in line
            assert "AWS_ACCESS_KEY_ID" in done.stderr
            assert "Traceback" not in done.stderr
            assert "testing" not in done.stderr.replace(str(tmp_path), "")  # no key in any message


@pytest.mark.slow
def test_a_bucket_that_takes_no_shards_ends_encoding_with_its_error(in_bucket, bucket, tmp_path, monkeypatch):
    """Denied in the encoder's process, where the error has to find its way back."""
    config, _ = in_bucket
    denied = []
    readable = b'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>'

    def answer(number: int, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        if method in ("PUT", "POST") and any(folder in path for folder in ("/latents/", "/text/")):
            denied.append(path)
            return s3_error(403, "AccessDenied", "Access Denied")
        if method == "PUT":
            return 200, {"ETag": '"0"'}, b""
        if method == "GET" and "list-type" in path:
            return 200, {"Content-Type": "application/xml"}, readable
        if path.strip("/") == "private":
            return 200, {}, b""
        return s3_error(404, "NoSuchKey", "The specified key does not exist.")

    with answering(answer) as (address, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        readonly = with_overrides(
            config, {"cache.path": "s3://private/cache", "dataset.path": str(tmp_path / "drawings")}
        )
        settings = tmp_path / "readonly.toml"
        settings.write_text(dump_config(readonly))
        done = sdxl_ray("cache", str(settings), timeout=200)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "access denied" in done.stderr
    assert "s3://private/cache" in done.stderr
    assert "Traceback" not in done.stderr
    assert denied
