"""NMI of attention: closed forms, windows by the chain rule against the whole map, the published code."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import probekit
from probekit.attention import stats_from_probabilities
from probekit.errors import UsageError
from probekit.metric import Row, Traces
from probekit.metrics.nmi import NMI
from probekit.testing import TinyViT


@dataclass
class FakeLayer:
    """Attention (B * G, H, prefix + n, prefix + n) of G sets of n tokens an image, or several such layers."""

    attention_full: torch.Tensor | None = None
    prefix: int = 0
    window_count: int = 1
    window_share: float = 1.0
    groups: tuple[FakeLayer, ...] = ()

    @property
    def patches(self):
        return self.attention_full[:, :, self.prefix :, self.prefix :]

    @property
    def tokens_count(self):
        return self.patches.shape[-2]

    @property
    def distances(self):
        return torch.ones(1, 1, *self.patches.shape[-2:])

    @property
    def attention_stats(self):
        return stats_from_probabilities(self.patches, self.distances)

    def windows(self):
        return list(self.groups) or [self]

    def unfold(self, values):
        return values.unflatten(0, (-1, self.window_count))


def measure(p, **options):
    """nmi of one (n, n) map or of (B, H, T, T); global attention, so both values are one."""
    p = torch.as_tensor(np.asarray(p)).float()
    values = NMI(**options).measure(FakeLayer(p.expand(1, 1, -1, -1) if p.dim() == 2 else p))
    assert torch.equal(values["nmi"], values["nmi_global"]) and values["nmi"].dtype == torch.float32
    return values["nmi"] if p.dim() == 4 else values["nmi"].item()


def reference(p):
    """I / sqrt(H(q) H(k)) of an (n, m) map with rows of any sum, p(q) = 1/n; 0 for 0/0. float64."""
    p = np.asarray(p, dtype=np.float64)
    p = p / p.sum(1, keepdims=True)
    n = len(p)
    mean = p.mean(0)
    information = sum(x * math.log(x / mean[j]) / n for row in p for j, x in enumerate(row) if x > 0)
    h_k = -sum(x * math.log(x) for x in mean if x > 0)
    scale = math.sqrt(math.log(n) * max(h_k, 0))
    return information / scale if scale > 0 else 0.0


def neighbours(near):
    grid = [divmod(i, 14) for i in range(196)]
    w = np.array([[float(near(a[0] - b[0], a[1] - b[1])) for b in grid] for a in grid])
    return w / w.sum(1, keepdims=True)


EYE, FLAT = np.eye(196), np.full((196, 196), 1 / 196)
SAME_KEY = np.tile(np.eye(196)[5], (196, 1))
TABLE = {
    "identity": (EYE, 1.0),
    "uniform": (FLAT, 0.0),
    "same key": (SAME_KEY, 0.0),
    "own row": (neighbours(lambda r, c: r == 0), 0.5),
    "3 x 3": (neighbours(lambda r, c: max(abs(r), abs(c)) <= 1), 0.604599),
    "gaussian": (neighbours(lambda r, c: math.exp(-(r * r + c * c) / 8)), 0.275232),
    "half identity": ((EYE + FLAT) / 2, 0.371710),
}


@pytest.mark.parametrize("name", TABLE)
def test_closed_forms(name):
    p, nmi = TABLE[name]
    got = measure(p)
    assert 0 <= got <= 1
    assert got == pytest.approx(reference(p), abs=3e-7)
    assert got == pytest.approx(nmi, abs=1e-5)
    with_eps = measure(p, compat="cl-vs-mim")  # the table's values are the published formula's
    assert with_eps == pytest.approx(nmi, abs=8e-6 if name in ("identity", "own row") else 1e-6)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_prefix_tokens_are_kept_where_asked(prefix):
    g = torch.Generator().manual_seed(prefix)
    p = (torch.randn(2, 3, 12 + prefix, 12 + prefix, generator=g) * 2).softmax(-1)
    layer = FakeLayer(p, prefix)
    kept, dropped = NMI(prefix="keep").measure(layer)["nmi"], NMI().measure(layer)["nmi"]
    for i, h in ((0, 0), (1, 2)):
        assert kept[i, h].item() == pytest.approx(reference(p[i, h]), rel=1e-6)
        patches = p[i, h, prefix:, prefix:]
        assert dropped[i, h].item() == pytest.approx(reference(patches), rel=1e-6)
    assert torch.allclose(kept, dropped) == (prefix == 0)
    assert NMI(prefix="keep").needs == {"attention_full"}


def test_all_queries_to_the_class_token_is_one_map_for_all():
    p = torch.eye(10).expand(1, 1, 10, 10).clone()
    p[..., 1:, :] = p[..., :1, :]
    assert NMI(prefix="keep").measure(FakeLayer(p, 1))["nmi"].item() == 0


@pytest.mark.parametrize("options", [{"prefix": "some"}, {"prefix": "keep", "compat": "cl-vs-mim"}])
def test_options_that_cannot_be(options):
    with pytest.raises(UsageError):
        NMI(**options)


def test_no_information_is_exactly_zero():
    for key in (0, 5, 195):
        assert measure(np.tile(np.eye(196)[key], (196, 1))) == 0
    assert measure(np.ones((1, 1))) == 0  # one token
    assert measure(np.zeros((4, 4))) == 0  # every row masked


@pytest.mark.parametrize(("gain", "nmi"), [(1, 0.092), (3, 0.53)])
def test_random_logits(gain, nmi):
    g = torch.Generator().manual_seed(0)
    p = (torch.randn(2, 6, 196, 196, generator=g) * gain).softmax(-1)
    got = measure(p)
    assert got.mean().item() == pytest.approx(nmi, abs=5e-3)
    for i, h in ((0, 0), (1, 5)):
        assert got[i, h].item() == pytest.approx(reference(p[i, h]), rel=1e-6)


def test_it_is_the_mean_of_nmis_not_the_nmi_of_a_mean():
    p = torch.stack([torch.tensor(EYE), torch.tensor(FLAT)]).unsqueeze(1)
    assert measure(p).mean().item() == pytest.approx(0.5, abs=1e-6)
    assert measure(p.mean(0, keepdim=True)).item() == pytest.approx(0.371710, abs=1e-6)


# ---------------------------------------------------------------------- the published code


def notebook(attention):
    """Its steps in float64: patch block, + 1e-8, rows to 1, joint with p(q) = softmax of ones, plain logs."""
    a = attention.double().numpy()[:, :, 1:, 1:] + 1e-8
    a = a / a.sum(-1, keepdims=True)
    n = a.shape[-1]
    pq = np.exp(np.ones(n)) / np.exp(np.ones(n)).sum()
    joint = a * pq[:, None]
    pk = joint.sum(-2, keepdims=True)
    information = (joint * np.log(a / pk)).sum((-2, -1))
    hq = -(pq * np.log(pq)).sum()
    hk = -(pk * np.log(pk)).sum((-2, -1))
    return information / np.sqrt(hq * hk)


def attention_with_sink(mass, gain=2.0, n=49):
    """(2, 3, 1 + n, 1 + n) whose rows give `mass` to patch keys."""
    g = torch.Generator().manual_seed(1)
    patches = (torch.randn(2, 3, n + 1, n, generator=g) * gain).double().softmax(-1) * mass
    return torch.cat([torch.full((2, 3, n + 1, 1), 1 - mass, dtype=torch.float64), patches], -1).float()


@pytest.mark.parametrize("mass", [0.95, 1e-2, 1e-5])
@pytest.mark.parametrize("gain", [0.5, 2.0, 10.0])
def test_compat_agrees_with_the_published_code(mass, gain):
    full = attention_with_sink(mass, gain)
    metric = NMI(compat="cl-vs-mim")
    assert metric.needs == {"attention_full"} and metric.conventions["eps"] == 1e-8
    got = metric.measure(FakeLayer(full, prefix=1))["nmi"]
    np.testing.assert_allclose(got, notebook(full), rtol=1e-5, atol=1e-6)


def test_the_published_epsilon_biases_heads_with_a_sink():
    """4 to 7 % where CLS or registers take all but 1e-5 of the attention; nothing to speak of elsewhere."""
    for mass, least, most in ((0.95, 0, 1e-4), (1e-5, 1e-2, 0.2)):
        full = FakeLayer(attention_with_sink(mass), prefix=1)
        exact = NMI().measure(full)["nmi"]
        bias = (1 - NMI(compat="cl-vs-mim").measure(full)["nmi"] / exact).abs()
        assert least <= bias.min() and bias.max() <= most
        whole = [[reference(head[1:, 1:]) for head in image.double()] for image in full.attention_full]
        np.testing.assert_allclose(exact, whole, rtol=1e-5)


def test_compat_of_identity_is_short_of_one():
    full = torch.eye(197).expand(1, 1, -1, -1)
    got = NMI(compat="cl-vs-mim").measure(FakeLayer(full, prefix=1))["nmi"].item()
    assert got == pytest.approx(0.999993, abs=5e-7)
    same = torch.zeros(1, 1, 197, 197)
    same[..., 6] = 1
    assert NMI(compat="cl-vs-mim").measure(FakeLayer(same, prefix=1))["nmi"].item() == pytest.approx(
        0, abs=1e-4
    )


# ---------------------------------------------------------------------- windows


def windowed(sizes, batch=2, heads=3, gain=2.0, flat=False, seed=0):
    """A layer whose image is cut into sets of the given sizes, and their maps, [image][head][set]."""
    g = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    groups, blocks = [], [[[] for _ in range(heads)] for _ in range(batch)]
    for n in sorted(set(sizes)):
        count = sizes.count(n)
        p = (torch.randn(batch * count, heads, n, n, generator=g) * (0 if flat else gain)).softmax(-1)
        groups.append(FakeLayer(p, window_count=count, window_share=count * n / total))
        for i in range(batch):
            for h in range(heads):
                blocks[i][h] += list(p[i * count : (i + 1) * count, h].double().numpy())
    return FakeLayer(groups=tuple(groups)), blocks


def whole_map(blocks):
    n = sum(len(b) for b in blocks)
    out, start = np.zeros((n, n)), 0
    for b in blocks:
        out[start : start + len(b), start : start + len(b)] = b
        start += len(b)
    return out


@pytest.mark.parametrize("sizes", [[4, 4, 4], [1, 4, 9, 9], [2, 3, 5, 7], [1, 1, 6], [1, 1], [5]])
def test_windows_within_and_over_the_whole_map(sizes):
    layer, blocks = windowed(sizes)
    got = NMI().measure(layer)
    total = sum(sizes)
    for i in range(2):
        for h in range(3):
            within = sum(len(b) / total * reference(b) for b in blocks[i][h])  # one token: 0
            assert got["nmi"][i, h].item() == pytest.approx(within, abs=1e-6)
            assert got["nmi_global"][i, h].item() == pytest.approx(
                reference(whole_map(blocks[i][h])), abs=1e-6
            )


def shifted(side, window, shift):
    """Sizes of the sets of shifted-window attention: each axis ends with a window cut in two."""
    cuts = [window] * (side // window - 1) + [window - shift, shift]
    return [a * b for a in cuts for b in cuts]


def test_baselines_of_swin():
    for side, value in ((56, 0.517), (28, 0.416), (14, 0.263)):
        layer, _ = windowed([49] * (side // 7) ** 2, batch=1, heads=2, flat=True)
        found = NMI().describe(layer)
        assert found["uniform"] == 0
        assert found["uniform_global"] == pytest.approx(value, abs=6e-4)
        assert found["uniform_global"] == pytest.approx(math.log((side // 7) ** 2) / math.log(side * side))
        got = NMI().measure(layer)
        assert got["nmi"].max() < 1e-6
        assert got["nmi_global"][0, 1].item() == pytest.approx(found["uniform_global"], abs=1e-6)
    alone, _ = windowed([49], flat=True)
    assert NMI().describe(alone) == {"uniform": 0.0, "uniform_global": 0.0}
    assert math.copysign(1, NMI().describe(alone)["uniform_global"]) == 1


def test_baseline_of_shifted_windows():
    assert set(shifted(56, 7, 3)) == {9, 12, 16, 21, 28, 49}
    for side in (14, 28):
        layer, blocks = windowed(shifted(side, 7, 3), batch=1, heads=2, flat=True)
        expected = reference(whole_map(blocks[0][0]))
        assert NMI().describe(layer)["uniform_global"] == pytest.approx(expected, abs=1e-6)
        assert NMI().measure(layer)["nmi_global"][0, 0].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "shapes", [[(4, 16)] * 4, [(16, 64)] * 9, [(2, 8), (3, 5), (3, 5)], [(1, 4)] * 3, [(6, 2)] * 2, [(4, 16)]]
)
def test_baseline_of_windows_with_other_numbers_of_keys(shapes):
    """As Hiera's, whose queries are pooled; against the whole map written out, and measured."""
    total, groups = sum(n for n, _ in shapes), []
    for n, m in sorted(set(shapes)):
        count = shapes.count((n, m))
        p = torch.full((count, 1, n, m), 1 / m)
        groups.append(FakeLayer(p, window_count=count, window_share=count * n / total))
    layer = FakeLayer(groups=tuple(groups))
    whole, row, column = np.zeros((total, sum(m for _, m in shapes))), 0, 0
    for n, m in shapes:
        whole[row : row + n, column : column + m] = 1 / m
        row, column = row + n, column + m
    expected = reference(whole)
    assert (expected > 0) == (len(shapes) > 1)
    assert NMI().describe(layer) == {"uniform": 0.0, "uniform_global": pytest.approx(expected, abs=1e-12)}
    assert NMI().measure(layer)["nmi_global"].item() == pytest.approx(expected, abs=1e-6)


