"""Vary captions: tags shuffled and left out, then trigger word, prefix and suffix."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np

from sdxl_ray.cache.captions import CaptionRules
from sdxl_ray.cache.sources.values import joined_tags

AS_IT_IS = -1  # in the place of a base caption's number: neither shuffled nor thinned


def expand_variants(
    captions: tuple[str, ...], rules: CaptionRules, image_hash: str
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(what is encoded for base captions; of which base caption each is a variant).

    If tags are shuffled or dropped: the first base caption as it is, for evaluation alone and so a variant of none
    (`AS_IT_IS`), then `rules.variants` of each. What comes out twice counts twice: tags are dropped as often as they
    are dropped. Else each base caption as it is.

    A variant depends on the image, the caption and its number alone, so that a caption that is added, or another
    number of variants, does not change the others.
    """
    if not rules.varies:
        whole = tuple(dict.fromkeys(decorate(caption, rules) for caption in captions))
        return whole, tuple(range(len(whole)))
    variants = [
        (draw_variant(caption, rules, _draw(image_hash, caption, number)), base)
        for base, caption in enumerate(captions)
        for number in range(rules.variants)
    ]
    texts, bases = zip((decorate(captions[0], rules), AS_IT_IS), *variants, strict=True)
    return texts, bases


def draw_variant(caption: str, rules: CaptionRules, draw: np.random.Generator) -> str:
    """One variant of a base caption: its tags in a new order and some left out, as `rules` say; then decorated.

    The first `keep_tags` tags stay. At least one tag is left. What comes out depends on `draw` alone.
    """
    if not rules.varies:
        return decorate(caption, rules)
    # Without the spaces around it, so that "a,b" has two tags for the separator ", " as well.
    pieces = caption.split(rules.separator.strip() or rules.separator)
    tags = [tag for piece in pieces if (tag := piece.strip())]
    kept, others = tags[: rules.keep_tags], tags[rules.keep_tags :]
    # Only `random` is used: NumPy may change how it makes a permutation, and with it what all caches hold.
    chances, places = draw.random(len(others)), draw.random(len(others))
    chosen = np.flatnonzero(chances >= rules.tag_dropout).tolist()
    if not kept and not chosen and others:
        chosen = [int(chances.argmax())]
    if rules.shuffle_tags:
        chosen.sort(key=lambda at: float(places[at]))
    varied = joined_tags([*kept, *(others[at] for at in chosen)], rules.separator)
    return decorate(varied or caption, rules)  # a caption of nothing but separators stays as it is


def decorate(caption: str, rules: CaptionRules) -> str:
    """Prefix, trigger word where it is nowhere in what comes out, the caption, suffix."""
    whole = f"{rules.prefix}{caption}{rules.suffix}"
    if rules.trigger_word and not _has_word(whole, rules.trigger_word):
        separator = ", " if caption else ""
        whole = f"{rules.prefix}{rules.trigger_word}{separator}{caption}{rules.suffix}"
    return whole.strip()


def _has_word(text: str, word: str) -> bool:
    # As a word of its own: a trigger "art" is not in "party".
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _draw(image_hash: str, caption: str, number: int) -> np.random.Generator:
    digest = hashlib.sha256(json.dumps([image_hash, caption, number]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
