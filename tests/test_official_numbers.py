"""Files in the published layouts: the numbers are those of the paper's published notebooks, to 1e-4.

Each pack's tests write its layout and hold a forward pass in plain torch, float64. Here the notebooks'
formulas (cl-vs-mim, self_attention_analysis.ipynb and representation_analysis.ipynb) are applied to that
pass, and compared with `probekit.probe` of the file. Swin has no notebook: its windows' formulas are the
definitions, over the places that tokens have in the image.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch

import probekit
from probekit.models.model import load_model
from probekit.plugins.catalog import Catalog

PLUGINS = Path(__file__).parent.parent / "plugins"
COMPAT = ":compat=cl-vs-mim"
CLOSE = {"rtol": 1e-4, "atol": 1e-7}
MEAN = 0.5


class Expected(NamedTuple):
    """maps: (B, H, T, T) of each layer, prefix tokens first
    strides: px between tokens, of each layer
    sites: (site, depth, (B, T, C)); of packs whose reference gives no tokens between, those are missing
    """

    reference: str
    prefix: int
    maps: list
    strides: list
    sites: list


def pack(name: str, file: str) -> ModuleType:
    """The module with a pack's layout and reference; skips where the pack isn't installed."""
    pytest.importorskip(f"probekit_{name}")
    path = PLUGINS / name / "tests" / file
    if not path.is_file():
        pytest.skip(f"the tests of '{name}' are not here")
    spec = importlib.util.spec_from_file_location(f"official_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def telling(state: dict, factor: float) -> dict:
    """Weights whose numbers say something: attention that is peaked, and no channel without a mean.

    factor: how many times longer queries and keys get, in every block
    A channel whose tokens' sum is by chance 1e-5 has a logarithm of noise at frequency 0, in any float32.
    """
    found = dict(state)
    for key, value in state.items():
        if key.endswith(("embed.proj.bias", "conv.bias", "decoder_embed.bias")):
            mean = MEAN / 5 if key.startswith("pools.") else MEAN  # what pooling gives is smaller, too
            found[key] = value + torch.where(value < 0, -mean, mean)
        if ".attn.qkv." in key:
            rows = torch.full((len(value),), factor)
            rows[2 * len(value) // 3 :] = 1
            found[key] = value * rows.reshape(-1, *[1] * (value.dim() - 1))
    return found


def still(state: dict, *blocks: str) -> dict:
    """Of a network of which these blocks (all) add nothing: their tokens after are those before."""
    ends = tuple(f"{layer}.{kind}" for layer in ("attn.proj", "mlp.fc2") for kind in ("weight", "bias"))
    return {
        key: torch.zeros_like(value) if key.endswith(ends) and key.startswith(blocks or "") else value
        for key, value in state.items()
    }


def between_and_after(layers: list) -> list:
    """Sites of (after attention, after the MLP, ...) of each layer."""
    sites = []
    for number, (mid, out, *_) in enumerate(layers, 1):
        sites += [("mid", number - 0.5, mid), ("out", float(number), out)]
    return sites


def of_stages(tokens_of, state: dict, block: str, depths: tuple[int, ...]) -> list:
    """Sites after each block, and before each stage; `tokens_of(state)`: tokens after each block."""
    sites, before = [], 0
    after = tokens_of(state)
    for stage, depth in enumerate(depths):
        sites.append(("embed", float(before), tokens_of(still(state, block.format(stage)))[before]))
        sites += [("out", float(n + 1), after[n]) for n in range(before, before + depth)]
        before += depth
    return sites


# ------------------------------------------------------------------ the published layouts


def moco(variant, images, path, monkeypatch):
    its = pack("moco", "moco_layout.py")
    base = telling(its.encoder(variant, 1), 1.5)
    torch.save(its.checkpoint(base, base | {"norm.bias": base["norm.bias"] + 1}), path)
    layers = its.reference(variant, base, images)
    embed = its.reference(variant, still(base), images)[0][1]
    sites = [("embed", 0.0, embed), *between_and_after(layers)]
    return Expected(f"moco:{variant}", 1, [layer[2] for layer in layers], [16] * 12, sites)


def simmim(variant, images, path, monkeypatch):
    its = pack("simmim", "test_simmim.py")
    state = telling(its.encoder(1), 1.5)
    with monkeypatch.context() as patch:
        torch.save(its.checkpoint(state, patch), path)
    layers, _ = its.reference(state, images)
    embed = its.reference(still(state), images)[0][0][1]
    sites = [("embed", 0.0, embed), *between_and_after(layers)]
    return Expected(f"simmim:{variant}", 1, [layer[2] for layer in layers], [16] * 12, sites)


def mae(variant, images, path, monkeypatch):
    its = pack("mae", "mae_layout.py")
    state = telling(its.random_state(variant, 1), 1.5)
    its.save(path, state)
    layers, _ = its.reference(state, images)
    sites = [("embed", 0.0, layers[0][0]), *between_and_after([layer[1:] for layer in layers])]
    sites.insert(25, ("embed", 12.0, layers[12][0]))
    return Expected(f"mae:{variant}", 1, [layer[3] for layer in layers], [16] * 20, sites)


def dino(variant, images, path, monkeypatch):
    its = pack("dino", "test_dino.py")
    state = telling(its.weights(1, width=384, patch=16, tokens=197), 2)
    torch.save(state, path)
    tokens, maps = its.reference(state, images, heads=6)
    first = its.reference(still(state), images, heads=6)[0][0]
    sites = [("embed", 0.0, first)] + [("out", float(n), x) for n, x in enumerate(tokens, 1)]
    return Expected(f"dino:{variant}", 1, maps, [16] * 12, sites)


def pit(variant, images, path, monkeypatch):
    its = pack("pit", "test_pit.py")
    # Not sharper: float32 scores of twelve layers then differ by more than the tolerance.
    state = telling(its.weights(7, variant), 2)
    torch.save(state, path)
    maps = its.reference(state, images, variant)[1]
    sites = of_stages(
        lambda state: its.reference(state, images, variant)[0], state, "transformers.{}.", (2, 6, 4)
    )
    return Expected(f"pit:{variant}", 1, maps, [8] * 2 + [16] * 6 + [32] * 4, sites)


# ------------------------------------------------------------------ the notebooks' formulas


def patch_attention(a: np.ndarray, prefix: int, eps: float) -> np.ndarray:
    a = a[:, :, prefix:, prefix:] + eps
    return a / a.sum(-1, keepdims=True)


def distance(a: np.ndarray, prefix: int, stride: float) -> np.ndarray:
    """(H,) px: mean over queries, then images."""
    a = patch_attention(a, prefix, 1e-32)
    side = round(a.shape[-1] ** 0.5)
    assert side**2 == a.shape[-1]
    place = np.stack(np.divmod(np.arange(side**2), side), 1)
    apart = stride * np.linalg.norm(place[:, None] - place[None], axis=-1)
    return (a * apart).sum(-1).mean(-1).mean(0)


def nmi(a: np.ndarray, prefix: int) -> np.ndarray:
    """(H,): of each image and head, then the mean over images."""
    a = patch_attention(a, prefix, 1e-8)
    n = a.shape[-1]
    pq = np.full(n, 1 / n)
    pk = (a * pq[:, None]).sum(-2)
    information = (a * pq[:, None] * np.log(a / pk[..., None, :])).sum((-1, -2))
    hq, hk = -(pq * np.log(pq)).sum(), -(pk * np.log(pk)).sum(-1)
    return (information / np.sqrt(hq * hk)).mean(0)


def log_amplitude(tokens: np.ndarray, prefix: int) -> np.ndarray:
    """(F,): the half diagonal of the mean log amplitude, less its first value."""
    x = tokens[:, prefix:]
    side = round(x.shape[1] ** 0.5)
    assert side**2 == x.shape[1]
    maps = x.reshape(len(x), side, side, -1).transpose(0, 3, 1, 2)
    f = np.log(np.abs(np.fft.fft2(maps)) + 1e-6)
    f = np.roll(f, (side // 2, side // 2), axis=(2, 3)).mean((0, 1))
    half = np.diagonal(f)[side // 2 :]
    return half - half[0]


def row(values, number: int, wanted: np.ndarray) -> None:
    """Row `number` of (layer, head or frequency) values is `wanted`, and empty behind it."""
    found = np.asarray(values[number])
    assert np.isnan(found[len(wanted) :]).all()
    np.testing.assert_allclose(found[: len(wanted)], wanted, **CLOSE, err_msg=f"row {number}")


def compare_tokens(fourier, sites: list, prefix: int, missing: tuple[str, ...] = ()) -> None:
    """All rows but those at `missing` sites are the expected ones, in order."""
    rows = [n for n, site in enumerate(fourier.site.values) if site not in missing]
    assert len(rows) == len(sites)
    for number, (site, depth, tokens) in zip(rows, sites, strict=True):
        assert (fourier.site.values[number], fourier.depth.values[number]) == (site, depth)
        row(fourier["fourier"].values, number, log_amplitude(tokens.numpy(), prefix))


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "published.pth"
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "family, variant",
    [(moco, "vit-s16"), (moco, "vit-b16"), (simmim, "vit-b16"), (mae, "vit-b16-full"), (dino, "vit-s16"),
     (pit, "s")],
    ids=["moco-s", "moco-b", "simmim-b", "mae-b-with-decoder", "dino-s", "pit-s"],
)  # fmt: skip
def test_a_published_file_gives_the_notebooks_numbers(family, variant, images, path, monkeypatch):
    expected = family(variant, images, path, monkeypatch)
    model = load_model(f"{expected.reference}@{path}", Catalog.load())
    names = ("attention_distance", "nmi", "fourier")
    results = probekit.probe(model, images, metrics=[name + COMPAT for name in names])
    found = {name: results[name + COMPAT] for name in names}

    count = len(expected.maps)
    assert [found[name].sizes["layer"] for name in names[:2]] == [count, count]
    curves = {"attention_distance": [], "nmi": []}
    for number, (a, stride) in enumerate(zip(expected.maps, expected.strides, strict=True)):
        wanted = {
            "attention_distance": distance(a.numpy(), expected.prefix, stride),
            "nmi": nmi(a.numpy(), expected.prefix),
        }
        for name, values in wanted.items():
            row(found[name][name].values, number, values)
            curves[name].append(values.mean())
    for name, curve in curves.items():
        np.testing.assert_allclose(found[name][f"{name}_curve"], curve, **CLOSE)
    assert min(curves["nmi"]) > 0.02, "the attention is uniform: it would show no difference"

    has_between = any(site == "mid" for site, *_ in expected.sites)
    compare_tokens(found["fourier"], expected.sites, expected.prefix, () if has_between else ("mid",))


# ------------------------------------------------------------------ windows


def xlogy(x, y):
    return np.where(x > 0, x * np.log(np.where(x > 0, y, 1)), 0)


def windowed(a: np.ndarray, numbers: np.ndarray, side: int, stride: float) -> dict[str, np.ndarray]:
    """(H,) each. a: (B, W, H, n, n); numbers: (W, n) of the windows' tokens in the image, raster order."""
    total = side * side
    place = np.stack(np.divmod(numbers, side), -1).astype(float) * stride
    apart = np.linalg.norm(place[:, :, None] - place[:, None], axis=-1)  # (W, n, n)
    far = (a * apart[:, None]).sum((1, 3, 4)) / total

    within = np.zeros(far.shape)
    for w in range(a.shape[1]):
        sees = a[0, w, 0] > 0  # tokens of one masked region attend to each other and to no others
        for members in np.unique(sees, axis=0):
            assert (sees[members] == members).all()
            g = a[:, w][:, :, members][..., members]
            n = int(members.sum())
            pk = g.mean(-2)
            information = xlogy(g, g / pk[..., None, :]).sum((-1, -2)) / n
            within += n / total * information / np.sqrt(np.log(n) * -xlogy(pk, pk).sum(-1))

    # The whole map is zero between windows, so a key's probability is its column in its window.
    pk = a.sum(-2) / total  # (B, W, H, n)
    information = xlogy(a, a / pk[..., None, :]).sum((1, 3, 4)) / total
    whole = information / np.sqrt(np.log(total) * -xlogy(pk, pk).sum((1, 3)))
    return {"attention_distance": far.mean(0), "nmi": within.mean(0), "nmi_global": whole.mean(0)}


def test_swins_published_file_gives_the_numbers_of_its_windows(images, path):
    its = pack("swin", "test_swin.py")
    state = its.weights(1)
    torch.save({"model": state}, path)
    model = load_model(f"swin:tiny@{path}", Catalog.load())
    found = probekit.probe(model, images, metrics=["attention_distance", "nmi", "fourier"])
    attention = its.reference(state, images, False, 7, 224)[1]

    assert len(attention) == found["nmi"].sizes["layer"] == 12
    sides = [56] * 2 + [28] * 2 + [14] * 6 + [7] * 2
    for number, (side, (a, numbers)) in enumerate(zip(sides, attention, strict=True)):
        for name, wanted in windowed(a.numpy(), numbers.numpy(), side, 224 / side).items():
            row(found[name.removesuffix("_global")][name].values, number, wanted)
            assert name == "attention_distance" or wanted.min() > 0.02 or (side, name) == (7, "nmi_global")
    sites = of_stages(
        lambda state: its.reference(state, images, False, 7, 224)[0], state, "layers.{}.", (2, 2, 6, 2)
    )
    compare_tokens(found["fourier"], sites, 0, ("mid",))
