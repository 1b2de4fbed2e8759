"""What Ray Data runs on the nodes: scan and decode tasks, encoding actors. Plain callables, no Ray in here.

What became of a shard travels as a row, its `ShardReport`, and so do errors (reports.py).
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sdxl_ray.cache.images import UnreadableImage
from sdxl_ray.cache.jobs.reports import ShardReport, error_text, unpacked
from sdxl_ray.cache.planning import TextShard, max_tokens
from sdxl_ray.cache.reading import is_web, load_image, not_given, reason_of
from sdxl_ray.cache.scan import ScannedFile, scan_file, scan_images
from sdxl_ray.cache.shards import DAMAGED_SUFFIX, OtherVersion, read_header, write_shard
from sdxl_ray.errors import CacheError, SdxlRayError, StorageError
from sdxl_ray.records import ImageRecord, Listed
from sdxl_ray.storage import join, open_folder, status

if TYPE_CHECKING:
    import torch

    from sdxl_ray.cache.encode import LatentEncoder, TextEncoder

Encoder = TypeVar("Encoder")


# ---- scan ------------------------------------------------------------------------------------------------------------


_READ_AGAIN = 20  # files of one row


class ScanChunk:
    """Ray Data task: some files of the list that the driver made."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        files = listed_from(str(row["files"]))
        scanned = [asdict(scan_file(listed, self.max_pixels, by_listing=trusted)) for listed, trusted in files]
        return {
            "first": row["first"],
            "scanned": json.dumps(scanned),
            "by_listing": json.dumps([trusted for _, trusted in files]),
            "node": socket.gethostname(),
        }


def files_as_row(first: int, files: Sequence[Listed], trusted: Sequence[bool]) -> dict[str, Any]:
    """A work item of `ScanChunk`; `first` is the place of its first file in the list."""
    items = [
        [file.path, file.stamp, file.address, file.original_hw, by_listing]
        for file, by_listing in zip(files, trusted, strict=True)
    ]
    return {"first": first, "files": json.dumps(items)}


def listed_from(text: str) -> list[tuple[Listed, bool]]:
    """What `files_as_row` wrote."""
    return [
        (Listed(path, stamp, address, tuple(original_hw) if original_hw else None), trusted)
        for path, stamp, address, original_hw, trusted in json.loads(text)
    ]


