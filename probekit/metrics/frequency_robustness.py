"""Accuracy lost to noise of one frequency band (Park et al., ICLR 2023, Fig. 8b)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from probekit.datasets.noise import BandNoise
from probekit.errors import MetricError, UsageError
from probekit.metric import Traces, Variation
from probekit.metrics.depth import depth_curve, image_coordinate
from probekit.metrics.readout import (
    Readout,
    best_constant,
    chosen,
    dataset,
    numbers,
    share,
)
from probekit.summaries import bootstrap_interval, result_attributes

_HIGH = 0.5  # pi: the curve is the mean over bands above it


class FrequencyRobustness(Readout):
    """Clean minus noisy top-1 accuracy of one probe, in percentage points, for noise around frequency f.

    The probe is trained on clean images. Noise is added to the normalised image, unclipped, in bands f = 0,
    step, .. 1 (units of pi) of half-width `half_width`; `seeds` draws are averaged. ``energy=ring`` is the
    published noise, whose energy grows with f; ``equal`` gives every band the same.

    The curve over layers is the mean drop over the bands above 0.5 pi, per image first: high frequencies as
    the paper's claim is about them, with less noise than any one band, and without the last one alone,
    whose ring is cut off by the border of the spectrum.
    """

    name = "frequency_robustness"
    version = 2
    units = {"frequency_robustness": "percentage points", "clean_accuracy": "%", "rms": "1"}
    figure = "Fig. 8b"

    def __init__(
        self,
        half_width: float = 0.05,
        eps: float = 0.7,
        energy: str = "ring",
        symmetric: bool = False,
        step: float = 0.1,
        seeds: int = 1,
        **shared,
    ):
        own = {"half_width": half_width, "eps": eps, "energy": energy, "symmetric": symmetric}
        super().__init__({**own, "step": step, "seeds": seeds}, **shared)
        if seeds < 1:
            raise UsageError(f"seeds is 1 or more, not {seeds}")
        if not 0 < step <= 1 or abs(round(1 / step) * step - 1) > 1e-9:
            raise UsageError(f"step divides 1 pi into equal parts, {step:g} doesn't")
        self.bands = [i / round(1 / step) for i in range(round(1 / step) + 1)]
        self.half_width, self.eps, self.energy = half_width, eps, energy
        self.symmetric, self.seeds = symmetric, seeds
        self._noise(0.0, 0)  # says which setting makes no sense
        self.conventions |= {
            "definition": "Park et al. 2023, Fig. 8b; FreqAttack of how-do-vits-work",
            "noise": f"eps {eps:g} in the model's normalised space, not clipped; energy {energy}; "
            f"{'symmetric' if symmetric else 'published, asymmetric'} mask",
            "bands": f"|f| within {half_width:g} pi of 0, {step:g} .. 1 pi [my reading]",
            "seeds": seeds,
            "curve": f"mean over bands above {_HIGH:g} pi [my reading]",
            "reading": "The higher, the more a probe on this layer loses to noise of this frequency.",
            "does_not_show": (
                "With energy=ring higher bands hold up to ten times the noise: compare models at a band, not "
                "bands of a model. A probe near chance has little to lose."
            ),
        }

    def variations(self) -> Sequence[Variation]:
        """One per band and seed."""
        return [
            Variation(self._name(band, seed), pixels=self._noise(band, seed))
            for band in self.bands
            for seed in range(self.seeds)
        ]

    def summarize(self, traces: Traces) -> xr.Dataset:
        heads = self.heads(traces)
        clean = heads.right(traces, traces.labels)
        noisy = np.stack([self._right(heads, traces, band) for band in self.bands], axis=1)
        drop = 100.0 * (clean[:, None] - noisy / self.seeds)  # (layer, band, image)
        per_image = np.moveaxis(drop, -1, 0)
        high = np.array(self.bands) > _HIGH
        n = len(traces)
        found = numbers(
            self.name,
            drop.mean(-1),
            *bootstrap_interval(per_image, traces.seed),
            "percentage points",
            ("layer", "band"),
        )
        found[self.name].attrs |= {"picture": "profile", "long_name": "accuracy lost to noise of each band"}
        line = per_image[:, :, high].mean(2)
        found |= depth_curve(
            self.name,
            line.mean(0),
            *bootstrap_interval(line, traces.seed),
            units="percentage points",
            reduced=f"mean over bands above {_HIGH:g} pi",
            long_name=f"accuracy lost above {_HIGH:g} pi",
        )
        size = traces.image_size
        floor = best_constant(traces.labels, heads.known)
        variables = {
            **found,
            **share("clean_accuracy", clean.sum(1), n),
            # no baseline to draw: each model has its own, ten times as high as any curve
            "drop_to_chance": xr.Variable(
                ("layer",), 100 * clean.mean(1) - floor, {"units": "percentage points", "role": "bound"}
            ),
            "rms": xr.Variable(
                ("band",),
                self._rms(size),
                {"units": "1", "long_name": "of the added noise, in the model's normalised space"},
            ),
            "correct": xr.Variable(("layer", "image"), clean.astype(np.int8)),
            "correct_noisy": xr.Variable(
                ("layer", "band", "image"), noisy.astype(np.int16), {"long_name": "of so many seeds"}
            ),
            **chosen(heads),
        }
        coordinates = {
            "image": image_coordinate(traces),
            "band": xr.Variable(("band",), np.array(self.bands), {"units": "pi"}),
        }
        return dataset(
            self,
            traces,
            heads.rows,
            variables,
            result_attributes(self, traces)["interval"] + ", paired",
            coordinates,
            seeds=self.seeds,
            chance=floor,
            rms_size=f"{size[0]} x {size[1]}" if size else "unknown",
            train_classes=len(heads.known),
        )

    def _right(self, heads, traces: Traces, band: float) -> np.ndarray:
        """In how many of the seeds each image was right, (rows, images)."""
        total = 0
        for seed in range(self.seeds):
            name = self._name(band, seed)
            if name not in traces.variations:
                raise MetricError(f"the images were not measured under '{name}'")
            noisy = traces.variations[name]
            if list(noisy.images) != list(traces.images):
                raise MetricError(f"the images under '{name}' are not the clean ones")
            total = total + heads.right(noisy, traces.labels).astype(np.int64)
        return total

    def _name(self, band: float, seed: int) -> str:
        mask = "-symmetric" if self.symmetric else ""
        return f"noise-{band:.4g}pi-w{self.half_width:g}-e{self.eps:g}-{self.energy}{mask}-{seed}"

    def _noise(self, band: float, seed: int) -> BandNoise:
        return BandNoise(band, self.half_width, self.eps, self.energy, self.symmetric, seed)

    def _rms(self, size: tuple[int, int] | None) -> list[float]:
        """Of each band's noise on the network's input; NaN where its size is not known."""
        if size is None:
            return [float("nan")] * len(self.bands)
        return [self._noise(band, 0).rms((3, *size)) for band in self.bands]
