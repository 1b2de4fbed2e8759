"""Ray: what the last cluster left, the one that would be used, its token."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_ray import connection
from sdxl_ray.doctor.finding import Finding, State
from sdxl_ray.errors import SdxlRayError

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config


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
            findings.append(_room(config))
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


def _room(config: Config) -> Finding:
    needs = connection.worker_resources(config.cluster.accelerator, config.cluster.cpus_per_worker)
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
