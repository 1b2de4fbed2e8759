"""This machine, this cluster, this config: what is fine, what is worth knowing, what is a problem, and the cure.

    python ─▶ packages ─▶ accelerators ─▶ ray ─▶ disk, memory, files ─▶ hub ─▶ the config's model, dataset, folders

Each examination is a function that returns findings. One that fails is a finding itself: `examine` never raises, and it
never prints a secret, only whether there is one.
"""

from __future__ import annotations

import contextlib
import netrc
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sdxl_ray import connection
from sdxl_ray.errors import SdxlRayError

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config

State = Literal["ok", "note", "problem"]

_GIB = 2**30
_REINSTALL = "pip install -c constraints.txt -e ."
_TEXT_BYTES = 77 * 2048 * 2 + 1280 * 2  # bf16 prompt_embeds and pooled_prompt_embeds of one caption
_SHARED_MEMORY_SHARE = 0.3  # of the memory: what Ray gives its object store
_FEW_OPEN_FILES = 4096
_LITTLE_SPACE = 5 * _GIB


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what was found. `cure` is what to type next."""

    subject: str
    state: State
    found: str
    cure: str = ""


def examine(*, address: str | None = None, config: Config | None = None) -> list[Finding]:
    """Look at everything. Starts no Ray; connects to one only where `address` or $RAY_ADDRESS names it."""
    examinations: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("python", python_version),
        ("packages", packages),
        ("accelerator", accelerators),
        ("ray", stale_cluster_note),  # before connecting, which removes it
        ("ray", lambda: ray_cluster(address, config)),
        ("ray auth", ray_authentication),
        ("disk", lambda: disk_space(config)),
        ("shared memory", shared_memory),
        ("open files", open_files),
        ("hub", hub),
    ]
    if config is not None:
        examinations += [
            ("model", lambda: base_model(config)),
            ("dataset", lambda: dataset(config)),
            ("output", lambda: output_folders(config)),
            ("wandb", lambda: wandb_login(config)),
        ]
    return [finding for subject, examination in examinations for finding in _guarded(subject, examination)]


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if anything is a problem, else 0."""
    return int(any(finding.state == "problem" for finding in findings))


def render(findings: Sequence[Finding]) -> str:
    """Aligned plain text; a cure stands on the line below its finding."""
    width = max((len(finding.subject) for finding in findings), default=0)
    lines = []
    for finding in findings:
        indent = " " * (width + 11)
        lines.append(f"{finding.state:<7}  {finding.subject:<{width}}  " + finding.found.replace("\n", f"\n{indent}"))
        if finding.cure:
            lines.append(f"{indent}-> " + finding.cure.replace("\n", f"\n{indent}   "))
    return "\n".join(lines)


