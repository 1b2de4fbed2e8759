"""Write docs/configuration.md and docs/coming-from-elsewhere.md: python scripts/make_docs.py.

A test fails when one is stale.
"""

from __future__ import annotations

from pathlib import Path

from sdxl_ray.config.elsewhere import DOCUMENT, render_table
from sdxl_ray.config.template import render_reference

if __name__ == "__main__":
    for name, text in (("docs/configuration.md", render_reference()), (DOCUMENT, render_table())):
        target = Path(__file__).parent.parent / name
        target.write_text(text, encoding="utf-8")
        print(f"{target} written")
