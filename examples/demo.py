"""The demo: every bundled miniature, every metric, the paper's claims as findings, one report, no network.

    make demo
    make demo IMAGES=/path/to/photos

Without IMAGES the images are drawn: shapes in textures (`shapetex`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

OUT = Path("runs/demo")


def miniatures() -> list[str]:
    """Names of the models whose weights come with their packs, with the untrained network among them."""
    from probekit.plugins.catalog import Catalog

    specs = [entry.spec for entry in Catalog.load().models]
    return [spec.full_name for spec in specs if spec.weights is not None and spec.weights.bundled]


def main() -> int:
    from probekit.cli.app import main as probekit

    models = [word for name in miniatures() for word in ("--model", name)]
    images = (
        ["--dataset", f"folder:{os.environ['IMAGES']}", "--limit", "256"] if os.environ.get("IMAGES") else []
    )
    out = OUT if not images else OUT.with_name("demo-images")
    code = probekit(["run", *models, "--metrics", "all", *images, "--out", str(out)])
    return code or probekit(["findings", str(out)])


if __name__ == "__main__":
    sys.exit(main())
