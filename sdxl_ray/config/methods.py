"""Settings of what is trained and how: adapter, text encoders, loss, noise, optimizer, learning rate, average."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from sdxl_ray.config.fields import FolderPath, Section, Strings, setting
from sdxl_ray.config.units import Duration, DurationField, Warmup, WarmupField

_INIT = "how it begins, and other forms"
_BLOCKS = "other values for some blocks"
_SHAPES = "shape of the loss"
_NOISE = "noise"
_TIMESTEPS = "which noise levels are seen how often"
_MASKS = "masks"
_CONDITIONS = "what the model is told"
_OTHERS = "other optimizers"
_CURVES = "curves"

Quantization = Literal["none", "int8", "int4", "fp8"]


def _one_or_many(given: Any) -> Any:
    """`targets = "attention"` and `targets = ["to_q", "to_k"]` are both fine."""
    return given if isinstance(given, list | tuple) else [given]


class BlockRule(Section):
    """What differs for the modules whose name a pattern is found in."""

    rank: int | None = Field(default=None, ge=0, le=1024, description="0: these modules are not trained.")
    alpha: float | None = Field(default=None, ge=0, description="0: equal to the rank of these modules.")
    learning_rate_scale: float = Field(default=1.0, ge=0, le=1000, description="Times the learning rate.")


class AdapterSection(Section):
    """What is trained: an adapter of the U-Net, or the U-Net itself."""

    kind: Literal["lora", "dora", "loha", "lokr", "full"] = setting(
        "lora",
        "lora: low-rank adaptation (arXiv:2106.09685). dora: its direction and its size apart (arXiv:2402.09353). "
        "loha, lokr: Hadamard and Kronecker products (arXiv:2108.06098, arXiv:2309.14859). full: every weight of the "
        "U-Net, without an adapter.",
    )
    rank: int = setting(16, "Width of the low-rank update: capacity and file size.", ge=1, le=1024)
    alpha: float = setting(0.0, "The update is scaled by alpha / rank. 0: equal to rank, which is a scale of 1.", ge=0)
    dropout: float = setting(0.0, "Share of the adapter's inputs that is zeroed in training.", ge=0, lt=1)
    targets: Annotated[Strings, BeforeValidator(_one_or_many)] = setting(
        ("attention",),
        "attention: q, k, v, out (560 layers). all-linear: every linear layer of the blocks (722). all-linear+conv: "
        "the convolutions and time projections of resnets and samplers too (788). Or module names or their ends in a "
        "list, or a regular "
        "expression for whole names.",
        min_length=1,
    )
    start_from: FolderPath = setting(
        "", "A LoRA file to go on from, with kohya's or diffusers' names. Empty: from nothing.", unit="path"
    )
    rank_stabilized: bool = setting(
        False, "Scale by alpha / sqrt(rank), so that high ranks learn as fast (arXiv:2312.03732).", more=_INIT
    )
    init: Literal["default", "gaussian", "pissa", "olora"] = setting(
        "default",
        "default: A uniform, B zero. gaussian: A normal, B zero. pissa: the largest singular directions of the weight "
        "(arXiv:2404.02948). olora: its QR decomposition (arXiv:2406.01775). At first none changes the output.",
        more=_INIT,
    )
    factor: int = setting(
        -1,
        "lokr: the size of the small Kronecker factor; -1: as near to a square as it goes.",
        ge=-1,
        le=128,
        more=_INIT,
    )
    blocks: dict[str, BlockRule] = setting(
        {},
        'By a regular expression that is found in the module\'s name; the first that fits counts: "mid_block" = '
        '{ rank = 32, alpha = 16, learning_rate_scale = 0.5 }, "down_blocks.1" = { rank = 0 }.',
        more=_BLOCKS,
    )

    @property
    def scaling_alpha(self) -> float:
        """alpha as a number to divide by rank."""
        return self.alpha or float(self.rank)

    def arguments(self, seed: int) -> dict[str, Any]:
        """Of `attach_adapter`, in plain values; `blocks` are (pattern, rank or None, alpha or None)."""
        return {
            "kind": self.kind,
            "rank": self.rank,
            "alpha": self.scaling_alpha,
            "dropout": self.dropout,
            "targets": self.targets,
            "seed": seed,
            "rank_stabilized": self.rank_stabilized,
            "init": self.init,
            "factor": self.factor,
            "blocks": tuple((pattern, rule.rank, rule.alpha) for pattern, rule in self.blocks.items()),
        }


class TextAdapterSection(Section):
    """A LoRA of a text encoder beside the U-Net's. Then captions are encoded in each step."""

    rank: int = setting(0, "Width of its LoRA. 0: the encoder is not trained.", ge=0, le=1024)
    alpha: float = setting(0.0, "Scaled by alpha / rank. 0: equal to rank.", ge=0)
    learning_rate: float = setting(0.0, "Peak learning rate. 0: optimizer.learning_rate.", ge=0, le=10)
    stop: DurationField = setting(
        Duration(0, "steps"), 'From here on it stays as it is: "1000 steps", "5 epochs". 0: it learns to the end.'
    )
    targets: Literal["attention", "all-linear"] = setting(
        "attention", "attention: q, k, v, out. all-linear: the two layers of each MLP as well."
    )

    @property
    def scaling_alpha(self) -> float:
        """alpha as a number to divide by rank."""
        return self.alpha or float(self.rank)

    def arguments(self, seed: int) -> dict[str, Any]:
        """Of `attach_adapter`, in plain values."""
        alpha = self.scaling_alpha
        return {"kind": "lora", "rank": self.rank, "alpha": alpha, "targets": self.targets, "seed": seed}


