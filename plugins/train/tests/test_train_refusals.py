"""Bad input: one sentence each, no traceback, and nothing of an earlier training lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from probekit_train import trained
from probekit_train.backbone import Description
from safetensors.torch import load_file, save_file
from tiny_pictures import SMALL

from probekit.errors import UsageError, WeightsError

SIMMIM = ["--objective", "simmim", "--set", "mask_unit=8"]
DATA = ["--dataset", "tiny-pictures:64"]


def refused(probekit, code: int, *line: object) -> str:
    found, _, err = probekit(*line)
    assert found == code, err
    message = next(text for text in err.splitlines() if text.startswith("error: "))
    assert "Traceback" not in err
    return message + "".join(text for text in err.splitlines() if text.startswith("  hint: "))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ([], "neither a recipe nor an objective is given"),
        (["--objective", "simmin"], "unknown objective 'simmin'  hint: did you mean 'simmim'?"),
        (
            ["--recipe", "miniature-moko"],
            "unknown recipe 'miniature-moko'  hint: did you mean 'miniature-moco'",
        ),
        (["--recipe", "nowhere/recipe.yaml"], "can't read recipe 'nowhere/recipe.yaml'"),
        (
            ["--recipe", "miniature-mae", "--objective", "moco"],
            "recipe 'miniature-mae' is for 'mae', not for 'moco'",
        ),
        (["--recipe", "park2023-linear"], "is for fine-tuning"),
        ([*SIMMIM, "--set", "mask_ration=0.5"], "no field 'mask_ration'  hint: did you mean 'mask_ratio'"),
        ([*SIMMIM, "--set", "views.0.flop=0.5"], "no field 'views.0.flop'  hint: did you mean 'flip'?"),
        ([*SIMMIM, "--set", "momentum=0.5"], "a recipe for 'simmim' has no field 'momentum'"),
        ([*SIMMIM, "--lambda", "0.5"], "a recipe for 'simmim' has no field 'lambda'"),
        ([*SIMMIM, "--set", "lr=-1"], "field 'lr' of the recipe can't be '-1'"),
        ([*SIMMIM, "--set", "lr"], "'lr' is not key=value"),
        ([*SIMMIM, "--set", "views=[{}, {}]"], "it takes 1 views, and 2 are given"),
        ([*SIMMIM, "--set", "img_size=18"], "patches of 4 x 4 px, which don't tile 18 x 18"),
        ([*SIMMIM, "--set", "mask_unit=6"], "masked squares of 6 px don't fit images of 16 px"),
        ([*SIMMIM, "--local-attention", "4"], "odd, not 4"),
        ([*SIMMIM, "--set", "batch_size=1000"], "a batch of 1000 images is more than the 64 there are"),
        ([*SIMMIM, "--set", "model_args.checkpoint_path=x"], "'model_args' can't have"),
        ([*SIMMIM, "--set", "model_args.depht=3"], "timm can't build 'vit'"),
        ([*SIMMIM, "--model", "vit_tinny_patch16_224"], "timm has no model 'vit_tinny_patch16_224'"),
        ([*SIMMIM, "--model", "resnet18"], "can't build 'resnet18'"),
        (["--objective", "moco", "--set", "batch_size=1"], "a batch of 1 has no others"),
        (["--objective", "moco", "--set", "accumulate=3"], "doesn't divide into 3 parts"),
        (["--objective", "supervised", "--dataset", "tiny-pictures:64-unlabelled"], "has no labels"),
        (["--objective", "supervised", "--set", "mixup=1", "--set", "batch_size=5"], "5 can't be paired"),
        ([*SIMMIM, "--dataset", "tiny-picturs:64"], "did you mean 'tiny-pictures'"),
    ],
)
def test_one_sentence_with_the_way_out(probekit, tmp_path, line, expected):
    small = [] if line[:1] == ["--recipe"] or "--model" in line else SMALL
    assert expected in refused(probekit, 2, "pretrain", *DATA, *small, *line, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_recipe_or_of_other_images_is_not_gone_on_from(probekit, tmp_path):
    line = ["pretrain", *SIMMIM, *SMALL, "--set", "epochs=1", "--out", tmp_path]
    assert probekit(*line, *DATA)[0] == 0
    before = (tmp_path / "state.pt").read_bytes()
    message = refused(probekit, 2, *line, *DATA, "--set", "lr=0.5")
    assert "is of another recipe: its 'lr' is '0.001', and here '0.5'" in message
    other = ["--objective", "mae", "--set", "epochs=1", "--set", "decoder_width=16"]
    message = refused(probekit, 2, "pretrain", *other, *SMALL, *DATA, "--out", tmp_path)
    assert "its 'objective' is 'simmim', and here 'mae'" in message
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save({**content, "fingerprint": "0" * 32}, tmp_path / "state.pt")
    assert "was trained on other images" in refused(probekit, 2, *line, *DATA)
    (tmp_path / "state.pt").write_bytes(before[:1000])
    assert "cut short, damaged" in refused(probekit, 4, *line, *DATA)


def test_randaugment_is_timms(probekit, tmp_path):
    line = ["pretrain", "--objective", "supervised", *SMALL, *DATA, "--out", tmp_path, "--set", "epochs=1"]
    message = refused(probekit, 2, *line, "--set", "views.0.randaugment=much")
    assert "timm has no RandAugment 'much'" in message
    assert probekit(*line, "--set", "views.0.randaugment=rand-m9-mstd0.5-inc1")[0] == 0


def test_two_trainings_dont_share_a_folder(probekit, tmp_path):
    from probekit.store.writing import RunLock

    with RunLock(tmp_path):
        line = ["pretrain", *SIMMIM, *SMALL, *DATA, "--set", "epochs=1", "--out", tmp_path]
        assert "is being written by" in refused(probekit, 4, *line)


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(probekit, tmp_path, monkeypatch):
    line = ["pretrain", *SIMMIM, *SMALL, *DATA, "--set", "epochs=6", "--out", tmp_path]
    assert probekit(*line, "--stop-after", "0")[0] == 0
    before = (tmp_path / "state.pt").read_bytes()

    class Full:
        f_bavail, f_frsize = 1, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    message = refused(probekit, 4, *line)
    assert "state.pt' needs" in message and "the disk has 4.1 kB" in message
    assert (tmp_path / "state.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_that_cant_be_written_is_said(probekit):
    line = ["pretrain", *SIMMIM, *SMALL, *DATA, "--set", "epochs=1", "--out", "/dev/full/training"]
    assert "/dev/full/training" in refused(probekit, 4, *line)


def test_a_loss_that_is_no_number_ends_the_training(probekit, tmp_path):
    line = ["pretrain", *SIMMIM, *SMALL, *DATA, "--set", "epochs=9", "--set", "lr=1e30", "--set", "clip=0"]
    assert "the loss is not a number any more at step" in refused(probekit, 4, *line, "--out", tmp_path)
    assert not (tmp_path / "state.pt").exists()


def test_an_image_that_cant_be_read_is_named(probekit, tmp_path):
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    line = ["pretrain", *SIMMIM, *SMALL, "--dataset", f"folder:{tmp_path}", "--out", tmp_path / "out"]
    assert "image '0.png' can't be used" in refused(probekit, 4, *line)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "model.safetensors"
    args = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    description = Description(model="vit", model_args=args, img_size=16)
    said = {
        "objective": "simmim",
        "architecture": description.model_dump(mode="json"),
        "preprocessing": trained.preprocessing_for(16, 1.0).model_dump(mode="json"),
    }
    trained.write(path, description.build().state_dict(), said)
    return path


def test_checkpoints_are_refused_where_they_arent_what_they_should_be(checkpoint, tmp_path):
    assert trained.build("simmim", weights=checkpoint).module.embed_dim == 32
    with pytest.raises(WeightsError, match="was trained with 'simmim', not 'moco'"):
        trained.build("moco", weights=checkpoint)
    with pytest.raises(WeightsError, match="none is given"):
        trained.build("", weights="random")
    with pytest.raises(WeightsError, match="no checkpoint"):
        trained.build("", weights=tmp_path / "nothing")
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(checkpoint), plain)
    with pytest.raises(WeightsError, match="doesn't say what network"):
        trained.build("", weights=plain)
    state = load_file(checkpoint)
    del state["norm.weight"]
    trained.write(plain, state, trained.about(checkpoint))
    with pytest.raises(WeightsError, match="1 missing"):
        trained.build("", weights=plain)
    plain.write_bytes(checkpoint.read_bytes()[:500])
    with pytest.raises(WeightsError, match="damaged"):
        trained.build("", weights=plain)


@pytest.mark.parametrize(
    "architecture",
    [
        {"reference": "./evil.py:build", "img_size": 16, "classes": 4, "pool": "avg"},
        {"reference": "os.path:join", "img_size": 16, "classes": 4, "pool": "avg"},
        {"model": "hf-hub:someone/something", "img_size": 16},
        {"model": "vit", "img_size": 16, "model_args": {"checkpoint_path": "/etc/passwd"}},
        {"model": "vit", "img_size": 16, "model_args": {"norm_layer": "os.system"}},
        {"model": "vit", "img_size": 16, "surprise": 1},
    ],
)
def test_metadata_names_no_code_no_file_and_no_address(checkpoint, tmp_path, architecture):
    path = tmp_path / "model.safetensors"
    trained.write(path, load_file(checkpoint), {**trained.about(checkpoint), "architecture": architecture})
    with pytest.raises((UsageError, WeightsError)):
        trained.build("", weights=path)
