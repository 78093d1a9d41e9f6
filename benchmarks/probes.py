"""Linear probes of twelve layers at once against a plain loop over batches for one layer.

    python benchmarks/probes.py [--images 4000] [--width 192] [--classes 10] [--layers 12] [--repeats 3]

The loop is what probing scripts do: a DataLoader over cached features, cross-entropy, autograd, SGD, 50
epochs. Ratios of process time, one thread, interleaved; the deterministic solver is beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from probekit.metrics.probing import Recipe, fit_many


def loop(features: np.ndarray, labels: np.ndarray, classes: int) -> None:
    """One layer, Table A.1's recipe."""
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    x = (x - x.mean(0)) / x.std(0)
    head = torch.nn.Linear(x.shape[1], classes)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0, momentum=0.9, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    batches = DataLoader(TensorDataset(x, y), batch_size=1000, shuffle=True)
    for _ in range(50):
        for part, target in batches:
            optimizer.zero_grad()
            F.cross_entropy(head(part), target).backward()
            optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("images", 4000), ("width", 192), ("classes", 10), ("layers", 12), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, given.classes, given.images)
    centres = rng.normal(size=(given.classes, given.width))
    layers = [
        (centres[labels] * 0.3 + rng.normal(size=(given.images, given.width))).astype(np.float32)
        for _ in range(given.layers)
    ]
    ways: dict[str, Callable[[], object]] = {
        "one layer, DataLoader loop": lambda: loop(layers[0], labels, given.classes),
        f"{given.layers} layers, sgd": lambda: fit_many(
            layers, labels, given.classes, Recipe(solver="sgd", lr=1.0, l2=0.05)
        ),
        f"{given.layers} layers, sgd, rate chosen": lambda: fit_many(
            layers, labels, given.classes, Recipe(solver="sgd")
        ),
        f"{given.layers} layers, lbfgs": lambda: fit_many(layers, labels, given.classes, Recipe(l2=0.01)),
        f"{given.layers} layers, lbfgs, l2 chosen": lambda: fit_many(layers, labels, given.classes),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.repeats):
        for name, way in ways.items():
            start = time.process_time()
            way()
            found[name].append(time.process_time() - start)
    base = found["one layer, DataLoader loop"]
    for name, seconds in found.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, base, strict=True))
        print(f"{name:<36} {statistics.median(seconds):6.2f} s   x {ratio:5.2f}")


if __name__ == "__main__":
    main()
