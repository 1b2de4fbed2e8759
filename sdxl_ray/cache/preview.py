"""What the model will see, as one HTML page: crops by bucket, what is cut away, captions, and what is skipped."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sdxl_ray.cache.caption_variants import decorate
from sdxl_ray.cache.captions import CaptionRules
from sdxl_ray.cache.images import UnreadableImage, load_pixels
from sdxl_ray.cache.reading import load_image, not_given
from sdxl_ray.errors import StorageError, storage_errors
from sdxl_ray.records import EncodedSample

SAMPLES_PER_BUCKET = 24
SKIPPED_SHOWN = 500
_CAPTIONS_SHOWN = 5
_CAPTION_LENGTH = 400  # characters; those that encoders read of one seldom exceed that
_THUMBNAIL_AREA = 224 * 224  # pixels: those of all shapes look equally large
_DARKENED = 0.3  # how bright what is cut away remains
_OUTLINE = (255, 160, 0)  # of the other crops

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { margin: 1.5rem auto; padding: 0 1rem; max-width: 110rem; }
h2 { margin: 2rem 0 .5rem; border-bottom: 1px solid #8886; }
h2 small, .note { font-weight: normal; opacity: .75; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(33rem, 100%), 1fr)); gap: 1.2rem; }
.samples { padding: 0; }
.samples > li { list-style: none; border: 1px solid #8884; border-radius: .5rem; padding: .7rem; }
figure { display: flex; flex-wrap: wrap; gap: .4rem; margin: 0 0 .5rem; align-items: flex-start; }
img { max-width: 100%; height: auto; outline: 1px solid #8888; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .7rem; margin: .5rem 0 0; font-size: .85rem; }
dt { opacity: .7; } dd { margin: 0; overflow-wrap: anywhere; }
.captions { margin: 0; padding-left: 1.2rem; overflow-wrap: anywhere; white-space: pre-line; }
.problem { color: light-dark(#a40000, #ff9b8a); }
table { border-collapse: collapse; } caption { text-align: left; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8883; overflow-wrap: anywhere; }
"""


def write_contact_sheet(
    path: Path,
    *,
    title: str,
    counts: Mapping[str, int],
    shown: Mapping[str, Sequence[EncodedSample]],
    skipped: Sequence[tuple[str, str]],
    num_skipped: int,
    decorations: Mapping[str, CaptionRules],
) -> None:
    """Write the page to `path`. It needs no other file, no network and no JavaScript.

    Args:
        counts: samples of each bucket ("1024x832", height first), in the order in which they are to appear.
        shown: some of each bucket's samples; the first `SAMPLES_PER_BUCKET` are drawn.
        skipped: (path, reason) of images that are left out; the first `SKIPPED_SHOWN` are listed.
        num_skipped: how many there are in all.
        decorations: by dataset, what training adds to the samples' captions; of a dataset that is not there, nothing.

    Raises:
        StorageError: the disk is full or refuses.
    """
    doing = "writing the contact sheet"
    with storage_errors(doing, path, "Free some space, or give another path."):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(_page(title, counts, shown, skipped, num_skipped, decorations))


def _page(
    title: str,
    counts: Mapping[str, int],
    shown: Mapping[str, Sequence[EncodedSample]],
    skipped: Sequence[tuple[str, str]],
    num_skipped: int,
    decorations: Mapping[str, CaptionRules],
) -> Iterator[str]:
    """The page in pieces: with a thousand thumbnails it has some 30 MB."""
    heading = html.escape(title)
    yield f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{heading}</title>\n'
    yield f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
    yield f"<body>\n<header>\n<h1>{heading}</h1>\n<p>{_number(sum(counts.values()), 'sample')} in "
    yield f"{_number(len(counts), 'bucket')}, {_number(num_skipped, 'image')} skipped. First what the model sees, then "
    yield "the whole image with what is cut away darkened. Sizes are height x width.</p>\n</header>\n<main>\n"
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:  # decoding frees the GIL
        for bucket, count in counts.items():
            samples = list(shown.get(bucket, ()))[:SAMPLES_PER_BUCKET]
            of_all = f", {len(samples)} of them shown" if len(samples) < count else ""
            name = bucket.replace("x", " x ")
            yield f'<section aria-label="Bucket {name}">\n<h2>{name} <small>{_number(count, "sample")}{of_all}</small>'
            yield '</h2>\n<ul class="samples">\n'
            yield from threads.map(_card, samples, [decorations.get(sample.dataset) for sample in samples])
            yield "</ul>\n</section>\n"
    yield from _skipped_table(skipped[:SKIPPED_SHOWN], num_skipped)
    yield "</main>\n</body>\n</html>\n"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _card(sample: EncodedSample, rules: CaptionRules | None) -> str:
    """One sample as a list item."""
    name = html.escape(Path(sample.path).name)
    try:
        pictures = _pictures(sample, name)
    except (UnreadableImage, OSError, StorageError) as error:
        problem = error if isinstance(error, UnreadableImage) else not_given(error)
        pictures = f'<p class="problem">{html.escape(str(problem))}</p>'
    trained = [text for text, base in zip(sample.captions, sample.caption_bases, strict=True) if base >= 0]
    seen = [decorate(caption, rules) if rules else caption for caption in trained[:_CAPTIONS_SHOWN]]
    captions = "".join(f"<li>{_caption(caption)}</li>" for caption in seen)
    if len(trained) > _CAPTIONS_SHOWN:
        captions += f'<li class="note">and {len(trained) - _CAPTIONS_SHOWN} more</li>'
    rows = "".join(f"<dt>{term}</dt><dd>{html.escape(value)}</dd>" for term, value in _facts(sample).items())
    return f'<li>\n{pictures}<ul class="captions">{captions}</ul>\n<dl>{rows}</dl>\n</li>\n'