def test_baseline_of_a_model_with_pooled_queries():
    """Hiera without queries attends uniformly: it has its own baseline, in every layer."""
    torch.manual_seed(0)
    model = timm.create_model("hieradet_small", num_classes=8).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".qkv." in name:
                p[: len(p) // 3] = 0
    result = probekit.probe(model, torch.randn(2, 3, 64, 64), metrics=["nmi"])["nmi"]
    measured = result["nmi_global"].mean("head", skipna=True)
    np.testing.assert_allclose(measured, result["uniform_global"], atol=1e-5)
    # the second layer: 4 windows of 16 queries and 64 keys
    assert result["uniform_global"][1].item() == pytest.approx(
        math.log(4) / math.sqrt(math.log(64) * math.log(256))
    )


def test_one_token_in_all():
    layer, _ = windowed([1])
    assert (NMI().measure(layer)["nmi_global"] == 0).all()
    assert NMI().describe(layer)["uniform_global"] == 0


# ---------------------------------------------------------------------- spread and density over heads


def traces_of(nmi):
    """Traces of (images, layers, heads) values; NaN where a layer has no such head."""
    rows = [
        Row(f"l{i}", i + 1.0, "attention", "encoder", 0, 3, (4, 4), (16, 16)) for i in range(nmi.shape[1])
    ]
    values = {name: nmi.astype(np.float32) for name in NMI.dims}
    return Traces(values, rows, [str(i) for i in range(len(nmi))])


def kernels(heads, at):
    """Gaussian kernels, bandwidth heads^(-1/5) times the sd (ddof 1), written out."""
    n = len(heads)
    mean = sum(heads) / n
    width = n ** (-1 / 5) * math.sqrt(sum((x - mean) ** 2 for x in heads) / (n - 1))
    return [
        sum(math.exp(-(((t - x) / width) ** 2) / 2) for x in heads) / (n * width * math.sqrt(2 * math.pi))
        for t in at
    ]


def test_density_over_heads():
    """Fig. E.1: of the image means of each layer's heads, layers of different numbers of heads."""
    nmi = np.random.default_rng(0).beta(2, 5, (7, 3, 12))
    nmi[:, 1, 4:] = np.nan
    result = NMI().summarize(traces_of(nmi))
    assert result["nmi_density"].dims == ("layer", "density_at")
    at = result["density_at"].values
    np.testing.assert_allclose(at, np.arange(101) / 100, atol=1e-12)
    for row, heads in enumerate((12, 4, 12)):
        means = nmi.astype(np.float32)[:, row, :heads].astype(np.float64).mean(0)
        np.testing.assert_allclose(
            result["nmi_density"][row], kernels(means.tolist(), at), rtol=1e-6, atol=1e-12
        )
    whole = NMI().summarize(traces_of(nmi[:, :1] * 0.2 + 0.4))["nmi_density"][0]
    assert float(whole.sum()) / 100 == pytest.approx(1, abs=1e-3)  # all of it lies between 0 and 1
    assert "Scott" in NMI().conventions["density"]
    assert (result["nmi_head_sd"].attrs["ddof"], result["nmi_density"].attrs["role"]) == (0, "density")


def test_a_collapsed_layers_density_is_as_wide_as_it_is_sampled():
    """Kernels far narrower than the places' distance would lie between two of them, or be 14,000 high at one."""
    nmi = (0.305 + 1e-5 * np.arange(12)) * np.ones((3, 1, 1))
    density = NMI().summarize(traces_of(nmi))["nmi_density"][0]
    assert float(density.sum()) / 100 == pytest.approx(1, abs=0.02)
    assert float(density.max()) < 1 / (0.01 * math.sqrt(2 * math.pi))


def test_layers_without_a_density():
    nmi = np.random.default_rng(1).random((5, 3, 4))
    nmi[:, 0, 1:] = np.nan  # one head
    nmi[:, 1] = nmi[:, 1, :1]  # heads that are all alike
    result = NMI().summarize(traces_of(nmi))
    assert result["nmi_density"].isnull().all("density_at").values.tolist() == [True, True, False]
    one = NMI().summarize(traces_of(nmi[:1]))
    assert one["nmi_density"].isnull().all("density_at").values.tolist() == [True, True, False]
    np.testing.assert_allclose(one["nmi_head_sd"][2], nmi[0, 2].std(), rtol=1e-6)


def test_density_is_in_the_results_of_a_probe():
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    result = probekit.probe(TinyViT(), images, metrics=["nmi"])["nmi"]
    assert result["nmi_density"].shape == (2, 101) and bool(result["nmi_density"].notnull().all())


# ---------------------------------------------------------------------- laws


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 60), st.integers(0, 2**20))
def test_between_zero_and_one(n, keys, gain, seed):
    g = torch.Generator().manual_seed(seed)
    p = (torch.randn(2, 2, n, keys, generator=g) * gain).softmax(-1)
    got = measure(p)
    assert ((got >= 0) & (got <= 1)).all()
    # I is a difference of float32 sums, good to 3e-7 nats: what is left of it where H(k) is next to nothing
    mean = p[1, 0].double().mean(0)
    scale = math.sqrt(math.log(n) * float(torch.special.entr(mean).sum().clamp(min=0)))
    room = 2e-5 + (3e-7 / scale if scale > 1e-6 else 1e-3)
    assert got[1, 0].item() == pytest.approx(min(reference(p[1, 0]), 1.0), abs=room)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**20))
def test_permutations(n, seed):
    g = torch.Generator().manual_seed(seed)
    p = (torch.randn(3, 4, n, n, generator=g) * 2).softmax(-1)
    got = measure(p)
    images, heads, queries, keys = (torch.randperm(size, generator=g) for size in (3, 4, n, n))
    assert torch.equal(measure(p[images][:, heads]), got[images][:, heads])
    torch.testing.assert_close(measure(p[:, :, queries][..., keys]), got, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.cat([measure(p[:1]), measure(p[1:])]), got)


def test_scaled_rows_are_renormalised():
    g = torch.Generator().manual_seed(0)
    p = (torch.randn(1, 2, 16, 16, generator=g) * 2).softmax(-1)
    torch.testing.assert_close(
        measure(p * torch.rand(1, 2, 16, 1, generator=g)), measure(p), rtol=1e-5, atol=1e-6
    )


def test_options():
    assert NMI().needs == {"attention_stats"} and NMI().conventions["eps"] == 0
    with pytest.raises(UsageError, match="compat"):
        NMI(compat="official")
