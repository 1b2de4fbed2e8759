import pytest
from pydantic import ValidationError

from sdxl_ray.config.contradictions import contradictions
from sdxl_ray.config.load import config_from_dict
from sdxl_ray.config.schema import Config
from sdxl_ray.errors import ConfigError


def test_the_defaults_are_valid_and_do_not_contradict_each_other():
    assert contradictions(Config()) == []
    assert config_from_dict({}).train == Config().train


def test_the_defaults_pass_their_own_limits():
    assert Config.model_validate(Config().model_dump(mode="json")) == Config()


def test_a_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Config().train.micro_batch_size = 3


def test_the_global_batch_counts_workers_and_accumulation():
    config = config_from_dict({"train": {"micro_batch_size": 3, "accumulation": 4, "num_workers": 5}})
    assert config.global_batch_size == 60


def test_one_table_is_a_list_of_one():
    for given in ({"path": "cats"}, [{"path": "cats"}]):
        assert [dataset.path for dataset in Config.model_validate({"dataset": given}).dataset] == ["cats"]


def test_datasets_are_those_that_are_not_left_out():
    config = config_from_dict({"dataset": [{"path": "cats"}, {"path": "dogs", "disabled": True}, {"path": "birds"}]})
    assert [dataset.name for dataset in config.dataset] == ["cats", "dogs", "birds"]
    assert [dataset.name for dataset in config.datasets] == ["cats", "birds"]


@pytest.mark.parametrize(
    ("given", "edges"),
    [
        ({}, [1024.0]),
        ({"resolution": 768}, [768.0]),
        ({"resolution": [512, 1024]}, [512.0, 1024.0]),
        ({"resolution": [0.25, 1], "resolution_unit": "megapixels"}, [512.0, 1024.0]),
        ({"resolution": 0.5, "resolution_unit": "megapixels"}, [pytest.approx(724.077, abs=1e-3)]),
        ({"resolution": 640, "resolution_unit": "shorter_side"}, [640.0]),
        ({"resolution": [512, 768], "buckets": ["square"]}, [512.0, 768.0]),
        ({"buckets": ["512x512", "2048x512"]}, [1024.0]),
    ],
)
def test_edges_of_the_square_bucket(given, edges):
    (dataset,) = config_from_dict({"dataset": given}).dataset
    assert list(dataset.edges) == edges


def test_the_largest_edge_is_of_the_datasets_that_take_part():
    sizes = [{"resolution": [512, 768]}, {"resolution": 0.5, "resolution_unit": "megapixels"}, {"disabled": True}]
    datasets = [{"path": str(number), **size} for number, size in enumerate(sizes)]
    assert config_from_dict({"dataset": datasets}).largest_edge == 768
    assert config_from_dict({"dataset": datasets[1:]}).largest_edge == 724


@pytest.mark.parametrize("name", ["a/b", "a\\b", "a\0b"])
def test_a_dataset_has_a_plain_name(name):
    with pytest.raises(ConfigError, match=r'must be a name, without "/"; where the images lie is dataset\.path'):
        config_from_dict({"dataset": {"name": name}})


@pytest.mark.parametrize("name", ["a/b", "../up", "..", ".", "a\\b", "a\0b"])
def test_a_run_name_is_one_folder(name):
    with pytest.raises(
        ConfigError, match=r'must be the name of one folder, without "/" or ".."; where it lies is run.output'
    ):
        config_from_dict({"run": {"name": name}})


@pytest.mark.parametrize("name", ["cat", "cat-2.1", "my cat", "..cat", "猫"])
def test_a_run_name_may_be_any_one_folder(name):
    assert config_from_dict({"run": {"name": name}}).run.name == name


@pytest.mark.parametrize(("section", "key"), [("run", "output"), ("model", "path")])
def test_cloud_addresses_are_refused_where_they_are_not_read(section, key):
    with pytest.raises(ConfigError) as error:
        config_from_dict({section: {key: "s3://bucket/folder"}})
    assert str(error.value) == (
        f'given: {section}.{key} = "s3://bucket/folder": a cloud address cannot be used here; give a folder that all '
        "machines see"
    )