def _caption(caption: str) -> str:
    """As HTML, the start of a long one."""
    if len(caption) <= _CAPTION_LENGTH:
        return html.escape(caption) or "(empty)"
    start = html.escape(caption[:_CAPTION_LENGTH].rstrip())
    return f'{start}… <span class="note">({len(caption):,} characters in all)</span>'


def _facts(sample: EncodedSample) -> dict[str, str]:
    (top, left), (height, width) = sample.crops[0], sample.original_hw
    facts = {
        "Image": f"{height} x {width}, resized to {sample.resized_hw[0]} x {sample.resized_hw[1]}",
        "Crop": f"{top} from the top, {left} from the left",
        "Dataset": sample.dataset,
        "File": sample.path,
    }
    if len(sample.crops) > 1:
        facts["Crop"] += f"; the first of {len(sample.crops)}, the others are outlined"
    if sample.flip:
        facts["Image"] += ", mirrored"
    return facts


def _pictures(sample: EncodedSample, name: str) -> str:
    """The first crop, the whole image and, where there is one, the mask; `name` is escaped."""
    pixels, mask = load_image(sample.image_record())
    whole = "whole, crop bright" + (", other crops outlined" if len(sample.crops) > 1 else "")
    pictures = [("as the model sees it", _thumbnail(pixels)), (whole, _whole_image(sample))]
    if mask is not None:
        pictures.append(("mask, white counts", _thumbnail(mask)))
    tags = (
        f'<img src="{_data_uri(picture)}" width="{picture.width}" height="{picture.height}" loading="lazy" '
        f'alt="{name}, {what}" title="{what}">'
        for what, picture in pictures
    )
    return f"<figure>{''.join(tags)}</figure>\n"


def _whole_image(sample: EncodedSample) -> Image.Image:
    """A thumbnail of the whole image, mirrored if the sample is; what is cut away is darkened, other crops outlined."""
    small_hw = _thumbnail_hw(sample.resized_hw)
    whole = dataclasses.replace(
        sample.image_record(), resized_hw=small_hw, bucket_hw=small_hw, crop_top_left=(0, 0), verify=False
    )
    pixels = load_pixels(whole)
    boxes = [_box(crop, sample, small_hw) for crop in sample.crops]
    left, top, right, bottom = boxes[0]
    darkened = (pixels * _DARKENED).astype(np.uint8)
    darkened[top:bottom, left:right] = pixels[top:bottom, left:right]
    picture = Image.fromarray(darkened)
    draw = ImageDraw.Draw(picture)
    for left, top, right, bottom in boxes[1:]:
        draw.rectangle((left, top, right - 1, bottom - 1), outline=_OUTLINE, width=2)
    return picture


def _box(crop: tuple[int, int], sample: EncodedSample, small_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a crop in the whole image of this size."""
    (top, bottom), (left, right) = (
        (round(offset * small / resized), round((offset + edge) * small / resized))
        for offset, edge, small, resized in zip(crop, sample.target_hw, small_hw, sample.resized_hw, strict=True)
    )
    return left, top, right, bottom


def _thumbnail(pixels: np.ndarray) -> Image.Image:
    """Of (height, width[, 3]) uint8."""
    height, width = _thumbnail_hw(pixels.shape[:2])
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)


def _thumbnail_hw(hw: Sequence[int]) -> tuple[int, int]:
    """Of one area for all shapes, but no longer than twice the square's edge."""
    edge = math.sqrt(_THUMBNAIL_AREA)
    scale = min(edge / math.sqrt(hw[0] * hw[1]), 2 * edge / max(hw))
    return max(1, round(hw[0] * scale)), max(1, round(hw[1] * scale))


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _skipped_table(skipped: Sequence[tuple[str, str]], num_skipped: int) -> Iterator[str]:
    if not num_skipped:
        return
    more = f" The first {len(skipped):,} are listed." if len(skipped) < num_skipped else ""
    yield f'<section aria-label="Skipped images">\n<h2>Skipped <small>{_number(num_skipped, "image")}</small></h2>\n'
    yield f"<table>\n<caption>Images that are left out, and why.{more}</caption>\n"
    yield '<thead><tr><th scope="col">Image</th><th scope="col">Why</th></tr></thead>\n<tbody>\n'
    for path, reason in skipped:
        yield f"<tr><td>{html.escape(path)}</td><td>{html.escape(reason)}</td></tr>\n"
    yield "</tbody>\n</table>\n</section>\n"
