"""Both packs on real photographs through the public Python API; skipped where there are none."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

import probekit


@pytest.fixture(scope="module")
def run(real_data, tmp_path_factory):
    pytest.importorskip("probekit_moco")
    pytest.importorskip("probekit_simmim")
    models = ["moco:vit-s16@random", "simmim:vit-b16@random"]
    out = tmp_path_factory.mktemp("real") / "r"
    return probekit.run(models, [f"folder:{real_data / 'imagenet-sample'}"], out=out, limit=6)


NEEDS_MORE = {"linear_probe", "knn", "shape_bias", "frequency_robustness", "segmentation_probe"}


def test_every_metric_has_a_result_or_a_reason(run):
    """Photographs without a train split, masks or cues."""
    ended = {(c.model, c.metric): c.outcome for c in run.cells()}
    assert {m for (_, m), o in ended.items() if o.status != "done"} <= NEEDS_MORE | {"token_embedding"}
    assert all(o.status == "does not apply" and o.reason for o in ended.values() if o.status != "done")
    assert len({m for (_, m), o in ended.items() if o.status == "done"}) >= 15


def test_untrained_networks_attend_almost_uniformly(run):
    """116.492 px on 14 x 14 tokens of 16 px, METRICS section 1."""
    for model in run.models:
        distance = run.result("attention_distance", model=model)
        np.testing.assert_allclose(distance["uniform"], 116.492, atol=1e-3)
        np.testing.assert_allclose(distance["attention_distance_curve"], 116.492, atol=3)
        nmi = run.result("nmi", model=model)
        assert float(nmi["nmi"].min()) >= 0 and float(nmi["nmi"].max()) < 0.1
        fourier = run.result("fourier", model=model)
        assert fourier["fourier"].shape == (25, 7)
        np.testing.assert_allclose(fourier["frequency"], 2 * np.arange(7) / 14)


def test_moco_has_its_twelve_heads(run):
    assert run.result("nmi", model="moco:vit-s16@random").sizes["head"] == 12


def test_intervals_hold_the_mean_and_narrow_with_images(run):
    nmi = run.result("nmi", model="simmim:vit-b16@random")
    assert (nmi["nmi_low"] <= nmi["nmi"]).all() and (nmi["nmi"] <= nmi["nmi_high"]).all()
    assert (nmi["nmi_curve_low"] < nmi["nmi_curve_high"]).all()


def test_replaying_the_command_has_the_same_bits(run, real_data, tmp_path):
    again = probekit.run(run.models[0], run.datasets, out=tmp_path / "again", limit=6)
    done = [c.metric for c in again.cells() if c.outcome.status == "done" and c.metric != "cka"]
    for metric in done:  # cka looks at the run's other model too
        files = [r.folder(run.models[0], run.datasets[0]).result(metric) for r in (run, again)]
        one, two = (hashlib.sha256(f.read_bytes()).hexdigest() for f in files)
        assert one == two
