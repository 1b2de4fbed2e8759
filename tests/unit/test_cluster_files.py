"""Files for clusters and the shipped configs, checked offline. pytest tests/unit/test_cluster_files.py"""

import copy
import tomllib
from pathlib import Path

import pytest
import ray
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

from sdxl_ray.config.load import load_config

REPOSITORY = Path(__file__).parents[2]
CLUSTERS = ["cluster.yaml", "configs/cluster-onprem.yaml"]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.toml"))


def read_yaml(name: str) -> dict:
    return yaml.safe_load((REPOSITORY / name).read_text(encoding="utf-8"))


def ray_range():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in project["dependencies"]]
    return next(requirement.specifier for requirement in wanted if requirement.name == "ray")


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_file_passes_rays_schema(name):
    assert validate_config(prepare_config(read_yaml(name))) is None, "it raises where the schema is broken"


@pytest.mark.parametrize("name", CLUSTERS)
def test_rays_schema_would_notice_a_misspelt_key(name):
    config = copy.deepcopy(read_yaml(name))
    config["setup_comands"] = []
    with pytest.raises(Exception, match="setup_comands"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("cluster.yaml", "# ray up cluster.yaml"),
        ("configs/cluster-onprem.yaml", "# ray up configs/cluster-onprem.yaml"),
        ("configs/rayjob.yaml", "# kubectl apply -f configs/rayjob.yaml"),
    ],
)
def test_file_begins_with_the_command_that_uses_it(name, command):
    assert (REPOSITORY / name).read_text(encoding="utf-8").splitlines()[0] == command


def test_images_carry_the_installed_ray():
    assert read_yaml("cluster.yaml")["docker"]["image"].startswith(f"rayproject/ray:{ray.__version__}-")
    assert f"FROM rayproject/ray:{ray.__version__}-" in (REPOSITORY / "configs/rayjob.yaml").read_text()


def test_a_worker_with_gpus_is_always_there():
    # a run counts the cluster's GPUs when it starts
    config = read_yaml("cluster.yaml")
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert types["gpu"]["min_workers"] >= 1
    assert types["gpu"]["labels"]["accel-vendor"] == "nvidia"


def test_rayjob():
    job = read_yaml("configs/rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["entrypoint"].startswith("sdxl-ray train ")
    assert "\n" not in spec["entrypoint"]
    assert spec["shutdownAfterJobFinishes"] is True
    version = spec["rayClusterSpec"]["rayVersion"]
    assert version == ray.__version__
    assert ray_range().contains(version)


def test_rayjob_entrypoint_is_a_config_that_loads():
    command, train, config, *overrides = read_yaml("configs/rayjob.yaml")["spec"]["entrypoint"].split()
    assert (command, train) == ("sdxl-ray", "train")
    loaded = load_config(REPOSITORY / "configs" / Path(config).name, overrides)
    assert loaded.cluster.accelerator == "gpu"
    workers = read_yaml("configs/rayjob.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert sum(group["replicas"] for group in workers) >= loaded.train.num_workers


def test_every_rayjob_container_has_shared_memory_and_the_shared_folder():
    cluster = read_yaml("configs/rayjob.yaml")["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert "persistentVolumeClaim" in volumes["shared"]
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert mounts == {"/dev/shm": "shm", "/shared": "shared"}
            assert "lifecycle" not in container  # a preStop `ray stop` would cut short how Ray drains a node
        assert group["labels"]


def test_there_are_configs():
    assert "demo.toml" in [path.name for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_begins_with_its_command_and_loads(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# sdxl-ray ")
    assert f"configs/{path.name}" in first
    load_config(path)
