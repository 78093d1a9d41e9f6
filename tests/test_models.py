from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from probekit.errors import PluginError, UsageError, WeightsError
from probekit.models import huggingface
from probekit.models import timm as timm_models
from probekit.models.checkpoints import Accounting
from probekit.models.model import Model, load_entry, load_model, state_sha256, wrap
from probekit.models.sincos import sincos_positions
from probekit.plugins.catalog import Catalog
from probekit.specs import Layout, ModelSpec, Preprocessing, Weights

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Net(nn.Module):
    def __init__(self, size=(8, 8)):
        super().__init__()
        self.size = size
        self.proj = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.proj(x))


def build(variant, *, flavour="plain", image_size=None):
    net = Net(image_size or (8, 8))
    if variant == "broken":
        raise ZeroDivisionError("as asked")
    if variant == "leaves":
        raise SystemExit(2)
    if variant == "double":
        return Model(net.double(), preprocessing=Preprocessing(size=(32, 32)))
    return "nothing" if variant == "wrong" else net


PREFIXED = Layout(name="toy checkpoint", prefix="a.", ignore=("b.*",), options={"flavour": "plain"})
OTHER = Layout(name="other toy", prefix="b.", ignore=("a.*",), options={"flavour": "odd"})


def spec(variant="x", **more):
    given = {"weights": Weights(layout=PREFIXED, layouts=(OTHER,)), **more}
    return ModelSpec(name="toy", variant=variant, summary="a toy", target=f"{__name__}:build", **given)


class Fake:
    """The two calls that `load_model` makes."""

    def __init__(self, spec, options=None, weights=None):
        ref = SimpleNamespace(weights=weights)
        self.entry = SimpleNamespace(
            spec=spec, pack="toys", version="1.2", ref=ref, options=options or {}, variant=spec.variant
        )

    def model(self, ref):
        return self.entry

    def resolve_target(self, entry):
        return build


def toy(tmp_path, prefix="a."):
    state = {f"{prefix}{key}": torch.randn(value.shape) for key, value in Net().state_dict().items()}
    path = tmp_path / "toy.safetensors"
    save_file(state, path)
    return state, path


# ------------------------------------------------------------------------------------- from a catalog


