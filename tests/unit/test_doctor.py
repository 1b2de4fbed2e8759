"""Every examination in good and in bad conditions. .venv/bin/pytest tests/unit/test_doctor.py"""

import netrc
import resource
import shutil
import socket
import subprocess
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import ray
import torch
from huggingface_hub import constants
from PIL import Image

from sdxl_ray import connection, doctor
from sdxl_ray.config.load import config_from_dict
from sdxl_ray.doctor import Finding, cluster, exit_code, inputs, machine, render
from sdxl_ray.errors import ClusterError, StorageError

GIB = 2**30
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    names = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "HF_ENDPOINT", "WANDB_MODE", "WANDB_API_KEY")
    for name in (*names, "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setattr(connection, "_CURRENT_CLUSTER", tmp_path / "no-cluster")


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path)


def make_config(tmp_path, model="owner/name", **sections):
    given = {
        "run": {"output": str(tmp_path / "runs")},
        "model": {"path": model},
        "dataset": {"path": "builtin:photographs"},
        "cache": {"path": str(tmp_path / "cache")},
    }
    return config_from_dict({**given, **sections})


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


# ---- Python and packages


def test_this_python_is_fine():
    assert only(machine.python_version()).state == "ok"


@pytest.mark.parametrize("version", [(3, 10, 4), (3, 14, 0)])
def test_other_pythons_are_not(monkeypatch, version):
    monkeypatch.setattr(machine.sys, "version_info", version)
    finding = only(machine.python_version())
    assert finding.state == "problem"
    assert "expected 3.11 to 3.13" in finding.found
    assert "python3.12 -m venv" in finding.cure


def test_installed_packages_are_in_range():
    finding = only(machine.packages())
    assert finding.state == "ok"
    assert f"ray {ray.__version__}" in finding.found
    assert "wandb" not in finding.found  # of an extra


def test_package_missing_or_out_of_range(monkeypatch):
    real = metadata.version

    def fake(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return "2.9.1" if name == "torch" else real(name)

    monkeypatch.setattr(metadata, "version", fake)
    wrong = {finding.subject: finding for finding in machine.packages() if finding.state == "problem"}
    assert set(wrong) == {"peft", "torch"}
    assert "missing" in wrong["peft"].found
    assert "2.9.1, expected <2.14,>=2.11" in wrong["torch"].found
    assert {finding.cure for finding in wrong.values()} == {"pip install -c constraints.txt -e ."}


# ---- accelerators


def fake_gpus(monkeypatch, names, *, cuda="12.8", hip=None, bf16=True):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    properties = [SimpleNamespace(name=name, total_memory=80 * GIB) for name in names]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties[number])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)


def fake_drivers(monkeypatch, *, nvidia=False, amd=False):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if nvidia else None)
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: amd if str(self) == "/dev/kfd" else real(self))


def test_cuda(monkeypatch):
    fake_gpus(monkeypatch, ["NVIDIA A100", "NVIDIA A100"])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="570.1\n570.1\n"))
    findings = machine.accelerators()
    assert [finding.subject for finding in findings] == ["gpu 0", "gpu 1", "bf16"]
    assert {finding.state for finding in findings} == {"ok"}
    for part in ("NVIDIA A100", "80.0 GiB", "CUDA 12.8", "driver 570.1"):
        assert part in findings[0].found


def test_cuda_without_nvidia_smi_still_lists_the_gpus(monkeypatch):
    fake_gpus(monkeypatch, ["NVIDIA A100"])

    def no_such_program(*_, **__):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", no_such_program)
    assert "driver" not in machine.accelerators()[0].found


def test_several_amd_gpus_get_a_note(monkeypatch):
    fake_gpus(monkeypatch, ["AMD Instinct MI300X"] * 2, cuda=None, hip="6.4")
    findings = machine.accelerators()
    assert "ROCm 6.4" in findings[0].found
    note = only([finding for finding in findings if finding.state == "note"])
    assert "HIP_VISIBLE_DEVICES" in note.found


