"""`ray job submit` on a real head, as docs/cluster.md describes it. pytest tests/integration/test_jobs.py

The head has ports, a folder and a process group of its own, so other Ray on the machine is neither met nor ended.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient
from safetensors.torch import load_file, save_file

from sdxl_ray.sdxl.tiny import write_tiny_sdxl

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    address: str  # of the dashboard
    gcs: str  # HOST:PORT, as for --address of sdxl-ray
    folder: Path  # its temp dir; short, since the path of a Unix socket may have 107 bytes
    environment: dict[str, str]

    @property
    def home(self) -> Path:
        return self.folder / "home"


@dataclass(frozen=True)
class Job:
    client_exit_code: int
    driver_exit_code: int | None
    status: JobStatus
    output: str


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="sxj", dir="/tmp"))
    gcs, dashboard, client_server, agent = _free_ports(4)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "SDXL_RAY_HOME": str(folder / "home"),  # jobs inherit the head's environment
    }
    ports = [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client_server}"]
    ports.append(f"--dashboard-agent-listen-port={agent}")
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}", "--num-cpus=2", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}", *ports]
    command += ["--object-store-memory=200000000"]
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder
        )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        _wait_for(address, process, folder / "head.log")
        yield Head(address, f"127.0.0.1:{gcs}", folder, environment)
    finally:
        _end(process, folder)
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def _wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api/version", timeout=2):
            return
        time.sleep(0.3)
    pytest.fail(f"no dashboard at {address}:\n{log.read_text()}")


def _end(process: subprocess.Popen, folder: Path) -> None:
    """By process group, then by name of its own folder: `ray stop` would end every Ray of the machine."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(3)  # Ray would take up to 30 s to drain a node that nobody needs any more
    for each in psutil.process_iter(["cmdline"]):
        if any(str(folder) in part for part in each.info["cmdline"] or ()):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(15)


def submit(head: Head, name: str, *arguments: str, working_dir: Path = REPOSITORY) -> Job:
    """As a user would: from outside, with the client's output and the driver's own exit code."""
    command = [str(BIN / "ray"), "job", "submit", "--address", head.address, "--working-dir", str(working_dir)]
    command += ["--submission-id", name, "--", "sdxl-ray", *arguments]
    done = subprocess.run(
        command, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200
    )
    info = JobSubmissionClient(head.address).get_job_info(name)
    return Job(done.returncode, info.driver_exit_code, info.status, done.stdout)


def short_run(head: Head, name: str, *, duration: str = "4 steps") -> list[str]:
    """demo.toml, with one worker and no images, on the cache that these tests share."""
    return [
        "train",
        "configs/demo.toml",
        f"run.name={name}",
        f"cache.path={head.folder / 'cache'}",
        f"train.duration={duration}",
        "train.num_workers=1",
        "train.log_every=1",
        "validation.prompts=[]",
        "eval.holdout=0",
        "cluster.max_failures=0",
        'export.formats=["kohya"]',
    ]


@pytest.fixture(scope="module")
def finished(head) -> Job:
    return submit(head, "finished", *short_run(head, "finished"))


def test_a_job_trains_and_its_progress_is_seen_by_the_client(head, finished):
    assert finished.driver_exit_code == 0, finished.output
    assert (finished.client_exit_code, finished.status) == (0, JobStatus.SUCCEEDED)
    assert "| loss" in finished.output
    assert "4/4" in finished.output
    # run.output = "runs" is relative: below $SDXL_RAY_HOME, since Ray deletes the job's own folder
    run_folder = head.home / "runs" / "finished"
    assert (run_folder / "export" / "finished.safetensors").exists(), sorted(run_folder.rglob("*"))
    assert (run_folder / "checkpoints" / "step_000004" / "state.json").exists()


def test_the_uploaded_folder_is_small(head, finished):
    uploaded = head.folder / "session_latest" / "runtime_resources" / "working_dir_files"
    names = {path.name for folder in uploaded.glob("_ray_pkg_*") if folder.is_dir() for path in folder.iterdir()}
    assert {"configs", "sdxl_ray", "pyproject.toml"} <= names
    assert not names & {".git", ".venv", "runs", "cache"}
    assert sum(path.stat().st_size for path in uploaded.rglob("*") if path.is_file()) < 100e6


@pytest.fixture(scope="module")
def troubled(head, finished) -> dict[str, Job]:
    """Jobs that meet trouble, side by side: most of their time is starting."""
    shards = sorted((head.folder / "cache" / "latents").rglob("*.safetensors"))
    assert shards
    for shard in shards:  # the last bytes of the tensors: the header stays readable, the checksum no longer fits
        content = shard.read_bytes()
        shard.write_bytes(content[:-4096] + bytes(byte ^ 0xFF for byte in content[-4096:]))
    jobs = {
        "no_number": [*short_run(head, "no_number"), f"model.path={model_without_a_number(head.folder / 'model')}"],
        "misspelt": [*short_run(head, "misspelt"), "optimizer.learning_rat=1e-4"],
        "crowded": [*short_run(head, "crowded"), "train.num_workers=5"],
        "damaged": short_run(head, "damaged", duration="4 epochs"),
    }
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = {name: pool.submit(submit, head, name, *arguments) for name, arguments in jobs.items()}
    return {name: future.result() for name, future in futures.items()}


def model_without_a_number(folder: Path) -> Path:
    """A tiny SDXL whose U-Net answers with NaN."""
    write_tiny_sdxl(folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"].fill_(float("nan"))
    save_file(weights, path, {"format": "pt"})
    return folder


@pytest.mark.slow
def test_bad_input_ends_the_driver_with_2(troubled):
    job = troubled["misspelt"]
    assert (job.client_exit_code, job.driver_exit_code, job.status) == (1, 2, JobStatus.FAILED)
    assert "Did you mean optimizer.learning_rate?" in job.output


@pytest.mark.slow
def test_a_run_without_room_ends_the_driver_with_1(troubled):
    job = troubled["crowded"]
    assert (job.client_exit_code, job.driver_exit_code, job.status) == (1, 1, JobStatus.FAILED)
    assert "error: train.num_workers = 5 with 1 CPU each do not fit" in job.output
    assert "Traceback" not in job.output


@pytest.mark.slow
def test_a_worker_that_fails_ends_the_driver_with_1(troubled):
    job = troubled["no_number"]
    assert (job.client_exit_code, job.driver_exit_code, job.status) == (1, 1, JobStatus.FAILED), job.output
    assert "error: step 1: loss nan" in job.output


@pytest.mark.slow
def test_a_damaged_cache_is_repaired_on_the_way(troubled):
    job = troubled["damaged"]
    assert (job.client_exit_code, job.driver_exit_code, job.status) == (0, 0, JobStatus.SUCCEEDED), job.output
    assert "is damaged (checksum" in job.output
    assert "For this run it is encoded anew" in job.output


def test_doctor_describes_the_cluster(head):
    command = [str(BIN / "sdxl-ray"), "doctor", "--address", head.gcs]
    done = subprocess.run(command, env=head.environment, capture_output=True, text=True, timeout=120, cwd=head.folder)
    assert f"{head.gcs}: 1 nodes, 2 CPUs, 0 GPUs" in done.stdout, done.stdout + done.stderr
    assert re.search(r"^ok +node [\d.]+ +2 CPUs, 0 GPUs$", done.stdout, re.MULTILINE), (
        done.stdout
    )  # Ray may resolve 127.0.0.1
