"""What Ray Data runs on the nodes to encode: decode tasks and encoding actors. Plain callables, no Ray in here.

What became of a shard travels as a row, its `ShardReport`, and so do errors (reports.py).
"""

from __future__ import annotations

import json
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from sdxl_ray.cache.images import UnreadableImage
from sdxl_ray.cache.jobs.reports import ShardReport, died_too_often, error_text, record_from, unpacked
from sdxl_ray.cache.planning import TextShard, max_tokens
from sdxl_ray.cache.reading import is_web, load_image, not_given, reason_of
from sdxl_ray.cache.shards import DAMAGED_SUFFIX, OtherVersion, read_header, write_shard
from sdxl_ray.errors import CacheError, StorageError
from sdxl_ray.records import ImageRecord
from sdxl_ray.storage import join, open_folder, status

if TYPE_CHECKING:
    import torch

    from sdxl_ray.cache.encode import LatentEncoder, TextEncoder

Encoder = TypeVar("Encoder")


# ---- what both actors share ------------------------------------------------------------------------------------------

_LOADER = ThreadPoolExecutor(1)  # one for the process: transformers' loading changes torch for as long as it lasts


class _ShardWriter(ABC, Generic[Encoder]):
    """Ray Data actor: encodes shards, a batch of one row each, and writes them.

    The encoder is loaded in a thread, since that takes seconds in which the first shard is decoded. Whatever goes wrong
    is told in the shard's report: raised here, it would be one of the errors that a job may lose (ray_jobs.py).
    """

    def __init__(
        self,
        *,
        cache: str,
        fingerprint: str,
        device: str = "cpu",
        threads: int = 0,
        began: Callable[[], int] = lambda: 1,
        max_starts: int = 0,
        **encoder: Any,
    ) -> None:
        """
        Args:
            fingerprint: of the model that encodes; written into each shard.
            threads: of torch on the CPU; 0 leaves them as they are.
            began: called at once, so that the driver knows that Ray has found a place for this actor; it returns how
                often that was.
            max_starts: where it has begun more often, it has died too often: each of its shards is an error. Left to
                Ray, the last death of an actor is now and then one that Ray Data never hears of, and the job waits for
                ever (Ray 2.60). 0: no limit.
            encoder: what the encoder is made with.
        """
        num_starts = began()
        self.cache, self.fingerprint, self.device, self.threads = cache, fingerprint, device, threads
        self.settings = encoder
        self.loading: Future[Encoder] = Future()
        if max_starts and num_starts > max_starts:
            self.loading.set_exception(died_too_often(num_starts - 1))
        else:
            self.loading = _LOADER.submit(lambda: self.load(torch_device(device)))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        row = {name: column[0] for name, column in batch.items()}
        item = self.item_of(row)
        try:
            return self.written(item, row).to_row()
        except Exception as error:
            return ShardReport(item["name"], error=error_text(error)).to_row()

    def ready(self) -> Encoder:
        """The encoder, waited for, with its threads for the thread that calls this.

        Raises:
            SdxlRayError: it cannot be loaded, or has died too often.
        """
        encoder = self.loading.result()
        limit_threads(self.device, self.threads)
        return encoder

    def write(self, name: str, keys: Sequence[str], tensors: dict[str, torch.Tensor], **extra: str) -> None:
        """The shard into the cache."""
        write_shard(open_folder(self.cache), name, keys, tensors, {"encoder": self.fingerprint, **extra})

    @abstractmethod
    def load(self, device: torch.device) -> Encoder: ...

    @abstractmethod
    def item_of(self, row: dict[str, Any]) -> dict[str, Any]:
        """What the row says of its shard: "name" and more."""

    @abstractmethod
    def written(self, item: dict[str, Any], row: dict[str, Any]) -> ShardReport:
        """Encode the row's shard and write it. `item`: of `item_of`."""


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


# ---- text ------------------------------------------------------------------------------------------------------------