def test_one_amd_gpu_needs_no_note(monkeypatch):
    fake_gpus(monkeypatch, ["AMD Instinct MI300X"], cuda=None, hip="6.4")
    assert {finding.state for finding in machine.accelerators()} == {"ok"}


def test_gpu_without_bf16(monkeypatch):
    fake_gpus(monkeypatch, ["Tesla V100"], bf16=False)
    monkeypatch.setattr(machine, "_nvidia_driver", lambda: "")
    finding = machine.accelerators()[-1]
    assert (finding.subject, finding.state) == ("bf16", "note")
    assert finding.cure == 'Set model.dtype = "fp32".'


def test_cpu_only(monkeypatch):
    fake_gpus(monkeypatch, [], cuda=None)
    fake_drivers(monkeypatch)
    finding = only(machine.accelerators())
    assert finding.state == "note"
    assert finding.found.startswith("CPU only: fine for trying out")


@pytest.mark.parametrize(("driver", "command"), [("nvidia", "CUDA"), ("amd", "ROCm")])
def test_torch_without_support_for_the_gpu_of_this_machine(monkeypatch, driver, command):
    fake_gpus(monkeypatch, [], cuda=None)
    fake_drivers(monkeypatch, **{driver: True})
    finding = only(machine.accelerators())
    assert finding.state == "problem"
    assert "built without support" in finding.found
    assert f"Reinstall torch with the {command} command" in finding.cure


def test_hidden_gpu(monkeypatch):
    fake_gpus(monkeypatch, [], cuda="12.8")
    fake_drivers(monkeypatch, nvidia=True)
    assert "nvidia-smi" in only(machine.accelerators()).cure
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    finding = only(machine.accelerators())
    assert "CUDA_VISIBLE_DEVICES=''" in finding.found
    assert finding.cure == "Unset CUDA_VISIBLE_DEVICES."


# ---- Ray


def test_without_an_address_no_ray_is_started(monkeypatch):
    monkeypatch.setattr(connection, "connect", lambda address: pytest.fail("connected"))
    finding = only(cluster.ray_cluster(None))
    assert finding.state == "ok"
    assert "no address given: a run starts Ray on this machine" in finding.found


def fake_cluster(monkeypatch, *nodes):
    """Each node: CPUs, GPUs, labels."""
    alive = [
        {
            "Alive": True,
            "NodeManagerAddress": f"10.0.0.{number}",
            "Labels": labels,
            "Resources": {"CPU": cpus, "GPU": gpus},
        }
        for number, (cpus, gpus, labels) in enumerate(nodes, 1)
    ]
    closed = []
    monkeypatch.setattr(connection, "connect", lambda address: None)
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {}}])
    total = {"GPU": sum(gpus for _, gpus, _ in nodes)}
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    monkeypatch.setattr(ray, "shutdown", lambda: closed.append(True))
    return closed


def test_cluster_is_described_and_left(monkeypatch):
    closed = fake_cluster(monkeypatch, (8, 0, {}), (16, 4, {"ray.io/accelerator-type": "A100", "room": "2"}))
    summary, head, worker = cluster.ray_cluster("10.0.0.1:6379")
    assert "10.0.0.1:6379: 2 nodes, 24 CPUs, 4 GPUs" in summary.found
    assert f"ray {ray.__version__}" in summary.found
    assert head.subject == "node 10.0.0.1"
    assert worker.found == "16 CPUs, 4 GPUs (A100), labels {'room': '2'}"
    assert closed == [True]


def test_ray_address_in_the_environment_counts(monkeypatch):
    fake_cluster(monkeypatch, (8, 0, {}))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster.ray_cluster(None)[0].found.startswith("10.0.0.1:6379")


def test_two_vendors_in_one_cluster_get_a_note(monkeypatch):
    fake_cluster(monkeypatch, (8, 1, {"accel-vendor": "nvidia"}), (8, 1, {"accel-vendor": "amd"}), (8, 0, {}))
    note = only([finding for finding in cluster.ray_cluster("x:1") if finding.state == "note"])
    assert "amd and nvidia" in note.found
    assert "--num-gpus 0" in note.cure


