"""The demo: every bundled miniature, every metric, the paper's claims as findings, no network.

    make demo
    make demo IMAGES=/path/to/photos

Without IMAGES the images are drawn: shapes in textures (`shapetex`). Whether a model goes by shape or by
texture is asked of images where the two disagree, which have a training split of their own: a second run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

OUT = Path("runs/demo")
SHAPE_BIAS = Path("runs/demo-shape-bias")


def miniatures() -> list[str]:
    """Names of the models whose weights come with their packs, with the untrained network among them."""
    from probekit.plugins.catalog import Catalog

    specs = [entry.spec for entry in Catalog.load().models]
    return [spec.full_name for spec in specs if spec.weights is not None and spec.weights.bundled]


def main() -> int:
    from probekit.cli.app import main as probekit

    models = [word for name in miniatures() for word in ("--model", name)]
    conflict = ["--metrics", "shape_bias", "--dataset", "shapetex:cue-conflict", "--limit", "512"]
    runs = {OUT: ["--metrics", "all"], SHAPE_BIAS: conflict}
    if photos := os.environ.get("IMAGES"):
        out = OUT.with_name("demo-images")
        runs = {out: ["--metrics", "all", "--dataset", f"folder:{photos}", "--limit", "256"]}
    for out, what in runs.items():
        if code := probekit(["run", *models, *what, "--out", str(out)]):
            return code
    code = max(probekit(["findings", str(out)]) for out in runs)
    print("\nreports:", *(out / "report.html" for out in runs))
    return code


if __name__ == "__main__":
    sys.exit(main())
