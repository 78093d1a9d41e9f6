"""Which layers a claim is about, by relative depth: what turns a curve over layers into one number.

A layer l of L lies at (l - 1/2) / L, between 0 and 1, whatever the model's depth. The first third are the
layers below 1/3, the last third those above 2/3: layers 1-4 and 9-12 of 12, 1-2 and 5-6 of 6. Encoder only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probekit.findings.finding import NotMeasured


@dataclass(frozen=True)
class Span:
    """The mean over the layers at relative depths from `low` to `high`."""

    name: str
    low: float
    high: float

    def weights(self, place: np.ndarray) -> np.ndarray:
        """(rows,) that sum to 1. Raises `NotMeasured` where no layer lies in the span."""
        inside = (place >= self.low) & (place <= self.high)
        if not inside.any():
            raise NotMeasured(f"no measured layer lies in the {self.name}")
        return inside / inside.sum()

    def read(self, curve: np.ndarray, place: np.ndarray) -> np.ndarray:
        """(..., rows) -> (...)"""
        return curve @ self.weights(place)

    def layers(self, numbers: np.ndarray, place: np.ndarray) -> str:
        """``last third (layers 9-12)``"""
        inside = numbers[self.weights(place) > 0]
        first, last = (f"{n:g}" for n in (inside.min(), inside.max()))
        return f"{self.name} (layer {first})" if first == last else f"{self.name} (layers {first}-{last})"


class End(Span):
    """The last layer alone, or the first."""

    def weights(self, place: np.ndarray) -> np.ndarray:
        """(rows,), 1 at the deepest row (`high` 1) or at the first one."""
        at = place.argmax() if self.high == 1 else place.argmin()
        return (np.arange(len(place)) == at).astype(float)


@dataclass(frozen=True)
class Change:
    """How much higher a curve is in one span than in another."""

    to: Span
    since: Span

    @property
    def name(self) -> str:
        return f"{self.to.name} minus {self.since.name}"

    def weights(self, place: np.ndarray) -> np.ndarray:
        """(rows,) that sum to 0."""
        return self.to.weights(place) - self.since.weights(place)

    def read(self, curve: np.ndarray, place: np.ndarray) -> np.ndarray:
        """(..., rows) -> (...)"""
        return curve @ self.weights(place)

    def layers(self, numbers: np.ndarray, place: np.ndarray) -> str:
        return f"{self.to.layers(numbers, place)} minus {self.since.layers(numbers, place)}"


@dataclass(frozen=True)
class Peak:
    """Where a curve is highest: relative depth, 0 at the input, 1 at the output."""

    name: str = "best layer"

    def weights(self, place: np.ndarray) -> None:
        """None: it isn't linear, so it needs values of each image for an interval."""

    def read(self, curve: np.ndarray, place: np.ndarray) -> np.ndarray:
        """(..., rows) -> (...)"""
        return place[curve.argmax(axis=-1)]

    def layers(self, numbers: np.ndarray, place: np.ndarray) -> str:
        return f"{self.name} of {len(numbers)}"


Over = Span | Change | Peak

FIRST_THIRD = Span("first third", 0, 1 / 3)
MIDDLE_THIRD = Span("middle third", 1 / 3, 2 / 3)
LAST_THIRD = Span("last third", 2 / 3, 1)
ALL_LAYERS = Span("all layers", 0, 1)
FIRST_LAYER = End("first layer", 0, 0)
LAST_LAYER = End("last layer", 1, 1)
LATE_MINUS_EARLY = Change(LAST_THIRD, FIRST_THIRD)
EARLY_MINUS_LATE = Change(FIRST_THIRD, LAST_THIRD)
BEST_LAYER = Peak()
