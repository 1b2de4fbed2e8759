from pathlib import Path

import pytest

from sdxl_ray.config.load import config_from_dict, dump_config, load_config, resolve_paths, with_overrides
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


def test_the_settings_of_another_trainer_are_told_as_that(tmp_path):
    path = tmp_path / "multidatabackend.json"
    path.write_text('[{"id": "cats", "instance_data_dir": "/cats"}]')
    with pytest.raises(
        ConfigError, match=r"is not valid TOML: .* It is JSON, as other .*: docs/coming-from-elsewhere\.md"
    ):
        load_config(path)


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
            "dataset": {
                "captions": ["filename"],
                "trigger_word": "ohwx \\ 猫",
                "resolution": [512, 1024],
                "caption_replace": [[r"\bcat\b", 'a "dog"'], ["\\s+", ""]],
            },
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
            '  cat.toml:5: dataset.resolution = "1024": must be a number, or a list of numbers such as [512, 1024]',
            "  cat.toml:6: dataset.crop = \"centre\": must be one of 'center', 'random', 'top_left', 'top_right', "
            "'bottom_left', 'bottom_right', 'focus'. Did you mean \"center\"?",
            "  on the command line: adapter.dropout = 1.5: must be below 1",
            "  cat.toml:9: adapter.rnak: unknown key. Did you mean adapter.rank?",
            '  cat.toml:12: train.duration = "2000": needs a whole number and its unit, such as "2000 steps" or '
            '"10 epochs"',
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
        (
            '[model]\ndtype = "fp12"',
            "2: model.dtype = \"fp12\": must be one of 'bf16', 'fp16', 'fp32'. Did you mean \"fp32\"?",
        ),
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
            '[dataset]\ncaption_extension = "5"',
            '2: dataset.caption_extension = "5": must have at least 2 characters',
        ),
        (
            "[sweep.parameters]\nadapter.rank = { gird = [4] }",
            "2: sweep.parameters.adapter.rank.gird: unknown key; known: grid, choice, uniform, loguniform",
        ),
        ("run = 5", "1: run = 5: must be a section: [run]"),
        ("[[run]]\nseed = 1", "1: run: must be a section: [run]"),
        ("run = { seed = -1 }", "1: run.seed = -1: must be at least 0"),
        (
            '[export]\nformats = [\n  "kohya",\n  "civitai",\n]',
            "2: export.formats = \"civitai\": must be one of 'kohya', 'diffusers', 'kohya-svd', 'checkpoint', "
            "'diffusers-folder'",
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


# ---- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapter.targets=all-linear", ("all-linear",)),  # a bare word
        ('adapter.targets="all-linear"', ("all-linear",)),
        ('adapter.targets=["to_q", "to_k"]', ("to_q", "to_k")),
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
    assert config.dataset[0].path == str(tmp_path / "cats")
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
    folder = Path(load_config(write('dataset.path = "builtin:photographs"')).dataset[0].path)
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
    assert config.dataset[0].path == str(job / "images")  # what was sent along with the job
    assert resolve_paths(config) == config


# ---- several datasets ------------------------------------------------------------------------------------------------

DATASETS = """\
[[dataset]]
path = "images/cats"

[[dataset]]
name = "portraits"
path = "s3://bucket/people/{000..099}.tar"
repeats = 2
resolution = 512

[train]
micro_batch_size = 1

[[dataset]]
path = "tables/*.parquet"
role = "eval"
"""


def test_each_table_is_a_dataset(write, tmp_path):
    config = load_config(write(DATASETS))
    assert [(dataset.name, dataset.path, dataset.repeats) for dataset in config.datasets] == [
        ("cats", str(tmp_path / "images/cats"), 1),
        ("portraits", "s3://bucket/people/{000..099}.tar", 2),
        ("tables", str(tmp_path / "tables/*.parquet"), 1),
    ]
    assert load_config(write(dump_config(config))) == config
    assert "\n[[dataset]]\n" in dump_config(config)


def test_problems_say_which_dataset_and_which_line(write):
    path = write(
        """\
[[dataset]]
path = "cats"
repeats = 0

[[dataset]]
name = "portraits"
resolutoin = 512
path = "people"

[train]
micro_batch_size = 0

[[dataset]]
path = "../images/*.tar"
resolution = [512, "1024"]
captions = [1]
start = 500
caption_replace = [["cat"]]

[[dataset]]
[dataset.caption]
x = 1
"""
    )
    assert problems_of(path) == "\n".join(
        [
            "cat.toml: 8 problems:",
            "  cat.toml:3: dataset 1 (cats): dataset.repeats = 0: must be at least 1",
            "  cat.toml:7: dataset 2 (portraits): dataset.resolutoin: unknown key. Did you mean dataset.resolution?",
            '  cat.toml:17: dataset 3 (images): dataset.start = 500: needs a whole number and its unit, such as "2000 '
            'steps" or "10 epochs"',
            "  cat.toml:16: dataset 3 (images): dataset.captions = 1: must be text in quotes",
            "  cat.toml:18: dataset 3 (images): dataset.caption_replace: must be a list of pairs: [['pattern', "
            "'replacement']]",
            '  cat.toml:15: dataset 3 (images): dataset.resolution = "1024": must be a number, without quotes',
            "  cat.toml:21: dataset 4 (images-2): dataset.caption: unknown key. Did you mean dataset.captions?",
            '  cat.toml:11: train.micro_batch_size = 0: must be a whole number of at least 1, or "auto"',
        ]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[dataset]\nrepeats = 0", "cat.toml:2: dataset.repeats = 0: must be at least 1"),
        ("[[dataset]]\nrepeats = 0", "cat.toml:2: dataset.repeats = 0: must be at least 1"),
        ("dataset.repeats = 0", "cat.toml:1: dataset.repeats = 0: must be at least 1"),
        ("dataset = [{ repeats = 0 }]", "cat.toml:1: dataset.repeats = 0: must be at least 1"),
        ("dataset = 5", "cat.toml:1: dataset = 5: must be a section: [[dataset]]"),
        ("dataset = [5]", "cat.toml:1: dataset = 5: must be a section: [[dataset]]"),
        ("dataset = []", "cat.toml:1: dataset: must not be empty"),
        (
            "[[dataset]]\n[[dataset]]\nresolution = 100",
            "cat.toml:3: dataset 2 (images-2): dataset.resolution: 100 is not a multiple of dataset.bucket_step = 64",
        ),
    ],
)
def test_places_of_dataset_settings(write, text, expected):
    assert problems_of(write(text)) == expected


