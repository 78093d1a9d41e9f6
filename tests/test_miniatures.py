"""A miniature ships only if it shows what its method is known for, on held-out images and beyond the untrained."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest

import probekit
from probekit.plugins.catalog import Catalog

SPECS = {
    entry.spec.name: entry.spec
    for entry in Catalog.load().models
    if entry.spec.weights is not None and entry.spec.weights.bundled
}
UNTRAINED = "untrained"
NAMES = {name: spec.full_name for name, spec in SPECS.items()}
NAMES |= {UNTRAINED: f"{next(iter(NAMES.values()))}@random"} if NAMES else {}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    metrics = ["attention_distance", "similarity_tokens", "linear_probe"]
    out = tmp_path_factory.mktemp("miniatures") / "run"
    return probekit.run(list(NAMES.values()), metrics=metrics, limit=512, train_limit=2048, out=out)


def curve(run, name: str, metric: str, value: str = "") -> np.ndarray:
    """Block outputs of the encoder, first to last."""
    found = run.result(metric, model=NAMES[name])
    rows = (found["part"].values == "encoder") & np.isin(found["site"].values, ("attention", "out"))
    return found[value or f"{metric}_curve"].values[rows]


def shipped(*names: str):
    missing = [name for name in names if name not in SPECS]
    return pytest.mark.skipif(bool(missing), reason=f"no miniature of {', '.join(missing)} is shipped")


@pytest.mark.parametrize("name", SPECS)
def test_small_and_the_default_of_its_name(name):
    package, _, file = SPECS[name].weights.bundled.partition(":")
    assert (resources.files(package) / file).stat().st_size < 4_000_000
    assert Catalog.load().model(name).spec.full_name == SPECS[name].full_name
    assert SPECS[name].preprocessing.size == (64, 64)


@shipped("simmim")
def test_simmim_looks_near(run):
    share = curve(run, "simmim", "attention_distance", "attention_distance_share_curve")
    assert (
        share.min()
        < 0.5
        < curve(run, UNTRAINED, "attention_distance", "attention_distance_share_curve").min()
    )


@shipped("simmim")
def test_simmim_is_best_before_its_last_third(run):
    assert curve(run, "simmim", "linear_probe").argmax() + 1 <= 8


@shipped("moco")
def test_moco_s_last_tokens_are_alike(run):
    last = {name: curve(run, name, "similarity_tokens")[-1] for name in NAMES}
    assert last["moco"] > last[UNTRAINED] + 0.2
    assert "simmim" not in last or last["moco"] > last["simmim"] + 0.1


@shipped("moco")
def test_moco_separates_classes_at_the_end(run):
    last = {name: curve(run, name, "linear_probe")[-1] for name in NAMES}
    assert last["moco"] > last[UNTRAINED] + 5
    assert "simmim" not in last or last["moco"] > last["simmim"] + 5


@shipped("mae")
def test_mae_s_decoder_guesses_better_than_each_patch_s_mean():
    import torch

    from probekit.datasets.images import batches
    from probekit.datasets.shapetex import load
    from probekit.models.model import load_model

    model = load_model(f"{SPECS['mae'].full_name}:mask_ratio=0.75", Catalog.load())
    pixels = next(batches(load(None), range(256), model.preprocessing, batch_size=256)).pixels
    patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    with torch.no_grad():
        error = (model.module(pixels) - target).square().mean(-1)
    hidden = torch.ones(64, dtype=torch.bool)
    hidden[model.module.visible] = False
    mean = target.square().mean(-1)  # of guessing each patch's mean
    assert error[:, hidden].mean() < 0.98 * mean[:, hidden].mean()
