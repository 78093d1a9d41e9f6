"""MAE's published layouts rebuilt with random weights, against a reference forward in plain torch."""

from __future__ import annotations

import math
import os

import pytest
import torch
from mae_layout import FILES, SIZES, Catalog, random_state, reference, save, shapes
from probekit_mae.models import build, build_full
from probekit_mae.plugin import probekit_models
from safetensors.torch import save_file

from probekit.errors import DoesNotApply, UsageError, WeightsError
from probekit.metrics.attention_distance import AttentionDistance
from probekit.metrics.fourier import Fourier
from probekit.models.checkpoints import landing
from probekit.models.model import load_model
from probekit.models.sincos import sincos_positions
from probekit.watch import Visitor, Watcher

NEEDS = frozenset({"tokens_in", "tokens_mid", "tokens_out", "attention_full"})


def watched(model, images, more=lambda layer: None):
    """What metrics see: the layers as in `reference`, the output, and the watcher."""
    found = []

    def visit(layer):
        more(layer)
        sites = ("tokens_in", "tokens_mid", "tokens_out")
        tokens = [torch.cat([layer.prefix_tokens(site), getattr(layer, site)], 1) for site in sites]
        found.append((*tokens, layer.attention_full))

    parts = model.declared.parts if model.declared else None
    watcher = Watcher(model.module, images, declared_parts=parts)
    output = watcher.run(images, [Visitor(NEEDS | {"attention", "distances"}, visit)])
    return found, output, watcher


def assert_same(expected, found):
    layers, output = expected
    assert len(found[0]) == len(layers)
    names = ("tokens before", "tokens after attention", "tokens after the MLP", "attention")
    for number, (want, have) in enumerate(zip(layers, found[0], strict=True)):
        for name, a, b in zip(names, want, have, strict=True):
            assert a.shape == b.shape and (a - b).abs().max() < 1e-5, f"{name} of layer {number}"
    assert (output - found[1]).abs().max() < 1e-5
    spread = layers[-1][3][:, :, 1:, 1:].amax(-1).mean() * 196
    assert spread > 2, "the attention is uniform: it would show no difference"


@pytest.fixture(scope="module")
def full():
    return random_state("vit-b16-full", 1)


@pytest.fixture(scope="module")
def full_file(full, tmp_path_factory):
    path = save(tmp_path_factory.mktemp("full") / "mae_pretrain_vit_base_full.pth", full)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def encoder(full):
    """The encoder-only file's tensors."""
    return {key: full[key] for key in shapes("vit-b16")}


@pytest.fixture(scope="module")
def encoder_file(encoder, tmp_path_factory):
    path = save(tmp_path_factory.mktemp("encoder") / "mae_pretrain_vit_base.pth", encoder)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(5))


def test_encoder_and_decoder_give_the_reference_tokens_and_attention(full, full_file, images):
    model = load_model(f"mae:vit-b16-full@{full_file}", Catalog())
    assert len(model.accounting.used) == len(full) and model.accounting.ignored == ()
    found = watched(model, images)
    assert_same(reference(full, images), found)

    rows = found[2].site_rows()
    sites = [("embed", 0.0, "encoder")]
    sites += [(s, d, "encoder") for n in range(1, 13) for s, d in (("mid", n - 0.5), ("out", float(n)))]
    sites += [("embed", 12.0, "decoder")]
    sites += [(s, d, "decoder") for n in range(13, 21) for s, d in (("mid", n - 0.5), ("out", float(n)))]
    assert len(sites) == 42
    assert [(row.site, row.depth, row.part) for row in rows] == sites
    layers = found[2].anatomy.layers
    assert [layer.heads for layer in layers] == [12] * 12 + [16] * 8
    assert {(layer.grid, layer.stride, layer.prefix) for layer in layers} == {((14, 14), (16.0, 16.0), 1)}


