"""What sections of settings are made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PlainValidator


def setting(default: Any, text: str, *, unit: str = "", more: str = "", **limits: Any) -> Any:
    """A field with its description and unit; `limits` are pydantic's (ge, gt, le, ...).

    `more`: the heading under which `sdxl-ray init` lists a setting that few need, commented out.
    """
    return Field(default=default, description=text, json_schema_extra={"unit": unit, "more": more}, **limits)


def _no_surrounding_space(text: str) -> str:
    if text != text.strip():
        raise ValueError("has spaces at its ends")
    return text


def _plain_folder_name(text: str) -> str:
    if text in (".", "..") or any(sign in text for sign in "/\\\0"):
        raise ValueError('must be the name of one folder, without "/" or ".."; where it lies is run.output')
    return text


def _no_cloud_address(text: str) -> str:
    if "://" in text and not text.startswith("file://"):
        raise ValueError("a cloud address cannot be used here; give a folder that all machines see")
    return text


def _auto_is_zero(given: Any) -> Any:
    if given == "auto":
        return 0
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError('must be a whole number of at least 1, or "auto"')
    return given


def _mode_or_number(given: Any) -> Any:
    modes = ("none", "transformer", "full")
    is_number = isinstance(given, int) and not isinstance(given, bool) and given >= 0
    if not is_number and given not in modes:
        raise ValueError(f"must be one of {', '.join(map(repr, modes))}, or a number of transformer blocks")
    return given


# 0 in code is "auto" in a file: how many is found out before the run.
MicroBatchSize = Annotated[int, BeforeValidator(_auto_is_zero), PlainSerializer(lambda size: size or "auto")]
Checkpointing = Annotated[str | int, PlainValidator(_mode_or_number)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]  # TOML gives lists
Trimmed = Annotated[str, AfterValidator(_no_surrounding_space)]
FolderName = Annotated[Trimmed, AfterValidator(_plain_folder_name)]
FolderPath = Annotated[Trimmed, AfterValidator(_no_cloud_address)]


class Section(BaseModel):
    """Strict (no number from a string), frozen, and deaf to unknown keys never: they are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
