"""Whole trainings of a tiny network: they learn, they resume exactly, and probekit measures what they make."""

from __future__ import annotations

import csv
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from probekit_train import trained
from probekit_train.alarms import alarms
from probekit_train.pictures import Order, Share
from probekit_train.pictures import Pictures as Decoded
from probekit_train.pretraining import comparable
from probekit_train.reading import changed, make, names, read
from probekit_train.schedule import optimiser, scheduler, steps_of
from probekit_train.showing import Shown, sparkline, write_log
from probekit_train.trained import preprocessing_for
from probekit_train.training import Job, Report, processes, train
from safetensors.torch import load_file
from tiny_pictures import SMALL, Pictures

HEADS = ["--set", "projector=[32, 16]", "--set", "predictor=[32, 16]"]
COARSE = ["--set", "model_args={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}"]
STILL = "{scale: [0.9, 1.0], flip: 0}"
TWO = ["--set", f"views=[{STILL}, {STILL}]"]


def command(objective: str, out: Path, *more: str, images: str = "64") -> list[str]:
    extra = [*HEADS, *COARSE, "--set", "rounds=1"] if objective == "moco" else []
    extra += ["--set", "mask_unit=8"] if objective == "simmim" else []
    extra += ["--set", "decoder_width=16"] if objective == "mae" else []
    data = f"tiny-pictures:{images}"
    return ["pretrain", "--objective", objective, "--dataset", data, "--out", str(out), *SMALL, *extra, *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# --- learning


def test_two_hundred_steps_learn_sixteen_images_by_heart(probekit, tmp_path):
    rest = ["--set", "epochs=200", "--set", "lr=0.003", "--json"]
    labels = ["--set", "label_smoothing=0", "--set", "drop_path=0", "--set", f"views=[{STILL}]"]
    code, out, _ = probekit(*command("supervised", tmp_path / "a", *labels, *rest, images="16"))
    said = json.loads(out)
    assert code == 0 and said["images_seen"] == 3200
    assert said["losses"]["accuracy"] == 100 and said["losses"]["loss"] < 0.02
    assert said["held_out"]["accuracy"] > 25  # of four classes, on images it never saw
    whole = ["--set", "drop_until=0.7"]
    code, out, _ = probekit(*command("moco", tmp_path / "b", *TWO, *whole, *rest, images="16"))
    said = json.loads(out)
    assert code == 0 and said["losses"]["info_nce"] < 2.1  # chance is log 16 = 2.77
    assert said["losses"]["loss"] == pytest.approx(2 * 0.2 * 2 * said["losses"]["info_nce"], rel=1e-3)


def test_masked_images_are_guessed_better_with_training(probekit, tmp_path):
    for objective in ("simmim", "mae"):
        held_out = []
        for epochs in (0, 15):
            rest = ["--set", f"epochs={epochs}", "--set", "lr=0.003", "--json"]
            code, out, _ = probekit(*command(objective, tmp_path / f"{objective}-{epochs}", *rest))
            assert code == 0
            held_out.append(json.loads(out)["held_out"]["loss"])
        assert held_out[1] < 0.9 * held_out[0], objective


def test_a_held_out_image_that_cannot_be_read_costs_the_held_out_loss_alone(probekit, tmp_path):
    for split, count in (("train", 32), ("val", 8)):
        (tmp_path / "images" / split / "a").mkdir(parents=True)
        for number in range(count):
            drawn = np.random.default_rng([count, number])  # no image is in both splits
            pixels = drawn.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / "a" / f"{number}.png")
    bad = tmp_path / "images" / "val" / "a" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    line = ["pretrain", "--objective", "simmim", "--dataset", f"folder:{tmp_path / 'images'}", *SMALL]
    line += [*COARSE, "--set", "mask_unit=8", "--set", "epochs=1", "--out", str(tmp_path / "out")]
    code, out, err = probekit(*line)
    assert code == 0, err
    assert "nothing said of held-out images" in out and "3.png" in " ".join(out.split()).replace(" ", "")
    said = trained.about(tmp_path / "out" / "model.safetensors")
    assert said["finished"] and said["held_out"] == {} and "3.png" in said["not_held_out"]


