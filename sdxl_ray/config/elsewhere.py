"""What other trainers call our settings: for "Did you mean", and for docs/coming-from-elsewhere.md.

kohya's sd-scripts, SimpleTuner, and the diffusers scripts with what ai-toolkit and OneTrainer share with them.
"""

from __future__ import annotations

from typing import NamedTuple

DOCUMENT = "docs/coming-from-elsewhere.md"


class Elsewhere(NamedTuple):
    """One of our settings as others know it."""

    ours: str
    theirs: tuple[str, ...]
    note: str = ""  # where it is not the same


SECTIONS = {
    "datasets": "dataset",
    "network": "adapter",
    "lora": "adapter",
    "save": "checkpoint",
    "sample": "validation",
}

ROWS = (
    Elsewhere("run.output", ("output_dir",), "one folder a run below it"),
    Elsewhere("run.name", ("output_name", "hub_model_id")),
    Elsewhere("model.path", ("pretrained_model_name_or_path", "base_model"), "a diffusers folder or a Hub id"),
    Elsewhere("model.dtype", ("mixed_precision", "train_dtype"), 'bf16 as a rule; with "fp16" the loss is scaled'),
    Elsewhere("model.quantize", ("base_model_precision", "fp8_base"), "int8, int4 or fp8, of the frozen U-Net"),
    Elsewhere(
        "dataset.path",
        ("train_data_dir", "image_dir", "instance_data_dir", "instance_data_root", "data_dir", "folder_path"),
    ),
    Elsewhere(
        "dataset.repeats",
        ("num_repeats",),
        "kohya also has it in a folder's name, `10_cat`: that number is not read here. SimpleTuner counts what comes "
        "on top: its `repeats = 1` is 2 here",
    ),
    Elsewhere(
        "dataset.weight",
        ("prior_loss_weight", "loss_weight"),
        "in the loss. There is no `probability`: images are mixed in proportion to their numbers, times `repeats`",
    ),
    Elsewhere("dataset.role", ("is_reg", "is_regularization_data"), '"regularization"'),
    Elsewhere("dataset.max_samples", ("max_train_samples", "max_num_samples")),
    Elsewhere("dataset.captions", ("caption_strategy",), '["textfile", "column"] unless set; several, with fallback'),
    Elsewhere(
        "dataset.caption_extension",
        ("caption_ext",),
        'kohya looks for ".caption", here it is ".txt"; each line of a file is a caption of its own unless '
        '`caption_lines = "whole"`',
    ),
    Elsewhere("dataset.instance_prompt", ("class_tokens",), 'with `captions = ["instance_prompt"]`'),
    Elsewhere("dataset.shuffle_tags", ("shuffle_caption", "shuffle_tokens"), "with `caption_variants = 8`, say"),
    Elsewhere("dataset.keep_tags", ("keep_tokens",)),
    Elsewhere("dataset.tag_dropout", ("caption_tag_dropout_rate", "token_dropout_rate")),
    Elsewhere("dataset.tag_separator", ("caption_separator",)),
    Elsewhere("loss.caption_dropout", ("caption_dropout_rate", "caption_dropout_probability"), "0.1 unless set"),
    Elsewhere(
        "dataset.resolution",
        ("resolutions", "max_resolution"),
        "one edge: `[832, 1216]` is two sizes, not a width and a height. Buckets are always on; "
        '`buckets = ["square"]` switches them off',
    ),
    Elsewhere("dataset.resolution_unit", ("resolution_type",)),
    Elsewhere("dataset.bucket_step", ("bucket_reso_steps", "aspect_bucket_alignment")),
    Elsewhere("dataset.upscale", ("bucket_no_upscale",), "the other way round: `upscale = false`"),
    Elsewhere("dataset.min_size", ("minimum_image_size",)),
    Elsewhere("dataset.crop", ("random_crop", "crop_style", "crop_aspect", "center_crop")),
    Elsewhere("dataset.flip", ("flip_aug", "random_flip", "flip_aug_p"), "encodes each image twice"),
    Elsewhere("dataset.mask", ("masked_loss", "alpha_mask", "conditioning_data_dir"), '"alpha", or "file"'),
    Elsewhere("cache.path", ("cache_dir", "cache_dir_vae", "latent_cache_dir")),
    Elsewhere("cache.mode", ("cache_latents", "cache_latents_to_disk", "vae_cache_ondemand"), '"disk" unless set'),
    Elsewhere("cache.text", ("cache_text_encoder_outputs", "cache_text_embeddings")),
    Elsewhere("cache.batch_size", ("vae_batch_size",), "0: as large as fits"),
    Elsewhere("cache.caption_chunks", ("max_token_length",), "chunks of 75: 75, 150 or 225 are 1, 2 or 3"),
    Elsewhere("adapter.kind", ("network_module", "lora_type", "use_dora", "model_type", "lora_format")),
    Elsewhere("adapter.rank", ("network_dim", "lora_rank", "dim", "linear")),
    Elsewhere("adapter.alpha", ("network_alpha", "lora_alpha", "linear_alpha")),
    Elsewhere("adapter.dropout", ("network_dropout", "lora_dropout")),
    Elsewhere("adapter.start_from", ("network_weights", "init_lora")),
    Elsewhere("adapter.targets", ("target_modules", "lora_layers")),
    Elsewhere(
        "text_encoder.learning_rate", ("text_encoder_lr", "text_encoder_lr1"), "with `text_encoder.rank` above 0"
    ),
    Elsewhere("text_encoder_2.learning_rate", ("text_encoder_lr2",)),
    Elsewhere("optimizer.name", ("optimizer_type",), "or a class by dotted path"),
    Elsewhere("optimizer.learning_rate", ("lr", "unet_lr"), "not multiplied by batch or workers"),
    Elsewhere("optimizer.options", ("optimizer_args", "optimizer_config")),
    Elsewhere("optimizer.weight_decay", ("adam_weight_decay",)),
    Elsewhere("lr_schedule.name", ("lr_scheduler", "lr_scheduler_type")),
    Elsewhere("lr_schedule.warmup", ("lr_warmup_steps", "warmup_steps"), '"100 steps" or "5 %"'),
    Elsewhere("lr_schedule.cycles", ("lr_scheduler_num_cycles", "lr_num_cycles")),
    Elsewhere("lr_schedule.power", ("lr_scheduler_power", "lr_power")),
    Elsewhere(
        "train.duration",
        ("max_train_steps", "max_train_epochs", "num_train_epochs", "max_steps", "epochs", "steps"),
        '"2000 steps" or "10 epochs", whatever the batch',
    ),
    Elsewhere("train.micro_batch_size", ("train_batch_size", "batch_size"), "of one GPU"),
    Elsewhere("train.accumulation", ("gradient_accumulation_steps", "gradient_accumulation")),
    Elsewhere("train.num_workers", ("num_processes", "num_gpus"), "GPUs"),
    Elsewhere("loss.objective", ("v_parameterization", "prediction_type"), '"v_prediction", say'),
    Elsewhere("loss.zero_terminal_snr", ("rescale_betas_zero_snr",)),
    Elsewhere("loss.min_snr_gamma", ("snr_gamma",), 'with `weighting = "min_snr"`'),
    Elsewhere("loss.error", ("loss_type",)),
    Elsewhere("loss.offset_noise", ("noise_offset",)),
    Elsewhere("loss.multires_noise_levels", ("multires_noise_iterations",)),
    Elsewhere("loss.input_perturbation", ("ip_noise_gamma",)),
    Elsewhere("loss.timestep_min", ("min_timestep",)),
    Elsewhere("loss.timestep_max", ("max_timestep",)),
    Elsewhere("ema.decay", ("use_ema", "ema_decay")),
    Elsewhere("validation.prompts", ("sample_prompts", "validation_prompt", "prompts")),
    Elsewhere(
        "validation.every",
        ("sample_every_n_steps", "sample_every", "validation_steps", "validation_step_interval", "validation_epochs"),
    ),
    Elsewhere("validation.num_steps", ("sample_steps", "validation_num_inference_steps")),
    Elsewhere("validation.guidance_scale", ("validation_guidance",)),
    Elsewhere(
        "checkpoint.every",
        ("save_every_n_steps", "save_every_n_epochs", "save_every", "checkpointing_steps", "checkpoint_step_interval"),
        "a checkpoint is all that a resume needs; `sdxl-ray export` makes a LoRA of any",
    ),
    Elsewhere("checkpoint.keep", ("checkpoints_total_limit", "max_step_saves_to_keep", "save_last_n_steps")),
    Elsewhere("export.formats", ("save_model_as",)),
    Elsewhere("export.dtype", ("save_precision",)),
    Elsewhere("tracking.wandb_project", ("report_to", "log_with", "tracker_project_name", "wandb_run_name")),
)