class WriteTextShard(_ShardWriter["TextEncoder"]):
    """Captions of one shard to embeddings, written."""

    def load(self, device: torch.device) -> TextEncoder:
        from sdxl_ray.cache.encode import TextEncoder, loading

        with loading("the text encoders", device):
            return TextEncoder(device=device, **self.settings)

    def item_of(self, row: dict[str, Any]) -> dict[str, Any]:
        return unpacked(row["shard"])

    def written(self, item: dict[str, Any], row: dict[str, Any]) -> ShardReport:
        shard = TextShard(**item)
        started = time.perf_counter()
        there = _written_meanwhile(self.cache, shard.name, shard.keys)
        if there is not None:
            num_tokens = json.loads(there["sdxl_ray.num_tokens"])
            return ShardReport(shard.name, num_there=len(shard.keys), long=self._num_long(num_tokens))
        tensors, num_tokens = self.ready().encode(shard.captions)
        self.write(shard.name, shard.keys, tensors, num_tokens=json.dumps(num_tokens))
        return ShardReport(
            shard.name, num=len(shard.keys), encode_s=time.perf_counter() - started, long=self._num_long(num_tokens)
        )

    def _num_long(self, num_tokens: Sequence[int]) -> int:
        return sum(num > max_tokens(self.settings.get("num_chunks", 1)) for num in num_tokens)


# ---- images: decode on CPUs, encode where there is an accelerator ----------------------------------------------------


def decode_shard(row: dict[str, Any], cache: str = "") -> dict[str, Any]:
    """Ray Data task: the pixels of one shard, (N, H, W, 3) uint8; N is smaller where images are damaged.

    With masks, "masks" is (N, H/8, W/8) uint8, else it has no pixels. An image that is damaged is skipped, and so are
    those that the work item is to be done without. At one that this node cannot read although the driver has, decoding
    ends without any pixels, and it is for the driver to look; where the listing was trusted instead, it is skipped if
    it is not there, or if its web server does not give it.

    Args:
        cache: where it is given, and the shard is there by now, nothing is decoded.
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
    if cache and _written_meanwhile(cache, shard["name"], [key for key, _ in wanted]) is not None:
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


class WriteLatentShard(_ShardWriter["LatentEncoder"]):
    """Pixels of one shard, as `decode_shard` gives them, to the VAE's posterior, written."""

    def __init__(self, *, write_empty: bool = False, **arguments: Any) -> None:
        """
        Args:
            write_empty: also shards of which no image can be decoded, since somebody waits for them.
            arguments: of every writer of shards.
        """
        super().__init__(**arguments)
        self.write_empty = write_empty

    def load(self, device: torch.device) -> LatentEncoder:
        from sdxl_ray.cache.encode import LatentEncoder, loading

        with loading("the VAE", device):
            return LatentEncoder(device=device, **self.settings)

    def item_of(self, row: dict[str, Any]) -> dict[str, Any]:
        header: dict[str, Any] = json.loads(str(row["header"]))
        return header

    def written(self, item: dict[str, Any], row: dict[str, Any]) -> ShardReport:
        name = item["name"]
        if item["num_there"] is not None:
            return ShardReport(name, num_there=item["num_there"])
        if item["unreadable"]:
            return ShardReport(name, unreadable=item["unreadable"])
        started = time.perf_counter()
        tiled = 0
        if item["keys"] or self.write_empty:
            encoder = self.ready()
            tensors = _encode(encoder, row["pixels"], item["paths"])
            tiled = len(encoder.tiled)
            encoder.tiled.clear()
            if row["masks"].shape[1]:
                tensors["mask"] = torch_tensor(row["masks"])
            self.write(name, item["keys"], tensors)
        return ShardReport(
            name,
            num=len(item["keys"]),
            skipped=item["skipped"],
            node=item["node"],
            encode_s=time.perf_counter() - started,
            decode_s=item["decode_s"],
            tiled=tiled,
        )


def _encode(encoder: LatentEncoder, pixels: np.ndarray, names: Sequence[str]) -> dict[str, torch.Tensor]:
    if len(pixels):
        return encoder.encode(list(pixels), names)
    blank = encoder.encode([np.zeros(pixels.shape[1:], np.uint8)], ["an empty shard"])
    return {name: tensor[:0] for name, tensor in blank.items()}


def torch_tensor(values: np.ndarray) -> torch.Tensor:
    """A copy: Ray's arrays cannot be written to, which torch warns about."""
    import torch

    return torch.from_numpy(values.copy())