@pytest.mark.parametrize(
    ("overrides", "repeats"),
    [
        (["dataset.repeats=5"], [5, 5, 5]),
        (["dataset.cats.repeats=5"], [5, 2, 1]),
        (["dataset.portraits.repeats=5"], [1, 5, 1]),
        (['dataset."portraits".repeats=5'], [1, 5, 1]),
        (["dataset.2.repeats=5"], [1, 5, 1]),
        (["dataset.repeats=5", "dataset.1.repeats=6"], [6, 5, 5]),
        (["dataset.1.path=elsewhere", "dataset.cats.repeats=5"], [5, 2, 1]),  # names are the file's
        (['dataset=[{ path = "dogs" }]', "dataset.dogs.repeats=5"], [5]),
    ],
)
def test_overrides_of_all_datasets_and_of_one(write, overrides, repeats):
    text = DATASETS.replace('role = "eval"', "")
    config = load_config(write(text), overrides)
    assert [dataset.repeats for dataset in config.dataset] == repeats


@pytest.mark.parametrize("text", ["", "[dataset]\nflip = true", "[[dataset]]\nflip = true", "dataset.flip = true"])
def test_overrides_where_there_is_one_dataset(write, tmp_path, text):
    for key in ("dataset.path", "dataset.1.path", "dataset.images.path"):
        (dataset,) = load_config(write(text), [f"{key}=dogs", "dataset.name=42"]).dataset
        assert (dataset.path, dataset.name, dataset.flip) == (str(tmp_path / "dogs"), "42", bool(text))


def test_a_name_with_a_point_or_of_digits_is_a_name(write):
    config = load_config(
        write('[[dataset]]\nname = "2"\n[[dataset]]\nname = "cats.v2"'),
        ["dataset.2.repeats=5", "dataset.cats.v2.repeats=6"],
    )
    assert [dataset.repeats for dataset in config.dataset] == [5, 6]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "dataset.path=elsewhere",
            "dataset.path: which of the 3 datasets? Write dataset.cats.path, or dataset.1.path.",
        ),
        ("dataset.name=x", "dataset.name: which of the 3 datasets? Write dataset.cats.name, or dataset.1.name."),
        (
            "dataset.portrait.repeats=2",
            'dataset.portrait.repeats: no dataset is called "portrait". Did you mean "portraits"? There are 1 to 3: '
            "cats, portraits, tables",
        ),
        (
            "dataset.4.repeats=2",
            'dataset.4.repeats: no dataset is called "4". There are 1 to 3: cats, portraits, tables',
        ),
        ("dataset.flip=2", "dataset.flip = 2: must be true or false"),  # once, although wrong for three
        ("dataset.cats.flip=2", "dataset.cats.flip = 2: must be true or false"),
        ("dataset.flap=2", "dataset.flap: unknown key. Did you mean dataset.flip?"),
        ("dataset.cats.flap=2", "dataset.cats.flap: unknown key. Did you mean dataset.flip?"),
        (
            "dataset.3.weight=2",
            'dataset.3.weight: is set, but dataset.role = "eval": the eval loss always takes each '
            "image once. Remove dataset.weight.",
        ),
        ("dataset=5", "dataset = 5: must be a section: [[dataset]]"),
    ],
)
def test_wrong_overrides_of_datasets(write, override, expected):
    assert problems_of(write(DATASETS), [override]) == f"on the command line: {expected}"


