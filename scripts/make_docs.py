"""Write docs/configuration.md from the schema: python scripts/make_docs.py. A test fails when the file is stale."""

from __future__ import annotations

from pathlib import Path

from sdxl_ray.config.template import render_reference

if __name__ == "__main__":
    target = Path(__file__).parent.parent / "docs" / "configuration.md"
    target.write_text(render_reference(), encoding="utf-8")
    print(f"{target} written")
