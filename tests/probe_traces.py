"""Hand-made traces of `features`, for metrics that train probes on them."""

from __future__ import annotations

import numpy as np

from probekit.metric import Row, Traces

WIDTHS = (6, 6, 6, 4)  # the last row is narrower, as a stage's is


def rows(layers: int = 2, part: str = "encoder", first: int = 0) -> list[Row]:
    """An embedding, then mid and out of each layer."""
    found = [Row(f"{part}.{first}.embed", first, "embed", part, 0, 2, (4, 4), (8.0, 8.0))]
    for layer in range(first, first + layers):
        for site, depth in (("mid", layer + 0.5), ("out", layer + 1.0)):
            found.append(Row(f"{part}.{layer}.attn.{site}", depth, site, part, 0, 2, (4, 4), (8.0, 8.0)))
    return found


def features(
    labels, seed: int, axis: list[Row], apart: float = 1.5, width: int = 6, narrow: int = 4
) -> np.ndarray:
    """(images, rows, width): class centres that don't depend on `seed`, more apart in later rows, plus noise.

    The last row has `narrow` features, then NaN.
    """
    centres = np.random.default_rng(99).standard_normal((32, len(axis), width))
    growth = np.linspace(0.3, 1, len(axis))[:, None]
    noise = np.random.default_rng(seed).standard_normal((len(labels), len(axis), width))
    found = (apart * growth * centres[np.asarray(labels)] + noise).astype(np.float32)
    found[:, -1, narrow:] = np.nan
    return found


def traces(labels, seed: int = 0, *, axis: list[Row] | None = None, apart: float = 1.5, **more) -> Traces:
    axis = axis or rows()
    labels = [int(label) for label in labels]
    values = {"features": features(labels, seed, axis, apart)}
    return Traces(values, axis, [f"{seed}/{i}" for i in range(len(labels))], labels, **more)


def split(
    classes: int = 3, train: int = 90, test: int = 60, apart: float = 1.5, seed: int = 1, **more
) -> Traces:
    """Test traces with a train split, labels in turn."""
    one = traces(np.arange(train) % classes, seed, apart=apart, axis=more.get("axis"))
    names = [f"class {i}" for i in range(classes)]
    return traces(np.arange(test) % classes, seed + 100, apart=apart, train=one, **{"classes": names, **more})


def shuffled(given: Traces, order) -> Traces:
    """The same images in another order."""
    from dataclasses import replace

    return replace(
        given,
        values={name: v[order] for name, v in given.values.items()},
        images=[given.images[i] for i in order],
        labels=[given.labels[i] for i in order] if given.labels is not None else None,
    )