def _guarded(subject: str, examination: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return examination()
    except Exception as error:  # whatever it is, the other examinations go on
        return [Finding(subject, "problem", f"could not be examined: {type(error).__name__}: {error}")]


# ---- Python and packages -------------------------------------------------------------------------


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


# ---- accelerators --------------------------------------------------------------------------------


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
        text = f"{device.name}, {device.total_memory / _GIB:.1f} GiB, torch {torch.__version__} for {runtime}"
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


# ---- Ray -----------------------------------------------------------------------------------------


def stale_cluster_note() -> list[Finding]:
    """Ray's note of the last cluster on this machine, if that cluster is dead."""
    path = connection._CURRENT_CLUSTER
    try:
        host, _, port = path.read_text().strip().rpartition(":")
    except OSError:
        return []
    with contextlib.suppress(OSError, ValueError), socket.create_connection((host, int(port)), timeout=1):
        return []
    return [
        Finding(
            "ray",
            "problem",
            f"{path} names a cluster that is dead: `ray` commands try to reach it",
            f"rm {path}   (sdxl-ray's commands remove it themselves when they connect)",
        )
    ]


def ray_cluster(address: str | None, config: Config | None = None) -> list[Finding]:
    """The cluster's machines and versions, and whether the workers fit; without an address, what would start."""
    import ray

    target = address or os.environ.get("RAY_ADDRESS")
    if not target and not ray.is_initialized():
        num_cpus, num_gpus = _usable_cpus(), _num_gpus()
        text = f"no address given: a run starts Ray on this machine, with {num_cpus} CPUs and {num_gpus} GPUs"
        return [Finding("ray", "ok", text)]
    with _connected(ray, target):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        findings = [_node(node) for node in nodes]
        total = {name: sum(node["Resources"].get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
        text = (
            f"{target or 'connected'}: {len(nodes)} nodes, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs; "
            f"ray {ray.__version__} and Python {platform.python_version()} as here"  # Ray refuses to connect otherwise
        )
        findings.insert(0, Finding("ray", "ok", text))
        vendors = {label for node in nodes if (label := _vendor(node))}
        if len(vendors) > 1:
            findings.append(
                Finding(
                    "ray",
                    "note",
                    f"GPUs of {' and '.join(sorted(vendors))}: workers of one run cannot talk across vendors",
                    "Start the nodes of the other vendor with --num-gpus 0, or make two clusters (docs/cluster.md).",
                )
            )
        if config is not None:
            findings.append(_room(config, total["GPU"]))
        return findings


@contextlib.contextmanager
def _connected(ray: Any, target: str | None) -> Iterator[None]:
    was_connected = ray.is_initialized()
    try:
        connection.connect(target)
    except SdxlRayError as error:
        # Ray says in the lines below the first which versions the cluster has
        raise SdxlRayError(f"{error}\n{error.__cause__}" if error.__cause__ else str(error)) from error
    try:
        yield
    finally:
        if not was_connected:
            ray.shutdown()


def _node(node: dict[str, Any]) -> Finding:
    resources, labels = node["Resources"], node.get("Labels") or {}
    own = {name: value for name, value in labels.items() if not name.startswith("ray.io/")}
    kind = labels.get("ray.io/accelerator-type", "")
    text = f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs" + (f" ({kind})" if kind else "")
    return Finding(f"node {node['NodeManagerAddress']}", "ok", text + (f", labels {own}" if own else ""))


def _vendor(node: dict[str, Any]) -> str:
    """The label that docs/cluster.md asks for, else a guess from Ray's own; empty for nodes without GPUs."""
    labels = node.get("Labels") or {}
    if not node["Resources"].get("GPU"):
        return ""
    named = str(labels.get("accel-vendor", "")).lower()
    if named:
        return named
    return "amd" if str(labels.get("ray.io/accelerator-type", "")).upper().startswith("AMD") else "nvidia"


def _room(config: Config, num_gpus: float) -> Finding:
    settings = config.cluster
    use_gpu = settings.accelerator == "gpu" or (settings.accelerator == "auto" and num_gpus > 0)
    needs = {"CPU": settings.cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}
    try:
        connection.check_room(config.train.num_workers, needs)
    except SdxlRayError as error:
        state: State = "problem" if connection.is_local() else "note"  # several machines: it may be growing
        return Finding("workers", state, str(error))
    return Finding("workers", "ok", f"room for train.num_workers = {config.train.num_workers}")


def ray_authentication() -> list[Finding]:
    """Whether clusters started here ask for a token. The token itself is not looked at."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    token_path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    has_token = "RAY_AUTH_TOKEN" in os.environ or token_path.exists()
    if mode == "token" and not has_token:
        cure = "ray get-auth-token --generate, then copy the file to every node"
        return [Finding("ray auth", "problem", f"RAY_AUTH_MODE=token, but there is no {token_path}", cure)]
    if has_token and not mode:
        return [
            Finding(
                "ray auth",
                "note",
                "there is a token, but no RAY_AUTH_MODE: `ray start --head` asks for it, `ray job submit` sends none",
                "export RAY_AUTH_MODE=token before `ray job submit`; the same token on every node",
            )
        ]
    return [Finding("ray auth", "ok", f"RAY_AUTH_MODE={mode}" if mode else "no token, RAY_AUTH_MODE is not set")]


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


# ---- disk, memory, files -------------------------------------------------------------------------


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
    text = f"{free / _GIB:.1f} GiB free at {path}"
    if needed:
        text += f"; the whole cache of this dataset takes about {needed / _GIB:.2f} GiB, less what is there already"
    if free < max(needed, _GIB):
        return Finding(subject, "problem", text, "Free some space, or choose another run.output and cache.path.")
    if free < needed + _LITTLE_SPACE:
        return Finding(subject, "note", text + "; little is left for checkpoints and images")
    return Finding(subject, "ok", text)


def shared_memory(path: Path = Path("/dev/shm")) -> list[Finding]:
    """Ray's object store and torch use it; containers get 64 MiB unless told otherwise."""
    if not path.exists():
        return []  # not Linux
    total, memory = shutil.disk_usage(path).total, _memory_bytes()
    wanted = _SHARED_MEMORY_SHARE * memory
    text = f"{path} has {total / _GIB:.2f} GiB, the machine {memory / _GIB:.1f} GiB of memory"
    if total >= wanted:
        return [Finding("shared memory", "ok", text)]
    text += f"; Ray wants {_SHARED_MEMORY_SHARE:.0%} of it and falls back to the slower /tmp"
    size = f"{wanted / _GIB + 1:.0f}g"
    cure = f"docker run --shm-size={size}; in Kubernetes an emptyDir of medium Memory at {path} (configs/rayjob.yaml)"
    return [Finding("shared memory", "problem" if total < _GIB else "note", text, cure)]


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


# ---- Hub and trackers ----------------------------------------------------------------------------


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


# ---- the config's own ----------------------------------------------------------------------------


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
