"""Encoded tensors as content-addressed `.safetensors` files.

    <cache>/latents/832x1216/<shard>.safetensors    mean, std (and mask)    one bucket a folder
    <cache>/text/<shard>.safetensors                prompt_embeds, pooled_prompt_embeds
    <cache>/**/<shard>.safetensors.damaged          keys in it that turned out damaged, one a line: not used any more;
                                                    none where the file is no shard, which has been reported

A shard's name is a hash of the keys planned for it (fewer are written where images are damaged), so two jobs that write
the same shard write the same content. Its header holds the keys in row order, a CRC-32 per row and one of the header
itself: a row is found by its key and never by a number alone, the index can be rebuilt from the shards, and a flipped
bit is found when the row is read, or its key. A file appears under its name only when it is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdxl_ray.errors import CacheError, StorageError, storage_errors
from sdxl_ray.storage import Folder, open_folder

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = "3"  # in every key: a new format never reads an old shard by mistake
KEY_BYTES = 16
DAMAGED_SUFFIX = ".damaged"


class OtherVersion(CacheError):
    """The shard was written by a version of this program with another format. It is sound, but not for us."""


def latent_key(
    image_hash: str,
    bucket_hw: tuple[int, int],
    resized_hw: tuple[int, int],
    crop_top_left: tuple[int, int],
    vae_fingerprint: str,
    *,
    flip: bool = False,
    mask_hash: str = "",
    scaled_jpeg: bool = False,
) -> str:
    """Everything that a latent depends on, hashed: the image's bytes, the transform, the VAE; and the mask with it.

    Args:
        mask_hash: of the mask file's bytes; "alpha": the image's own transparency; empty: none.
        scaled_jpeg: as in `ImageRecord`.
    """
    transform = (bucket_hw, resized_hw, crop_top_left, flip, "shrunk, lanczos" if scaled_jpeg else "lanczos")
    if mask_hash == "alpha":
        mask_hash = "alpha, not laid on white"
    return _digest(repr(("latent", FORMAT_VERSION, image_hash, transform, mask_hash, vae_fingerprint)))


def text_key(caption: str, text_fingerprint: str, num_chunks: int = 1) -> str:
    """Everything that an embedding depends on, hashed: the caption, both encoders and tokenizers, its length."""
    return _digest(repr(("text", FORMAT_VERSION, caption, num_chunks, text_fingerprint)))


def shard_name(kind: str, keys: Sequence[str], bucket: str = "") -> str:
    """The path below the cache, from the keys alone: the same gap is always filled by the same file."""
    folder = f"latents/{bucket}" if kind == "latents" else "text"
    return f"{folder}/{_digest(repr(tuple(keys)))}.safetensors"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[: 2 * KEY_BYTES]


def write_shard(
    folder: Folder, name: str, keys: Sequence[str], tensors: Mapping[str, torch.Tensor], extra: Mapping[str, str]
) -> None:
    """Write one shard whole or not at all.

    Args:
        keys: hex, one per row of every tensor.
        tensors: (len(keys), ...) each, on the CPU.
        extra: more strings for the header, such as the encoder's fingerprint.

    Raises:
        StorageError: the disk is full or read-only, or the bucket refuses; no half-written file is left.
    """
    from safetensors.torch import save

    checksums = [row_checksum({key: tensor[row] for key, tensor in tensors.items()}) for row in range(len(keys))]
    metadata = {
        "format": "pt",
        "sdxl_ray.version": FORMAT_VERSION,
        "sdxl_ray.keys": json.dumps(list(keys)),
        "sdxl_ray.crc32": json.dumps(checksums),
        **{f"sdxl_ray.{key}": value for key, value in extra.items()},
        _HEADER_CRC: _NO_CRC.decode(),
    }
    content = _sealed(save({key: tensor.contiguous() for key, tensor in tensors.items()}, metadata=metadata))
    cure = "Free some space and run again: finished shards are kept."
    folder.write(name, content, doing="writing encoded tensors", cure=cure)
    if folder.exists(name + DAMAGED_SUFFIX):  # what was damaged has just been replaced
        folder.delete(name + DAMAGED_SUFFIX)


_HEADER_CRC = "sdxl_ray.header_crc32"  # of the header's bytes, with zeros in its own place
_NO_CRC = b"00000000"
_PLACE_OF_CRC = re.compile(b'(?<="%s":")[0-9a-f]{8}(?=")' % re.escape(_HEADER_CRC.encode()))


def _sealed(content: bytes) -> bytes:
    """The shard with its header's checksum in the header."""
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    return content[:8] + _PLACE_OF_CRC.sub(b"%08x" % zlib.crc32(header), header, count=1) + content[8 + length :]


