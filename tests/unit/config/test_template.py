import itertools
import re
import tomllib
from pathlib import Path

import pytest

from sdxl_ray.config.elsewhere import DOCUMENT, render_table
from sdxl_ray.config.keys import known_keys
from sdxl_ray.config.load import config_from_dict, load_config
from sdxl_ray.config.schema import DatasetSection
from sdxl_ray.config.template import PRESET_NOTES, PRESETS, render_reference, render_template

ROOT = Path(__file__).parents[3]


def nested(changes):
    raw = {}
    for key, value in changes.items():
        section, name = key.split(".")
        raw.setdefault(section, {})[name] = value
    return raw


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_file_that_says_what_was_meant(preset, tmp_path):
    path = tmp_path / "cats.toml"
    path.write_text(render_template(file_name="cats.toml", preset=preset), encoding="utf-8")
    assert load_config(path) == config_from_dict(nested(PRESETS[preset]), name="cats")


def test_presets_only_name_known_settings():
    changed = {key for changes in PRESETS.values() for key in changes}
    assert changed <= set(known_keys())
    assert PRESETS.keys() == PRESET_NOTES.keys()


def all_settings(template):
    """The template with what is commented out put back."""
    return re.sub(r"^#(?=\w+ = )", "", template, flags=re.MULTILINE)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_commented_out_is_the_default(preset, tmp_path):
    path = tmp_path / "cats.toml"
    path.write_text(all_settings(render_template(preset=preset)), encoding="utf-8")
    assert load_config(path) == config_from_dict(nested(PRESETS[preset]), name="cats")


def test_the_template_mentions_every_setting_and_no_other():
    raw = tomllib.loads(all_settings(render_template()))
    (raw["dataset"],) = raw["dataset"]
    assert {f"{section}.{name}" for section, settings in raw.items() for name in settings} == set(known_keys())


def test_the_template_shows_the_settings_of_a_dataset_that_most_people_look_at():
    (dataset,) = tomllib.loads(render_template())["dataset"]
    assert set(dataset) == {
        "path",
        "repeats",
        "captions",
        "instance_prompt",
        "trigger_word",
        "resolution",
        "upscale",
        "crop",
        "flip",
        "max_unreadable",
    }
    assert dataset["resolution"] == 1024  # not [1024.0]


def test_the_other_settings_of_a_dataset_stand_under_headings():
    headings = re.findall(r"^# ---- dataset: (.*)$", render_template(), re.MULTILINE)
    assert headings == [
        "with several datasets",
        "which images",
        "columns of a table",
        "captions",
        "tags",
        "buckets and crops",
        "masks",
        "what is too much",
    ]
    marked = [name for name, field in DatasetSection.model_fields.items() if field.json_schema_extra["more"]]
    of_datasets = re.search(r"^\[\[dataset\]\]$(.*?)^\[", render_template(), re.MULTILINE | re.DOTALL)[1]
    commented = re.findall(r"^#(\w+) = ", of_datasets, re.MULTILINE)
    assert sorted(commented) == sorted(marked)


def test_a_preset_shows_what_it_changes(monkeypatch):
    monkeypatch.setitem(PRESETS, "24gb", {"dataset.bucket_step": 32})
    (dataset,) = tomllib.loads(render_template(preset="24gb"))["dataset"]
    assert dataset["bucket_step"] == 32


def test_the_template_starts_with_the_commands_that_use_it():
    lines = render_template(file_name="cats.toml").splitlines()
    assert lines[1].startswith("#   sdxl-ray check cats.toml")
    assert lines[2].startswith("#   sdxl-ray train cats.toml")


def test_every_setting_of_the_template_is_explained():
    lines = render_template().splitlines()
    for before, line in itertools.pairwise(lines):
        if re.match(r"#?\w+ = ", line):
            assert before.startswith("# "), line


def test_the_reference_has_a_row_of_four_cells_for_every_setting():
    rows = [line for line in render_reference().splitlines() if line.startswith("| `")]
    cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows]
    assert all(len(row) == 4 for row in cells), [row for row in cells if len(row) != 4]
    assert [row[0].strip(" `") for row in cells] == [key.split(".", 1)[1] for key in known_keys()]


def test_the_reference_gives_range_unit_and_choices():
    reference = render_reference()
    assert "| `rank` | `16` | at least 1, at most 1024 |" in reference
    assert "| `height` | `1024` | at least 64, multiple of 8, pixels |" in reference
    assert "| `resolution` | `1024` |  |" in reference
    assert "| `formats` | `[]` | kohya, diffusers, kohya-svd, checkpoint, diffusers-folder |" in reference


def test_the_reference_explains_several_datasets():
    reference = render_reference()
    assert "## [[dataset]]\n" in reference and "## [dataset]" not in reference
    assert "`dataset.cats.repeats=2` in the one called" in reference


def test_the_file_in_docs_is_up_to_date():
    """python scripts/make_docs.py"""
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == render_reference()


def test_the_example_of_several_datasets():
    cats, animals, photographs, held_out = load_config(ROOT / "configs" / "datasets.toml").datasets
    assert cats.resolution == (768, 1024) and cats.flip
    assert animals.path.startswith("s3://")
    assert (photographs.role, photographs.weight < 1) == ("regularization", True)
    assert held_out.role == "eval"


def test_the_page_for_other_trainers_is_up_to_date():
    """python scripts/make_docs.py"""
    assert (ROOT / DOCUMENT).read_text(encoding="utf-8") == render_table()
