"""A miniature ships only if it shows what its method is known for, on held-out images and beyond the untrained."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import probekit
from probekit.plugins.catalog import Catalog

SPECS = {
    entry.spec.name: entry.spec
    for entry in Catalog.load().models
    if entry.spec.weights is not None and entry.spec.weights.bundled
}
UNTRAINED = "untrained"
NAMES = {name: spec.full_name for name, spec in SPECS.items()}
PAGE = Path(__file__).parents[1] / "docs" / "miniatures.md"


def file_of(name: str) -> Path:
    package, _, file = SPECS[name].weights.bundled.partition(":")
    return Path(str(resources.files(package) / file))


def said_by(name: str) -> dict:
    """What the training wrote into the file."""
    with safe_open(file_of(name), framework="pt") as file:
        return json.loads(file.metadata()["probekit"])


LABELS = {"shape": "shapetex", "texture": "shapetex?labels=texture"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What is asked of MoCo's and SimMIM's, on held-out images."""
    out = tmp_path_factory.mktemp("miniatures") / "run"
    names = [NAMES[name] for name in ("moco", "simmim", UNTRAINED)]
    common = {"limit": 512, "train_limit": 2048, "out": out}
    metrics = ["attention_distance", "similarity_tokens", "linear_probe"]
    probekit.run(names, metrics=metrics, datasets=[LABELS["shape"]], **common)
    return probekit.run(names, metrics=["linear_probe"], datasets=[LABELS["texture"]], **common)


def curve(run, name: str, metric: str, value: str = "", labels: str = "shape") -> np.ndarray:
    """Block outputs of the encoder, first to last."""
    found = run.result(metric, model=NAMES[name], dataset=LABELS[labels])
    rows = (found["part"].values == "encoder") & np.isin(found["site"].values, ("attention", "out"))
    return found[value or f"{metric}_curve"].values[rows]


def shipped(*names: str):
    missing = [name for name in names if name not in SPECS]
    return pytest.mark.skipif(bool(missing), reason=f"no miniature of {', '.join(missing)} is shipped")


@pytest.mark.parametrize("name", SPECS)
def test_small_and_the_default_of_its_name(name):
    assert file_of(name).stat().st_size < 4_000_000
    assert Catalog.load().model(name).spec.full_name == SPECS[name].full_name
    assert SPECS[name].preprocessing.size == (64, 64)


def test_bare_names_run_offline_and_the_header_names_what_is_published(tmp_path, cli):
    models = ["--model", "simmim", "--model", "untrained", "--model", "simmim@random"]
    code, out, err = cli("run", *models, "--metrics", "nmi", "--limit", "4", "--out", tmp_path / "run")
    assert code == 0, err
    assert "no --dataset given: 4 drawn images of known shape and texture" in out
    lines = [line.strip() for line in out.splitlines()]
    assert any(
        re.match(r"simmim:mini +bundled miniature of SimMIM .*published model is simmim:vit-b16$", x)
        for x in lines
    )
    assert any(re.match(r"untrained:mini +.*before any training$", x) for x in lines)
    assert not any(re.match(r"simmim:mini@random +bundled", x) for x in lines)


@pytest.mark.parametrize("name", [name for name in SPECS if name != UNTRAINED])
def test_its_committed_recipe_makes_it_again_and_its_card_is_true(name):
    reading = pytest.importorskip("probekit_train.reading")
    said = said_by(name)
    recipe = f"miniature-{said['objective']}"
    made = reading.make(reading.read(recipe))
    assert reading.make(said["recipe"]) == made and said["finished"]
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{name}` |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == f"`{recipe}`"
    assert cells[2] == f"{said['images_seen']:,}"
    assert cells[3] == (f"{made.rounds} x " if made.rounds > 1 else "") + f"{made.epochs:g}"
    assert cells[4] == f"{said['losses']['loss']:.3f}"
    assert cells[5] == f"{said['held_out']['loss']:.3f}"
    assert cells[6] == f"{said['seconds'] / 60:.0f}"
    assert cells[7] == f"{said['seed']}"


def test_the_page_speaks_of_every_miniature_and_of_no_other():
    rows = set(re.findall(r"^\| `(\w+)` \| `miniature-", PAGE.read_text(), re.MULTILINE))
    assert rows == SPECS.keys() - {UNTRAINED}


def test_the_untrained_one_is_where_the_others_began():
    said = said_by(UNTRAINED)
    assert said["images_seen"] == 0 and said["seed"] == said_by("simmim")["seed"]


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
    moco, simmim, untrained = (curve(run, n, "similarity_tokens")[-1] for n in ("moco", "simmim", UNTRAINED))
    assert moco > untrained + 0.2
    assert moco > simmim + 0.1


@shipped("moco")
@pytest.mark.parametrize("labels", LABELS)
def test_moco_separates_classes_at_the_end(run, labels):
    moco, simmim, untrained = (
        curve(run, n, "linear_probe", labels=labels)[-1] for n in ("moco", "simmim", UNTRAINED)
    )
    assert moco > max(simmim, untrained) + 5


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
