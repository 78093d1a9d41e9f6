"""The demo: two self-supervised ViTs, three metrics, one report, no network.

    make demo
    make demo IMAGES=/path/to/photos

Without IMAGES it cuts crops out of the photograph that matplotlib ships.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

MODELS = ("moco:vit-s16", "simmim:vit-b16")


def crops(folder: Path, count: int = 32) -> Path:
    """Square crops of one photograph, at sides from 128 px to all of it; the same ones every time."""
    import numpy as np
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    with get_sample_data("grace_hopper.jpg") as file:
        photograph = Image.open(file).convert("RGB")
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number, side in enumerate(np.linspace(128, min(photograph.size), count).astype(int)):
        left, top = (int(random.integers(0, length - side + 1)) for length in photograph.size)
        crop = photograph.crop((left, top, left + int(side), top + int(side)))
        crop.save(folder / f"crop-{number:02d}.png")
    return folder


def main() -> int:
    from probekit.cli.app import main as probekit

    chosen = os.environ.get("IMAGES")
    folder = Path(chosen) if chosen else crops(Path("runs/demo-images"))
    models = [word for name in MODELS for word in ("--model", f"{name}@random")]
    code = probekit(["run", *models, "--metrics", "all", "--dataset", f"folder:{folder}", "--limit", "64"])
    print(
        "\nThese weights are random: the published ones need a download. With a network, and your own images:"
    )
    print(f"  probekit run --model {MODELS[0]} --model {MODELS[1]} --metrics all --dataset folder:PHOTOS")
    return code


if __name__ == "__main__":
    sys.exit(main())
