"""This machine: Python, packages, accelerators, shared memory, open files."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from sdxl_ray.doctor.finding import GIB, Finding

_REINSTALL = "pip install -c constraints.txt -e ."
_SHARED_MEMORY_SHARE = 0.3  # of the memory: what Ray gives its object store
_FEW_OPEN_FILES = 4096


def python_version() -> list[Finding]:
    """Against the range of pyproject.toml."""
    found = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return [Finding("python", "ok", found)]
    return [
        Finding(
            "python",
            "problem",
            f"{found}, expected 3.11 to 3.13",
            f"Make an environment with one of these: python3.12 -m venv .venv && . .venv/bin/activate && {_REINSTALL}",
        )
    ]


def packages() -> list[Finding]:
    """The installed versions against the ranges of pyproject.toml, as the installed package carries them."""
    from packaging.requirements import Requirement

    found, wrong = [], []
    for text in metadata.requires("sdxl-ray") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue  # of an optional extra, or of another platform
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            wrong.append(Finding(wanted.name, "problem", f"missing, expected {wanted.specifier}", _REINSTALL))
            continue
        if wanted.specifier.contains(version, prereleases=True):
            found.append(f"{wanted.name} {version}")
        else:
            text = f"{version}, expected {wanted.specifier}"
            wrong.append(Finding(wanted.name, "problem", text, _REINSTALL))
    return [Finding("packages", "ok", ", ".join(found)), *wrong] if found else wrong


def accelerators() -> list[Finding]:
    """The GPUs that torch sees, their precision; or why it sees none."""
    import torch

    if torch.cuda.is_available():
        return _gpus(torch)
    if torch.backends.mps.is_available():
        return [Finding("accelerator", "note", "Apple GPU (MPS): not tried with this trainer; Ray counts it as no GPU")]
    unused = _unused_gpu(torch)
    if unused is not None:
        return [unused]
    return [Finding("accelerator", "note", "CPU only: fine for trying out, about 10 s per 512² step")]


def _gpus(torch: Any) -> list[Finding]:
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    driver = "" if torch.version.hip else _nvidia_driver()
    findings = []
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        text = f"{device.name}, {device.total_memory / GIB:.1f} GiB, torch {torch.__version__} for {runtime}"
        findings.append(Finding(f"gpu {number}", "ok", text + (f", driver {driver}" if driver else "")))
    if torch.version.hip and len(findings) > 1:
        findings.append(
            Finding(
                "accelerator",
                "note",
                "several AMD GPUs: Ray would set HIP_VISIBLE_DEVICES against CUDA_VISIBLE_DEVICES; in its training "
                "workers sdxl-ray keeps it from that, so leave both unset",
            )
        )
    if torch.cuda.is_bf16_supported(including_emulation=False):
        findings.append(Finding("bf16", "ok", "supported"))
    else:
        findings.append(Finding("bf16", "note", "not supported by this GPU", 'Set model.dtype = "fp32".'))
    return findings


def _unused_gpu(torch: Any) -> Finding | None:
    nvidia, amd = shutil.which("nvidia-smi") is not None, Path("/dev/kfd").exists()
    if not (nvidia or amd):
        return None
    vendor, built = ("NVIDIA", torch.version.cuda) if nvidia else ("AMD", torch.version.hip)
    if not built:
        return Finding(
            "accelerator",
            "problem",
            f"this machine has an {vendor} driver, but torch {torch.__version__} is built without support for it",
            f"Reinstall torch with the {'CUDA' if nvidia else 'ROCm'} command from https://pytorch.org/get-started/locally",
        )
    hidden = [name for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if name in os.environ]
    where = f" ({', '.join(f'{name}={os.environ[name]!r}' for name in hidden)})" if hidden else ""
    return Finding(
        "accelerator",
        "problem",
        f"an {vendor} driver is here and torch is built for {built}, but torch sees no GPU{where}",
        f"Unset {' and '.join(hidden)}."
        if hidden
        else "Compare the driver's version (nvidia-smi, amd-smi) with torch's.",
    )


def _nvidia_driver() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return next(iter(shown.split()), "")
    return ""


def shared_memory(path: Path = Path("/dev/shm")) -> list[Finding]:
    """Ray's object store and torch use it; containers get 64 MiB unless told otherwise."""
    if not path.exists():
        return []  # not Linux
    total, memory = shutil.disk_usage(path).total, _memory_bytes()
    wanted = _SHARED_MEMORY_SHARE * memory
    text = f"{path} has {total / GIB:.2f} GiB, the machine {memory / GIB:.1f} GiB of memory"
    if total >= wanted:
        return [Finding("shared memory", "ok", text)]
    text += f"; Ray wants {_SHARED_MEMORY_SHARE:.0%} of it and falls back to the slower /tmp"
    size = f"{wanted / GIB + 1:.0f}g"
    cure = f"docker run --shm-size={size}; in Kubernetes an emptyDir of medium Memory at {path} (configs/rayjob.yaml)"
    return [Finding("shared memory", "problem" if total < GIB else "note", text, cure)]


def _memory_bytes() -> int:
    """What this process may use: the machine's memory or the container's limit."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        return min(physical, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return physical


def open_files() -> list[Finding]:
    """Ray keeps several files and sockets open for each worker process."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _FEW_OPEN_FILES:
        return [Finding("open files", "ok", f"limit {'none' if soft == resource.RLIM_INFINITY else soft}")]
    most = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
    return [
        Finding("open files", "note", f"limit {soft}: few for many workers", f"ulimit -n {most} before starting Ray")
    ]