def test_random_weights_come_from_the_seed_and_nothing_else():
    before = torch.random.get_rng_state()
    one, two, three = (load_model("toy", Fake(spec(), weights="random"), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.weights == two.weights and one.weights.sha256 != three.weights.sha256
    assert (one.weights.kind, one.weights.source) == ("random", "seed 3")
    assert one.weights.sha256 == state_sha256(two.module)
    assert not one.module.training and one.spec.name == "toy"


def test_a_file_is_loaded_with_its_identity_and_accounting(tmp_path):
    state, path = toy(tmp_path)
    model = load_model("toy", Fake(spec(), {"flavour": "plain"}, str(path)))
    assert torch.equal(model.module.proj.weight, state["a.proj.weight"])
    assert model.accounting == Accounting(("a.proj.bias", "a.proj.weight"), (), "toy checkpoint")
    import hashlib

    assert model.weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (model.weights.kind, model.weights.source) == ("file", str(path))
    assert model.weights.note == "toy checkpoint: 2 keys used, 0 ignored"


def test_a_file_for_other_options_is_named(tmp_path):
    _, path = toy(tmp_path, "b.")
    with pytest.raises(WeightsError, match="is a other toy for 'toy:x:flavour=odd', not for") as caught:
        load_model("toy", Fake(spec(), {"flavour": "plain"}, str(path)))
    assert caught.value.hint == f"take 'toy:x:flavour=odd@{path}'"
    assert load_model("toy", Fake(spec(), {"flavour": "odd"}, str(path))).accounting.layout == "other toy"


def test_published_weights_go_through_the_downloader(tmp_path, monkeypatch):
    _, path = toy(tmp_path)
    (tmp_path / "weights").mkdir()
    path.rename(tmp_path / "weights" / "toy-1.safetensors")
    monkeypatch.setenv("PROBEKIT_CACHE", str(tmp_path))
    published = Weights(
        url="https://example.org/t", filename="toy-1.safetensors", licence="MIT", layout=PREFIXED
    )
    model = load_model("toy", Fake(spec(weights=published)))
    assert (model.weights.kind, model.weights.source) == ("file", "https://example.org/t")
    with pytest.raises(WeightsError, match="no weights are published for 'toy:x'") as caught:
        load_entry(spec(), build, variant="x")
    assert "toy:x@random" in caught.value.hint


def test_without_a_layout_the_keys_must_be_the_models_own(tmp_path):
    state, path = toy(tmp_path, "")
    model = load_entry(spec(weights=None), build, weights=str(path))
    assert torch.equal(model.module.proj.bias, state["proj.bias"])
    with pytest.raises(WeightsError, match="there is no file"):
        load_entry(spec(), build, weights=str(tmp_path / "absent.pth"))


def test_builders_that_fail_are_named_with_their_pack():
    with pytest.raises(PluginError, match=r"of pack 'toys 1.2' failed to build: ZeroDivisionError: as asked"):
        load_model("toy", Fake(spec("broken"), weights="random"))
    with pytest.raises(PluginError, match=r"pack 'toys 1.2' returned a 'str'"):
        load_model("toy", Fake(spec("wrong"), weights="random"))

    with pytest.raises(PluginError, match=r"of pack 'toys 1.2' failed to build: SystemExit: 2"):
        load_model("toy", Fake(spec("leaves"), weights="random"))


@pytest.mark.parametrize(
    ("part", "value", "needed"),
    [
        ("preprocessing", "imagenet", "a probekit.Preprocessing"),
        ("forward", 3, "a function"),
        ("declared", {"decoder": "decoder"}, "a probekit.Declared"),
        ("weights", "w.pth", "a probekit.WeightsIdentity"),
        ("module", "net", "an nn.Module"),
    ],
)
def test_parts_of_a_model_that_are_something_else_are_named(part, value, needed):
    def build(variant, image_size=None):
        return replace(Model(Net()), **{part: value})

    given = type(value).__name__
    with pytest.raises(PluginError, match=f"model 'toy' of pack 'toys' has a '{given}' as its '{part}'") as e:
        load_entry(spec(), build, weights="random", name="toy", pack="toys")
    assert needed in e.value.hint


def test_a_forward_pass_that_fails_is_named_with_its_pack():
    def fails(error):
        def forward(module, images):
            raise error

        return Model(Net(), forward=forward, name="toy", pack="toys 1.2")

    said = r"the forward pass of 'toy' of pack 'toys 1.2' raised "
    for error in (ZeroDivisionError("as asked"), SystemExit(2)):
        with pytest.raises(PluginError, match=said + type(error).__name__):
            fails(error)(None)
    for error in (MemoryError(), torch.OutOfMemoryError("of the device"), WeightsError("ours")):
        with pytest.raises(type(error)):
            fails(error)(None)


def test_float32_and_the_models_own_preprocessing():
    model = load_model("toy", Fake(spec("double"), weights="random"))
    assert model.module.proj.weight.dtype == torch.float32
    assert model.preprocessing.size == (32, 32)
    model = load_model("toy", Fake(spec("double"), weights="random"), image_size=(64, 96))
    assert model.preprocessing.size == (64, 96) and model.module.size == (64, 96)
    own = Preprocessing(mean=(0.5, 0.5, 0.5), size=(8, 8))
    assert load_model("toy", Fake(spec(preprocessing=own), weights="random")).preprocessing == own


def test_a_module_from_python_is_taken_as_it_is():
    net = Net().train()
    model = wrap(net)
    assert model.module is net and net.training and model.preprocessing is None
    assert (model.weights.kind, model.weights.source) == ("module", "Net")
    digest = state_sha256(net)
    with torch.no_grad():
        net.proj.weight[0, 0] += 1e-3
    assert state_sha256(net) != digest
    assert wrap(net, Preprocessing(size=(8, 8))).preprocessing.size == (8, 8)
    with pytest.raises(UsageError, match="not a 'str'"):
        wrap("net")


def test_state_identity_sees_names_types_and_shapes():
    digests = set()
    for shape, dtype, name in (
        ((2, 3), torch.float32, "w"),
        ((3, 2), torch.float32, "w"),
        ((6,), torch.float32, "v"),
    ):
        module = nn.Module()
        module.register_buffer(name, torch.zeros(shape, dtype=dtype))
        digests.add(state_sha256(module))
    module.register_buffer("v", torch.zeros(6, dtype=torch.int32))
    assert len(digests | {state_sha256(module)}) == 4
    module.register_buffer("scalar", torch.zeros((), dtype=torch.bfloat16))
    state_sha256(module)


OWN = """
import torch
from probekit.models.model import Model
from probekit.specs import Preprocessing

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(2, 2)

def build():
    return Net()

def sized(image_size=(1, 1)):
    net = Net()
    net.size = image_size
    return Model(net, forward=lambda module, images: "mine", preprocessing=Preprocessing(size=(5, 5)))

def broken():
    raise KeyError("gone")
"""


def test_callables_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(OWN)
    (tmp_path / "own_pkg").mkdir()
    (tmp_path / "own_pkg" / "__init__.py").write_text("")
    (tmp_path / "own_pkg" / "nets.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    catalog = Catalog.load(enabled=False)
    file = f"{tmp_path}/own_models.py"
    model = load_model(f"{file}:build", catalog)
    assert model.weights.kind == "module" and model.preprocessing == Preprocessing()
    assert load_model(f"{file}:build", catalog).weights == model.weights, "random, but not from run to run"
    assert load_model("own_pkg.nets:build@random", catalog, seed=1).weights.kind == "random"
    sized = load_model(f"{file}:sized", catalog, image_size=(3, 4))
    assert sized.module.size == (3, 4) and sized.preprocessing.size == (3, 4) and sized(None) == "mine"
    assert load_model(f"{file}:build", catalog, image_size=(3, 4)).preprocessing.size == (3, 4)
    with pytest.raises(PluginError, match="failed to build: KeyError"):
        load_model(f"{file}:broken", catalog)
    save_file({"proj.weight": torch.ones(2, 2), "proj.bias": torch.zeros(2)}, tmp_path / "w.safetensors")
    loaded = load_model(f"{file}:build@{tmp_path}/w.safetensors", catalog)
    assert loaded.weights.kind == "file" and bool((loaded.module.proj.weight == 1).all())


# ------------------------------------------------------------------------------------------------ timm


@pytest.fixture(scope="module")
def tiny():
    return timm.create_model("vit_tiny_patch16_224", num_classes=1000, depth=12)


def test_timm_by_name_with_its_own_preprocessing_and_head():
    model = load_model("timm:vit_tiny_patch16_224@random", Catalog.load(enabled=False))
    assert model.preprocessing == Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)
    assert model.module.head.out_features == 1000
    deit = load_model("timm:deit_tiny_patch16_224@random", Catalog.load(enabled=False))
    assert (deit.preprocessing.mean, deit.preprocessing.std) == IMAGENET
    with torch.inference_mode():
        assert deit(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_timm_names_that_do_not_exist():
    with pytest.raises(UsageError, match="timm has no model 'vit_tin_patch16_224'") as caught:
        timm_models.build("vit_tin_patch16_224", weights="random")
    assert "'timm:vit_tiny_patch16_224'" in caught.value.hint
    with pytest.raises(UsageError, match="has no weights 'augreg_in21'") as caught:
        timm_models.build("vit_tiny_patch16_224.augreg_in21", weights="published")
    assert "did you mean 'timm:vit_tiny_patch16_224.augreg_in21k'" in caught.value.hint
    with pytest.raises(WeightsError, match="timm has no weights for 'vit_base_patch16_plus_240'"):
        timm_models.build("vit_base_patch16_plus_240", weights="published")


def test_timm_at_another_size(tiny, tmp_path):
    model = timm_models.build("vit_tiny_patch16_224", weights="random", image_size=(224, 448))
    assert model.module.pos_embed.shape == (1, 1 + 14 * 28, 192)
    with pytest.raises(UsageError, match="16 x 16 px, which don't tile 230 x 224") as caught:
        timm_models.build("vit_tiny_patch16_224", weights="random", image_size=(230, 224))
    assert "224x224" in caught.value.hint
    timm_models.build("pvt_v2_b0", weights="random", image_size=(256, 256))  # takes no img_size, and any size


def test_a_checkpoint_of_ones_own_into_timm(tiny, tmp_path):
    state = tiny.state_dict()
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    model = load_model(f"timm:vit_tiny_patch16_224@{path}", Catalog.load(enabled=False))
    assert all(torch.equal(value, state[key]) for key, value in model.module.state_dict().items())
    assert model.weights.kind == "file" and "state_dict" not in model.module.pretrained_cfg
    headless = {f"module.{key}": value for key, value in state.items() if not key.startswith("head.")}
    torch.save({"model": headless, "epoch": 3}, tmp_path / "w.pth")
    model = timm_models.build("vit_tiny_patch16_224", weights=tmp_path / "w.pth")
    assert isinstance(model.module.head, nn.Identity)
    headless |= {"module.head.weight": torch.zeros(10, 192), "module.head.bias": torch.zeros(10)}
    torch.save(headless, tmp_path / "w.pth")
    model = timm_models.build("vit_tiny_patch16_224", weights=tmp_path / "w.pth", image_size=(224, 448))
    assert model.module.head.out_features == 10 and model.module.pos_embed.shape[1] == 393


def test_a_checkpoint_that_does_not_fit_timm_is_refused(tiny, tmp_path):
    state = tiny.state_dict()
    path = tmp_path / "w.pth"

    def refused(changed, variant="vit_tiny_patch16_224"):
        torch.save(changed, path)
        with pytest.raises(WeightsError) as caught:
            timm_models.build(variant, weights=path)
        assert "\n" not in caught.value.message
        hints.append(caught.value.hint)
        return caught.value.message

    hints = []
    gone = {key: value for key, value in state.items() if key != "blocks.5.attn.proj.bias"}
    assert "keys 1 missing ('blocks.5.attn.proj.bias')" in refused(gone)
    assert "keys 1 unexpected ('blocks.12.x')" in refused(state | {"blocks.12.x": torch.zeros(1)})
    assert "another architecture" in hints[0] and "without these keys" in hints[1]
    assert "of another shape ('cls_token' [1, 1, 192] where the model has [1, 1, 384]" in refused(
        state, "vit_small_patch16_224"
    )
    assert "NaN" in refused(state | {"norm.bias": torch.full((192,), float("nan"))})
    pruned = {key: value for key, value in state.items() if not key.startswith("blocks.11.")}
    message = refused({"teacher": {f"backbone.{key}": value for key, value in pruned.items()}})
    assert "w.pth' ('teacher', prefix 'backbone.') doesn't fit 'timm:vit_tiny_patch16_224'" in message
    assert "keys 12 missing ('blocks.11.norm1.weight'" in message
    message = refused({"weights": {"layer1.conv.weight": torch.zeros(3)}, "epoch": 3})
    assert "none of its keys is the model's; it holds 'weights', 'epoch'" in message
    assert "has patches of 16 x 16 px and 'timm:vit_small_patch8_224' of 8 x 8" in refused(
        {key: torch.zeros(384, 3, 16, 16) if "proj.weight" in key else value for key, value in state.items()},
        "vit_small_patch8_224",
    )


def test_a_smaller_window_keeps_the_offsets_that_are_left():
    from timm.models.swin_transformer import SwinTransformer

    def network(size):
        return SwinTransformer(
            img_size=size, window_size=6, embed_dim=8, depths=(1, 2), num_heads=(1, 2), num_classes=0
        )

    big = network(48).state_dict()  # 12 x 12 tokens, then 6 x 6
    small = network((24, 48))  # 6 x 12, then 3 x 6
    fitted = timm_models.fit_grid(big, small)
    key = "layers.1.blocks.1.attn.relative_position_bias_table"
    assert fitted[key].shape == (5 * 11, 2)
    assert torch.equal(fitted[key], big[key].reshape(11, 11, 2)[3:8].flatten(0, 1))
    small.load_state_dict(fitted)


def test_a_moco_vit_s_is_refused_by_timms_six_heads(tmp_path):
    """Its linear-probe file has timm's very keys and shapes, and would run."""
    state = timm.create_model("vit_small_patch16_224").state_dict()
    state["pos_embed"] = sincos_positions((14, 14), 384)
    path = tmp_path / "linear-vit-s-300ep.pth.tar"
    torch.save({"arch": "vit_small", "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    with pytest.raises(WeightsError, match="12 heads; this model has 6"):
        load_model(f"timm:vit_small_patch16_224@{path}", Catalog.load(enabled=False))
    (tmp_path / "six.py").write_text(
        "import timm\ndef build():\n    return timm.create_model('vit_small_patch16_224')\n"
    )
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "bare.safetensors")
    with pytest.raises(WeightsError, match="12 heads; this model has 6"):
        load_model(f"{tmp_path}/six.py:build@{tmp_path}/bare.safetensors", Catalog.load(enabled=False))


def test_offline_is_one_sentence(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"weights of 'vit_tiny_patch16_224'.*can't be reached") as caught:
        timm_models.build("vit_tiny_patch16_224", weights="published")
    assert "timm:vit_tiny_patch16_224@PATH" in caught.value.hint and "\n" not in caught.value.message
    with pytest.raises(WeightsError, match=r"can't fetch 'nobody/nothing-here'.*can't be reached") as caught:
        huggingface.build("nobody/nothing-here", weights="published")
    assert "'hf:./FOLDER'" in caught.value.hint and "\n" not in caught.value.message


def test_a_relative_table_is_resampled_like_timms_where_both_axes_grow():
    from timm.layers import resize_rel_pos_bias_table

    table = torch.randn(732, 12)
    assert torch.equal(timm_models.resample_table(table, (14, 14), 3), table)
    ours = timm_models.resample_table(table, (24, 24), 3)
    with pytest.warns(UserWarning):
        theirs = resize_rel_pos_bias_table(table, (24, 24), (47 * 47 + 3, 12))
    assert torch.allclose(ours, theirs, atol=1e-3)
    small = timm_models.resample_table(table, (7, 7), 3)
    middle = table[:729].reshape(27, 27, 12)[7:20, 7:20].reshape(169, 12)
    assert torch.equal(small, torch.cat([middle, table[729:]]))


def test_sine_cosine_positions():
    table = sincos_positions((2, 3), 8)
    assert table.shape == (1, 7, 8) and not table[0, 0].any()
    token = table[0, 1 + 1 * 3 + 2]  # row 1, column 2
    one, two = torch.tensor([1.0, 0.01]), torch.tensor([2.0, 0.02])
    assert torch.allclose(token, torch.cat([one.sin(), one.cos(), two.sin(), two.cos()]))
    swapped = sincos_positions((2, 3), 8, rows_first=False)
    assert torch.equal(swapped, torch.cat([table[..., 4:], table[..., :4]], dim=-1))


# ---------------------------------------------------------------------------------------- Hugging Face

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder as `save_pretrained` writes it, with a classifier around the encoder."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf") / "vit"
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**TINY)).eval()
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(folder)
    return folder, model


def test_a_folder_of_transformers(vit):
    folder, original = vit
    model = load_model(f"hf:{folder}", Catalog.load(enabled=False))
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        ours = model(images).last_hidden_state
        theirs = original.vit(images).last_hidden_state
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert model.preprocessing.mean == (0.1, 0.2, 0.3)
    assert (model.preprocessing.crop_mode, model.preprocessing.size) == ("squash", (32, 32))
    assert model.preprocessing.interpolation == "bilinear"
    assert model.module.config._attn_implementation == "sdpa"
    assert (model.weights.kind, model.weights.source) == ("file", str(folder))


def test_transformers_with_random_and_own_weights_and_sizes(vit, tmp_path):
    folder, original = vit
    one, two = (load_model(f"hf:{folder}@random", Catalog.load(enabled=False), seed=seed) for seed in (1, 2))
    assert one.weights.kind == "random" and one.weights.sha256 != two.weights.sha256
    file = folder / "model.safetensors"
    own = load_model(f"hf:{folder}@{file}", Catalog.load(enabled=False), image_size=(32, 64))
    key = "layernorm.weight"
    assert torch.equal(own.module.state_dict()[key], original.vit.state_dict()[key])
    assert own.weights.kind == "file" and own.weights.source == str(file)
    assert own(torch.zeros(1, 3, 32, 64)).last_hidden_state.shape == (1, 33, 32)
    state = {key: value for key, value in original.state_dict().items() if "layernorm_before" not in key}
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(WeightsError, match="doesn't fit the model of its config: keys 4 missing"):
        huggingface.build(str(folder), weights=tmp_path / "cut.pth")
    torch.save(original.state_dict() | {"strange": torch.zeros(1)}, tmp_path / "cut.pth")
    with pytest.raises(WeightsError, match=r"1 unexpected \(strange\)"):
        huggingface.build(str(folder), weights=tmp_path / "cut.pth")


def test_mae_keeps_its_tokens_in_the_images_order(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.ViTMAEConfig(**TINY).save_pretrained(tmp_path / "mae")
    model = huggingface.build(str(tmp_path / "mae"), weights="random")
    model.module.eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        tokens = model(images).last_hidden_state
        assert tokens.shape == (2, 17, 32), "some tokens were masked"
        assert torch.equal(tokens, model(images).last_hidden_state), "the order is random"
        moved = images.clone()
        moved[:, :, 8:16, 24:32] += 1  # patch (1, 3)
        caught = []
        hook = model.module.embeddings.register_forward_hook(lambda m, i, out: caught.append(out[0]))
        model(images), model(moved)
        hook.remove()
    changed = (caught[0] != caught[1]).any(-1).any(0).nonzero().flatten().tolist()
    assert changed == [1 + 1 * 4 + 3]


def test_a_processor_that_crops(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.Dinov2Config(**TINY).save_pretrained(tmp_path / "dino")
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, resample=3
    )
    processor.save_pretrained(tmp_path / "dino")
    found = huggingface.build(str(tmp_path / "dino"), weights="random").preprocessing
    assert (found.crop_mode, found.crop_pct, found.interpolation) == ("center", 0.8, "bicubic")


def test_what_is_no_vision_model_or_no_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(UsageError, match="no vision model but a 'bert'"):
        huggingface.build(str(tmp_path / "bert"), weights="random")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="isn't a model that transformers can load"):
        huggingface.build(str(tmp_path / "empty"), weights="random")
    with pytest.raises(WeightsError, match="there is no folder"):
        huggingface.build("./absent", weights="random")
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "config.json").write_text(
        '{"model_type": "odd", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}'
    )
    (remote / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(WeightsError):
        huggingface.build(str(remote), weights="random")
    assert not Path(tmp_path / "ran").exists()


def test_of_a_model_of_images_and_text_the_vision_tower_is_taken(tmp_path):
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text |= {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    images = torch.randn(2, 3, 32, 32)
    for name in ("CLIP", "Siglip"):
        folder = tmp_path / name
        config = getattr(transformers, f"{name}Config")(vision_config=TINY, text_config=text)
        both = getattr(transformers, f"{name}Model")(config).eval()
        both.save_pretrained(folder)
        for weights in ("published", folder / "model.safetensors"):
            model = huggingface.build(str(folder), weights=weights)
            model.module.eval()
            with torch.inference_mode():
                expected = both.vision_model(images).last_hidden_state
                torch.testing.assert_close(model(images).last_hidden_state, expected, rtol=0, atol=1e-6)
        random = huggingface.build(str(folder), weights="random")
        assert type(random.module).__name__ == f"{name}VisionModel"
        assert random.preprocessing.size == (32, 32)
    state = {key: value for key, value in both.state_dict().items() if "layer_norm1" not in key}
    torch.save(state | {"strange": torch.zeros(1)}, tmp_path / "cut.pth")
    with pytest.raises(WeightsError, match="doesn't fit the model of its config: keys 4 missing"):
        huggingface.build(str(folder), weights=tmp_path / "cut.pth")


@pytest.mark.parametrize(
    ("config", "options", "text"),
    [
        ("BlipConfig", {}, "is a 'blip', whose vision tower transformers can't build alone"),
        ("VideoMAEConfig", TINY | {"num_frames": 4}, "is a 'VideoMAEModel', which takes videos, no images"),
        (
            "Siglip2VisionConfig",
            {key: value for key, value in TINY.items() if key != "image_size"},
            "needs 'pixel_attention_mask' beside the images",
        ),
    ],
)
def test_what_takes_more_than_images_is_refused(config, options, text, tmp_path):
    transformers = pytest.importorskip("transformers")
    getattr(transformers, config)(**options).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=text):
        huggingface.build(str(tmp_path), weights="random")


def test_without_transformers_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PluginError) as caught:
        huggingface.build("facebook/vit-mae-base", weights="random")
    assert caught.value.hint == '`pip install "vit-probekit[hf]"`'
