"""What a run reads and writes: model, dataset, folders, the Hub, trackers."""

from __future__ import annotations

import contextlib
import netrc
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_ray.doctor.finding import GIB, Finding
from sdxl_ray.errors import SdxlRayError
from sdxl_ray.storage import local_path, open_folder

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config, DatasetSection

_LITTLE_SPACE = 5 * GIB


def disk_space(config: Config | None = None) -> list[Finding]:
    """Free space where the run and the cache go, against what the cache will need. A cloud address has no end."""
    if config is None:
        return [_space("disk", Path.cwd(), 0)]
    findings = [_space("disk for runs", Path(config.run.output), 0)]
    cache = local_path(config.cache.path)
    if cache is not None:
        needed = sum(_count_images(dataset) * cache_bytes_per_image(dataset, config) for dataset in config.datasets)
        findings.append(_space("disk for cache", cache, needed))
    return findings


def cache_bytes_per_image(dataset: DatasetSection, config: Config) -> int:
    """Mean and standard deviation of each latent and the embeddings of one caption, all bf16: 566.5 KiB at 1024²."""
    cache = config.cache
    latents = sum(2 * 4 * (round(edge) // 8) ** 2 * 2 for edge in dataset.edges)
    latents *= dataset.crop_variants * (2 if dataset.flip else 1)
    chunk, pooled = 77 * 2048 * 2, 1280 * 2
    text = dataset.caption_variants * (cache.caption_chunks * chunk + pooled)
    return (0 if cache.mode == "off" else latents) + (0 if cache.text == "online" else text)


def _space(subject: str, path: Path, needed: int) -> Finding:
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    text = f"{free / GIB:.1f} GiB free at {path}"
    if needed:
        text += f"; the whole cache of these images takes about {needed / GIB:.2f} GiB, less what is there already"
    if free < max(needed, GIB):
        return Finding(subject, "problem", text, "Free some space, or choose another run.output and cache.path.")
    if free < needed + _LITTLE_SPACE:
        return Finding(subject, "note", text + "; little is left for checkpoints and images")
    return Finding(subject, "ok", text)


def base_model(config: Config) -> list[Finding]:
    """Whether model.path can be loaded: a whole folder, or a Hub id that is cached or can be fetched."""
    from sdxl_ray.sdxl.components import resolve_model
    from sdxl_ray.sdxl.hub import is_local

    try:
        resolved = resolve_model(config.model.path)
    except SdxlRayError as error:
        return [Finding("model", "problem", str(error))]
    if is_local(resolved):
        return [Finding("model", "ok", f"{config.model.path}: complete, at {resolved}")]
    from huggingface_hub import constants, try_to_load_from_cache

    revision = config.model.revision or None
    if isinstance(try_to_load_from_cache(resolved, "unet/config.json", revision=revision), str):
        return [Finding("model", "ok", f"{resolved}: in the Hub's local cache, at least in part")]
    if constants.HF_HUB_OFFLINE:
        cure = f"hf download {resolved} while online, or unset HF_HUB_OFFLINE"
        return [
            Finding("model", "problem", f"{resolved} is not in the Hub's local cache, and HF_HUB_OFFLINE is set", cure)
        ]
    return [Finding("model", "note", f"{resolved} is not in the Hub's local cache: the first run fetches it")]


def dataset(config: Config) -> list[Finding]:
    """Whether each dataset is there and has images. Captions are `sdxl-ray check`'s."""
    from sdxl_ray.cache.sources import list_dataset

    findings = []
    for section in config.datasets:
        subject = "dataset" if len(config.datasets) == 1 else f"dataset {section.name}"
        try:
            num_images = sum(1 for _ in list_dataset(section))
        except SdxlRayError as error:
            findings.append(Finding(subject, "problem", str(error)))
        else:
            findings.append(Finding(subject, "ok", f"{num_images} images in {section.path}"))
    return findings


def output_folders(config: Config) -> list[Finding]:
    """Whether results can be written. Nothing is created."""
    cache = local_path(config.cache.path)
    return [
        _writable("run.output", Path(config.run.output)),
        _writable("cache.path", cache) if cache is not None else _cloud_cache(config.cache.path),
    ]


def _writable(key: str, path: Path) -> Finding:
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        return Finding(key, "problem", f"{existing} is a file, expected a folder", f"Choose another {key}.")
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding(key, "problem", f"{existing} is not writable", f"Change its owner, or choose another {key}.")
    return Finding(key, "ok", f"{path} is writable" if path.exists() else f"{path} can be created")


def _cloud_cache(address: str) -> Finding:
    try:
        num_files = len(open_folder(address).list())
    except SdxlRayError as error:
        return Finding("cache.path", "problem", str(error))
    return Finding("cache.path", "ok", f"{address} is a cloud address and can be listed: {num_files} files")


def _count_images(dataset: DatasetSection) -> int:
    from sdxl_ray.cache.sources import list_dataset

    try:
        return sum(1 for _ in list_dataset(dataset))
    except SdxlRayError:
        return 0  # `dataset` says why


def hub() -> list[Finding]:
    """How the base model will be fetched. The token is not shown."""
    from huggingface_hub import constants, get_token

    token = "a token" if get_token() else "no token (needed for gated and private models only: hf auth login)"
    text = f"{token}; cache {constants.HF_HUB_CACHE}"
    if "HF_ENDPOINT" in os.environ:
        text += f"; HF_ENDPOINT={constants.ENDPOINT}"
    if constants.HF_HUB_OFFLINE:
        return [
            Finding(
                "hub", "note", f"HF_HUB_OFFLINE is set: nothing is fetched; {text}", "unset HF_HUB_OFFLINE to fetch"
            )
        ]
    return [Finding("hub", "ok", text)]


def wandb_login(config: Config) -> list[Finding]:
    """Looked at only where the config sends metrics there."""
    if not config.tracking.wandb_project:
        return []
    try:
        version = metadata.version("wandb")
    except metadata.PackageNotFoundError:
        return [
            Finding(
                "wandb", "problem", "tracking.wandb_project is set, wandb is missing", 'pip install "sdxl-ray[wandb]"'
            )
        ]
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return [Finding("wandb", "note", f"wandb {version}, WANDB_MODE={os.environ['WANDB_MODE']}: nothing is sent")]
    if os.environ.get("WANDB_API_KEY") or _has_netrc_login("api.wandb.ai"):
        return [Finding("wandb", "ok", f"wandb {version}, logged in")]
    cure = "wandb login, or set WANDB_API_KEY; on a cluster for the machine of rank 0"
    return [Finding("wandb", "problem", f"wandb {version}, not logged in", cure)]


def _has_netrc_login(host: str) -> bool:
    """Where `wandb login` puts the key."""
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(str(path)).authenticators(host) is not None
    return False
