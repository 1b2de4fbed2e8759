"""Which format can hold which kind of training, and why others cannot. No torch: settings are checked with it.

    kohya             ComfyUI, A1111, Forge, InvokeAI; of LoRA diffusers too. LoHa, LoKr and DoRA have LyCORIS's names;
                      a DoRA is read exactly by LyCORIS, nearly by ComfyUI and Forge, not by others (`DORA_IN_KOHYA`)
    diffusers         `load_lora_weights`, peft: LoRA, and DoRA of the U-Net
    kohya-svd         the plain LoRA that comes nearest, which every program reads
    checkpoint        the whole model in one file, in Stability's layout, with what was trained merged into it
    diffusers-folder  the same as a folder for `from_pretrained`

Which program reads what: "SDXL LoRA file formats" in the project's field notes.
"""

from __future__ import annotations

_LORA_FILES = ("kohya", "diffusers", "kohya-svd")
_WHOLE_MODELS = ("checkpoint", "diffusers-folder")

FORMATS: tuple[str, ...] = (*_LORA_FILES, *_WHOLE_MODELS)

# Kind -> what can hold it.
FORMATS_OF: dict[str, tuple[str, ...]] = {
    "lora": FORMATS,
    "dora": FORMATS,
    "loha": ("kohya", "kohya-svd", *_WHOLE_MODELS),
    "lokr": ("kohya", "kohya-svd", *_WHOLE_MODELS),
    "full": _WHOLE_MODELS,
}

# What programs make of a DoRA in a kohya file. Training, as peft, has one magnitude for each output row: dora_scale
# (out, 1). ComfyUI and Forge (`weight_decompose`, output axis) divide by the norm of the base weight where training
# divides by that of the changed one. A1111 and InvokeAI know LyCORIS's default only, one for each input column (1, in),
# and broadcast ours without a word; diffusers drops it with a log line.
DORA_IN_KOHYA = (
    "LyCORIS reads it exactly, ComfyUI and Forge nearly (they divide by the norm of the base weight); A1111, InvokeAI "
    "and diffusers read it wrongly, without an error"
)

# Kind -> what is written unless asked otherwise. The plain LoRA that stands in for a DoRA has the plain name.
DEFAULT_FORMATS: dict[str, tuple[str, ...]] = {
    "lora": ("kohya", "diffusers"),
    "dora": ("kohya-svd", "kohya", "diffusers"),
    "loha": ("kohya", "kohya-svd"),
    "lokr": ("kohya", "kohya-svd"),
    "full": ("checkpoint",),
}


def is_whole_model(format_name: str) -> bool:
    """Whether the format holds all of the model rather than what was trained; it needs the base model's files."""
    return format_name in _WHOLE_MODELS


def refuse(kind: str, format_name: str, has_text_encoders: bool = False) -> str | None:
    """Why `format_name` cannot hold a training of `kind`, and what to do; None where it can.

    Args:
        kind: as in adapter.kind.
        has_text_encoders: whether LoRAs of the text encoders were trained too. Every format that holds the U-Net's part
            holds these; the argument is here so that callers need not know that.
    """
    if kind not in FORMATS_OF:
        return f'adapter.kind = "{kind}" is unknown to the export. Known: {", ".join(FORMATS_OF)}.'
    if format_name not in FORMATS:
        return f"No export format is called '{format_name}'. Known: {', '.join(FORMATS)}."
    possible = FORMATS_OF[kind]
    if format_name in possible:
        return None
    instead = f"Set export.formats to some of: {', '.join(possible)}; or leave it empty."
    if kind == "full":
        also = " and merge the text encoders' LoRAs into it" if has_text_encoders else ""
        return (
            f'export.formats: "{format_name}" holds an adapter, and adapter.kind = "full" trains the U-Net itself. '
            f"Write the whole model{also}. {instead}"
        )
    return (
        f"export.formats: diffusers cannot read a {_NAMES[kind]}: its load_lora_weights takes LoRA and DoRA only "
        f"(\"all keys must contain 'lora'\"). {instead}"
    )


_NAMES = {"loha": "LoHa", "lokr": "LoKr"}
