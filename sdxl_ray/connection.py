"""How every command reaches Ray: an address, `RAY_ADDRESS`, the cluster of a submitted job, or a private local one."""

from __future__ import annotations

import atexit
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdxl_ray.errors import ClusterError

# Set before Ray reads them; a user's own values win.
DEFAULT_ENVIRONMENT = {
    # Ray Train's controller looks at its workers this often, and `report` waits for it: Ray's own 2 s is long.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Workers would otherwise start in a folder of Ray's, where relative paths mean something else.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # CPU tasks must not see GPUs: a decode task that touches CUDA would take memory on GPU 0 (ray issue 54868).
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # `uv run` would be run again for every worker process (ray issue 50961).
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "1",
}
_CURRENT_CLUSTER = Path(tempfile.gettempdir()) / "ray" / "ray_current_cluster"


def connect(address: str | None = None) -> None:
    """Reach `address`, else $RAY_ADDRESS, else start Ray on this machine. Does nothing where Ray is connected already.

    Ray's own log goes to its files (`/tmp/ray/session_latest/logs`); only its errors reach the terminal.

    Raises:
        ClusterError: nothing answers at the address, or Ray does not start.
    """
    set_environment()
    import ray

    if ray.is_initialized():
        return
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    if target.startswith("http"):
        raise ClusterError(
            f"{target} is the address for submitting jobs: `ray job submit --address {target} --working-dir . -- "
            "sdxl-ray train my.toml`. To connect from here, give HOST:6379 or ray://HOST:10001."
        )
    remove_stale_cluster_file()
    logging.getLogger("ray").setLevel(logging.ERROR)
    _drop_raylet_noise()
    runtime_env = None
    if target != "local" and not in_ray_job():
        # The workers of a cluster that somebody else started have Ray, but maybe not this package.
        runtime_env = {"py_modules": [str(Path(__file__).parent)]}
    try:
        with warnings.catch_warnings(), _sigterm_stays_ours():
            warnings.simplefilter("ignore")
            # The dashboard is needed: without it, Ray Train cannot free the placement groups of stopped trials.
            ray.init(
                address=target,
                include_dashboard=True if target == "local" else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=runtime_env,
            )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ClusterError(
            f"no Ray at {target}: {next(iter(str(error).splitlines()), type(error).__name__)}\n"
            "Check the address with `ray status --address HOST:6379`, or leave it out to use this machine alone."
        ) from error


def set_environment() -> None:
    """`DEFAULT_ENVIRONMENT` where the user has not decided; some of it is read when Ray is imported."""
    for name, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def wants_gpu(accelerator: str) -> bool:
    """Whether workers ask for GPUs: `cluster.accelerator`, where "auto" is yes if the connected cluster has any."""
    import ray

    return accelerator == "gpu" or (accelerator == "auto" and ray.cluster_resources().get("GPU", 0) > 0)


def worker_resources(accelerator: str, cpus_per_worker: float) -> dict[str, float]:
    """What one training worker reserves."""
    return {"CPU": cpus_per_worker, **({"GPU": 1.0} if wants_gpu(accelerator) else {})}


def in_ray_job() -> bool:
    """Whether this process was started by `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def is_local() -> bool:
    """Whether the cluster is one machine."""
    import ray

    return len([node for node in ray.nodes() if node["Alive"]]) == 1


def remove_stale_cluster_file() -> bool:
    """Ray notes the last cluster of this machine and believes it also after it has died, which costs 12 s a run and
    leaks placement groups. True if there was such a note of a dead cluster and it was removed."""
    try:
        host, _, port = _CURRENT_CLUSTER.read_text().strip().rpartition(":")
    except OSError:
        return False
    try:
        with socket.create_connection((host, int(port)), timeout=1):
            return False
    except (OSError, ValueError):
        _CURRENT_CLUSTER.unlink(missing_ok=True)
        return True


def check_room(num_workers: int, resources: dict[str, float], *, growing: bool = False) -> None:
    """Refuse what would wait for ever: Ray starts asking again every minute for workers that no machine can hold.

    Raises:
        ClusterError: the cluster is too small and does not grow.
    """
    import ray

    if growing:
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(min(node.get(name, 0) / amount for name, amount in resources.items() if amount)) for node in nodes)
    if room < num_workers:
        needs = ", ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount)
        have = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
        raise ClusterError(
            f"train.num_workers = {num_workers} with {needs} each do not fit: the cluster has room for {room} "
            f"({len(nodes)} nodes: {have}). Lower train.num_workers or cluster.cpus_per_worker, or add machines."
        )


@contextmanager
def sigterm_as_interrupt() -> Iterator[threading.Event]:
    """SIGTERM, which Kubernetes, Slurm, systemd, Docker and `ray job stop` send, does what Ctrl-C does at that moment.

    The event is set once it has come, the same one in a context inside another. In another thread than the main one,
    which cannot hear signals, nothing changes.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield threading.Event()
    elif isinstance(before, _Interrupt):
        yield before.heard
    else:
        interrupt = _Interrupt()
        signal.signal(signal.SIGTERM, interrupt)
        try:
            yield interrupt.heard
        finally:
            signal.signal(signal.SIGTERM, before)


