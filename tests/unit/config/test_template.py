import itertools
import re
import tomllib

import pytest

from sdxl_ray.config.load import config_from_dict, known_keys, load_config
from sdxl_ray.config.template import PRESET_NOTES, PRESETS, render_reference, render_template


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


def test_the_template_mentions_every_setting_and_no_other():
    raw = tomllib.loads(render_template())
    assert {f"{section}.{name}" for section, settings in raw.items() for name in settings} == set(known_keys())


def test_the_template_starts_with_the_commands_that_use_it():
    lines = render_template(file_name="cats.toml").splitlines()
    assert lines[1].startswith("#   sdxl-ray check cats.toml")
    assert lines[2].startswith("#   sdxl-ray train cats.toml")


def test_every_setting_of_the_template_is_explained():
    lines = render_template().splitlines()
    for before, line in itertools.pairwise(lines):
        if re.match(r"\w+ = ", line):
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
    assert '| `formats` | `["kohya", "diffusers"]` | kohya, diffusers |' in reference
