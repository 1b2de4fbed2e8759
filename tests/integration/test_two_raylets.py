"""Two raylets on one machine train together: the workers' process group crosses node borders."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from sdxl_ray.config.load import dump_config
from sdxl_ray.tracking.metrics import read_metrics

from .conftest import small_config

# In a process of its own: pytest's has a Ray already, and a process can have one.
SCRIPT = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from sdxl_ray import connect, fit, load_config
from sdxl_ray.connection import DEFAULT_ENVIRONMENT
import os, socket
for name, value in DEFAULT_ENVIRONMENT.items():
    os.environ.setdefault(name, value)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
cluster = Cluster(
    initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True, "dashboard_port": port}
)
cluster.add_node(num_cpus=1)
connect(cluster.address)
nodes = set()

def on_event(event):
    if event["event"] == "metrics" and not nodes:
        from ray.util.state import list_actors
        alive = list_actors(filters=[("state", "=", "ALIVE")])
        nodes.update(actor.node_id for actor in alive if "RayTrainWorker" in actor.class_name)

result = fit(load_config(sys.argv[1]), on_event=on_event)
print("RESULT", json.dumps({"nodes": len(nodes), "step": result.step, "exports": len(result.exports)}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_two_raylets_train_together(tmp_path, shared_cache, tiny_model):
    config = small_config(tmp_path / "runs", shared_cache, "two", tiny_model, train={"duration": "6 steps"})
    settings = tmp_path / "two.toml"
    settings.write_text(dump_config(config))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(settings)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads(lines[0].removeprefix("RESULT ")) == {"nodes": 2, "step": 6, "exports": 2}
    assert sum("train/loss" in line for line in read_metrics(tmp_path / "runs" / "two" / "metrics.jsonl")) == 6