def test_whether_the_workers_fit(monkeypatch, tmp_path):
    config = make_config(tmp_path, train={"num_workers": 3})
    fake_cluster(monkeypatch, (8, 4, {}))
    assert cluster.ray_cluster("x:1", config)[-1] == Finding("workers", "ok", "room for train.num_workers = 3")
    fake_cluster(monkeypatch, (8, 2, {}))
    assert cluster.ray_cluster("x:1", config)[-1].state == "problem"
    assert "Lower train.num_workers" in cluster.ray_cluster("x:1", config)[-1].found
    fake_cluster(monkeypatch, (8, 1, {}), (8, 1, {}))  # several machines may become more
    assert cluster.ray_cluster("x:1", config)[-1].state == "note"


def test_unreachable_cluster_is_a_finding_with_all_that_ray_says(monkeypatch):
    def refuse(address):
        try:
            raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.50.0")
        except RuntimeError as cause:
            raise ClusterError(f"no Ray at {address}: Version mismatch") from cause

    monkeypatch.setattr(connection, "connect", refuse)
    finding = only(doctor._guarded("ray", lambda: cluster.ray_cluster("10.0.0.1:6379")))
    assert finding.state == "problem"
    assert "no Ray at 10.0.0.1:6379" in finding.found
    assert "Ray: 2.50.0" in finding.found


def test_stale_cluster_note(monkeypatch, tmp_path):
    path = tmp_path / "ray_current_cluster"
    monkeypatch.setattr(connection, "_CURRENT_CLUSTER", path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        path.write_text(f"127.0.0.1:{server.getsockname()[1]}")
        assert cluster.stale_cluster_note() == []
    finding = only(cluster.stale_cluster_note())
    assert finding.state == "problem"
    assert finding.cure.startswith(f"rm {path}")
    assert path.exists()  # looked at, not repaired


def test_no_cluster_note():
    assert cluster.stale_cluster_note() == []


def test_ray_authentication(monkeypatch, tmp_path):
    assert only(cluster.ray_authentication()).state == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert "get-auth-token --generate" in only(cluster.ray_authentication()).cure
    (tmp_path / "no-token").write_text("s3cret")
    assert only(cluster.ray_authentication()).state == "ok"
    monkeypatch.delenv("RAY_AUTH_MODE")
    finding = only(cluster.ray_authentication())
    assert finding.state == "note"
    assert "RAY_AUTH_MODE=token" in finding.cure


# ---- disk, memory, files


def test_cache_estimate_is_the_size_of_the_tensors(tmp_path):
    latents = 2 * torch.zeros(4, 128, 128, dtype=torch.bfloat16).nbytes
    pooled = torch.zeros(1280, dtype=torch.bfloat16).nbytes
    text = torch.zeros(77, 2048, dtype=torch.bfloat16).nbytes + pooled

    def estimate(dataset=None, **cache):
        config = make_config(tmp_path, dataset=dataset or {}, cache={"path": str(tmp_path / "cache"), **cache})
        return inputs.cache_bytes_per_image(config.datasets[0], config)

    assert estimate() == latents + text == 566.5 * 1024
    assert estimate({"resolution": [512, 1024], "flip": True}) == 2 * 1.25 * latents + text
    assert estimate({"crop": "random", "crop_variants": 3}) == 3 * latents + text
    assert estimate({"shuffle_tags": True, "caption_variants": 4}) == latents + 4 * text
    assert estimate(caption_chunks=3) == latents + 3 * (text - pooled) + pooled
    assert estimate(mode="off") == text
    assert estimate(text="online") == latents


@pytest.mark.parametrize(("free", "state"), [(100 * GIB, "ok"), (3 * GIB, "note"), (GIB // 2, "problem")])
def test_disk_space_of_the_current_folder(monkeypatch, free, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(200 * GIB, 0, free))
    assert only(inputs.disk_space()).state == state


def test_disk_space_against_what_the_cache_will_take(monkeypatch, config):
    monkeypatch.setattr(inputs, "_count_images", lambda dataset: 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(200 * GIB, 0, 20 * GIB))
    runs, cache = inputs.disk_space(config)
    assert (runs.state, cache.state) == ("ok", "problem")
    assert "takes about 54.03 GiB" in cache.found
    assert "cache.path" in cache.cure


def test_the_cache_holds_every_dataset(monkeypatch, tmp_path):
    config = make_config(tmp_path, dataset=[{"path": "a"}, {"path": "b"}, {"path": "c", "disabled": True}])
    monkeypatch.setattr(inputs, "_count_images", lambda dataset: 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(200 * GIB, 0, 150 * GIB))
    assert "takes about 108.05 GiB" in inputs.disk_space(config)[1].found


def test_a_cloud_address_has_no_disk(monkeypatch, tmp_path):
    config = make_config(tmp_path, cache={"path": "s3://bucket/cache"})
    monkeypatch.setattr(inputs, "_count_images", lambda dataset: pytest.fail("listed for nothing"))
    assert only(inputs.disk_space(config)).subject == "disk for runs"


def test_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_memory_bytes", lambda: 64 * GIB)

    def of(total):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(total, 0, total))
        return only(machine.shared_memory(tmp_path))

    assert of(32 * GIB).state == "ok"
    assert of(8 * GIB).state == "note"
    docker = of(64 * 2**20)
    assert docker.state == "problem"
    assert "0.06 GiB" in docker.found
    assert "--shm-size=20g" in docker.cure


def test_shared_memory_where_there_is_none(tmp_path):
    assert machine.shared_memory(tmp_path / "absent") == []


def test_open_files(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 524288))
    finding = only(machine.open_files())
    assert (finding.state, finding.cure) == ("note", "ulimit -n 65536 before starting Ray")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65536, 65536))
    assert only(machine.open_files()).state == "ok"


