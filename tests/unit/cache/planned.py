"""Images, plans of them, and a stand-in for the encoders: what tests of collection, planning and upkeep share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from sdxl_ray.cache.foreseen import index_tables
from sdxl_ray.cache.index import Index
from sdxl_ray.cache.planning import CachePlan, plan_cache
from sdxl_ray.cache.shards import write_shard
from sdxl_ray.config.load import config_from_dict, with_overrides
from sdxl_ray.records import EncodedSample


def add_image(
    folder: Path, name: str, *, size: tuple[int, int] = (80, 60), colour: int = 0, caption: str | None = None
) -> Path:
    """An image of its own colour, (width, height), with a caption file."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour % 256, colour // 256, 7)).save(path, "PNG")
    path.with_suffix(".txt").write_text(caption or f"caption of {path.name}", encoding="utf-8")
    return path


def add_images(folder: Path, num: int = 20, *, colour: int = 0) -> Path:
    """Of three shapes in turn; the folder."""
    for number in range(num):
        add_image(folder, f"{number:02d}.png", size=[(80, 60), (60, 80), (64, 64)][number % 3], colour=colour + number)
    return folder


def config_of(tmp_path: Path, model: str, *folders: Path, **dataset: Any) -> Any:
    """Small buckets; keys of `dataset` are those of its section, for all of them."""
    sections = [{"path": str(folder), "resolution": 64, "bucket_step": 8, **dataset} for folder in folders]
    return config_from_dict({"model": {"path": model}, "dataset": sections, "cache": {"path": str(tmp_path / "cache")}})


def changed(config: Any, **changes: Any) -> Any:
    """Keys have `__` for the dot."""
    return with_overrides(config, {key.replace("__", "."): value for key, value in changes.items()})


def plan_of(config: Any, **changes: Any) -> CachePlan:
    """With one validation prompt."""
    config = changed(config, **changes)
    return plan_cache(config.datasets, config.model, config.cache, model_path=config.model.path, prompts=["draw a cat"])


def fill(plan: CachePlan) -> None:
    """Stands in for the encoders: writes every missing shard."""
    folder = plan.store.folder
    for shard in plan.latent_shards():
        write_shard(folder, shard.name, shard.keys, {"mean": torch.zeros(len(shard.keys), 4)}, {})
    for shard in plan.text_shards():
        write_shard(folder, shard.name, shard.keys, {"prompt_embeds": torch.zeros(len(shard.keys), 4)}, {})


def missing(plan: CachePlan) -> tuple[int, int]:
    return plan.num_missing_latents, plan.num_missing_text


def samples_of(plan: CachePlan) -> list[EncodedSample]:
    """As the index will have them."""
    tables = list(index_tables(plan))
    if not tables:
        return []
    index = Index(pa.concat_tables(tables))
    return [index[row] for row in range(len(index))]


def name_of(item: Any) -> str:
    """Of a sample's or a skipped image's file."""
    return Path(item.path).name


def by_name(plan: CachePlan) -> dict[str, EncodedSample]:
    """Its samples; of those of one image the last."""
    return {name_of(sample): sample for sample in samples_of(plan)}
