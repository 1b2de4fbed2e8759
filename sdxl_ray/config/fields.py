"""What sections of settings are made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


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
    if "://" in text:
        raise ValueError("a cloud address cannot be used here; give a folder that all machines see")
    return text


Strings = Annotated[tuple[str, ...], Field(strict=False)]  # TOML gives lists
Trimmed = Annotated[str, AfterValidator(_no_surrounding_space)]
FolderName = Annotated[Trimmed, AfterValidator(_plain_folder_name)]
FolderPath = Annotated[Trimmed, AfterValidator(_no_cloud_address)]


class Section(BaseModel):
    """Strict (no number from a string), frozen, and deaf to unknown keys never: they are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
