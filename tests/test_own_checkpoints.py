"""Checkpoints of the user's own in timm's models: where the weights are found, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from probekit.errors import UsageError, WeightsError
from probekit.models import candidates
from probekit.models import timm as timm_models
from probekit.models.model import load_model
from probekit.plugins.catalog import Catalog


@pytest.fixture(scope="module")
def tiny():
    return timm.create_model("vit_tiny_patch16_224", num_classes=1000, depth=12)


@pytest.mark.parametrize(
    ("container", "prefix"),
    [
        ("state_dict", "module.base_encoder."),
        ("model", "encoder."),
        ("teacher", "backbone."),
        ("model_state", "student."),
        ("module", "model._orig_mod."),
        ("state/net", ""),
    ],
)
def test_weights_are_found_wherever_training_left_them(tiny, tmp_path, container, prefix):
    state = {f"{prefix}{key}": value for key, value in tiny.state_dict().items() if "head" not in key}
    extra = {"predictor.weight": torch.zeros(2)} if prefix else {}
    if prefix:  # a projection head where the classifier would be
        extra |= {f"{prefix}head.0.weight": torch.zeros(3, 2), f"{prefix}head.1.running_mean": torch.zeros(3)}
    content = state | extra
    for key in reversed(container.split("/")):
        content = {key: content}
    torch.save(content | {"epoch": 3, "optimizer": {"state": {0: torch.zeros(2)}}}, tmp_path / "w.pth")
    model = load_model(f"timm:vit_tiny_patch16_224@{tmp_path}/w.pth", Catalog.load(enabled=False))
    assert all(torch.equal(value, tiny.state_dict()[key]) for key, value in model.module.state_dict().items())
    assert set(model.accounting.used) == set(state) and set(model.accounting.ignored) == set(extra)
    where = f"'{container}', prefix '{prefix}'" if prefix else f"'{container}'"
    assert model.weights.note == (
        f"'timm:vit_tiny_patch16_224' from {where}: 150 keys used, {len(extra)} ignored; 3 heads as in"
        " 'timm:vit_tiny_patch16_224': no shape in a file shows their number"
    )


def test_two_places_that_fit_alike_are_an_error_that_lists_them(tiny, tmp_path):
    state = {key: value for key, value in tiny.state_dict().items() if "head" not in key}
    other = {key: value + 1 for key, value in state.items()}
    path, catalog = tmp_path / "w.pth", Catalog.load(enabled=False)
    name = "timm:vit_tiny_patch16_224"

    def bias(text):
        return load_model(f"{name}{text}@{path}", catalog).module.norm.bias

    teacher = {f"backbone.{key}": value for key, value in other.items()}
    student = {f"module.backbone.{key}": value for key, value in state.items()}
    torch.save({"student": student, "teacher": teacher}, path)
    with pytest.raises(WeightsError) as caught:
        bias("")
    assert "in 2 places: 'student', prefix 'module.backbone.' (150 of 150 keys); 'teacher'" in str(
        caught.value
    )
    assert caught.value.hint == f"say which: '{name}:container=student@{path}'"
    assert torch.equal(bias(":container=student"), state["norm.bias"])
    assert torch.equal(bias(":container=teacher"), other["norm.bias"])
    with pytest.raises(WeightsError, match="in the place asked for: there are 'student', prefix"):
        bias(":container=model")

    pair = {f"base_encoder.{key}": value for key, value in state.items()}
    pair |= {f"momentum_encoder.{key}": value for key, value in other.items()}
    torch.save({"state_dict": pair}, path)
    with pytest.raises(WeightsError, match="in 2 places") as caught:
        bias("")
    assert caught.value.hint == f"say which: '{name}:prefix=base_encoder.@{path}'"
    assert torch.equal(bias(":prefix=momentum_encoder."), other["norm.bias"])

    torch.save({"model": state, "model_ema": other}, path)  # no average is taken in silence
    with pytest.raises(WeightsError, match="in 2 places"):
        bias("")
    torch.save(state | {"ema": other}, path)
    with pytest.raises(WeightsError, match="in 2 places: the file itself") as caught:
        bias("")
    assert ":container=none@" in caught.value.hint
    assert torch.equal(bias(":container=none"), state["norm.bias"])
    with pytest.raises(UsageError, match="no checkpoint is given"):
        load_model(f"{name}:container=teacher@random", catalog)


@pytest.mark.parametrize(
    ("container", "prefix"),
    [("", ""), ("", "module."), ("state_dict", "model.backbone."), ("model", "_orig_mod."), ("teacher", "")],
)
def test_callables_of_the_users_own_read_the_same_files(tmp_path, container, prefix):
    sys.path.insert(0, str(Path(__file__).parent))
    from tiny import TinyViT

    state = {f"{prefix}{key}": value + 1 for key, value in TinyViT().state_dict().items()}
    extra = {"head.weight": torch.zeros(2)} if prefix else {}
    content = state | extra
    torch.save({container: content, "epoch": 3} if container else content, tmp_path / "w.pth")
    text = f"{Path(__file__).parent}/tiny.py:build"
    catalog = Catalog.load(enabled=False)
    model = load_model(f"{text}@{tmp_path}/w.pth", catalog)
    own = model.module.state_dict()
    assert all(torch.equal(state[f"{prefix}{key}"], own[key]) for key in own)
    assert set(model.accounting.used) == set(state) and set(model.accounting.ignored) == set(extra)
    assert (model.weights.kind, model.weights.note.startswith("from ")) == ("file", bool(container or prefix))

    torch.save({"model": state, "ema": state}, tmp_path / "two.pth")
    with pytest.raises(WeightsError, match="in 2 places: 'model'") as caught:
        load_model(f"{text}@{tmp_path}/two.pth", catalog)
    assert caught.value.hint == f"say which: '{text}:container=model@{tmp_path}/two.pth'"
    assert load_model(f"{text}:container=ema@{tmp_path}/two.pth", catalog).weights.note.startswith(
        "from 'ema'"
    )
    torch.save({"model": state | {f"{prefix}more.weight": torch.zeros(2)}}, tmp_path / "more.pth")
    with pytest.raises(WeightsError, match=r"keys 1 unexpected \('more.weight' \(2\)\)") as caught:
        load_model(f"{text}@{tmp_path}/more.pth", catalog)
    assert "without these keys" in caught.value.hint


def test_what_timm_resamples_is_said(tiny, tmp_path):
    save_file(tiny.state_dict(), tmp_path / "w.safetensors")
    model = timm_models.build(
        "vit_tiny_patch16_224", weights=tmp_path / "w.safetensors", image_size=(224, 448)
    )
    assert "pos_embed (1, 197, 192) resampled to (1, 393, 192)" in str(model.accounting)


def test_an_authors_file_goes_through_timms_filter(tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("pit_ti_224", num_classes=7).state_dict()
    official = {
        key.replace("transformers.1.pool", "pools.0").replace("transformers.2.pool", "pools.1"): value
        for key, value in theirs.items()
    }
    torch.save(official, tmp_path / "w.pth")
    model = timm_models.build("pit_ti_224", weights=tmp_path / "w.pth")
    assert all(torch.equal(value, theirs[key]) for key, value in model.module.state_dict().items())
    assert "2, 4, 8 heads as in 'timm:pit_ti_224'" in str(model.accounting)
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5).state_dict()
    official = {}
    for key, value in swin.items():
        for stage in (1, 2, 3):
            key = key.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample")
        official[key.replace("head.fc.", "head.")] = value
    torch.save({"model": official}, tmp_path / "w.pth")
    module = timm_models.build("swin_tiny_patch4_window7_224", weights=tmp_path / "w.pth").module
    assert torch.equal(module.head.fc.weight, swin["head.fc.weight"])
    assert torch.equal(module.layers[2].downsample.norm.bias, swin["layers.2.downsample.norm.bias"])


def test_a_folder_as_timm_saves_it(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    torch.manual_seed(1)
    saved = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2)
    timm.models.save_for_hf(saved, folder, model_args={"depth": 2}, safe_serialization=True)
    catalog = Catalog.load(enabled=False)
    model = load_model(f"timm:local-dir:{folder}", catalog)
    state = saved.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.module.state_dict().items())
    assert (model.weights.kind, model.weights.source) == ("file", str(folder / "model.safetensors"))
    assert "3 heads" in model.weights.note and len(model.module.blocks) == 2
    other = {key: value + 1 for key, value in state.items()}
    save_file(other, tmp_path / "other.safetensors")
    own = load_model(f"timm:local-dir:{folder}@{tmp_path}/other.safetensors", catalog, image_size=(64, 64))
    assert torch.equal(own.module.norm.bias, other["norm.bias"]) and own.module.pos_embed.shape[1] == 17
    assert load_model(f"timm:local-dir:{folder}@random", catalog).weights.kind == "random"
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="holds no weights") as caught:
        load_model(f"timm:local-dir:{folder}", catalog)
    assert "@random" in caught.value.hint
    with pytest.raises(WeightsError, match="is no folder of a timm model: Config file not found"):
        load_model(f"timm:local-dir:{tmp_path}/absent@random", catalog)


def test_a_repository_of_timms_kind_on_the_hub(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for text in ("timm:hf-hub:nobody/vit-mine", "timm:hf-hub:nobody/vit-mine@random"):
        with pytest.raises(WeightsError, match=r"can't fetch 'nobody/vit-mine'.*can't be reached") as caught:
            load_model(text, Catalog.load(enabled=False))
        assert "'timm:local-dir:FOLDER'" in caught.value.hint and "\n" not in caught.value.message


def test_a_file_of_other_names_is_left_to_timms_conversion_if_it_holds_one_set_of_weights():
    names = ["stages.0.blocks.0.conv_dw.weight", "stages.0.blocks.0.norm.weight"]
    foreign = {
        "module.stages.0.0.dwconv.weight": torch.zeros(2),
        "module.stages.0.0.norm.weight": torch.ones(2),
    }
    asked = {"source": "w.pth", "target": "timm:x"}
    place = candidates.choose({"model": foreign, "loss": {"center": torch.zeros(2)}}, names, **asked)
    assert (place.container, place.prefix, place.found) == (("model",), "module.", 0)
    assert set(place.tensors) == {"stages.0.0.dwconv.weight", "stages.0.0.norm.weight"}
    with pytest.raises(WeightsError, match="none of its keys is the model's"):
        candidates.choose({"model": foreign, "ema": foreign}, names, **asked)
