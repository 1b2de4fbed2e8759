from pathlib import Path

import pytest

from sdxl_ray.config.load import (
    config_from_dict,
    dump_config,
    known_keys,
    load_config,
    locate_keys,
    resolve_paths,
    with_overrides,
)
from sdxl_ray.errors import ConfigError


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes cat.toml in the current folder, which is empty."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="cat.toml"):
        path = Path(name)
        if isinstance(text, bytes):
            path.write_bytes(text)
        else:
            path.write_text(text, encoding="utf-8")
        return path

    return write


def problems_of(path, overrides=()):
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_an_empty_file_is_the_defaults(write):
    assert load_config(write("")) == config_from_dict({}, name="cat")


def test_the_run_is_called_after_its_file(write):
    assert load_config(write("", "my cat.v2.toml")).run.name == "my cat.v2"
    assert load_config(write('run.name = "other"')).run.name == "other"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cat.toml: no such file. `sdxl-ray init cat.toml` writes one to start from."),
        (b'run.name = "caf\xe9"', "cat.toml: is not UTF-8 text (byte 15). Save it as UTF-8."),
        (b"[run\nname = 1", "cat.toml: is not valid TOML: "),
        (b"run.seed = 1\nrun.seed = 2\n", "cat.toml: is not valid TOML: "),
    ],
)
def test_a_file_that_cannot_be_read(write, content, text):
    path = Path("cat.toml") if content is None else write(content)
    assert problems_of(path).startswith(text)


def test_a_folder_in_place_of_a_file(tmp_path):
    assert problems_of(tmp_path) == f"{tmp_path}: is a folder, expected a TOML file of settings."


def test_a_file_below_a_file(tmp_path):
    (tmp_path / "cat.toml").touch()
    assert problems_of(tmp_path / "cat.toml" / "dog.toml").endswith("dog.toml: cannot be read: Not a directory.")


def test_a_byte_order_mark_and_windows_line_ends_are_fine(write):
    path = write(b'\xef\xbb\xbf[run]\r\nname = "cat"\r\nseed = -1\r\n')
    assert problems_of(path) == "cat.toml:3: run.seed = -1: must be at least 0"


def test_a_config_reads_what_it_writes(write):
    config = config_from_dict(
        {
            "run": {"name": 'a "quoted" name'},
            "dataset": {"captions": ["filename"], "trigger_word": "ohwx \\ 猫"},
            "train": {"duration": "3 epochs"},
            "lr_schedule": {"warmup": "33.333333333 %"},
            "optimizer": {"learning_rate": 1 / 3},
            "validation": {"prompts": ["a cat", "two\nlines"]},
            "sweep": {
                "parameters": {
                    "optimizer.learning_rate": {"loguniform": [1e-5, 1e-3]},
                    "lr_schedule.name": {"grid": ["constant", "cosine"]},
                }
            },
        }
    )
    assert load_config(write(dump_config(config))) == config


# ---- error texts -----------------------------------------------------------------------------------------------------