def parse_header(header: bytes) -> dict[str, Any]:
    """
    Raises:
        ValueError, LookupError, TypeError, AttributeError: it is damaged. A flipped bit in a key would make it another.
        OtherVersion: see there.
    """
    parsed: dict[str, Any] = json.loads(header)
    version = parsed["__metadata__"]["sdxl_ray.version"]
    if version != FORMAT_VERSION:
        raise OtherVersion(f"is of version {version} of the format")
    found = _PLACE_OF_CRC.search(header)
    if found is None or int(found[0], 16) != zlib.crc32(_PLACE_OF_CRC.sub(_NO_CRC, header, count=1)):
        raise ValueError("its header is damaged")
    return parsed


def mark_damaged(cache: str, shard: str, *keys: str) -> None:
    """From now on these entries count as missing, so that the next `sdxl-ray cache` encodes them again.

    Raises:
        OSError, StorageError: the mark cannot be written.
    """
    folder, name = open_folder(cache), shard + DAMAGED_SUFFIX
    known = read_marker(folder, name)
    new = [key for key in dict.fromkeys(keys) if key not in known]
    if not new and folder.exists(name):
        return
    if folder.local is None:  # of two workers that mark one shard at once, one may have to do it again the next time
        folder.write(name, "".join(f"{key}\n" for key in (*known, *new)).encode())
        return
    path = folder.local / name
    with storage_errors("noting what is damaged", path, "Free some space and run again."):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:  # in one write, so that no worker loses what another one notes
            file.write("".join(f"{key}\n" for key in new))


def read_marker(folder: Folder, name: str) -> list[str]:
    """The keys that `mark_damaged` wrote down.

    Raises:
        StorageError: they cannot be read.
    """
    try:
        return [*dict.fromkeys(folder.read(name).decode(errors="replace").split())]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(folder, name, error) from None


_FIRST_READ = 64 * 1024  # holds the header of a usual shard


def read_header(folder: Folder, name: str, size: int) -> dict[str, Any] | None:
    """The header of a shard with its metadata, or None where the file is cut short or no shard of ours.

    Raises:
        FileNotFoundError: the file is not there any more.
        StorageError: it cannot be read, which says nothing about what is in it.
        OtherVersion: see there.
    """
    try:
        start = folder.read_range(name, 0, min(_FIRST_READ, size))
        length = int.from_bytes(start[:8], "little")
        if not 0 < length <= size - 8:
            return None
        if len(start) < 8 + length:
            start += folder.read_range(name, len(start), 8 + length - len(start))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(folder, name, error) from None
    try:
        header = parse_header(start[8 : 8 + length])
        metadata = header["__metadata__"]
        tensors = [value for key, value in header.items() if key != "__metadata__"]
        num_rows = {len(json.loads(metadata[f"sdxl_ray.{name}"])) for name in ("keys", "crc32")}
        num_rows |= {tensor["shape"][0] for tensor in tensors}
        is_whole = size == 8 + length + max(tensor["data_offsets"][1] for tensor in tensors)
    except OtherVersion as error:
        raise OtherVersion(f"{folder.path}/{name}: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return header if is_whole and len(num_rows) == 1 else None


def _unreadable(folder: Folder, name: str, error: OSError) -> StorageError:
    reason = error.strerror or str(error)
    cures = {
        errno.EMFILE: "Allow more open files: `ulimit -n 65536`.",
        errno.ENFILE: "The machine has too many open files: end what holds them.",
        errno.EACCES: "Allow the user that runs this to read it.",
        errno.EPERM: "Allow the user that runs this to read it.",
    }
    cure = cures.get(error.errno or 0, "Check the disk; if this file is lost, delete it: it is encoded again.")
    return StorageError(f"{folder.path}/{name}: cannot be read ({reason}). {cure}")


def check_shard(folder: Folder, name: str) -> list[str] | None:
    """The keys of its damaged entries; None where it is not whole or its disk has lost it, empty where it is gone.

    Raises:
        StorageError: it cannot be read for another reason, which says nothing about what is in it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = folder.read(name)
        length = int.from_bytes(content[:8], "little")
        metadata = parse_header(content[8 : 8 + length])["__metadata__"]
        tensors = load(content)
        keys, checksums = json.loads(metadata["sdxl_ray.keys"]), json.loads(metadata["sdxl_ray.crc32"])
    except (FileNotFoundError, OtherVersion):
        return []
    except OSError as error:
        if error.errno == errno.EIO:
            return None
        raise _unreadable(folder, name, error) from None
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None
    rows = ({kind: tensor[row] for kind, tensor in tensors.items()} for row in range(len(keys)))
    return [key for key, row, expected in zip(keys, rows, checksums, strict=True) if row_checksum(row) != expected]


def row_checksum(row: Mapping[str, torch.Tensor]) -> int:
    """CRC-32 over the bytes of a row's tensors, in the order of their names."""
    import torch

    checksum = 0
    for name in sorted(row):
        checksum = zlib.crc32(row[name].contiguous().view(-1).view(torch.uint8).numpy().data, checksum)
    return checksum
