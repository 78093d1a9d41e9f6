"""Fine-tuning: what is trained, what begins anew, and that the result is loaded as it was."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from probekit_train import trained
from safetensors.torch import load_file
from tiny_pictures import SMALL

from probekit.errors import UsageError

MINIATURE = ["--recipe", "miniature-finetune", "--dataset", "tiny-pictures:64"]
SHORT = ["--set", "batch_size=16", "--set", "epochs=1", "--set", "warmup_epochs=0"]


@pytest.fixture
def pretrained(probekit, tmp_path):
    line = [
        "pretrain",
        "--objective",
        "simmim",
        "--dataset",
        "tiny-pictures:64",
        *SMALL,
        "--set",
        "mask_unit=8",
    ]
    code, _, err = probekit(*line, "--set", "epochs=1", "--out", tmp_path / "pre")
    assert code == 0, err
    return tmp_path / "pre" / "model.safetensors"


def test_a_model_is_tuned_and_loaded_again(probekit, pretrained, tmp_path):
    out = tmp_path / "tuned"
    line = ["finetune", "--model", f"trained@{pretrained}", *MINIATURE, *SHORT, "--out", out]
    code, text, err = probekit(
        *line, "--set", "epochs=30", "--set", "lr=0.003", "--local-attention", "3", "--json"
    )
    assert code == 0, err
    said = json.loads(text)
    assert said["objective"] == "finetune" and said["classes"] == ["a", "b", "c", "d"]
    assert said["losses"]["accuracy"] > 40 and said["held_out"]["accuracy"] > 40  # chance is 25
    model = trained.build("", weights=out / "model.safetensors")
    assert model.module(torch.randn(2, 3, 16, 16)).shape == (2, 4)
    assert model.module.blocks[0].attn.local_mask.shape == (17, 17)


def test_a_frozen_model_stays_and_its_batch_norm_is_folded_into_the_classifier(
    probekit, pretrained, tmp_path
):
    line = ["finetune", "--model", f"trained@{pretrained}", "--recipe", "park2023-linear", *SHORT]
    code, text, err = probekit(
        *line,
        "--dataset",
        "tiny-pictures:64",
        "--set",
        "lr=0.1",
        "--set",
        "epochs=10",
        "--out",
        tmp_path,
        "--json",
    )
    assert code == 0, err
    before, after = load_file(pretrained), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert after.keys() - before.keys() == {"head.weight", "head.bias"}
    # the folded classifier, on held-out images without augmentation, is as good as the trained one
    from tiny_pictures import Pictures

    from probekit.datasets.images import transform

    model = trained.build("", weights=tmp_path / "model.safetensors")
    pictures = Pictures(32, 1)
    prepare = transform(model.preprocessing)
    images = torch.stack([prepare(pictures.image(index)) for index in range(32)])
    with torch.no_grad():
        right = (model.module.eval()(images).argmax(1) == torch.tensor(pictures.labels)).float().mean()
    assert float(right) > 0.4 and abs(float(right) - json.loads(text)["held_out"]["accuracy"] / 100) < 0.3


def test_blocks_begin_anew_and_the_others_stay(probekit, pretrained, tmp_path):
    line = ["finetune", "--model", f"trained@{pretrained}", *MINIATURE, *SHORT, "--set", "epochs=0"]
    assert probekit(*line, "--reinit-last", "1", "--out", tmp_path)[0] == 0
    before, after = load_file(pretrained), load_file(tmp_path / "model.safetensors")
    changed = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("blocks.1.") for name in changed)
    assert float(after["blocks.1.mlp.fc1.weight"].std()) == pytest.approx(0.02, rel=0.1)
    code, _, err = probekit(*line, "--reinit-first", "2", "--reinit-last", "1", "--out", tmp_path / "more")
    assert code == 2 and "can't begin anew where there are 2" in err


def test_a_model_of_timm_is_tuned_and_rebuilt_by_its_name(probekit, tmp_path):
    line = ["finetune", "--model", "timm:vit_tiny_patch16_224@random", *MINIATURE, "--set", "img_size=32"]
    code, _, err = probekit(*line, *SHORT, "--set", "batch_size=8", "--set", "mixup=0.8", "--out", tmp_path)
    assert code == 0, err
    said = trained.about(tmp_path / "model.safetensors")
    assert said["architecture"]["reference"] == "timm:vit_tiny_patch16_224"
    model = trained.build("", weights=tmp_path / "model.safetensors")
    assert model.preprocessing.size == (32, 32) and model.preprocessing.mean == (0.5, 0.5, 0.5)
    assert model.module(torch.randn(1, 3, 32, 32)).shape == (1, 4)


def test_a_fine_tuning_isnt_gone_on_with_from_other_weights(probekit, pretrained, tmp_path):
    line = ["finetune", "--model", f"trained@{pretrained}", *MINIATURE, *SHORT, "--out", tmp_path / "tuned"]
    code, text, err = probekit(*line, "--json")
    assert code == 0, err
    digest = hashlib.sha256(pretrained.read_bytes()).hexdigest()
    assert json.loads(text)["base"] == digest
    path = tmp_path / "tuned" / "state.pt"
    content = torch.load(path, weights_only=True)
    assert content["base"] == digest
    said, state = trained.about(pretrained), load_file(pretrained)
    trained.write(pretrained, {**state, "cls_token": state["cls_token"] + 1}, said)
    code, _, err = probekit(*line)
    assert code == 2 and f"began with other weights: the content of 'trained@{pretrained}' has changed" in err
    del content["base"]  # a state of before goes on, and says nothing of what it began with
    torch.save(content, path)
    code, text, err = probekit(*line, "--json")
    assert code == 0 and "base" not in json.loads(text), err


def test_what_couldnt_be_loaded_again_isnt_trained(probekit, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import timm\n\ndef vit():\n    return timm.create_model('vit_tiny_patch16_224')\n")
    line = ["finetune", "--model", f"{file}:vit", *MINIATURE, *SHORT, "--out", tmp_path / "out"]
    code, _, err = probekit(*line)
    assert code == 2 and "is no pack's model: nothing could build its network again" in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_an_autoencoder_of_another_pack_is_refused_with_what_to_take():
    with pytest.raises(UsageError, match="can't be given a classifier") as caught:
        trained.classify(torch.nn.Linear(2, 2), 4, "avg")
    assert "of MAE the encoder alone ('mae:vit-b16')" in caught.value.hint


def test_a_network_with_two_classifiers_is_tuned_whole_or_not_at_all(probekit, tmp_path):
    line = ["finetune", "--model", "timm:deit_tiny_distilled_patch16_224@random", "--set", "img_size=32"]
    line += [*SHORT, "--set", "batch_size=8", "--set", "pool=token", "--dataset", "tiny-pictures:16"]
    code, _, err = probekit(*line, "--recipe", "park2023-linear", "--out", tmp_path / "frozen")
    assert code == 2 and "has no one linear classifier that could be trained alone" in err
    code, _, err = probekit(*line, "--recipe", "miniature-finetune", "--out", tmp_path / "whole")
    assert code == 0, err