def folder_of(root: Path, *splits: str) -> Path:
    """Noise, eight images in each of the folders ``train/a``."""
    for place in splits:
        (root / place).mkdir(parents=True)
        for number in range(8):
            pixels = np.random.default_rng([number, *place.encode()]).integers(0, 255, (16, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / place / f"{number}.png")
    return root


def supervised(probekit, images: Path, out: Path) -> dict:
    line = ["pretrain", "--objective", "supervised", "--dataset", f"folder:{images}", *SMALL, *COARSE]
    code, text, err = probekit(*line, "--set", "epochs=1", "--set", "batch_size=8", "--out", out, "--json")
    assert code == 0, err
    assert weights(out)
    return json.loads(text)


def test_held_out_classes_are_those_of_the_training_by_name(probekit, tmp_path):
    images = folder_of(tmp_path / "flat", "train/a", "train/b", "test")
    said = supervised(probekit, images, tmp_path / "1")
    assert said["finished"] and said["held_out"] == {} and said["not_held_out"] == "they have no labels"
    images = folder_of(tmp_path / "more", "train/a", "train/b", "val/a", "val/b", "val/c")
    said = supervised(probekit, images, tmp_path / "2")
    assert "accuracy" in said["held_out"] and said["held_out_unknown"] == 8
    images = folder_of(tmp_path / "others", "train/a", "train/b", "val/c")
    said = supervised(probekit, images, tmp_path / "3")
    assert said["held_out"] == {} and said["not_held_out"] == "none is of a class that was trained on"


def test_held_out_labels_get_the_numbers_of_the_training():
    learned, held_out = Pictures(8, 0), Pictures(8, 1)
    held_out.classes = ("A", "d", "x", "b")  # capitals apart, as a dataset's own `class_of` has it
    found = comparable(held_out, learned)
    assert found.labels == [0, 3, 1, 0, 3, 1] and found.ids == [f"1-{n}" for n in (0, 1, 3, 4, 5, 7)]
    learned.classes = held_out.classes = None
    learned.labels = [0, 1] * 4
    assert comparable(held_out, learned).labels == [0, 1, 0, 1]


@pytest.mark.parametrize("failure", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_whatever_measuring_meets_the_weights_are_written(probekit, tmp_path, monkeypatch, failure):
    def measured(*arguments):
        raise failure

    monkeypatch.setattr("probekit_train.pretraining.measured", measured)
    code, _, _ = probekit(*command("simmim", tmp_path, "--set", "epochs=1"))
    said = trained.about(tmp_path / "model.safetensors")
    assert said["finished"] and weights(tmp_path)
    if isinstance(failure, RuntimeError):
        assert code == 0 and "RuntimeError: no memory" in said["not_held_out"]


# --- the same weights again


@pytest.mark.parametrize("objective", ["moco", "mae"])
def test_a_training_in_pieces_gives_the_weights_of_one_in_one_piece(probekit, tmp_path, objective):
    epochs = ["--set", "epochs=7"]  # 28 steps: it stops after 10 and 20
    assert probekit(*command(objective, tmp_path / "whole", *epochs))[0] == 0
    assert probekit(*command(objective, tmp_path / "pieces", *epochs, "--stop-after", "0"))[0] == 0
    first = trained.about(tmp_path / "pieces" / "model.safetensors")
    assert not first["finished"] and first["images_seen"] == 160
    code, out, _ = probekit(*command(objective, tmp_path / "pieces", *epochs, "--stop-after", "0"))
    assert code == 0 and "the same command goes on" in out
    assert probekit(*command(objective, tmp_path / "pieces", *epochs, "--workers", "1"))[0] == 0
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "pieces"))
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "pieces")]
    assert_same(states[0]["objective"], states[1]["objective"])  # momentum encoder, heads, batch norms
    rows = [list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("whole", "pieces")]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]] != []