def scanned_files(row: Mapping[str, Any], files: Sequence[Listed], max_pixels: int) -> list[ScannedFile]:
    """The files of one row of `ScanChunk`, on the driver.

    What the node could not read is read here again, at most 20 of them: a network drive may have stumbled. What neither
    can read is skipped like any other.

    Raises:
        CacheError: the node cannot read more than 20 files that the driver can, which is no stumbling.
    """
    scanned = [ScannedFile(**item) for item in json.loads(str(row["scanned"]))]
    by_listing, first = json.loads(str(row["by_listing"])), int(row["first"])
    failed = [at for at, found in enumerate(scanned) if found.kind == "unreadable"]
    # Spread over all of them, so that they tell what the others are like.
    chosen = failed[:: -(-len(failed) // _READ_AGAIN)] if failed else []
    again = scan_images(
        [files[first + at] for at in chosen], max_pixels=max_pixels, by_listing=[by_listing[at] for at in chosen]
    )
    readable = [at for at, found in zip(chosen, again, strict=True) if found.kind != "unreadable"]
    if len(readable) * len(failed) > _READ_AGAIN * len(chosen):
        _, _, reason = scanned[readable[0]].problem.partition(": ")  # behind "cannot be read"
        raise unreadable_on_node(str(row["node"]), files[first + readable[0]].path, reason)
    for at, found in zip(chosen, again, strict=True):
        scanned[at] = found
    return scanned


def unreadable_on_node(node: str, path: str, reason: str) -> CacheError:
    """A node cannot read what the driver can."""
    return CacheError(
        f"node {node} cannot read {path}: {reason}. Is dataset.path the same folder on all machines, and allowed to "
        "the user that Ray runs as? For a cloud address: do all nodes have the keys?"
    )


# ---- text ------------------------------------------------------------------------------------------------------------


class WriteTextShard:
    """Ray Data actor: captions of one shard to embeddings, written."""

    def __init__(
        self,
        *,
        cache: str,
        fingerprint: str,
        device: str = "cpu",
        threads: int = 0,
        began: Callable[[], None] = lambda: None,
        **encoder: Any,
    ) -> None:
        """
        Args:
            began: called at once, so that the driver knows that Ray has found a place for this actor.
        """
        began()
        self.cache, self.fingerprint, self.device, self.settings = cache, fingerprint, device, encoder
        self.threads = threads
        self.loading = _in_background(self._load)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        shard = TextShard(**unpacked(batch["shard"][0]))
        started = time.perf_counter()
        try:
            there = _written_meanwhile(self.cache, shard.name, shard.keys)
            if there is not None:
                num_long = self._num_long(json.loads(there["sdxl_ray.num_tokens"]))
                return ShardReport(shard.name, num_there=len(shard.keys), long=num_long).to_row()
            encoder = self.loading.result()
            limit_threads(self.device, self.threads)
            tensors, num_tokens = encoder.encode(shard.captions)
            extra = {"encoder": self.fingerprint, "num_tokens": json.dumps(num_tokens)}
            write_shard(open_folder(self.cache), shard.name, shard.keys, tensors, extra)
        except SdxlRayError as error:
            return ShardReport(shard.name, error=error_text(error)).to_row()
        return ShardReport(
            shard.name,
            num=len(shard.keys),
            encode_s=time.perf_counter() - started,
            long=self._num_long(num_tokens),
        ).to_row()

    def _num_long(self, num_tokens: Sequence[int]) -> int:
        return sum(num > max_tokens(self.settings.get("num_chunks", 1)) for num in num_tokens)

    def _load(self) -> TextEncoder:
        from sdxl_ray.cache.encode import TextEncoder, loading

        device = torch_device(self.device)
        with loading("the text encoders", device):
            return TextEncoder(device=device, **self.settings)


# ---- images: decode on CPUs, encode where there is an accelerator ----------------------------------------------------


def decode_shard(row: dict[str, Any]) -> dict[str, Any]:
    """Ray Data task: the pixels of one shard, (N, H, W, 3) uint8; N is smaller where images are damaged.

    With masks, "masks" is (N, H/8, W/8) uint8, else it has no pixels. Where the row names the "cache" and the shard is
    there by now, nothing is decoded. An image that is damaged is skipped, and so are those that the work item is to be
    done without. At one that this node cannot read although the driver has, decoding
    ends without any pixels, and it is for the driver to look; where the listing was trusted instead, it is skipped if
    it is not there, or if its web server does not give it.
    """
    shard = unpacked(row["shard"])
    without = set(shard.get("without", ()))
    wanted = [item for item in zip(shard["keys"], shard["records"], strict=True) if item[0] not in without]
    started = time.perf_counter()
    pixels: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    node = socket.gethostname()
    header: dict[str, Any] = {"name": shard["name"], "node": node, "num_there": None, "keys": [], "paths": []}
    header |= {"skipped": [], "unreadable": None}
    if "cache" in row and _written_meanwhile(row["cache"], shard["name"], [key for key, _ in wanted]) is not None:
        header["num_there"], wanted = len(wanted), []
    for key, fields in wanted:
        record = record_from(fields)
        try:
            image, mask = _load(record)
        except UnreadableImage as error:
            item = {"key": key, "path": record.path, "image_hash": record.image_hash}
            header["skipped"].append({**item, "reason": str(error), "kind": error.kind})
            continue
        except (OSError, StorageError) as error:
            header["unreadable"] = {"key": key, "node": node, "reason": reason_of(error)}
            pixels.clear()
            masks.clear()
            break
        pixels.append(image)
        masks += [] if mask is None else [mask]
        header["keys"].append(key)
        header["paths"].append(record.path)
    height, width = shard["records"][0]["bucket_hw"]
    cells = (height // 8, width // 8) if shard["records"][0]["mask"] else (0, 0)
    header["decode_s"] = time.perf_counter() - started
    return {
        "header": json.dumps(header),
        "pixels": np.stack(pixels) if pixels else np.zeros((0, height, width, 3), np.uint8),
        "masks": np.stack(masks) if masks else np.zeros((len(pixels), *cells), np.uint8),
    }


def _load(record: ImageRecord) -> tuple[np.ndarray, np.ndarray | None]:
    """`load_image`. A list of addresses holds dead servers too, and dataset.max_unreadable limits how many."""
    try:
        return load_image(record)
    except OSError as error:
        if record.verify or not is_web(error):
            raise
        raise not_given(error) from None


class WriteLatentShard:
    """Ray Data actor: pixels of one shard to the VAE's posterior, written."""

    def __init__(
        self,
        *,
        cache: str,
        fingerprint: str,
        device: str = "cpu",
        threads: int = 0,
        write_empty: bool = False,
        began: Callable[[], None] = lambda: None,
        **encoder: Any,
    ) -> None:
        """
        Args:
            write_empty: also shards of which no image can be decoded, since somebody waits for them.
            began: as for `WriteTextShard`.
        """
        began()
        self.cache, self.fingerprint, self.device, self.settings = cache, fingerprint, device, encoder
        self.threads, self.write_empty = threads, write_empty
        self.loading = _in_background(self._load)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        header = json.loads(str(batch["header"][0]))
        name = header["name"]
        if header["num_there"] is not None:
            return ShardReport(name, num_there=header["num_there"]).to_row()
        if header["unreadable"]:
            return ShardReport(name, unreadable=header["unreadable"]).to_row()
        started = time.perf_counter()
        pixels, masks = batch["pixels"][0], batch["masks"][0]
        tiled = 0
        if header["keys"] or self.write_empty:
            try:
                encoder = self.loading.result()
                limit_threads(self.device, self.threads)
                tensors = _encode(encoder, pixels, header["paths"])
                tiled = len(encoder.tiled)
                encoder.tiled.clear()
                if masks.shape[1]:
                    tensors["mask"] = torch_tensor(masks)
                write_shard(open_folder(self.cache), name, header["keys"], tensors, {"encoder": self.fingerprint})
            except Exception as error:  # raised here, it would be one of those that a job may lose (ray_jobs.py)
                return ShardReport(name, error=error_text(error)).to_row()
        return ShardReport(
            name,
            num=len(header["keys"]),
            skipped=header["skipped"],
            node=header["node"],
            encode_s=time.perf_counter() - started,
            decode_s=header["decode_s"],
            tiled=tiled,
        ).to_row()

    def _load(self) -> LatentEncoder:
        from sdxl_ray.cache.encode import LatentEncoder, loading

        device = torch_device(self.device)
        with loading("the VAE", device):
            return LatentEncoder(device=device, **self.settings)


def _encode(encoder: LatentEncoder, pixels: np.ndarray, names: Sequence[str]) -> dict[str, torch.Tensor]:
    if len(pixels):
        return encoder.encode(list(pixels), names)
    blank = encoder.encode([np.zeros(pixels.shape[1:], np.uint8)], ["an empty shard"])
    return {name: tensor[:0] for name, tensor in blank.items()}


def torch_tensor(values: np.ndarray) -> torch.Tensor:
    """A copy: Ray's arrays cannot be written to, which torch warns about."""
    import torch

    return torch.from_numpy(values.copy())


def record_from(fields: dict[str, Any]) -> ImageRecord:
    """What `asdict` and JSON made of a record."""
    pairs = {name: tuple(fields[name]) for name in ("original_hw", "bucket_hw", "resized_hw", "crop_top_left")}
    return ImageRecord(**{**fields, **pairs})


# ---- shared by text and images ---------------------------------------------------------------------------------------


_LOADER = ThreadPoolExecutor(1)  # one for the process: transformers' loading changes torch for as long as it lasts


def _in_background(load: Callable[[], Encoder]) -> Future[Encoder]:
    """`load()` in a thread, since it takes seconds in which the first shard is decoded.

    Its error is raised where a shard asks for the result, and can travel as a row.
    """
    return _LOADER.submit(load)


def limit_threads(kind: str, threads: int) -> None:
    """Threads of torch on the CPU, for the thread that calls this; 0 leaves it as it is.

    Ray allows one per reserved core, and an encoder reserves a fraction of one.
    """
    import torch

    if kind == "cpu" and threads:
        torch.set_num_threads(threads)


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


def _written_meanwhile(cache: str, name: str, keys: Iterable[str]) -> dict[str, str] | None:
    """The metadata of this shard where it is there by now, whole and with all of these entries; else None.

    Another job may fill the same gap. Where an entry of it was noted as damaged, it is to be written again.
    """
    folder = open_folder(cache)
    try:
        found = status(join(cache, name))
        if found is None or folder.exists(name + DAMAGED_SUFFIX):
            return None
        header = read_header(folder, name, found.size)
    except (OSError, StorageError, OtherVersion):  # it is encoded, and writing tells what is wrong there
        return None
    metadata: dict[str, str] = header["__metadata__"] if header else {}
    return metadata if set(keys) <= set(json.loads(metadata.get("sdxl_ray.keys", "[]"))) else None
