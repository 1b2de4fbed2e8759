"""Which format holds what, asked before anything is trained or written."""

import subprocess
import sys
from typing import get_args

import pytest

from sdxl_ray.config.schema import ExportFormat
from sdxl_ray.export.which import DEFAULT_FORMATS, FORMATS, FORMATS_OF, is_whole_model, refuse
from sdxl_ray.sdxl.adapters import ADAPTER_KINDS


def test_the_tables_know_all_kinds_and_all_formats_of_the_settings():
    assert set(FORMATS_OF) == set(DEFAULT_FORMATS) == {*ADAPTER_KINDS, "full"}
    assert set(FORMATS) == set(get_args(ExportFormat))
    for kind, formats in DEFAULT_FORMATS.items():
        assert formats and set(formats) <= set(FORMATS_OF[kind])


def test_a_dora_goes_out_first_as_a_lora_that_every_program_reads():
    assert DEFAULT_FORMATS["dora"] == ("kohya-svd", "kohya", "diffusers")


@pytest.mark.parametrize("kind", FORMATS_OF)
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_format_is_refused_where_it_is_not_in_the_table(kind, format_name):
    assert (refuse(kind, format_name) is None) == (format_name in FORMATS_OF[kind])


def test_reasons_say_what_to_set():
    assert refuse("loha", "diffusers") == (
        'export.formats: diffusers cannot read a LoHa: its load_lora_weights takes LoRA and DoRA only ("all keys must '
        "contain 'lora'\"). Set export.formats to some of: kohya, kohya-svd, checkpoint, diffusers-folder; or leave it "
        "empty."
    )
    assert refuse("full", "kohya", has_text_encoders=True) == (
        'export.formats: "kohya" holds an adapter, and adapter.kind = "full" trains the U-Net itself. Write the whole '
        "model and merge the text encoders' LoRAs into it. Set export.formats to some of: checkpoint, "
        "diffusers-folder; or leave it empty."
    )
    assert "No export format is called 'comfy'. Known: kohya, diffusers" in refuse("lora", "comfy")
    assert 'adapter.kind = "oft" is unknown to the export. Known: lora' in refuse("oft", "kohya")


def test_whole_models_are_told_apart():
    assert [name for name in FORMATS if is_whole_model(name)] == ["checkpoint", "diffusers-folder"]


def test_the_table_needs_no_torch():
    code = "import sys, sdxl_ray.export.which; print('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
