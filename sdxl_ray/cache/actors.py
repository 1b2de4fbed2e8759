"""What Ray Data runs on the nodes: scan and decode tasks, encoding actors. Plain callables, no Ray in here.

Errors travel as rows: raised inside an actor they would come back wrapped three times, and one raised in a constructor
would be tried again and again. `raise_error` on the driver makes of such a row what it was.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdxl_ray import errors
from sdxl_ray.cache.images import UnreadableImage, load_pixels
from sdxl_ray.cache.planning import TextShard
from sdxl_ray.cache.scan import ScannedFile, scan_file
from sdxl_ray.cache.shards import write_shard
from sdxl_ray.errors import CacheError, SdxlRayError
from sdxl_ray.records import ImageRecord

if TYPE_CHECKING:
    import torch

    from sdxl_ray.cache.encode import LatentEncoder, TextEncoder


# ---- scan ------------------------------------------------------------------------------------------------------------


class ScanChunk:
    """Ray Data task: some files of the list that the driver made."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        scanned = [
            asdict(scan_file((path, size, mtime), self.max_pixels)) for path, size, mtime in json.loads(row["files"])
        ]
        return {"scanned": json.dumps(scanned), "node": socket.gethostname()}


def scanned_files(row: Mapping[str, Any], max_pixels: int) -> list[ScannedFile]:
    """The files of one row of `ScanChunk`, on the driver.

    Raises:
        CacheError: the node cannot read a file that the driver can. What neither can read is skipped like any other.
    """
    files = [ScannedFile(**item) for item in json.loads(row["scanned"])]
    for number, file in enumerate(files):
        if file.problem.startswith("cannot be read"):
            files[number] = scan_file(file.identity, max_pixels)
            if not files[number].problem.startswith("cannot be read"):
                raise _unreadable_on_node(row["node"], file.path, file.problem.removeprefix("cannot be read: "))
    return files


def _unreadable_on_node(node: str, path: str, reason: str) -> CacheError:
    return CacheError(
        f"node {node} cannot read {path}: {reason}. Is dataset.path the same folder on all machines, and allowed to "
        "the user that Ray runs as?"
    )


# ---- text ------------------------------------------------------------------------------------------------------------


class WriteTextShard:
    """Ray Data actor: captions of one shard to embeddings, written."""

    def __init__(self, *, cache: str, fingerprint: str, device: str = "cpu", **encoder: Any) -> None:
        self.cache, self.fingerprint, self.device, self.settings = Path(cache), fingerprint, device, encoder
        self.encoder: TextEncoder | None = None  # loaded with the first shard, where errors can travel as rows

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        shard = TextShard(**json.loads(str(batch["shard"][0])))
        try:
            self.encoder = self.encoder or self._load()
            tensors, num_tokens = self.encoder.encode(shard.captions)
            extra = {"encoder": self.fingerprint, "num_tokens": json.dumps(num_tokens)}
            write_shard(self.cache, shard.name, shard.keys, tensors, extra)
        except SdxlRayError as error:
            return _row(0, error=error_text(error))
        return _row(len(shard.keys))

    def _load(self) -> TextEncoder:
        from sdxl_ray.cache.encode import TextEncoder, loading

        settings = {name: value for name, value in self.settings.items() if name != "dtype"}
        device = torch_device(self.device)
        with loading("the text encoders", device):
            return TextEncoder(device=device, **settings)


# ---- images: decode on CPUs, encode where there is an accelerator ----------------------------------------------------


def decode_shard(row: dict[str, Any]) -> dict[str, Any]:
    """Ray Data task: the pixels of one shard, (N, H, W, 3) uint8; N is smaller where images are damaged.

    An image that is damaged is skipped. One that this node cannot read is an error: the driver has read it.
    """
    shard = json.loads(str(row["shard"]))
    pixels: list[np.ndarray] = []
    header: dict[str, Any] = {"name": shard["name"], "keys": [], "paths": [], "skipped": [], "error": ""}
    for key, fields in zip(shard["keys"], shard["records"], strict=True):
        record = _record(fields)
        try:
            pixels.append(load_pixels(record))
        except UnreadableImage as error:
            header["skipped"].append({"path": record.path, "reason": str(error)})
            continue
        except OSError as error:
            reason = error.strerror or str(error)
            header["error"] = error_text(_unreadable_on_node(socket.gethostname(), record.path, reason))
            pixels.clear()
            break
        header["keys"].append(key)
        header["paths"].append(record.path)
    height, width = shard["records"][0]["bucket_hw"]
    stacked = np.stack(pixels) if pixels else np.zeros((0, height, width, 3), np.uint8)
    return {"header": json.dumps(header), "pixels": stacked}


class WriteLatentShard:
    """Ray Data actor: pixels of one shard to the VAE's posterior, written."""

    def __init__(self, *, cache: str, fingerprint: str, device: str = "cpu", **encoder: Any) -> None:
        self.cache, self.fingerprint, self.device, self.settings = Path(cache), fingerprint, device, encoder
        self.encoder: LatentEncoder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        header = json.loads(str(batch["header"][0]))
        if header["error"]:
            return _row(0, error=header["error"])
        if header["keys"]:
            try:
                self.encoder = self.encoder or self._load()
                tensors = self.encoder.encode(list(batch["pixels"][0]), header["paths"])
                write_shard(self.cache, header["name"], header["keys"], tensors, {"encoder": self.fingerprint})
            except SdxlRayError as error:
                return _row(0, error=error_text(error))
        return _row(len(header["keys"]), skipped=header["skipped"])

    def _load(self) -> LatentEncoder:
        from sdxl_ray.cache.encode import LatentEncoder, loading

        device = torch_device(self.device)
        with loading("the VAE", device):
            return LatentEncoder(device=device, **self.settings)


def _record(fields: dict[str, Any]) -> ImageRecord:
    pairs = {name: tuple(fields[name]) for name in ("original_hw", "bucket_hw", "resized_hw", "crop_top_left")}
    return ImageRecord(fields["path"], fields["image_hash"], captions=tuple(fields["captions"]), **pairs)


# ---- shared by text and images ---------------------------------------------------------------------------------------


def torch_device(kind: str) -> torch.device:
    """The device that was reserved: "cuda" (which is also what ROCm calls itself), "cpu", or "mps" if there is one.

    Raises:
        CacheError: Ray gave a GPU, but torch has none. On the CPU it would be a hundred times slower without a word.
    """
    import torch

    if kind == "cuda":
        if not torch.cuda.is_available():
            raise CacheError(
                f"node {socket.gethostname()} has a GPU for Ray, but torch {torch.__version__} cannot use it. Install "
                'a torch build for this GPU there; or encode on CPUs with cluster.accelerator = "cpu".'
            )
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if kind == "mps" and torch.backends.mps.is_available() else "cpu")


def _row(num: int, *, skipped: Sequence[Any] = (), error: str = "") -> dict[str, Any]:
    return {"num": np.array([num]), "skipped": np.array([json.dumps(list(skipped))]), "error": np.array([error])}


def error_text(error: SdxlRayError) -> str:
    """An error as part of a row."""
    return json.dumps([type(error).__name__, str(error), socket.gethostname()])


def raise_error(text: str) -> None:
    """Nothing if there was none; else raise it as the kind it was, with its node where that is another machine."""
    if not text:
        return
    name, message, node = json.loads(text)
    kind = getattr(errors, name, CacheError)
    raise kind(message if node == socket.gethostname() or node in message else f"on node {node}: {message}")
