"""What watching costs, and what the official formulas cost: ratios of process time, interleaved, medians.

    python benchmarks/cost.py [--model vit_base_patch16_224] [--batch 8] [--repeats 9] [--threads 1]

(a) forward + metrics : the bare (fused) forward, for the first three metrics, for every streaming metric,
    and with the spectra of tokens on one image in eight (the default) and on every image
(b) the official notebooks' formulas : ours, on the same activations, forward left out

Process time isn't disturbed by other processes taking the core, but caches and clock are: quote medians, and
look at the spread. Attention is peaked by scaling the query and key weights (no trained weights needed).
The official side is written from the formulas in the paper's notebooks, in the way they do them: a full
softmax map per layer, numpy float32 x float64 products, a distance matrix filled in by a Python loop at every
call, one 2-D FFT of every channel. (b) is given with that loop, and with the matrix handed in.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import timm
import torch

from probekit.engine import collector, measure_batch, numerics
from probekit.jobs import make_metric
from probekit.metrics.attention_distance import AttentionDistance
from probekit.metrics.fourier import Fourier
from probekit.metrics.nmi import NMI
from probekit.plugins.catalog import Catalog
from probekit.watch import Visitor, Watcher

STREAMING = (
    "attention_distance", "nmi", "fourier", "attention_entropy", "prefix_mass", "feature_variance",
    "similarity_heads", "similarity_depths", "similarity_tokens", "token_translation", "features",
)  # fmt: skip


def peaked(name: str, factor: float = 4.0) -> torch.nn.Module:
    """A model with random weights whose attention isn't uniform."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for module in model.modules():
        if hasattr(module, "qkv"):
            with torch.no_grad():
                width = module.qkv.weight.shape[1]
                module.qkv.weight[: 2 * width] *= factor
    return model


def official_distance(maps: np.ndarray, distances: np.ndarray) -> np.ndarray:
    patches = maps[:, :, 1:, 1:] + 1e-32
    patches = patches / patches.sum(-1, keepdims=True)
    return (patches * distances).sum(-1).mean(-1)


def official_matrix(side: int = 14, patch: int = 16) -> np.ndarray:
    places = [np.array([row, col]) for row in range(side) for col in range(side)]
    found = np.zeros((len(places), len(places)))
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            found[i, j] = patch * np.sqrt(((a - b) ** 2).sum())
    return found


def official_nmi(maps: torch.Tensor) -> torch.Tensor:
    patches = maps[:, :, 1:, 1:] + 1e-8
    patches = patches / patches.sum(-1, keepdim=True)
    n = patches.shape[-1]
    pq = torch.softmax(torch.ones((*patches.shape[:2], n)), -1)
    joint = patches * pq.unsqueeze(-1)
    pk = joint.sum(-2)
    information = (joint * torch.log(patches / pk.unsqueeze(-2))).sum((-1, -2))
    hq, hk = -(pq * pq.log()).sum(-1), -(pk * pk.log()).sum(-1)
    return information / torch.sqrt(hq * hk)


def official_fourier(tokens: torch.Tensor) -> torch.Tensor:
    b, n, c = tokens.shape
    side = int(n**0.5)
    x = tokens.transpose(1, 2).reshape(b, c, side, side)
    amplitude = torch.log(torch.fft.fft2(x).abs() + 1e-6)
    shifted = torch.roll(amplitude, (side // 2, side // 2), (2, 3)).mean((0, 1))
    line = shifted.diag()[side // 2 :]
    return line - line[0]


def grab(watcher: Watcher, images: torch.Tensor) -> tuple[list, list, list]:
    """Captured layers and sites, and the full maps the official code starts from."""
    layers, sites = [], []
    visitors = [
        Visitor(frozenset({"attention"}), layers.append),
        Visitor(frozenset({"tokens"}), sites.append),
    ]
    watcher.run(images, visitors)
    maps = [layer.captured["scores"].full() for layer in layers]
    return layers, sites, maps


def timed(functions: dict[str, object], repeats: int) -> dict[str, list[float]]:
    """Process seconds of each function, interleaved."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if round_number:  # the first round warms up
                found[name].append(time.process_time() - start)
    return found


def show(name: str, numbers: list[float], base: list[float], batch: int) -> None:
    ratio = [a / b for a, b in zip(numbers, base, strict=True)]
    middle = statistics.median(numbers) / batch * 1000
    print(
        f"  {name:<34} {middle:8.1f} ms/image   x {statistics.median(ratio):5.3f}"
        f"  ({min(ratio):.3f} to {max(ratio):.3f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", help="timm names; default: ViT-B/16 and ViT-S/16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    images = torch.randn(given.batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for name in given.model or ["vit_base_patch16_224", "vit_small_patch16_224"]:
        print(f"{name}, batch {given.batch}, {given.threads} thread(s), torch {torch.__version__}")
        measure(peaked(name), images, given.repeats)


def measure(model: torch.nn.Module, images: torch.Tensor, repeats: int) -> None:
    device = images.device
    with numerics(device, "float32"), torch.no_grad():
        watcher = Watcher(model, images)
        every = [collector(metric, watcher) for metric in (AttentionDistance(), NMI(), Fourier())]
        catalog = Catalog.load()
        suite = {
            name: collector(make_metric(catalog.metric(name), catalog), watcher)
            for name in (*STREAMING, "spectrum_tokens")
        }
        streaming = [suite[name] for name in STREAMING]
        whole = list(range(len(images)))
        eighth = [whole] * len(streaming) + [whole[: max(1, len(images) // 8)]]

        def all_with(chosen: list[list[int]] | None) -> None:
            measure_batch(watcher, images, [*streaming, suite["spectrum_tokens"]], chosen)

        nothing = Visitor(frozenset({"q"}), lambda layer: None)
        found = timed(
            {
                "bare forward": lambda: model(images),
                "watched, nothing measured": lambda: watcher.run(images, [nothing]),
                "distance + NMI": lambda: measure_batch(watcher, images, every[:2]),
                "Fourier": lambda: measure_batch(watcher, images, every[2:]),
                "(a) the first three": lambda: measure_batch(watcher, images, every),
                "(a) every streaming metric": lambda: measure_batch(watcher, images, streaming),
                "(a) and spectra, 1 image in 8": lambda: all_with(eighth),
                "(a) and spectra, every image": lambda: all_with(None),
                **{
                    f"  {name} alone": lambda c=c: measure_batch(watcher, images, [c])
                    for name, c in suite.items()
                },
            },
            repeats,
        )
        for name, numbers in found.items():
            show(name, numbers, found["bare forward"], len(images))
        layers, sites, maps = grab(watcher, images)
        distances = layers[0].distances[0, 0].double().numpy()

        def official(matrix: np.ndarray | None = distances) -> None:
            for m in maps:
                official_distance(m.numpy(), official_matrix() if matrix is None else matrix)
                official_nmi(m)
            for site in sites:
                official_fourier(site.tokens)

        def ours() -> None:
            for layer in layers:
                for key in ("attention_stats", "_restricted"):
                    layer.__dict__.pop(key, None)
                for metric in (AttentionDistance(), NMI()):
                    metric.measure(layer)
            for site in sites:
                Fourier().measure(site)

        sides = {
            "ours, same activations": ours,
            "(b) official, matrix handed in": official,
            "(b) official, as published": lambda: official(None),
        }
        found = timed(sides, max(3, repeats // 2))
        for name, numbers in found.items():
            show(name, numbers, found["ours, same activations"], len(images))


if __name__ == "__main__":
    main()