def test_an_override_that_is_wrong_for_some_datasets_says_for_which(write):
    assert problems_of(write(DATASETS), ["dataset.repeats=3"]) == (
        'on the command line: dataset 3 (tables): dataset.repeats: is set, but dataset.role = "eval": the eval loss '
        "always takes each image once. Remove dataset.repeats."
    )


def test_an_override_of_no_section(write):
    assert "on the command line: dataset.repeats: dataset is a value, not a section" in problems_of(
        write("dataset = 5"), ["dataset.repeats=2"]
    )


def test_with_overrides_of_datasets():
    config = config_from_dict({"dataset": [{"path": "cats"}, {"path": "dogs", "repeats": 2}]})
    changed = with_overrides(config, {"dataset.flip": True, "dataset.dogs.repeats": 3, "dataset.1.weight": 0.5})
    assert [(dataset.flip, dataset.repeats, dataset.weight) for dataset in changed.dataset] == [
        (True, 1, 0.5),
        (True, 3, 1.0),
    ]
    assert [dataset.name for dataset in changed.dataset] == ["cats", "dogs"]


def test_a_name_that_nobody_gave_goes_with_the_path():
    config = config_from_dict({"dataset": {"path": "cats"}})
    assert with_overrides(config, {"dataset.path": "/data/dogs"}).dataset[0].name == "dogs"
    config = config_from_dict({"dataset": {"path": "cats", "name": "mine"}})
    assert with_overrides(config, {"dataset.path": "/data/dogs"}).dataset[0].name == "mine"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"dataset.path": "x"},
            "dataset.path: which of the 2 datasets? Write dataset.cats.path, or dataset.1.path.",
        ),
        (
            {"dataset.birds.flip": True},
            'dataset.birds.flip: no dataset is called "birds". There are 1 to 2: cats, dogs',
        ),
        ({"dataset.cats.flap": True}, "dataset.cats.flap: unknown key. Did you mean dataset.flip?"),
        ({"dataset.dogs.repeats": 0}, "dataset 2 (dogs): dataset.repeats: must be at least 1"),
        (
            {"dataset.dogs.resolution": 1000},
            "dataset 2 (dogs): dataset.resolution: 1000 is not a multiple of dataset.bucket_step = 64",
        ),
    ],
)
def test_wrong_with_overrides_of_datasets(changes, text):
    with pytest.raises(ConfigError) as error:
        with_overrides(config_from_dict({"dataset": [{"path": "cats"}, {"path": "dogs"}]}), changes)
    assert str(error.value) == text


@pytest.mark.parametrize("path", ["s3://bucket/cats", "gs://bucket/*.tar", "hf://org/name", "abfs://c@a/x"])
def test_cloud_addresses_stay_as_they_are(write, path):
    assert load_config(write(f'dataset.path = "{path}"')).dataset[0].path == path
    assert load_config(write('cache.path = "s3://bucket/cache"')).cache.path == "s3://bucket/cache"


def test_file_addresses_become_paths(write):
    """Wherever one may be written, so that nothing after it has to know of them."""
    loaded = load_config(
        write(
            'dataset.path = "file:///data/{a,b} c.tar"\ncache.path = "file:///data/my%20cache"\n'
            'run.output = "file:///runs"\nmodel.path = "file:///models/sdxl"'
        )
    )
    assert loaded.dataset[0].path == "/data/{a,b} c.tar"
    assert (loaded.cache.path, loaded.run.output, loaded.model.path) == ("/data/my cache", "/runs", "/models/sdxl")


@pytest.mark.parametrize("pattern", ["data/*.tar", "data/{00000..00099}.tar", "data/**/[ab]?.parquet"])
def test_patterns_become_absolute_and_stay_patterns(write, tmp_path, monkeypatch, pattern):
    monkeypatch.setenv("HOME", "/home/cat")
    assert load_config(write(f'dataset.path = "{pattern}"')).dataset[0].path == f"{tmp_path}/{pattern}"
    assert load_config(write(f'dataset.path = "~/{pattern}"')).dataset[0].path == f"/home/cat/{pattern}"


def test_the_place_for_copies_of_shards_is_expanded(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/cat")
    assert load_config(write("")).cache.local_path == "/home/cat/.cache/sdxl-ray/shards"