class LossSection(Section):
    """What the U-Net learns to predict, from how much noise, and how much each noise level counts."""

    objective: Literal["epsilon", "v_prediction", "sample"] = setting(
        "epsilon",
        "What the base model predicts: epsilon for SDXL base, v_prediction for models that say so, sample: the image.",
    )
    zero_terminal_snr: bool = setting(
        False,
        "Rescale the schedule so that the last noise level holds nothing of the image (arXiv:2305.08891). Needs "
        "objective = v_prediction or sample. Models whose own schedule says so are trained so anyway.",
    )
    weighting: Literal["constant", "min_snr", "soft_min_snr", "debiased", "debiased_sqrt"] = setting(
        "constant",
        "How much each noise level counts. constant: the same. min_snr: arXiv:2303.09556. soft_min_snr: the same "
        "without an edge (arXiv:2401.11605). debiased: arXiv:2310.08442, for v 1 / (snr + 1) as in kohya's scripts. "
        "debiased_sqrt: for v 1 / sqrt(snr + 1) as in OneTrainer.",
    )
    min_snr_gamma: float = setting(5.0, "Of min_snr and soft_min_snr: the SNR above which levels count less.", gt=0)
    caption_dropout: float = setting(
        0.1, "Share of captions that are left out, so that guidance works.", unit="share 0-1", ge=0, le=1
    )
    error: Literal["mse", "huber", "smooth_l1", "mae"] = setting(
        "mse",
        "mse: squared. mae: absolute. huber, smooth_l1: squared where small and absolute where large (pseudo-Huber, "
        "2c(sqrt(d^2 + c^2) - c), and the same without the factor c).",
        more=_SHAPES,
    )
    huber_c: float = setting(
        0.1, "Where huber and smooth_l1 turn from squared to absolute.", gt=0, le=1000, more=_SHAPES
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = setting(
        "snr",
        "constant: c everywhere. exponential: from 1 at no noise down to c at all noise. snr: the same along the "
        "signal-to-noise ratio.",
        more=_SHAPES,
    )
    offset_noise: float = setting(
        0.0,
        "Adds noise that is one value for a whole channel, so that dark and bright images are learnt. Usually "
        "0.03-0.1.",
        ge=0,
        le=1,
        more=_NOISE,
    )
    offset_noise_probability: float = setting(
        1.0, "Share of the samples that get offset noise.", unit="share 0-1", gt=0, le=1, more=_NOISE
    )
    multires_noise_discount: float = setting(
        0.0,
        "Adds noise of coarser and coarser grain, each level times this share of the one before. Usually 0.3; 0: none.",
        ge=0,
        lt=1,
        more=_NOISE,
    )
    multires_noise_levels: int = setting(
        6, "How many coarser levels multires noise has at most.", ge=1, le=12, more=_NOISE
    )
    input_perturbation: float = setting(
        0.0,
        "Noise that the U-Net sees and is not asked to predict (arXiv:2301.11706). Usually 0.1.",
        ge=0,
        le=1,
        more=_NOISE,
    )
    input_perturbation_end: DurationField = setting(
        Duration(0, "steps"), "Until here it falls linearly to 0. 0: it stays as it is.", more=_NOISE
    )
    timesteps: Literal["uniform", "logit_normal"] = setting(
        "uniform",
        "uniform: each noise level as often. logit_normal: those around the middle more often (arXiv:2403.03206).",
        more=_TIMESTEPS,
    )
    stratified: bool = setting(
        True,
        "Spread the noise levels evenly over the samples of a step, of all workers together: less noise in the "
        "gradient, the same mean.",
        more=_TIMESTEPS,
    )
    logit_mean: float = setting(
        0.0,
        "logit_normal: where its middle is. Above 0: more noise.",
        ge=-5,
        le=5,
        more=_TIMESTEPS,
    )
    logit_std: float = setting(1.0, "logit_normal: how wide it is.", gt=0, le=10, more=_TIMESTEPS)
    timestep_bias: Literal["none", "less_noise", "more_noise", "range"] = setting(
        "none",
        "Draw some levels more often. less_noise: the low timesteps, texture and detail. more_noise: the high ones, "
        "composition. range: those between bias_begin and bias_end.",
        more=_TIMESTEPS,
    )
    bias_factor: float = setting(2.0, "How many times as often.", ge=0, le=1000, more=_TIMESTEPS)
    bias_share: float = setting(
        0.25, "Of less_noise and more_noise: how many of the levels.", unit="share 0-1", gt=0, lt=1, more=_TIMESTEPS
    )
    bias_begin: int = setting(0, "Of range: the first level.", unit="timestep", ge=0, le=999, more=_TIMESTEPS)
    bias_end: int = setting(999, "Of range: the last level.", unit="timestep", ge=0, le=999, more=_TIMESTEPS)
    timestep_min: int = setting(
        0, "The least noisy level that is seen.", unit="timestep", ge=0, le=999, more=_TIMESTEPS
    )
    timestep_max: int = setting(999, "The noisiest level that is seen.", unit="timestep", ge=0, le=999, more=_TIMESTEPS)
    mask_normalize: bool = setting(
        False,
        "Take the mean over the masked area, so that a small mask counts as much as a large one.",
        more=_MASKS,
    )
    unmasked_share: float = setting(
        0.0, "How much counts what is masked out.", unit="share 0-1", ge=0, le=1, more=_MASKS
    )
    caption_dropout_to: Literal["zeros", "empty"] = setting(
        "zeros",
        "What takes the place of a caption that is left out. zeros: as SDXL base was trained. empty: the encoded "
        "empty text, as most other trainers and many models made with them.",
        more=_CONDITIONS,
    )
    size_dropout: float = setting(
        0.0,
        "Share of samples that are told nothing about their size and crop (six zeros).",
        unit="share 0-1",
        ge=0,
        le=1,
        more=_CONDITIONS,
    )


class OptimizerSection(Section):
    """On fp32 master weights of what is trained."""

    name: str = setting(
        "adamw",
        "adamw (arXiv:1711.05101), adamw_8bit, lion, stable_adamw, prodigy, adafactor, adamw_schedule_free, muon; or "
        "the dotted path of a class, such as torch.optim.RAdam.",
        min_length=1,
    )
    learning_rate: float = setting(1e-4, "Peak learning rate; for prodigy 1.0.", gt=0, le=10)
    weight_decay: float = setting(0.01, "Decoupled weight decay.", ge=0, le=1)
    beta1: float = setting(0.9, "Decay of the mean of the gradient.", ge=0, lt=1)
    beta2: float = setting(0.999, "Decay of the mean of its square.", ge=0, lt=1)
    epsilon: float = setting(1e-8, "Added to the denominator.", gt=0)
    lora_plus_ratio: float = setting(
        1.0,
        "How many times as fast B learns as A; LoRA+ (arXiv:2402.12354) takes 16. 1: as fast.",
        ge=1,
        le=1000,
        more=_OTHERS,
    )
    options: dict[str, Any] = setting(
        {},
        "More keyword arguments of the optimizer's class, such as { d_coef = 0.5 } for prodigy.",
        more=_OTHERS,
    )


class LrScheduleSection(Section):
    """The learning rate over the run: a pure function of the optimizer step. docs/learning-rates.md draws them."""

    name: Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial", "wsd", "rex"] = setting(
        "constant",
        "After the warm-up. linear, cosine, polynomial, rex (arXiv:2107.04197) fall until just after the last step. "
        "cosine_restarts: several times. wsd: constant, then a fall at the end (arXiv:2404.06395).",
    )
    warmup: WarmupField = setting(Warmup(percent=5.0), 'Linear rise from 0: "100 steps", "1 epoch" or "5 %".')
    end_share: float = setting(
        0.0, "Where the fall ends, as a share of the peak.", unit="share 0-1", ge=0, lt=1, more=_CURVES
    )
    power: float = setting(2.0, "polynomial: its power.", gt=0, le=20, more=_CURVES)
    cycles: int = setting(3, "cosine_restarts: how many falls.", ge=1, le=1000, more=_CURVES)
    decay: WarmupField = setting(
        Warmup(percent=20.0), 'wsd: how long the fall at the end is: "200 steps", "1 epoch", "20 %".', more=_CURVES
    )


class EmaSection(Section):
    """An exponential moving average of the trained weights, in fp32 on every worker."""

    decay: float = setting(
        0.0, "How much of the average is kept in each step, usually 0.999. 0: no average.", ge=0, lt=1
    )
    warmup: bool = setting(True, "Begin with a short average: a decay of at most (1 + step) / (10 + step).")
    evaluate: bool = setting(True, "The eval loss and validation images are the average's.")
    export: bool = setting(True, "The exported files are the average.")
