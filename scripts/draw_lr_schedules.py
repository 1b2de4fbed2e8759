"""Write docs/learning-rates.svg: python scripts/draw_lr_schedules.py. A test fails when the drawing is stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdxl_ray.train.lr_schedules import LR_SCHEDULES, lr_schedule

# A run of 200 steps with the defaults: 5 % warm-up, and 20 % decay for wsd.
_RUN: dict[str, Any] = {"peak": 1.0, "warmup_steps": 10, "max_steps": 200, "decay_steps": 40}
_END_SHARE = 0.2  # of the thin line
_COLUMNS, _WIDTH, _HEIGHT, _GAP, _TITLE = 4, 200, 100, 24, 24
_TEXT = 'font-family="sans-serif" fill="#777"'  # readable on white and on black


def draw() -> str:
    """All schedules in a grid: rate over step. Thick: end_share = 0; thin: end_share = 0.2."""
    rows = -(-len(LR_SCHEDULES) // _COLUMNS)
    width, height = _COLUMNS * (_WIDTH + _GAP) + _GAP, rows * (_HEIGHT + _TITLE + _GAP) + _GAP
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">']
    for number, name in enumerate(LR_SCHEDULES):
        left = _GAP + number % _COLUMNS * (_WIDTH + _GAP)
        top = _GAP + number // _COLUMNS * (_HEIGHT + _TITLE + _GAP)
        lines += [
            f'<g transform="translate({left} {top})">',
            f'<text x="0" y="{_TITLE - 10}" font-size="14" {_TEXT}>{name}</text>',
            f'<path d="M0 {_TITLE}V{_TITLE + _HEIGHT}H{_WIDTH}" fill="none" stroke="#999"/>',
            f'<text x="{_WIDTH}" y="{_TITLE + _HEIGHT + 14}" font-size="10" text-anchor="end" {_TEXT}>step 200</text>',
            _curve(name, _END_SHARE, 'stroke="#999" stroke-width="1" stroke-dasharray="4 3"'),
            _curve(name, 0.0, 'stroke="#36c" stroke-width="2"'),
            "</g>",
        ]
    return "\n".join([*lines, "</svg>", ""])


def _curve(name: str, end_share: float, style: str) -> str:
    rate = lr_schedule(name, end_share=end_share, **_RUN)
    steps = range(1, _RUN["max_steps"] + 1)
    # Two decimals of a pixel, so that the last digit of a cosine cannot change the file.
    points = " ".join(
        f"{step * _WIDTH / _RUN['max_steps']:g},{_TITLE + _HEIGHT * (1.0 - rate(step)):.2f}" for step in steps
    )
    return f'<polyline points="{points}" fill="none" {style}/>'


if __name__ == "__main__":
    target = Path(__file__).parent.parent / "docs" / "learning-rates.svg"
    target.write_text(draw(), encoding="utf-8")
    print(f"{target} written")
