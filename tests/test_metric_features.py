"""Pooled features: which tokens, and what is said where there is no such token."""

from __future__ import annotations

import pytest
import torch

from probekit.errors import DoesNotApply, UsageError
from probekit.metrics.cka import CKA
from probekit.metrics.features import Features
from probekit.metrics.knn import KNN
from probekit.metrics.linear_probe import LinearProbe
from probekit.metrics.spectrum_images import SpectrumImages
from probekit.testing import make_layer

FIRST = "first prefix token (the class token where there is one)"


@pytest.mark.parametrize("prefix", [1, 4])
def test_pools(prefix: int) -> None:
    tokens = torch.randn(2, prefix + 6, 5, generator=torch.Generator().manual_seed(0))
    layer = make_layer(tokens=tokens, grid=(2, 3), prefix=prefix)
    first, mean = tokens[:, 0], tokens[:, prefix:].sum(1) / 6
    for pool, expected in (("mean", mean), ("cls", first), ("both", torch.cat([first, mean], 1))):
        torch.testing.assert_close(Features(pool=pool).measure(layer)["features"], expected)


def test_a_model_without_prefix_tokens() -> None:
    layer = make_layer(grid=(2, 3))
    assert Features().measure(layer)["features"].shape == (2, 24)
    for pool in ("cls", "both"):
        with pytest.raises(DoesNotApply, match="the model has no prefix token"):
            Features(pool=pool).measure(layer)


def test_what_cls_is_called() -> None:
    """A register may be first: no result calls it a class token."""
    for metric, key in (
        (Features, "pool"),
        *((m, "features") for m in (CKA, KNN, SpectrumImages, LinearProbe)),
    ):
        assert metric(pool="cls").conventions[key].startswith(FIRST)
        assert metric().conventions[key].startswith("mean of patch tokens")
    for metric in (Features, LinearProbe):
        assert str(metric(pool="both").conventions).count(f"{FIRST}, then mean of patch tokens") == 1
    with pytest.raises(UsageError, match="not 'first'") as error:
        CKA(pool="first")
    assert FIRST in error.value.hint