_OURS = {name: row.ours for row in ROWS for name in row.theirs}


def our_name(theirs: str) -> str:
    """Our key for a setting or a section of another trainer; empty if there is none that we know."""
    return _OURS.get(theirs) or SECTIONS.get(theirs, "")


_INTRODUCTION = """\
# Coming from another trainer

Made by `scripts/make_docs.py`; the same names answer an unknown key with "Did you mean".

One file of settings holds everything, datasets included: one `[[dataset]]` for each of theirs. `sdxl-ray init` writes
one to start from, and `sdxl-ray check` says what it would do before anything is encoded. Images and captions stay as
they are; caches of other trainers (`.npz`, `.pt`) are not read.

Without a dataset of `role = "eval"`, a share of the images (`eval.holdout`, at least one) is not trained on but
evaluated, so that settings can be compared. `eval.holdout = 0` trains on all of them.
"""


def render_table() -> str:
    """The page for people who come from another trainer."""
    return "\n".join(
        [
            _INTRODUCTION,
            "| here | kohya, SimpleTuner, diffusers, ai-toolkit | what differs |",
            "|---|---|---|",
            *(f"| `{row.ours}` | {', '.join(f'`{name}`' for name in row.theirs)} | {row.note} |" for row in ROWS),
            "",
        ]
    )
