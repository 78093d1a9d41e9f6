from __future__ import annotations

import argparse
import collections
import os
import pickle
import sys
import zipfile
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from probekit.errors import PluginError, WeightsError
from probekit.models.checkpoints import adopt, check_heads, choose, own_state, read
from probekit.models.fetch import sha256
from probekit.models.sincos import sincos_positions
from probekit.models.weightfile import load
from probekit.specs import Layout, Weights


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)


def weights(seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        key: torch.randn(v.shape) if v.is_floating_point() else torch.tensor(5)
        for key, v in Net().state_dict().items()
    }


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("old_format", [False, True])
def test_reads_torch_files_with_what_training_leaves_beside_the_weights(tmp_path, old_format):
    state = weights()
    content = {
        "state_dict": state,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(lr=0.1, layers=[1, 2]),
        "best": np.float64(0.75),
        "count": np.int64(3),
        "curve": np.arange(3.0),
        "epoch": 3,
        "seen": collections.defaultdict(list, {"a": [1]}),
        "none": None,
    }
    path = tmp_path / "c.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    found = read(path, ("state_dict",))
    assert list(found) == list(state)
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_classes_of_the_file_are_never_imported(tmp_path, monkeypatch):
    module = ModuleType("yacs.config")

    class CfgNode(dict):
        def __setstate__(self, state):
            raise AssertionError("ran")

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    node = CfgNode(a=CfgNode(b=1))
    node.attribute = 3
    path = tmp_path / "c.pth"
    torch.save({"model": weights(), "config": node}, path)
    for name in ("yacs", "yacs.config"):
        monkeypatch.delitem(sys.modules, name)
    assert len(read(path, ("model",))) == len(weights())
    assert "yacs.config" not in sys.modules


def test_reads_safetensors_by_name_and_by_content(tmp_path):
    state = weights()
    for name in ("w.safetensors", "w.bin"):
        save_file(state, tmp_path / name)
        assert torch.equal(read(tmp_path / name)["head.bias"], state["head.bias"])
    # as our hint for unsafe files says: the container is gone, and that is fine
    assert set(read(tmp_path / "w.safetensors", ("state_dict",))) == set(state)


