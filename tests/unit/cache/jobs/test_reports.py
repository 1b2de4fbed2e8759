"""What travels between the driver and the nodes."""

import json
import socket
from dataclasses import asdict

import numpy as np
import pytest

from sdxl_ray.cache.jobs.reports import ShardReport, error_text, packed, raise_error, unpacked
from sdxl_ray.errors import CacheError, ClusterError, DatasetError, ModelError, StorageError
from tests.unit.cache.planned import config_of, plan_of


@pytest.mark.parametrize("kind", [CacheError, StorageError, ModelError, DatasetError, ClusterError])
def test_an_error_comes_back_as_what_it_was(kind):
    with pytest.raises(kind, match=r"^it went wrong$") as error:
        raise_error(error_text(kind("it went wrong")))
    assert type(error.value) is kind


def test_an_error_of_another_machine_names_it(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "node-7")
        text = error_text(ModelError("no token"))
    with pytest.raises(ModelError, match=r"^on node node-7: no token$"):
        raise_error(text)


def test_no_error():
    assert raise_error("") is None


def test_a_report_travels_as_a_row_of_ray_data():
    report = ShardReport("latents/x", num=3, skipped=({"path": "x", "reason": "y"},), unreadable={"key": "k"}, tiled=1)
    row = report.to_row()
    assert all(isinstance(column, np.ndarray) and len(column) == 1 for column in row.values())
    assert (
        ShardReport.from_row(row) == ShardReport.from_row({name: column[0] for name, column in row.items()}) == report
    )


def test_a_work_item_is_packed_to_a_fraction_and_comes_out_the_same(images, tmp_path, tiny_model):
    (shard,) = plan_of(config_of(tmp_path / "planned", tiny_model, images)).latent_shards()
    fields = {**asdict(shard), "without": ["ä"]}
    plain = json.dumps(fields)
    assert unpacked(packed(fields)) == json.loads(plain)
    assert len(packed(fields)) < len(plain) / 2
