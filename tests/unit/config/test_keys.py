import pytest

from sdxl_ray.config.keys import field_of, known_keys, label, line_of, locate_keys


def test_known_keys_are_leaves():
    keys = known_keys()
    assert {"run.name", "sweep.parameters", "train.duration", "dataset.path"} <= set(keys)
    assert len(keys) == len(set(keys))
    assert all(key.count(".") == 1 for key in keys)


@pytest.mark.parametrize("key", ["dataset.flip", "dataset.cats.flip", "dataset.2.flip", "dataset.cats.v2.flip"])
def test_the_field_of_a_dataset_is_the_same_in_all_of_them(key):
    field = field_of(key)
    assert field is not None and field.annotation is bool
    assert field_of("dataset.cats.flap") is field_of("adapter.rank.x") is field_of("zzz") is None


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("\n[run]\n# seed = 1\nseed = 2", "run.seed", 4),
        ("run . seed = 2", "run.seed", 1),
        ('[run]\n"seed" = 2', "run.seed", 2),
        ("  [ run ]  # note\n  seed=2", "run.seed", 2),
        ("[sweep.parameters]\n'adapter.rank' = 1", "sweep.parameters.adapter.rank", 2),
        ('[sweep.parameters."adapter.rank"]\ngrid = [1]', "sweep.parameters.adapter.rank", 1),
        ("[sweep]\nnum_trials = 1\n[sweep.parameters]\na = [\n [1, 2],\n [3, 4]\n]\nb = 1", "sweep.parameters.b", 8),
    ],
)
def test_lines_of_keys(text, key, line):
    assert locate_keys(text)[key] == line


def test_lines_of_datasets():
    text = """\
[[dataset]]
path = "a"
[train]
micro_batch_size = 1
[[ dataset ]]  # the second
path = "b"
[dataset.x]
y = 1
"""
    lines = locate_keys(text)
    expected = {
        "dataset": 1,
        "dataset.1": 1,
        "dataset.1.path": 2,
        "train.micro_batch_size": 4,
        "dataset.2": 5,
        "dataset.2.path": 6,
        "dataset.2.x.y": 8,
    }
    assert expected.items() <= lines.items()
    assert line_of("dataset.2.repeats", lines) == 5  # it is not there: the section's


@pytest.mark.parametrize("text", ["[dataset]\npath = 1", "\ndataset.path = 1", "\n[[dataset]]\npath = 1"])
def test_one_dataset_is_the_first(text):
    lines = locate_keys(text)
    assert line_of("dataset.1.path", lines) == text.count("\n") + 1


@pytest.mark.parametrize(
    ("key", "names", "text"),
    [
        ("run.seed", ["cats"], "run.seed"),
        ("dataset.1.flip", ["cats"], "dataset.flip"),
        ("dataset.1", ["cats"], "dataset"),
        ("dataset.2.flip", ["cats", "dogs"], "dataset 2 (dogs): dataset.flip"),
        ("dataset.2", ["cats", "dogs"], "dataset 2 (dogs)"),
        ("dataset", ["cats", "dogs"], "dataset"),
        ("sweep.parameters.dataset.2.flip", ["cats", "dogs"], "sweep.parameters.dataset.2.flip"),
    ],
)
def test_labels(key, names, text):
    assert label(key, names) == text