def test_kill_9_and_the_same_command_give_the_undisturbed_weights(probekit, tmp_path):
    epochs = ["--set", "epochs=30", "--save-every", "0"]
    assert probekit(*command("simmim", tmp_path / "whole", *epochs))[0] == 0
    plugin = str(Path(__file__).parent / "tiny_pictures.py")
    line = [
        sys.executable,
        "-m",
        "probekit",
        "--plugin",
        plugin,
        *command("simmim", tmp_path / "killed", *epochs),
    ]
    process = subprocess.Popen(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    state = tmp_path / "killed" / "state.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    done = torch.load(state, weights_only=True)["step"]
    assert 0 < done < 120 and not (tmp_path / "killed" / "model.safetensors").exists()
    assert probekit(*command("simmim", tmp_path / "killed", *epochs))[0] == 0
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_a_finished_training_goes_on_when_its_rounds_are_raised(probekit, tmp_path):
    line = partial(command, "moco", tmp_path / "later")
    long = ["--set", "epochs=7", "--set", "drop_tokens=0.5", "--set", "drop_until=0.5"]
    assert probekit(*line(*long))[0] == 0
    one = weights(tmp_path / "later")
    code, out, _ = probekit(*line(*long, "--set", "rounds=2", "--json"))
    said = json.loads(out)
    assert code == 0 and said["recipe"]["rounds"] == 2 and said["images_seen"] == 2 * 7 * 64
    rates = [float(row["lr"]) for row in csv.DictReader((tmp_path / "later" / "log.csv").open())]
    assert rates[2] < 1e-5 < rates[3] > rates[4] > rates[5]  # steps 28, 30, 40, 50 of twice 28
    code, out, err = probekit(*command("moco", tmp_path / "whole", *long, "--set", "rounds=2"))
    assert code == 0 and "2 rounds of 7 epochs" in out + err
    assert_same(weights(tmp_path / "later"), weights(tmp_path / "whole"))
    assert any(not torch.equal(one[name], value) for name, value in weights(tmp_path / "later").items())
    code, _, err = probekit(*line(*long))
    assert code == 2 and "its 'rounds' is '2', and here '1'" in err


def test_another_seed_gives_other_weights_and_no_epochs_the_untrained_network(probekit, tmp_path):
    for name, more in (("a", ["--seed", "1"]), ("b", ["--seed", "2"]), ("c", ["--seed", "1"])):
        assert probekit(*command("simmim", tmp_path / name, "--set", "epochs=0", *more))[0] == 0
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert_same(a, c)
    assert not torch.equal(a["blocks.0.attn.qkv.weight"], b["blocks.0.attn.qkv.weight"])
    assert trained.about(tmp_path / "a" / "model.safetensors")["images_seen"] == 0


def test_accumulated_parts_make_the_step_of_the_whole_batch(probekit, tmp_path):
    still = ["--set", "drop_path=0", "--set", "epochs=1", "--set", "lr=0.1", "--set", "optimizer=sgd"]
    assert probekit(*command("supervised", tmp_path / "a", *still))[0] == 0
    assert probekit(*command("supervised", tmp_path / "b", *still, "--set", "accumulate=4"))[0] == 0
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    for name in a:  # four steps of plain gradients, which differ by rounding alone
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)


class Recorder(torch.nn.Module):
    """An objective of a third party, which keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[float] = []

    def begin_step(self, progress: float) -> None:
        self.seen.append(progress)

    def losses(self, batch) -> dict[str, torch.Tensor]:
        self.seen += [float(torch.rand(1)), float(batch.views[0].mean())]
        return {"loss": (self.weight - 1).square().sum()}

    forward = losses

    def exported(self) -> dict[str, torch.Tensor]:
        return self.state_dict()

    def no_weight_decay(self) -> set[str]:
        return set()


def test_any_module_of_this_shape_is_trained_with_chance_and_images_of_each_step_its_own(tmp_path):
    recipe = make(
        changed(read("miniature-simmim"), ["epochs=3", "warmup_epochs=0", "batch_size=8", "accumulate=2"])
    )
    found = []
    for name in ("a", "b"):
        recorder = Recorder()
        pictures = Decoded(Pictures(16, 0))
        job = Job(recipe, pictures, recorder, preprocessing_for(16, 1.0), tmp_path / name, "0" * 32)
        state = train(job, processes(recipe, cpu=True))
        assert state.step == 6 and float(recorder.weight) > 0
        found.append(recorder.seen)
    assert found[0] == found[1]
    steps = [found[0][start : start + 5] for start in range(0, 30, 5)]
    assert [step[0] for step in steps] == [number / 6 for number in range(6)]
    drawn = [value for step in steps for value in (step[1], step[3])]
    seen = [value for step in steps for value in (step[2], step[4])]
    assert len(set(drawn)) == len(set(seen)) == 12


def launched(processes: int, line: list[str]) -> dict:
    """What a training says of itself, from so many processes; `accelerate launch --cpu` starts one alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    plugin = str(Path(__file__).parent / "tiny_pictures.py")
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), "-m", "probekit", "--plugin", plugin, *line],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert said["processes"] == processes
    return said


def test_two_processes_train_the_model_of_one(tmp_path):
    said = []
    for count in (1, 2):
        # without batch norms and chance, which are a process's own
        still = ["--set", "drop_path=0", "--set", "epochs=2", "--set", "lr=0.1", "--set", "optimizer=sgd"]
        line = command("supervised", tmp_path / str(count), *still, "--cpu", "--json")
        said.append(launched(count, line))
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    for name in one:  # eight steps of plain gradients, which differ by rounding alone
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)
    assert said[1]["finished"] and said[1]["images_seen"] == 128
    assert said[1]["losses"] == pytest.approx(said[0]["losses"], rel=1e-3)
    # each process took a part of the held-out images: one that takes them all finds the same
    assert said[1]["held_out"] == pytest.approx(said[0]["held_out"], rel=1e-3)
    assert len(list(csv.DictReader((tmp_path / "2" / "log.csv").open()))) == 1