def test_of_a_masked_image_the_encoder_sees_some_patches_and_the_decoder_all(full, full_file, images):
    model = load_model(f"mae:vit-b16-full:mask_ratio=0.75:seed=3@{full_file}", Catalog())
    visible = model.module.visible.tolist()
    assert len(visible) == 49 and visible == sorted(set(visible)) and set(visible) <= set(range(196))
    distances, fourier = [], []

    def measure(layer):
        distances.append(AttentionDistance().measure(layer)["attention_distance"])
        try:
            fourier.append(layer.grid)
        except DoesNotApply as error:
            fourier.append(str(error))

    layers, output = expected = reference(full, images, visible)
    found = watched(model, images, measure)
    assert_same(expected, found)
    assert output.shape == (2, 196, 768)

    centres = torch.tensor([[8.0 + 16 * (n // 14), 8.0 + 16 * (n % 14)] for n in visible]).double()
    apart = torch.cdist(centres, centres)
    for number in (0, 11):
        info = found[2].anatomy.layers[number]
        assert info.grid is None and torch.equal(torch.from_numpy(info.positions), centres)
        patches = layers[number][3][:, :, 1:, 1:]
        patches = patches / patches.sum(-1, keepdim=True)
        assert (distances[number] - (patches * apart).sum(-1).mean(-1)).abs().max() < 1e-3
    assert fourier[:12] == [f"the tokens of 'blocks.{n}.attn' form no full grid" for n in range(12)]
    assert fourier[12:] == [(14, 14)] * 8
    assert len(found[2].site_rows()) == 42


def test_frequencies_are_refused_in_a_sentence_where_tokens_are_missing(images):
    model = build_full("vit-b16-full", mask_ratio=0.5, image_size=(64, 64))
    small, said, measured = images[:, :, :64, :64], set(), []

    def visit(layer):
        try:
            measured.append(Fourier().measure(layer)["fourier"])
        except DoesNotApply as error:
            said.add(str(error))

    watcher = Watcher(model.module, small, declared_parts=model.declared.parts)
    watcher.run(small, [Visitor(frozenset({"tokens"}), visit)])
    assert said and all("form no full grid" in text for text in said)
    assert len(measured) == 17 and all(value.isfinite().all() for value in measured)


def test_the_mask_is_the_seeds_and_of_every_image_the_same():
    catalog = Catalog()
    first, again, other = (
        load_model(f"mae:vit-b16-full:mask_ratio=0.6:seed={n}@random", catalog, image_size=(64, 64))
        for n in (1, 1, 2)
    )
    assert len(first.module.visible) == int(16 * 0.4)
    assert torch.equal(first.module.visible, again.module.visible)
    assert not torch.equal(first.module.visible, other.module.visible)
    assert first.weights.sha256 == other.weights.sha256, "the mask is no weight"
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        together = first(images)
        alone = torch.cat([first(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-5)
    for text in ("1", "-0.1", "0.99"):
        with pytest.raises(UsageError, match="a masking ratio can't be"):
            load_model(f"mae:vit-b16-full:mask_ratio={text}@random", catalog, image_size=(64, 64))


def test_the_encoder_alone(encoder, encoder_file, images, tmp_path):
    model = load_model(f"mae:vit-b16@{encoder_file}", Catalog())
    assert_same(reference(encoder, images), watched(model, images))
    assert len(model.accounting.used) == len(encoder) and model.declared is None
    assert model.preprocessing.mean == (0.485, 0.456, 0.406)
    assert (model.preprocessing.interpolation, model.preprocessing.crop_pct) == ("bicubic", 0.875)

    bare = tmp_path / "encoder.safetensors"
    save_file({key: value.contiguous() for key, value in encoder.items()}, bare)
    assert load_model(f"mae@{bare}", Catalog()).weights.sha256 != model.weights.sha256


def test_a_fine_tuned_classifier(encoder, encoder_file, images, tmp_path):
    state = {key: value for key, value in encoder.items() if not key.startswith("norm.")}
    generator = torch.Generator().manual_seed(7)
    state |= {
        key: torch.randn(s, generator=generator)
        for key, s in shapes("vit-b16-ft").items()
        if key not in state
    }
    path = save(tmp_path / "mae_finetuned_vit_base.pth", state)
    model = load_model(f"mae:vit-b16-ft@{path}", Catalog())
    with torch.inference_mode():
        assert torch.allclose(model(images[:1]).double(), reference(state, images[:1])[1], atol=1e-4)
    assert len(model.accounting.used) == len(shapes("vit-b16-ft"))
    with pytest.raises(
        WeightsError, match="is a MAE encoder fine-tuned as a classifier, not a MAE encoder w"
    ) as caught:
        load_model(f"mae:vit-b16@{path}", Catalog())
    assert "'mae:vit-b16-ft@PATH'" in caught.value.hint
    with pytest.raises(
        WeightsError, match="is a MAE encoder without a decoder, not a MAE encoder fine-tuned"
    ):
        load_model(f"mae:vit-b16-ft@{encoder_file}", Catalog())


def test_a_file_of_the_other_kind_is_named(full_file, encoder_file, full, tmp_path):
    with pytest.raises(
        WeightsError,
        match=r"^'.*mae_pretrain_vit_base_full.pth' is a MAE autoencoder with its decoder, not a MAE encoder",
    ) as caught:
        load_model(f"mae:vit-b16@{full_file}", Catalog())
    assert "'mae:vit-b16-full@PATH'" in caught.value.hint
    with pytest.raises(
        WeightsError,
        match=r"^'.*mae_pretrain_vit_base.pth' is a MAE encoder without a decoder, not a MAE auto",
    ) as caught:
        load_model(f"mae:vit-b16-full@{encoder_file}", Catalog())
    assert "'mae:vit-b16@PATH'" in caught.value.hint

    cut = dict(full)
    del cut["decoder_blocks.5.attn.proj.bias"]
    with pytest.raises(WeightsError, match=r"1 missing \('decoder_blocks.5.attn.proj.bias' \(512\)\)"):
        load_model(f"mae:vit-b16-full@{save(tmp_path / 'cut.pth', cut)}", Catalog())
    tiny = {"cls_token": torch.zeros(1, 1, 192), "blocks.0.attn.qkv.weight": torch.zeros(576, 192)}
    with pytest.raises(WeightsError, match="doesn't fit the model as a MAE encoder-only file"):
        load_model(f"mae:vit-b16@{save(tmp_path / 'tiny.pth', tiny)}", Catalog())


def test_a_file_that_runs_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    path = save(tmp_path / "bad.pth", {"cls_token": torch.zeros(1, 1, 768)}, args=Payload())
    with pytest.raises(WeightsError, match=r"needs code to load \('posix.system'\)"):
        load_model(f"mae@{path}", Catalog())
    assert not (tmp_path / "ran").exists()


def test_another_image_size_interpolates_both_position_tables(full_file):
    model = load_model(f"mae:vit-b16-full@{full_file}", Catalog(), image_size=(112, 224))
    module = model.module
    assert module.pos_embed.shape == (1, 99, 768) and module.decoder_pos_embed.shape == (1, 99, 512)
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 112, 224)).shape == (1, 98, 768)
    with pytest.raises(UsageError, match="don't tile 230 x 224"):
        load_model(f"mae:vit-b16-full@{full_file}", Catalog(), image_size=(230, 224))


@pytest.mark.parametrize("variant", ["vit-b16", "vit-b16-full", "vit-b16-ft"])
def test_an_untrained_network_is_the_papers(variant):
    model = load_model(f"mae:{variant}@random", Catalog(), seed=4)
    module = model.module
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == shapes(variant)
    assert {m.eps for m in module.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    # columns first, where MoCo v3 has rows: the same tables with their halves swapped
    moco = sincos_positions((14, 14), 768)
    assert torch.allclose(module.pos_embed, moco.roll(384, -1), atol=1e-6)
    weight = module.blocks[3].attn.qkv.weight.detach()
    assert float(weight.abs().max()) == pytest.approx(math.sqrt(6 / (4 * 768)), rel=1e-3)
    kernel = module.patch_embed.proj.weight.detach()
    assert float(kernel.abs().max()) == pytest.approx(math.sqrt(6 / (768 + 768)), rel=1e-3)
    assert float(module.cls_token.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not module.blocks[0].mlp.fc1.bias.detach().any()
    if variant == "vit-b16-full":
        moco = sincos_positions((14, 14), 512)
        assert torch.allclose(module.decoder_pos_embed, moco.roll(256, -1), atol=1e-6)
        assert float(module.mask_token.detach().std()) == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize("size", ["vit-l16", "vit-h14"])
@pytest.mark.parametrize("kind", ["", "-full", "-visualize", "-ft"])
def test_the_keys_of_the_large_files(size, kind):
    variant = f"{size}{kind}"
    with torch.device("meta"):  # their weights would only take time
        made = build_full(variant).module if kind in ("-full", "-visualize") else build(variant)
    assert {key: tuple(value.shape) for key, value in made.state_dict().items()} == shapes(variant)
    assert made.blocks[0].attn.num_heads == 16 and len(made.blocks) == SIZES[size][1]
    spec = next(spec for spec in probekit_models() if spec.variant == variant)
    file = {key: torch.empty(shape, device="meta") for key, shape in shapes(variant).items()}
    assert landing(made, {"model": file}, spec.weights.layout) == len(file)


@pytest.mark.skipif(not os.environ.get("PROBEKIT_SLOW"), reason="4 GB and a minute; PROBEKIT_SLOW=1 runs it")
@pytest.mark.parametrize("variant", ["vit-l16-full", "vit-h14"])
def test_the_large_files_load(variant, tmp_path):
    path = save(tmp_path / "large.pth", {key: torch.zeros(shape) for key, shape in shapes(variant).items()})
    model = load_model(f"mae:{variant}@{path}", Catalog())
    assert len(model.accounting.used) == len(shapes(variant))


def test_what_the_entries_say():
    specs = {spec.variant: spec for spec in probekit_models()}
    mini = specs.pop("mini")
    assert mini.default and mini.weights.bundled and mini.published_as in specs
    assert set(specs) == {f"{size}{kind}" for size in SIZES for kind in ("", "-full", "-visualize", "-ft")}
    assert not any(spec.default for spec in specs.values())
    folder = {"": "pretrain/mae_pretrain_{}", "-full": "pretrain/mae_pretrain_{}_full"}
    folder |= {"-visualize": "visualize/mae_visualize_{}", "-ft": "finetune/mae_finetuned_{}"}
    for size, (_, depth, heads, _) in SIZES.items():
        for kind, pattern in folder.items():
            spec = specs[f"{size}{kind}"]
            decoder = kind in ("-full", "-visualize")
            file = pattern.format(FILES[size])
            assert spec.weights.url == f"https://dl.fbaipublicfiles.com/mae/{file}.pth"
            assert "CC BY-NC 4.0" in spec.weights.licence and spec.citation
            assert spec.objective == ("supervised" if kind == "-ft" else "MIM")
            assert spec.layers == depth + 8 * decoder
            assert spec.heads == (None if decoder and heads != 16 else heads)
            assert set(spec.options) == ({"mask_ratio", "seed"} if decoder else set())
    filenames = {spec.weights.filename for spec in specs.values()}
    assert len(filenames) == len(specs)