def test_every_problem_is_reported_at_once_with_its_line(write):
    path = write(
        """\
[run]
seed = -1

[dataset]
resolution = "1024"
crop = "centre"

[adapter]
rnak = 4

[train]
duration = "2000"
"""
    )
    assert problems_of(path, ["adapter.dropout=1.5"]) == "\n".join(
        [
            "cat.toml: 6 problems:",
            "  cat.toml:2: run.seed = -1: must be at least 0",
            '  cat.toml:5: dataset.resolution = "1024": must be a whole number (pixels)',
            "  cat.toml:6: dataset.crop = \"centre\": must be one of 'center', 'random'. Did you mean \"center\"?",
            "  on the command line: adapter.dropout = 1.5: must be below 1",
            "  cat.toml:9: adapter.rnak: unknown key. Did you mean adapter.rank?",
            '  cat.toml:12: train.duration = "2000": needs a number and its unit, such as "2000 steps" or "10 epochs"',
        ]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[optimizer]\nlearning_rat = 1",
            "2: optimizer.learning_rat: unknown key. Did you mean optimizer.learning_rate?",
        ),
        ("[train]\nlearning_rate = 1", "2: train.learning_rate: unknown key. Did you mean optimizer.learning_rate?"),
        ("[optimiser]\nbeta1 = 0.5", "1: optimiser: unknown key. Did you mean optimizer?"),
        ("[zzz]\nqqq = 1", "1: zzz: unknown key."),
        ("[run]\nseed = 2147483648", "2: run.seed = 2147483648: must be below 2147483648"),
        ("[run]\nseed = 1.5", "2: run.seed = 1.5: must be a whole number"),
        ("[run]\nseed = true", "2: run.seed = true: must be a whole number"),
        ("[run]\nname = 5", "2: run.name = 5: must be text in quotes"),
        ('[run]\nname = " cat"', '2: run.name = " cat": has spaces at its ends'),
        ('[model]\npath = ""', '2: model.path = "": must not be empty'),
        ('[model]\ndtype = "fp16"', "2: model.dtype = \"fp16\": must be one of 'bf16', 'fp32'. Did you mean \"bf16\"?"),
        (
            '[optimizer]\nlearning_rate = "1e-4"',
            '2: optimizer.learning_rate = "1e-4": must be a number, without quotes',
        ),
        (
            '[optimizer]\nlearning_rate = "high"',
            '2: optimizer.learning_rate = "high": must be a number, without quotes',
        ),
        ("[optimizer]\nlearning_rate = 0", "2: optimizer.learning_rate = 0: must be above 0"),
        ("[adapter]\nrank = 2000", "2: adapter.rank = 2000: must be at most 1024"),
        ("[tracking]\ntensorboard = 1", "2: tracking.tensorboard = 1: must be true or false"),
        ("[validation]\nheight = 100", "2: validation.height = 100: must be a multiple of 8 (pixels)"),
        ('[validation]\nprompts = "a cat"', '2: validation.prompts = "a cat": must be a list, such as ["one", "two"]'),
        ("[dataset]\ncaptions = []", "2: dataset.captions: must not be empty"),
        (
            "[sweep.parameters]\nadapter.rank = { gird = [4] }",
            "2: sweep.parameters.adapter.rank.gird: unknown key; known: grid, choice, uniform, loguniform",
        ),
        ("run = 5", "1: run = 5: must be a section: [run]"),
        ("[[run]]\nseed = 1", "1: run: must be a section: [run]"),
        ("run = { seed = -1 }", "1: run.seed = -1: must be at least 0"),
        (
            '[export]\nformats = [\n  "kohya",\n  "civitai",\n]',
            "2: export.formats = \"civitai\": must be one of 'kohya', 'diffusers'",
        ),
        ("[dataset]\nresolution = 1000", "2: dataset.resolution: 1000 is not a multiple of dataset.bucket_step = 64"),
        (
            '[sweep.parameters]\n"adapter.rnk" = { grid = [4] }',
            "2: sweep.parameters.adapter.rnk: no such setting. Did you mean adapter.rank?",
        ),
    ],
)
def test_one_problem_is_one_line(write, text, expected):
    assert problems_of(write(text)) == f"cat.toml:{expected}"


def test_several_contradictions_are_reported_at_once(write):
    path = write('[dataset]\nresolution = 1000\ninstance_prompt = "a cat"\n[eval]\nevery = "0 steps"')
    assert problems_of(path).splitlines() == [
        "cat.toml: 3 problems:",
        '  cat.toml:3: dataset.instance_prompt: is set, but dataset.captions never uses it. Add "instance_prompt" to '
        "dataset.captions.",
        "  cat.toml:2: dataset.resolution: 1000 is not a multiple of dataset.bucket_step = 64",
        "  cat.toml:5: eval.every: must be at least 1 step or 1 epoch",
    ]


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


# ---- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapter.targets=all-linear", "all-linear"),  # a bare word
        ('adapter.targets="all-linear"', "all-linear"),
        ("optimizer.learning_rate=2e-4", 2e-4),
        ("adapter.rank=8", 8),
        ("tracking.tensorboard=false", False),
        ('validation.prompts=["a cat", "b = c"]', ("a cat", "b = c")),
        ("train.duration=10 epochs", "10 epochs"),
        ("model.variant=", ""),
        ("run.name=42", "42"),
        ("run.name=2025-01-31", "2025-01-31"),
        ("run.name=a=b", "a=b"),
        (" run.seed =7", 7),
    ],
)
def test_overrides(write, override, expected):
    path = write("[adapter]\nrank = 4\n[optimizer]\nlearning_rate = 1.0")
    value = load_config(path, [override])
    for part in override.partition("=")[0].strip().split("."):
        value = getattr(value, part)
    assert (str(value) if "duration" in override else value) == expected


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ('[sweep.parameters]\n"adapter.rank" = { grid = [4] }', []),
        ("[sweep.parameters]\nadapter.rank = { grid = [4] }", []),  # to TOML, a table in a table
        ("[sweep.parameters.adapter.rank]\ngrid = [4]", []),
        ("", ["sweep.parameters.adapter.rank={ grid = [4] }"]),
        ("", ['sweep.parameters={ "adapter.rank" = { grid = [4] } }']),
    ],
)
def test_what_is_swept_needs_no_quotes(write, text, overrides):
    parameters = load_config(write(text), overrides).sweep.parameters
    assert {key: space.grid for key, space in parameters.items()} == {"adapter.rank": (4,)}


