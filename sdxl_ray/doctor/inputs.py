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

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config

_TEXT_BYTES = 77 * 2048 * 2 + 1280 * 2  # bf16 prompt_embeds and pooled_prompt_embeds of one caption
_LITTLE_SPACE = 5 * GIB


def disk_space(config: Config | None = None) -> list[Finding]:
    """Free space where the run and the cache go, against what the cache will need."""
    if config is None:
        return [_space("disk", Path.cwd(), 0)]
    num_images = _count_images(config)
    return [
        _space("disk for runs", Path(config.run.output), 0),
        _space(
            "disk for cache", Path(config.cache.path), num_images * cache_bytes_per_image(config.dataset.resolution)
        ),
    ]


def cache_bytes_per_image(resolution: int) -> int:
    """Mean and standard deviation of the latent and one caption's embeddings, all bf16: 566.5 KiB at 1024²."""
    return 2 * 4 * (resolution // 8) ** 2 * 2 + _TEXT_BYTES


def _space(subject: str, path: Path, needed: int) -> Finding:
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    text = f"{free / GIB:.1f} GiB free at {path}"
    if needed:
        text += f"; the whole cache of this dataset takes about {needed / GIB:.2f} GiB, less what is there already"
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
    """Whether the folder is there and has images. Captions are `sdxl-ray check`'s."""
    from sdxl_ray.cache.scan import list_images

    try:
        num_images = len(list_images(config.dataset.path))
    except SdxlRayError as error:
        return [Finding("dataset", "problem", str(error))]
    return [Finding("dataset", "ok", f"{num_images} images in {config.dataset.path}")]


def output_folders(config: Config) -> list[Finding]:
    """Whether results can be written. Nothing is created."""
    return [_writable("run.output", Path(config.run.output)), _writable("cache.path", Path(config.cache.path))]


def _writable(key: str, path: Path) -> Finding:
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        return Finding(key, "problem", f"{existing} is a file, expected a folder", f"Choose another {key}.")
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding(key, "problem", f"{existing} is not writable", f"Change its owner, or choose another {key}.")
    return Finding(key, "ok", f"{path} is writable" if path.exists() else f"{path} can be created")


def _count_images(config: Config) -> int:
    from sdxl_ray.cache.scan import list_images

    try:
        return len(list_images(config.dataset.path))
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