def test_two_processes_contrast_with_the_keys_of_both(tmp_path):
    line = command("moco", tmp_path, "--set", "epochs=2", "--set", "precision=bf16", "--cpu", "--json")
    two = launched(2, [*line, "--local-attention", "1", "--set", "drop_tokens=0"])
    assert two["finished"] and two["images_seen"] == 128
    # at the start InfoNCE is about log 16: the keys of both processes, 8 of each, are told apart
    assert 2.2 < two["losses"]["info_nce"] < 4.0
    assert 2.2 < two["held_out"]["info_nce"] < 4.0


# --- what comes of it


def test_probekit_measures_the_checkpoints(probekit, tmp_path):
    models = []
    for objective in ("simmim", "mae"):
        assert probekit(*command(objective, tmp_path / objective, "--set", "epochs=1", "--half"))[0] == 0
        models += ["--model", f"trained:{objective}@{tmp_path / objective / 'model.safetensors'}"]
    code, _, err = probekit(
        "run", *models, "--metrics", "nmi", "--dataset", "tiny-pictures:8", "--limit", "4",
        "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert code == 0, err
    simmim = trained.build("", weights=tmp_path / "simmim" / "model.safetensors")
    half = trained.build("", weights=tmp_path / "simmim" / "model-fp16.safetensors")
    assert simmim.preprocessing.size == (16, 16)
    image = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(simmim(image), half(image), rtol=2e-2, atol=2e-2)  # fp16 weights
    said = trained.about(tmp_path / "mae" / "model.safetensors")
    assert said["decoder"] == {"width": 16, "depth": 2, "heads": 2}
    assert said["dataset"]["images"] == 64 and len(said["dataset"]["fingerprint"]) == 32
    module = trained.build("mae", weights=tmp_path / "mae" / "model.safetensors").module
    assert module(image).shape == (1, 16, 48)
    assert (tmp_path / "mae" / "loss.svg").read_text().startswith("<?xml")


def test_the_tensors_have_their_published_names(probekit, tmp_path):
    from probekit.models.model import load_model
    from probekit.plugins.catalog import Catalog

    network = ["--model", "vit_tiny_patch16_224", "--set", "img_size=224", "--set", "positions=sincos"]
    line = ["pretrain", "--objective", "moco", "--dataset", "tiny-pictures:16", "--out", tmp_path, *network]
    nothing = ["--set", "epochs=0", "--set", "warmup_epochs=0", "--set", "batch_size=8"]
    assert probekit(*line, *nothing)[0] == 0
    file = tmp_path / "model.safetensors"
    ours = trained.build("moco", weights=file)
    theirs = load_model(f"moco:vit-ti16@{file}", Catalog.load())
    image = torch.randn(1, 3, 224, 224)
    tokens = [model.module.eval().forward_features(image) for model in (ours, theirs)]
    torch.testing.assert_close(*tokens)


# --- parts


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own():
    order = Order(10, seed=0)
    epochs = [[order[10 * epoch + place] for place in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [Order(10, seed=0)[place] for place in range(30)] == [*epochs[0], *epochs[1], *epochs[2]]
    assert [Order(10, seed=1)[place] for place in range(10)] != epochs[0]


def test_processes_and_parts_share_a_batch_without_changing_its_views():
    recipe = make(changed(read("miniature-moco"), ["batch_size=8"]))
    pictures = Decoded(Pictures(16, 0))
    whole = Share(pictures, recipe, 16)[1]
    halves = [Share(pictures, recipe, 16, rank=rank, processes=2)[1] for rank in (0, 1)]
    for view in (0, 1):
        assert torch.equal(whole[0][view], torch.cat([half[0][view] for half in halves]))
    assert torch.equal(whole[1], torch.cat([half[1] for half in halves]))
    assert not torch.equal(whole[0][0], whole[0][1])


def test_table_a1_is_in_its_recipes():
    tuned, hybrid = make(read("park2023-finetune")), make(read("park2023-hybrid"))
    linear = make(read("park2023-linear"))
    assert (tuned.lr, tuned.batch_size, tuned.epochs, tuned.warmup_epochs) == (1.25e-3, 2048, 100, 20)
    assert (tuned.mixup, tuned.cutmix, tuned.label_smoothing, tuned.drop_path) == (0.8, 1.0, 0.1, 0.1)
    assert (tuned.layer_decay, tuned.clip, tuned.schedule) == (0.65, 5.0, "cosine")
    assert tuned.views[0].randaugment == "rand-m9-mstd0.5-inc1"
    assert (linear.optimizer, linear.lr, linear.batch_size, linear.epochs) == ("sgd", 1.0, 1024, 50)
    assert (hybrid.lr, hybrid.batch_size, hybrid.epochs, hybrid.warmup_epochs) == (1e-4, 1024, 100, 10)
    assert (hybrid.schedule, hybrid.weight, hybrid.temperature) == ("multistep", 0.2, 0.2)
    assert all(recipe.weight_decay == 0.05 for recipe in (tuned, linear, hybrid))
    assert all(make(read(name)) for name in names())


def test_the_rate_warms_up_then_falls_along_a_cosine():
    recipe = make(changed(read("miniature-simmim"), ["epochs=10", "warmup_epochs=2", "batch_size=10"]))
    network = torch.nn.Linear(2, 2)
    network.no_weight_decay = set
    optimizer = optimiser(recipe, network)
    rates = scheduler(recipe, optimizer, 100)
    assert steps_of(recipe, 100) == 100
    found = []
    for step in range(100):
        rates.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    assert found[20] == pytest.approx(0.5e-3 * (1 + torch.cos(torch.tensor(torch.pi * 0.2)).item()), rel=1e-4)
    assert found[0] == pytest.approx(1e-3 / 20) and max(found) <= 1e-3 and found[-1] < 1e-6
    assert found[:20] == sorted(found[:20]) and found[20:] == sorted(found[20:], reverse=True)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}  # biases aren't decayed


def test_alarms_speak_of_collapse_chance_and_triviality():
    assert alarms({"feature_std": 0.001, "info_nce": 4.85}, 0.05, 128) == {}  # it has hardly begun
    assert "collapsed" in alarms({"feature_std": 0.001}, 0.5, 128)["collapse"]
    chance = alarms({"feature_std": 0.5, "info_nce": 4.84}, 0.5, 128)
    assert "at chance (log 128 = 4.85)" in chance["chance"] and len(chance) == 1
    assert "floor" in alarms({"feature_std": 0.5, "info_nce": 0.001}, 0.5, 128)["floor"]
    assert alarms({"feature_std": 0.5, "info_nce": 2.0}, 0.5, 128) == {}


def test_every_kind_of_alarm_is_said_once():
    said = []
    shown = Shown(None, None)
    shown.say = said.append
    for step, value in ((10, 4.84), (20, 4.85), (30, 0.001), (40, 0.002)):
        row = {"loss": 1.0, "info_nce": value, "images_per_second": 1.0, "seconds": 1.0}
        shown(Report(step, 100, row, alarms(row, 0.5, 128)))
    assert len(said) == 2 and "at chance" in said[0] and "step 30" in said[1] and "floor" in said[1]


def test_the_card_has_the_alarms_whatever_was_printed(probekit, tmp_path):
    # a batch of two whose views are the whole image: nothing to learn, InfoNCE near log 2 all the time
    blind = ["--set", "epochs=1", "--set", "batch_size=2", "--set", "lr=1e-9", "--set", "temperature=100"]
    code, out, _ = probekit(*command("moco", tmp_path, *blind, "--json", images="64"))
    said = json.loads(out)
    assert code == 0 and said["alarms"] == {"chance": 10}
    assert json.loads((tmp_path / "card.json").read_text())["alarms"] == {"chance": 10}


def test_the_log_counts_exactly(tmp_path):
    write_log(tmp_path, [{"step": 1234567, "images": 128 * 1234567, "loss": 0.123456789}])
    (row,) = csv.DictReader((tmp_path / "log.csv").open())
    assert row == {"step": "1234567", "images": "158024576", "loss": "0.123457"}


def test_views_can_be_sent_to_spawned_workers():
    views = [{"blur": 1.0, "jitter": [0.4, 0.4, 0.2, 0.1], "solarise": 0.2}, {"randaugment": "rand-m9-inc1"}]
    recipe = make({**read("miniature-moco"), "views": views, "batch_size": 4})
    share = Share(Decoded(Pictures(8, 0)), recipe, 16)
    (here, _), (there, _) = share[1], pickle.loads(pickle.dumps(share))[1]
    assert all(map(torch.equal, here, there))


def test_the_curve_falls_with_the_loss():
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert len(sparkline(range(1000), 16)) == 16
    assert sparkline([1, 1], 4) == "▁▁"
