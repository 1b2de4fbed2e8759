"""How fast the true VAE and both text encoders encode on this device, with the classes that `sdxl-ray cache` runs.

    python scripts/bench_encode.py                                  1024² and two wide buckets, bf16
    python scripts/bench_encode.py --resolutions 512 --num-images 2 --dtype fp32     something for a CPU

The weights are random: speed depends on shapes alone. "of peak" divides the FLOPs that the mathematics needs
(4.88 TFLOP for a 1024² image) by what large matrix products reach on this device. Copies to the device and back are
included; decoding is not (scripts/bench_cache.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.bench_train import device_name, empty_cache, matrix_peak, peak_memory_gib, reset_peak_memory, synchronize
from sdxl_ray.cache.encode import LatentEncoder
from sdxl_ray.sdxl.architecture import TEXT_ENCODER_2_CONFIG, TEXT_ENCODER_CONFIG, VAE_CONFIG
from sdxl_ray.sdxl.devices import DTYPES
from sdxl_ray.sdxl.text import encode_prompts

CAPTION = (
    "a photograph of a street in the evening, people under umbrellas, reflections on wet stones, 35 mm, film grain"
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--resolutions", nargs="+", default=["1024", "832x1216", "512"], help="edge or HEIGHTxWIDTH")
    parser.add_argument("--num-images", type=int, default=64, help="of each resolution, as in a shard")
    parser.add_argument("--num-captions", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=0, help="0: automatic")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="the small model, to try this script out")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    peak = matrix_peak(device, dtype, tiny=args.tiny)["tflops_per_s"]
    print(f"{device_name(device)}, torch {torch.__version__}, matrix peak {peak:.3g} TFLOP/s in {args.dtype}\n")
    print(
        f"{'what':<24}{'at once':>8}{'per s':>10}{'TFLOP each':>12}{'TFLOP/s':>9}{'of peak':>9}{'GiB':>7}", flush=True
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        encoder = latent_encoder(Path(folder), device, args)
        for resolution in args.resolutions:
            rows.append(measure_images(encoder, *parse_hw(resolution), args, peak))
            print_row(rows[-1])
    del encoder
    empty_cache(device)
    for chunks in (1, 3):
        rows.append(measure_captions(device, dtype, chunks, args, peak))
        print_row(rows[-1])
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items()}
        content = {"device": device_name(device), "settings": settings, "matrix_peak_tflops_per_s": peak, "rows": rows}
        args.json.write_text(json.dumps(content, indent=2))


def parse_hw(text: str) -> tuple[int, int]:
    """ "832x1216" or "1024" to (height, width)."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    print(
        f"{row['what']:<24}{row['at_once']:>8}{row['per_s']:>10.3g}{row['tflop_each']:>12.3g}"
        f"{row['tflops_per_s']:>9.3g}{row['share_of_peak']:>9.1%}{row['peak_memory_gib']:>7.2f}",
        flush=True,
    )


def latent_encoder(folder: Path, device: torch.device, args: argparse.Namespace) -> LatentEncoder:
    """The class that caching uses, on a VAE of the true size with random weights."""
    from diffusers import AutoencoderKL

    from sdxl_ray.sdxl.tiny import write_tiny_sdxl

    write_tiny_sdxl(folder / "model")
    if not args.tiny:
        torch.manual_seed(0)
        AutoencoderKL(**VAE_CONFIG).to(DTYPES[args.dtype]).save_pretrained(folder / "model" / "vae")
    return LatentEncoder(
        str(folder / "model"),
        dtype=args.dtype,
        device=device,
        batch_size=args.batch_size,
        revision="",
        variant="",
        compile=args.compile,
    )


def measure_images(
    encoder: LatentEncoder, height: int, width: int, args: argparse.Namespace, peak: float
) -> dict[str, Any]:
    """Images/s of one bucket, after a first batch."""
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(min(8, args.num_images))]
    images = [pixels[number % len(pixels)] for number in range(args.num_images)]
    names = [str(number) for number in range(args.num_images)]
    encoder.encode(images, names)  # chooses kernels and the number at once
    synchronize(encoder.device)
    reset_peak_memory(encoder.device)
    started = time.perf_counter()
    encoder.encode(images, names)
    synchronize(encoder.device)
    per_s = args.num_images / (time.perf_counter() - started)
    tflop = vae_tflop(height, width, tiny=args.tiny)
    return row(f"VAE {height}x{width}", encoder._sizes[height, width], per_s, tflop, peak, encoder.device)


def vae_tflop(height: int, width: int, *, tiny: bool) -> float:
    """Of one image, 2 per multiply-add, counted on tensors without memory."""
    from diffusers import AutoencoderKL

    from sdxl_ray.sdxl.tiny import vae_config

    with torch.device("meta"):
        vae = AutoencoderKL(**(vae_config() if tiny else VAE_CONFIG))
    with FlopCounterMode(display=False) as counter:
        vae.encode(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops() / 1e12


def measure_captions(
    device: torch.device, dtype: torch.dtype, chunks: int, args: argparse.Namespace, peak: float
) -> dict[str, Any]:
    """Captions/s of both encoders together."""
    encoders = text_encoders(device, dtype, tiny=args.tiny)
    at_once = args.batch_size or 32
    captions = [f"{CAPTION} {number}" for number in range(args.num_captions)]
    batches = [captions[start : start + at_once] for start in range(0, len(captions), at_once)]
    encode_prompts(encoders, batches[0], chunks)
    synchronize(device)
    reset_peak_memory(device)
    started = time.perf_counter()
    for batch in batches:
        embeds, pooled, _ = encode_prompts(encoders, batch, chunks)
        embeds.cpu(), pooled.cpu()
    per_s = len(captions) / (time.perf_counter() - started)
    with FlopCounterMode(display=False) as counter:
        encode_prompts(encoders, captions[:1], chunks)
    tflop = counter.get_total_flops() / 1e12
    return row(f"captions, {77 * chunks} tokens", at_once, per_s, tflop, peak, device)


def text_encoders(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> Any:
    """Both encoders at their true size with random weights, and the tokenizers of the small model."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from sdxl_ray.sdxl.components import TextEncoders, load_text_encoders
    from sdxl_ray.sdxl.tiny import write_tiny_sdxl

    with tempfile.TemporaryDirectory() as folder:
        write_tiny_sdxl(Path(folder) / "model")
        small = load_text_encoders(str(Path(folder) / "model"), dtype=dtype, device=device)
    if tiny:
        return small
    torch.manual_seed(0)
    first = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER_CONFIG)).to(device, dtype).eval()
    second = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_ENCODER_2_CONFIG)).to(device, dtype).eval()
    return TextEncoders(small.tokenizer, small.tokenizer_2, first, second)


def row(what: str, at_once: int, per_s: float, tflop: float, peak: float, device: torch.device) -> dict[str, Any]:
    """A line of the table."""
    return {
        "what": what,
        "at_once": at_once,
        "per_s": per_s,
        "tflop_each": tflop,
        "tflops_per_s": per_s * tflop,
        "share_of_peak": per_s * tflop / peak,
        "peak_memory_gib": peak_memory_gib(device),
    }


if __name__ == "__main__":
    main()