class _Interrupt:
    """A handler of SIGTERM."""

    def __init__(self) -> None:
        self.heard = threading.Event()

    def __call__(self, number: int, frame: Any) -> None:
        self.heard.set()
        on_ctrl_c = signal.getsignal(signal.SIGINT)
        if not callable(on_ctrl_c):  # ignored, as in what a script starts with "&"
            raise KeyboardInterrupt
        on_ctrl_c(signal.SIGINT, frame)


@contextmanager
def _sigterm_stays_ours() -> Iterator[None]:
    """`ray.init` sets handlers of its own, and the one of its C++ core ends the process with a stack dump."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # SIGTERM, heard by Ray's
        if callable(before):
            before(signal.SIGTERM, None)
        raise
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


# What Ray prints in the driver's terminal although nothing is wrong; all of it is in Ray's log files too.
_KNOWN_NOISE = (
    b"ray-project/ray/issues/53727",  # every actor pool of Ray Data, at level ERROR
    b"PYTHON worker processes have been started",  # two trials on two cores
    b"retries remaining, so the task will be retried",  # a process that died is told already
)


def filter_ray_noise() -> None:
    """Keep known harmless lines of Ray's out of this process's terminal; everything else passes unchanged.

    For the command line only: it puts a pipe in place of standard error, since Ray's C++ core writes there directly.
    """
    original = os.dup(2)
    read_end, write_end = os.pipe()
    os.dup2(write_end, 2)
    os.close(write_end)

    def copy() -> None:
        pending = b""
        while chunk := os.read(read_end, 65536):
            # download bars end their lines with a carriage return
            *lines, pending = re.split(rb"(?<=[\r\n])", pending + chunk)
            for line in lines:
                if not any(noise in line for noise in _KNOWN_NOISE):
                    os.write(original, line)
        os.write(original, pending)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()

    def restore() -> None:
        sys.stderr.flush()
        os.dup2(original, 2)  # closes this process's writing end
        thread.join(timeout=1)  # processes of Ray's may hold the other writing ends for a moment

    atexit.register(restore)


_DEAD_WORKER = re.compile(
    r"A worker died or was killed while executing a task.*Worker IP address: (\S+).*Worker PID: (\d+)"
)


def _drop_raylet_noise() -> None:
    """Ray's driver prints messages of the raylet through a function of its own. A dead process is one line of ours."""
    import ray._private.worker as worker

    if not sys.stdout.isatty():  # a log
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    original = getattr(worker, "print_to_stdstream", None)
    if original is None or getattr(original, "filters_noise", False):
        return
    told: set[tuple[str, ...]] = set()  # Ray says it for each task that the process had

    def filtered(data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        kept = []
        if any("Raylet is terminated" in line for line in data.get("lines", ())):  # with fifty lines of its log
            machine = str(data.get("ip", "a machine"))
            if ("raylet", machine) not in told:
                told.add(("raylet", machine))
                print(
                    f"note: Ray's own process on {machine} died. Killed for want of memory? "
                    "`dmesg` tells. Where that is this machine, the run ends; what is finished is kept: run again",
                    file=sys.stderr,
                )
            return
        for line in data.get("lines", ()):
            dead = _DEAD_WORKER.search(line)
            if dead is None:
                if not any(noise in line.encode() for noise in _KNOWN_NOISE):
                    kept.append(line)
            elif dead.groups() not in told:
                told.add(dead.groups())
                print(
                    f"note: process {dead[2]} on {dead[1]} died; of a worker, Ray starts another one, which does its "
                    "work again. Killed for want of memory? `dmesg` tells, and so do Ray's logs: "
                    "/tmp/ray/session_latest/logs",
                    file=sys.stderr,
                )
        if kept:
            original({**data, "lines": kept}, *args, **kwargs)

    filtered.filters_noise = True  # type: ignore[attr-defined]
    worker.print_to_stdstream = filtered