def test_later_overrides_win(write):
    assert load_config(write(""), ["adapter.rank=8", "adapter.rank=9"]).adapter.rank == 9


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapter.rnak=8", "on the command line: adapter.rnak: unknown key. Did you mean adapter.rank?"),
        ("adaptr.rank=8", "on the command line: adaptr: unknown key. Did you mean adapter?"),
        ("adapter.rank=high", 'on the command line: adapter.rank = "high": must be a whole number'),
        ("adapter.rank=0", "on the command line: adapter.rank = 0: must be at least 1"),
        ("adapter={rank=0}", "on the command line: adapter.rank = 0: must be at least 1"),
        ("adapter.rank.x=0", "on the command line: adapter.rank.x: rank is a value, not a section"),
        ("adapter.rank", '"adapter.rank": expected KEY=VALUE, such as optimizer.learning_rate=2e-4'),
        ("=8", '"=8": expected KEY=VALUE, such as optimizer.learning_rate=2e-4'),
    ],
)
def test_wrong_overrides(write, override, expected):
    assert problems_of(write("[adapter]\nrank = 4"), [override]) == expected


def test_an_override_cures_a_value_of_the_file(write):
    assert load_config(write("[adapter]\nrank = 0"), ["adapter.rank=8"]).adapter.rank == 8


# ---- with_overrides --------------------------------------------------------------------------------------------------


def test_with_overrides_changes_only_what_is_named():
    config = config_from_dict({})
    changed = with_overrides(config, {"adapter.rank": 3, "train.duration": "5 epochs"})
    assert (changed.adapter.rank, str(changed.train.duration)) == (3, "5 epochs")
    assert with_overrides(changed, {"adapter.rank": 16, "train.duration": "2000 steps"}) == config


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"adapter.rank": 0}, "adapter.rank: must be at least 1"),
        ({"adapter.rnak": 1}, "adapter.rnak: unknown key. Did you mean adapter.rank?"),
        ({"dataset.resolution": 1000}, "dataset.resolution: 1000 is not a multiple of dataset.bucket_step = 64"),
    ],
)
def test_with_overrides_checks_everything_again(changes, text):
    with pytest.raises(ConfigError) as error:
        with_overrides(config_from_dict({}), changes)
    assert str(error.value) == text


# ---- paths -----------------------------------------------------------------------------------------------------------


def test_relative_paths_start_at_the_current_folder(write, tmp_path):
    (tmp_path / "models" / "sdxl").mkdir(parents=True)
    config = load_config(write('run.output = "out"\ndataset.path = "cats"\nmodel.path = "models/sdxl"'))
    assert config.run.output == str(tmp_path / "out")
    assert config.cache.path == str(tmp_path / "cache")
    assert config.dataset.path == str(tmp_path / "cats")
    assert config.model.path == str(tmp_path / "models" / "sdxl")


def test_absolute_and_home_paths(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/cat")
    config = load_config(write('run.output = "/out"\ncache.path = "~/cache"\nmodel.path = "~/sdxl"'))
    assert (config.run.output, config.cache.path) == ("/out", "/home/cat/cache")
    assert config.model.path == "/home/cat/sdxl"
    assert "there is no such user" in problems_of(write('cache.path = "~nobody-here/cache"'))


@pytest.mark.parametrize("model", ["stabilityai/stable-diffusion-xl-base-1.0", "builtin:tiny"])
def test_hub_ids_and_builtins_are_no_paths(write, model):
    assert load_config(write(f'model.path = "{model}"')).model.path == model


def test_the_builtin_photographs_are_a_folder_of_images(write):
    folder = Path(load_config(write('dataset.path = "builtin:photographs"')).dataset.path)
    assert any(folder.glob("*.jpg"))


@pytest.mark.parametrize(
    ("home", "expected"), [("/results", "/results"), ("", "/home/cat/sdxl-ray"), (None, "/home/cat/sdxl-ray")]
)
def test_in_a_ray_job_results_go_where_ray_does_not_delete_them(tmp_path, monkeypatch, home, expected):
    job = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    monkeypatch.setenv("HOME", "/home/cat")
    if home is None:
        monkeypatch.delenv("SDXL_RAY_HOME", raising=False)
    else:
        monkeypatch.setenv("SDXL_RAY_HOME", home)
    config = config_from_dict({"dataset": {"path": "images"}})
    assert (config.run.output, config.cache.path) == (f"{expected}/runs", f"{expected}/cache")
    assert config.dataset.path == str(job / "images")  # what was sent along with the job
    assert resolve_paths(config) == config


def test_known_keys_are_leaves():
    keys = known_keys()
    assert {"run.name", "sweep.parameters", "train.duration"} <= set(keys)
    assert len(keys) == len(set(keys))
    assert all(key.count(".") == 1 for key in keys)