class Touch:
    """Runs a command when unpickled."""

    def __init__(self, path, how):
        self.path, self.how = path, how

    def __reduce__(self):
        if self.how == "system":
            return os.system, (f"touch {self.path}",)
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("how", ["system", "eval"])
@pytest.mark.parametrize("form", ["zip", "old", "pickle2", "pickle5"])
def test_a_file_that_runs_code_is_refused_and_does_not_run(tmp_path, how, form):
    path, ran = tmp_path / "evil.pth", tmp_path / "ran"
    content = {"state_dict": weights(), "args": argparse.Namespace(x=Touch(ran, how))}
    if form.startswith("pickle"):
        content["state_dict"] = {}
        path.write_bytes(pickle.dumps(content, protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(WeightsError) as caught:
        load(path)
    assert not ran.exists()
    assert "needs code to load" in caught.value.message and str(path) in caught.value.message
    if form != "pickle5":
        assert ("posix.system" if how == "system" else "eval") in caught.value.message
    assert "safetensors.torch.save_file" in caught.value.hint
    torch.load(path, weights_only=False) if form in ("zip", "old") else pickle.loads(path.read_bytes())
    assert ran.exists(), "the file would have run nothing anyway: the test shows nothing"


class Custom:
    pass


def test_the_first_foreign_class_is_named(tmp_path):
    path = tmp_path / "c.pth"
    Custom.__module__ = "somewhere.trainer"
    sys.modules["somewhere"] = ModuleType("somewhere")
    sys.modules["somewhere.trainer"] = module = ModuleType("somewhere.trainer")
    module.Custom = Custom
    try:
        torch.save({"model": weights(), "trainer": Custom()}, path)
        torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    finally:
        del sys.modules["somewhere"], sys.modules["somewhere.trainer"]
    with pytest.raises(WeightsError, match=r"'somewhere.trainer.Custom'"):
        load(path)
    with pytest.raises(WeightsError, match=r"'torch.nn.modules.linear.Linear'"):
        load(tmp_path / "module.pth")


def test_the_hint_for_files_that_need_code_works(tmp_path, monkeypatch):
    import safetensors.torch

    monkeypatch.chdir(tmp_path)
    module = nn.Linear(2, 2)
    for content in (module, {"state_dict": module.state_dict(), "x": Touch(tmp_path / "ran", "eval")}):
        torch.save(content, "w.pth")
        with pytest.raises(WeightsError) as caught:
            load("w.pth")
        lines = [line.strip() for line in caught.value.hint.splitlines() if line.startswith("    ")]
        exec("\n".join(lines), {"torch": torch, "safetensors": safetensors, "FILE": "w.pth"})
        assert torch.equal(load("weights.safetensors")["weight"], module.weight)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(WeightsError, match="TorchScript"):
        load(tmp_path / "script.pt")


def saved(tmp_path, **how) -> bytes:
    torch.save({"state_dict": {"a": torch.randn(1000)}}, tmp_path / "whole.pth", **how)
    return (tmp_path / "whole.pth").read_bytes()


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_torch_files(tmp_path, share, zipped):
    whole = saved(tmp_path, _use_new_zipfile_serialization=zipped)
    path = tmp_path / "cut.pth"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(WeightsError, match="cut short, damaged"):
        load(path)


def test_truncated_safetensors(tmp_path):
    save_file({"a": torch.randn(1000)}, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    for share in (0.001, 0.01, 0.5, 0.99):
        (tmp_path / "w.safetensors").write_bytes(whole[: max(int(len(whole) * share), 1)])
        with pytest.raises(WeightsError, match="cut short, damaged"):
            load(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><title>Quota exceeded</title>", "web page"),
        (b"\n  <html lang='en'>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS pointer"),
        (b"\x1f\x8b\x08\x00garbage", "packed archive"),
        (b"\x89HDF\r\n\x1a\n0000", "HDF5"),
        (b"\x93NUMPY\x01\x00", "NumPy"),
        (b"hello, world\n" * 50, "cut short, damaged, or not"),
        (bytes(range(256)) * 20, "cut short, damaged, or not"),
        (b"\0" * 4000, "cut short, damaged, or not"),
        (b"PK\x03\x04" + b"\0" * 400, "cut short, damaged, or not"),
    ],
)
def test_other_files_get_one_sentence(tmp_path, content, message):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        load(path)
    assert "\n" not in caught.value.message and str(path) in caught.value.message


def test_a_zip_that_is_no_checkpoint_a_folder_and_nothing(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightsError, match="damaged, or not"):
        load(tmp_path / "w.zip")
    with pytest.raises(WeightsError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(WeightsError, match="no checkpoint"):
        load(tmp_path / "absent.pth")
    torch.save(torch.zeros(3), tmp_path / "t.pth")
    with pytest.raises(WeightsError, match="holds a Tensor"):
        load(tmp_path / "t.pth")


def test_containers_that_are_absent_list_what_there_is(tmp_path):
    torch.save({"model": weights(), "epoch": 1}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="has no 'state_dict': it holds 'model', 'epoch'"):
        read(tmp_path / "w.pth", ("state_dict",))
    with pytest.raises(WeightsError, match="no tensors at its top level, only 'model', 'epoch'"):
        read(tmp_path / "w.pth")


def test_sha256_reports_its_progress(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 3_000_000)
    seen = []
    digest = sha256(tmp_path / "f", lambda done, total: seen.append((done, total)))
    assert seen[-1] == (9_000_000, 9_000_000) and len(seen) == 3
    import hashlib

    assert digest == hashlib.sha256(b"abc" * 3_000_000).hexdigest()


# ----------------------------------------------------------------------------------------- adopting


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def test_every_key_is_used_or_ignored():
    state = weights()
    content = {"model": prefixed(state, "enc.") | {"enc.extra.w": torch.zeros(2), "dec.w": torch.zeros(1)}}
    layout = Layout(name="toy", container=("model",), prefix="enc.", ignore=("enc.extra.*", "dec.*"))
    net = Net()
    accounting = adopt(net, content, layout, source="f.pth")
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert set(accounting.used) == set(prefixed(state, "enc."))
    assert accounting.ignored == ("enc.extra.w", "dec.w")
    assert str(accounting) == f"toy: {len(state)} keys used, 2 ignored"


def test_a_misfit_is_refused_by_names_and_shapes_and_changes_nothing():
    state = weights()
    state["head.weight"] = torch.zeros(9, 4)
    del state["first.bias"]
    state |= {f"more.{i}": torch.zeros(i) for i in range(5)}
    net = Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        adopt(net, state, Layout(hint="use the other one"), source="f.pth")
    message = caught.value.message
    assert "'f.pth' doesn't fit" in message and caught.value.hint == "use the other one"
    assert "1 missing ('first.bias' (4))" in message
    assert "5 unexpected ('more.0' (0), 'more.1' (1), 'more.2' (2), ...)" in message
    assert "1 of another shape ('head.weight' (9, 4) where the model has (2, 4))" in message
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_file_with_more_than_the_model_is_not_called_another_architecture():
    with pytest.raises(WeightsError, match=r"keys 1 unexpected \('more' \(1\)\)") as caught:
        adopt(Net(), weights() | {"more": torch.zeros(1)}, Layout(), source="f")
    assert "save the file without these keys" in caught.value.hint


def test_keys_outside_the_prefix_must_be_ignored_by_name():
    state = prefixed(weights(), "a.") | {"b.w": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"1 unexpected \('b.w'\)"):
        adopt(Net(), state, Layout(prefix="a."), source="f")
    adopt(Net(), state, Layout(prefix="a.", ignore=("b.*",)), source="f")
    with pytest.raises(WeightsError, match=r"no weights whose name starts with 'c.'.*'a.first.weight'"):
        adopt(Net(), state, Layout(prefix="c."), source="f")


def test_renaming_and_converting():
    state = weights()
    old = {key.replace("first", "stem.conv"): value for key, value in state.items()}
    rename = ((r"^stem\.", ""), (r"^conv\.", "first."))
    net = Net()
    adopt(net, old, Layout(rename=rename), source="f")
    assert torch.equal(net.first.weight, state["first.weight"])

    split = dict(state)
    weight = split.pop("first.weight")
    split |= {"first.up": weight[:2], "first.down": weight[2:]}
    net = Net()
    adopt(net, split, Layout(convert=f"{__name__}:join"), source="f")
    assert torch.equal(net.first.weight, weight)
    with pytest.raises(WeightsError, match=r"can't be converted.*KeyError"):
        adopt(Net(), state, Layout(convert=f"{__name__}:join"), source="f")
    with pytest.raises(PluginError, match="can't be imported"):
        adopt(Net(), state, Layout(convert="nowhere.at_all:join"), source="f")
    with pytest.raises(WeightsError, match="several keys for one place"):
        adopt(Net(), state | {"first.bias2": torch.zeros(4)}, Layout(rename=(("bias2", "bias"),)), source="f")


def join(state, module):
    state = dict(state)
    state["first.weight"] = torch.cat([state.pop("first.up"), state.pop("first.down")])
    return state


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_numbers_are_refused(bad):
    state = weights()
    state["head.weight"][1, 2] = bad
    with pytest.raises(WeightsError, match=r"NaN or infinite weights, the first in 'head.weight'"):
        adopt(Net(), state, Layout(), source="f")
    adopt(nn.Sequential(nn.Linear(3, 4)), weights_of_first(state), Layout(ignore=("head.*",)), source="f")


def weights_of_first(state):
    """A NaN in what is ignored does no harm."""
    return {
        "0.weight": state["first.weight"],
        "0.bias": state["first.bias"],
        "head.weight": state["head.weight"],
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype):
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights().items()}
    net = Net()
    adopt(net, state, Layout(), source="f")
    assert net.first.weight.dtype == torch.float32
    assert torch.equal(net.first.weight, state["first.weight"].float())
    assert int(net.norm.num_batches_tracked) == 5


def test_the_layout_in_which_most_keys_land_is_chosen():
    state = weights()
    bare, wrapped = Layout(name="bare"), Layout(name="wrapped", container=("model",), prefix="m.")
    other = Layout(name="other", prefix="x.", options={"which": "b"})
    known = Weights(layout=wrapped, layouts=(bare, other))
    assert choose(Net(), {"model": prefixed(state, "m.")}, known.suiting({})).name == "wrapped"
    assert choose(Net(), state, known.suiting({})).name == "bare"
    assert choose(Net(), prefixed(state, "x."), known.suiting({"which": "b"})).name == "other"
    assert [one.name for one in known.suiting({"which": "a"})] == ["wrapped", "bare"]
    assert choose(Net(), {"nothing": 3}, known.suiting({})).name == "wrapped"


def test_own_states_lose_their_wrappers(tmp_path):
    state = weights()
    torch.save({"model": weights(2), "model_ema": prefixed(state, "module._orig_mod.")}, tmp_path / "w.pth")
    found = own_state(tmp_path / "w.pth")
    assert all(torch.equal(found[key], state[key]) for key in state)
    state["head.bias"][0] = float("nan")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="NaN"):
        own_state(tmp_path / "w.pth")


class Attention(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.num_heads = heads


def test_a_moco_vit_s_needs_twelve_heads():
    fixed = sincos_positions((14, 14), 384)
    check_heads(Attention(12), {"pos_embed": fixed}, "f")
    check_heads(Attention(6), {"pos_embed": torch.randn(1, 197, 384)}, "f")
    check_heads(
        Attention(6), {"pos_embed": sincos_positions((14, 14), 384, rows_first=False)}, "f"
    )  # MAE's order
    with pytest.raises(WeightsError, match="12 heads; this model has 6") as caught:
        check_heads(Attention(6), {"pos_embed": fixed.half()}, "f.pth")
    assert caught.value.hint == "take 'moco:vit-s16@f.pth'"


def test_published_weights_need_a_file_name_and_a_licence():
    with pytest.raises(ValueError, match="filename and a licence"):
        Weights(url="https://example.org/w.pth")
    for name in ("../w.pth", "/w.pth", ".w", "a/b", "a\\b"):
        with pytest.raises(ValueError, match="filename"):
            Weights(url="https://example.org/w", filename=name, licence="MIT")
