"""Bad input: one sentence each, no traceback, and nothing of an earlier training lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from probekit_train import trained
from probekit_train.backbone import Description
from probekit_train.reading import changed, read
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
        (
            [*SIMMIM, "--set", "mask_unit=16"],
            "squares of 16 px at a ratio of 0.6 hide the whole image: 1 of 1",
        ),
        (
            [*SIMMIM, "--set", "mask_ratio=0.8"],
            "squares of 8 px at a ratio of 0.8 hide the whole image: 4 of 4",
        ),
        ([*SIMMIM, "--local-attention", "4"], "odd, not 4"),
        ([*SIMMIM, "--set", "views.0.jitter=[0.4, 0.4, 0.2, 0.6]"], "jitter's strengths are 0 or more"),
        ([*SIMMIM, "--set", "views.0.jitter=[-0.4, 0.4, 0.2, 0.1]"], "jitter's strengths are 0 or more"),
        ([*SIMMIM, "--set", "views.0.blur_radius=[2, 1]"], "blur_radius goes from 0 or more up"),
        ([*SIMMIM, "--set", "views.0.blur=1.5"], "field 'views.0.blur' of the recipe can't be '1.5'"),
        ([*SIMMIM, "--set", "betas=[0.9, 1.0]"], "field 'betas.1' of the recipe can't be '1.0'"),
        ([*SIMMIM, "--set", "epochs=.inf"], "field 'epochs' of the recipe can't be 'inf'"),
        ([*SIMMIM, "--set", "model_args.in_chans=1"], "images have 3 channels"),
        ([*SIMMIM, "--set", "model_args.dynamic_img_size=true"], "excludes model_args.dynamic_img_size"),
        (
            ["--objective", "moco", "--set", "model_args.global_pool=max", "--set", "pool=token"],
            "pools by 'max', not by 'token' as the recipe's 'pool' says",
        ),
        (
            ["--objective", "supervised", "--model", "vit_base_patch16_siglip_224", "--set", "img_size=32"],
            "pools by 'map', not by 'token' as the recipe's 'pool' says",
        ),
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


def _without(content: dict, name: str) -> dict:
    return {key: value for key, value in content.items() if key != name}


def _spoilt(content: dict) -> dict:
    weights = dict(content["objective"])
    weights["mask_token"] = weights["mask_token"] * float("nan")
    return {**content, "objective": weights}


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda content: _without(content, "step"), "its 'step' is missing or of another kind"),
        (lambda content: {**content, "rows": 3}, "its 'rows' is missing or of another kind"),
        (lambda content: {**content, "rows": [1]}, "its log can't be read"),
        (lambda content: {**content, "recipe": "{"}, "its recipe can't be read"),
        (lambda content: {**content, "recipe": "[]"}, "its recipe can't be read"),
        (lambda content: {**content, "step": 400}, "it is at step 400 of 4"),
        (_spoilt, "some of its weights are no numbers"),
        (lambda content: b"no state at all", "state.pt"),
    ],
)
def test_a_damaged_state_is_said_with_the_way_out(probekit, tmp_path, damage, expected):
    line = ["pretrain", *SIMMIM, *SMALL, *DATA, "--set", "epochs=1", "--out", tmp_path]
    assert probekit(*line)[0] == 0
    path = tmp_path / "state.pt"
    content = damage(torch.load(path, weights_only=True))
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    message = refused(probekit, 4, *line)
    assert expected in message
    assert "move the file away to begin anew, or give another `--out`" in message


def test_an_untrained_network_isnt_overwritten_by_another_recipe(probekit, tmp_path):
    line = ["pretrain", *SIMMIM, *SMALL, *DATA, "--set", "epochs=0", "--out", tmp_path]
    assert probekit(*line)[0] == 0
    assert probekit(*line)[0] == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    assert "its 'seed' is '0', and here '1'" in refused(probekit, 2, *line, "--seed", "1")
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_numbers_inside_a_network_s_arguments_are_numbers(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("objective: simmim\nmodel_args: {init_values: 1e-5, depth: 2}\n")
    assert read(str(path))["model_args"] == {"init_values": 1e-5, "depth": 2}
    set_here = changed({}, ["model_args={init_values: 1e-5}", "views=[{scale: [1e-1, 1]}]"])
    assert set_here == {"model_args": {"init_values": 1e-5}, "views": [{"scale": [0.1, 1]}]}


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