# ---- Hub and trackers


def test_hub_never_shows_the_token(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_s3cret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    finding = only(inputs.hub())
    assert finding.state == "ok"
    assert finding.found.startswith("a token; cache ")
    assert "s3cret" not in render([finding])


def test_hub_offline_with_mirror_and_without_token(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror")
    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror")
    finding = only(inputs.hub())
    assert finding.state == "note"
    assert "no token" in finding.found
    assert "HF_ENDPOINT=https://mirror" in finding.found
    assert finding.cure == "unset HF_HUB_OFFLINE to fetch"


def test_wandb_is_looked_at_only_where_it_is_used(config):
    assert inputs.wandb_login(config) == []


def test_wandb(monkeypatch, tmp_path):
    config = make_config(tmp_path, tracking={"wandb_project": "cats"})
    monkeypatch.setattr(metadata, "version", lambda name: "0.31.0")
    assert only(inputs.wandb_login(config)).cure.startswith("wandb login")
    path = tmp_path / "no-netrc"
    path.write_text("machine api.wandb.ai login user password s3cret")
    path.chmod(0o600)
    assert only(inputs.wandb_login(config)).state == "ok"
    path.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    finding = only(inputs.wandb_login(config))
    assert finding.state == "ok"
    assert "s3cret" not in render([finding])
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert only(inputs.wandb_login(config)).state == "note"

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert only(inputs.wandb_login(config)).cure == 'pip install "sdxl-ray[wandb]"'


def test_damaged_netrc_is_no_login(monkeypatch, tmp_path):
    (tmp_path / "no-netrc").write_text("nonsense")
    with pytest.raises(netrc.NetrcParseError):
        netrc.netrc(str(tmp_path / "no-netrc"))
    assert not inputs._has_netrc_login("api.wandb.ai")


# ---- the config's own


def test_local_model(tmp_path, tiny_model):
    finding = only(inputs.base_model(make_config(tmp_path, tiny_model)))
    assert finding.state == "ok"
    assert tiny_model in finding.found


def test_model_that_is_not_there(tmp_path):
    finding = only(inputs.base_model(make_config(tmp_path, "./nowhere")))
    assert finding.state == "problem"
    assert "there is no folder" in finding.found


@pytest.mark.parametrize(
    ("cached", "offline", "state"), [(True, True, "ok"), (False, False, "note"), (False, True, "problem")]
)
def test_model_on_the_hub(monkeypatch, tmp_path, cached, offline, state):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "/x" if cached else None)
    finding = only(inputs.base_model(make_config(tmp_path, "owner/name")))
    assert finding.state == state
    if state == "problem":
        assert finding.cure == "hf download owner/name while online, or unset HF_HUB_OFFLINE"


def test_dataset(config, tmp_path):
    assert only(inputs.dataset(config)).found.startswith("21 images in ")
    missing = make_config(tmp_path, dataset={"path": str(tmp_path / "nowhere")})
    finding = only(inputs.dataset(missing))
    assert finding.state == "problem"
    assert "nowhere" in finding.found


def test_each_dataset_has_a_finding(tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    paths = [str(tmp_path / name) for name in ("cats", "nowhere", "dogs")]
    config = make_config(tmp_path, dataset=[{"path": path} for path in paths] + [{"path": "x", "disabled": True}])
    findings = inputs.dataset(config)
    assert [(finding.subject, finding.state) for finding in findings] == [
        ("dataset cats", "ok"),
        ("dataset nowhere", "problem"),
        ("dataset dogs", "ok"),
    ]
    assert findings[0].found == f"1 images in {tmp_path / 'cats'}"


def test_output_folders(monkeypatch, config, tmp_path):
    assert [finding.state for finding in inputs.output_folders(config)] == ["ok", "ok"]
    assert not (tmp_path / "runs").exists()  # nothing is created
    (tmp_path / "runs").write_text("")
    output, cache = inputs.output_folders(config)
    assert "is a file, expected a folder" in output.found
    monkeypatch.setattr(inputs.os, "access", lambda path, mode: False)
    cache = inputs.output_folders(config)[1]
    assert cache.state == "problem"
    assert "choose another cache.path" in cache.cure


def test_a_cloud_cache_is_listed(monkeypatch, tmp_path):
    config = make_config(tmp_path, cache={"path": "s3://bucket/cache"})
    monkeypatch.setattr(inputs, "open_folder", lambda path: SimpleNamespace(list=lambda: [path] * 3))
    assert inputs.output_folders(config)[1] == Finding(
        "cache.path", "ok", "s3://bucket/cache is a cloud address and can be listed: 3 files"
    )

    def denied():
        raise StorageError("s3://bucket/cache: access denied. Set AWS_ACCESS_KEY_ID.")

    monkeypatch.setattr(inputs, "open_folder", lambda path: SimpleNamespace(list=denied))
    assert inputs.output_folders(config)[1] == Finding(
        "cache.path", "problem", "s3://bucket/cache: access denied. Set AWS_ACCESS_KEY_ID."
    )


# ---- together


def test_examine_never_raises(monkeypatch, config):
    def broken(*_, **__):
        raise OSError("the disk is on fire")

    for module, names in (
        (machine, ("python_version", "packages", "accelerators")),
        (inputs, ("hub", "base_model", "disk_space")),
        (cluster, ("ray_authentication",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, broken)
    failed = [finding for finding in doctor.examine(config=config) if "on fire" in finding.found]
    assert len(failed) == 7
    assert {finding.state for finding in failed} == {"problem"}
    assert failed[0].found == "could not be examined: OSError: the disk is on fire"


def test_examine_this_machine(monkeypatch, config):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_s3cret")
    findings = doctor.examine(config=config)
    text = render(findings)
    assert "could not be examined" not in text
    assert "s3cret" not in text
    assert {finding.subject for finding in findings} >= {"python", "packages", "ray", "model", "dataset", "run.output"}
    assert not ray.is_initialized()


def test_exit_code():
    fine, note, bad = Finding("a", "ok", ""), Finding("b", "note", ""), Finding("c", "problem", "")
    assert exit_code([]) == exit_code([fine, note]) == 0
    assert exit_code([fine, bad]) == 1


def test_render():
    findings = [
        Finding("python", "ok", "3.12.1"),
        Finding("shared memory", "problem", "too small\nby far", "more of it"),
    ]
    assert render(findings).splitlines() == [
        "ok       python         3.12.1",
        "problem  shared memory  too small",
        "                        by far",
        "                        -> more of it",
    ]
    assert render([]) == ""