@pytest.mark.parametrize(
    ("section", "key"), [("run", "output"), ("cache", "path"), ("dataset", "path"), ("model", "path")]
)
def test_empty_paths_are_refused(section, key):
    with pytest.raises(ConfigError, match=f'given: {section}.{key} = "": must not be empty'):
        config_from_dict({section: {key: ""}})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_must_be_finite(value):
    with pytest.raises(ConfigError, match=r"train\.max_grad_norm = (nan|inf): must be a finite number"):
        config_from_dict({"train": {"max_grad_norm": value}})


# ---- sweep -----------------------------------------------------------------------------------------------------------


def sweep_error(parameters):
    with pytest.raises(ConfigError) as error:
        config_from_dict({"sweep": {"parameters": parameters}})
    return str(error.value)


@pytest.mark.parametrize(
    ("space", "text"),
    [
        ({}, "needs exactly one of grid, choice, uniform, loguniform; found none"),
        ({"grid": [1], "choice": [2]}, "needs exactly one of grid, choice, uniform, loguniform; found grid, choice"),
        ({"uniform": [0.5, 0.1]}, "needs [low, high] with low < high, found [0.5, 0.1]"),
        ({"loguniform": [0.1, 0.1]}, "needs [low, high] with low < high, found [0.1, 0.1]"),
        ({"loguniform": [0.0, 0.1]}, "loguniform needs bounds above 0, found [0.0, 0.1]"),
        ({"grid": []}, "needs at least one value"),
        ({"uniform": [0.1]}, "must be a list of two numbers: [low, high]"),
        ({"uniform": [0.1, 0.2, 0.3]}, "must be a list of two numbers: [low, high]"),
        ({"uniform": "0.1"}, "must be a list"),
    ],
)
def test_a_search_space_is_one_thing_with_sound_bounds(space, text):
    error = sweep_error({"adapter.dropout": space})
    assert error.startswith("given: sweep.parameters.adapter.dropout")
    assert text in error


@pytest.mark.parametrize(
    ("key", "space", "text"),
    [
        ("optimizer.learning_rat", {"grid": [1e-4]}, "no such setting. Did you mean optimizer.learning_rate?"),
        ("adapter.rank", {"choice": [4, 5000]}, "cannot try 5000: adapter.rank: must be at most 1024"),
        ("adapter.rank", {"uniform": [4, 16]}, "cannot try 4.0: adapter.rank: must be a whole number"),
        ("adapter.kind", {"grid": ["lora", "lor"]}, "cannot try 'lor': adapter.kind: must be one of"),
        (
            "train.duration",
            {"grid": ["10 steps"]},
            'cannot try \'10 steps\': lr_schedule.warmup: "100 steps" is longer than train.duration = "10 steps"',
        ),
    ],
)
def test_every_value_of_a_sweep_is_tried_on_the_schema(key, space, text):
    with pytest.raises(ConfigError) as error:
        config_from_dict({"lr_schedule": {"warmup": "100 steps"}, "sweep": {"parameters": {key: space}}})
    assert f"given: sweep.parameters.{key}: {text}" in str(error.value)


@pytest.mark.parametrize(
    "key", ["run.seed", "model.dtype", "dataset.crop", "dataset.cats.crop", "cache.vae_dtype", "cluster.accelerator"]
)
def test_what_the_trials_share_cannot_vary(key):
    assert sweep_error({key: {"grid": [0]}}) == (
        f"given: sweep.parameters.{key}: cannot vary between trials, which share the model, the cache and the cluster"
    )


def test_a_sound_sweep_passes():
    parameters = {"optimizer.learning_rate": {"loguniform": [1e-5, 1e-3]}, "adapter.rank": {"choice": [4, 16]}}
    config = config_from_dict({"sweep": {"parameters": parameters}})
    assert config.sweep.parameters["adapter.rank"].values == (4, 16)
    assert config.sweep.parameters["optimizer.learning_rate"].values == (1e-5, 1e-3)
