"""``shapetex``: the same pixels everywhere, independent cues, shapes that are what they are called."""

from __future__ import annotations

import hashlib
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probekit.datasets.images import masks
from probekit.datasets.shapetex import KINDS, ShapeTex, load
from probekit.datasets.shapetex_drawing import COSINE, ONE, PERIOD, SHAPES, SPAN, TEXTURES, plane
from probekit.errors import UsageError
from probekit.specs import Preprocessing


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:32]


# --- the same everywhere ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "split", "pixels", "fingerprint"),
    [
        ("independent", "test", "b3c89c2cb53e1896c1eac193b7c07781", "74072695730884567a21065c819e4208"),
        ("independent", "train", "d760e0f5ae1144286128d521fcc8e299", "47468e89ef8ac03c1ff32f04aa8cacac"),
        ("paired", "test", "90be4ea593313de27ccbc7ba9a88dd70", "212ba93985d005e56cdd8af110f50895"),
        ("paired", "train", "a302b519dc2cc4e5d1fd24962f156367", "38ea5f8a6f289c772a9e2ebfe78c6c05"),
        ("cue-conflict", "test", "2376ebffd9a69ee8609c07a5f8d55d29", "787cf47c05cdcd8b11b32b7c4d65a9af"),
    ],
)
def test_pixels_and_fingerprints_are_these_on_every_machine(
    kind: str, split: str, pixels: str, fingerprint: str
) -> None:
    """Raise `shapetex.VERSION` with these numbers: models were trained on the pixels they stand for."""
    data = ShapeTex(kind, images=64, train=64)
    data = data if split == "test" else data.train
    assert digest(*(np.asarray(data.image(i)) for i in range(64))) == pixels
    assert data.fingerprint(range(64)) == fingerprint


def test_so_are_other_sizes_and_seeds_and_masks() -> None:
    data = ShapeTex(images=32, train=0, size=31, classes=5, labels="texture", seed=2**64 - 1)
    pairs = [np.asarray(part) for i in range(32) for part in (data.image(i), data.mask(i))]
    assert digest(*pairs) == "d4aff9d72a165f613bc39d951c19317a"


def test_no_last_bit_decides_a_cosine() -> None:
    exact = [SPAN * math.cos(math.tau * k / 256) for k in range(256)]
    assert min(abs(value % 1 - 0.5) for value in exact) > 1e-4
    assert COSINE[0] == SPAN and COSINE[64] == 0 and COSINE[128] == -SPAN


def test_an_image_depends_on_its_seed_split_and_index_alone() -> None:
    few, many = ShapeTex(images=20, train=3), ShapeTex(images=40, train=9)
    order = [7, 3, 19, 3]
    shown = [np.asarray(few.image(i)) for i in order]
    again = pickle.loads(pickle.dumps(many))
    assert all(np.array_equal(a, np.asarray(again.image(i))) for a, i in zip(shown, order, strict=True))
    assert few.labels == many.labels[:20]
    assert few.fingerprint(order) == many.fingerprint(order)
    seen = {digest(np.asarray(data.image(i))) for data in (many, many.train) for i in range(9)}
    seen |= {digest(np.asarray(ShapeTex(seed=1, images=9).image(i))) for i in range(9)}
    assert len(seen) == 27


def test_the_fingerprint_changes_with_what_decides_the_pixels() -> None:
    options = [{}, {"seed": 1}, {"size": 32}, {"classes": 7}, {"labels": "texture"}]
    found = {ShapeTex(images=50, train=1, **o).fingerprint(range(50)) for o in options}
    found |= {ShapeTex(kind, images=50, train=1).fingerprint(range(50)) for kind in KINDS[1:]}
    found |= {ShapeTex(images=50).fingerprint(order) for order in (range(49), range(49, -1, -1))}
    assert len(found) == len(options) + len(KINDS[1:]) + 2


def test_a_scene_is_the_same_at_every_size() -> None:
    small, large = ShapeTex(images=30, size=32), ShapeTex(images=30, size=128)
    for i in range(30):
        a = np.asarray(small.image(i), np.float64)
        b = np.asarray(large.image(i), np.float64).reshape(32, 4, 32, 4, 3).mean((1, 3))
        # 2 x 2 points a pixel against 8 x 8, and the noise: up to 8 at 32 pixels
        assert np.abs(a - b).mean() < 16
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.85


# --- classes and cues ------------------------------------------------------------------------------


def test_shapes_and_textures_are_independent() -> None:
    data = load(None).train
    counts = np.zeros((8, 8))
    np.add.at(counts, (data.shapes, data.textures), 1)
    expected = counts.sum() / 64
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 63 + 4 * math.sqrt(2 * 63)
    assert data.labels == data.shapes.tolist()
    assert data.classes == list(SHAPES)
    assert not data.cues  # on images that show both, "shape bias" would mean nothing
    textures = load(None, labels="texture", images=100)
    assert textures.labels == textures.textures.tolist()
    assert textures.classes == list(TEXTURES)
    assert np.array_equal(textures.shapes, load(None, images=100).shapes)


def test_cues_conflict_and_the_train_split_is_paired() -> None:
    data = load("cue-conflict")
    data.check()
    assert (len(data), len(data.train)) == (2048, 50_000)
    shapes, textures = (np.array(data.cues[cue]) for cue in ("shape", "texture"))
    assert (shapes != textures).all()
    counts = np.zeros((8, 8))
    np.add.at(counts, (shapes, textures), 1)
    assert counts[~np.eye(8, dtype=bool)].min() > 2048 / 56 / 3
    assert data.labels == shapes.tolist()
    assert np.array_equal(data.train.shapes, data.train.textures)
    assert data.train.classes == data.classes
    assert data.classes[0] == "circle-stripes"
    assert not data.train.cues
    assert load("paired").train.ids == data.train.ids


@given(kind=st.sampled_from(KINDS), classes=st.integers(2, 8), seed=st.integers(0, 2**64 - 1))
def test_any_number_of_classes(kind: str, classes: int, seed: int) -> None:
    data = load(kind, classes=classes, seed=seed, images=60, train=60)
    data.check()
    assert len(data.classes) == classes
    for split in (data, data.train):
        assert max(split.shapes.max(), split.textures.max()) < classes
    assert (data.shapes == data.textures).any() == (kind != "cue-conflict")


def test_options_that_make_no_sense() -> None:
    for wrong in ({"size": 7}, {"size": 2000}, {"images": 0}, {"train": -1}, {"classes": 9}, {"seed": -1}):
        with pytest.raises(UsageError, match=f"shapetex can't have {next(iter(wrong))}=") as caught:
            load(None, **wrong)
        assert " to " in caught.value.hint
    with pytest.raises(UsageError, match="can't have labels=colour"):
        load(None, labels="colour")
    with pytest.raises(UsageError, match="no kind 'conflict'") as caught:
        load("conflict", size=64)
    assert "cue-conflict" in caught.value.hint
    assert load(None, train=0).train is None


def test_it_is_a_built_in_with_an_optional_kind() -> None:
    from probekit.plugins.catalog import Catalog
    from probekit.subject import open_dataset

    catalog = Catalog.load([], enabled=False)
    for text, count, train, size in [
        ("shapetex", 2048, 50_000, 64),
        ("shapetex?images=10&size=32", 10, 50_000, 32),
        ("shapetex:cue-conflict?train=5", 2048, 5, 64),
    ]:
        data = open_dataset(catalog.dataset(text), catalog)
        assert (len(data), len(data.train), data.image(0).size) == (count, train, (size, size))
        assert data.name == text.partition("?")[0]


# --- what is drawn ---------------------------------------------------------------------------------


def triangle(*corners: complex) -> float:
    a, b, c = corners
    return abs((b - a).real * (c - a).imag - (b - a).imag * (c - a).real) / 2


def lens(r: float, s: float, d: float) -> float:
    """Area common to circles of radii r and s at distance d."""
    a, b = ((d * d + p * p - q * q) / (2 * d * p) for p, q in ((r, s), (s, r)))
    kite = math.sqrt((-d + r + s) * (d + r - s) * (d - r + s) * (d + r + s)) / 2
    return r * r * math.acos(a) + s * s * math.acos(b) - kite


def areas() -> dict[str, float]:
    """In squares of the unit, from geometry."""
    inner = 480 / ONE  # of a pentagram: the circle within its pentagon
    outer = inner / math.cos(math.radians(72))
    notch = inner / math.cos(math.radians(36))
    star = 10 * triangle(0, outer, notch * complex(math.cos(math.tau / 10), math.sin(math.tau / 10)))
    side = 780 / ONE  # of the heart's square, half, in coordinates stretched by the root of 2
    return {
        "circle": math.pi * (920 / ONE) ** 2,
        "square": (1620 / ONE) ** 2,
        "triangle": (1800 / ONE) ** 2 / math.sqrt(3),
        "star": star,
        "cross": (2 * 1050 * 780 * 2 - 780**2) / ONE**2,
        "ring": math.pi * (1050**2 - 520**2) / ONE**2,
        "crescent": math.pi * (1100 / ONE) ** 2 - lens(1100 / ONE, 880 / ONE, 560 / ONE),
        "heart": ((2 * side) ** 2 + math.pi * side**2) / 2,
    }


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_their_areas(name: str) -> None:
    axis = np.arange(-2048, 2048, 4, dtype=np.int32) + 2
    u, v = np.meshgrid(axis, axis)
    inside = SHAPES[name](u, v)
    assert inside.sum() * 16 / ONE**2 == pytest.approx(areas()[name], rel=0.01)
    assert not inside[0].any() and not inside[:, 0].any()


def test_shapes_differ_whatever_their_angle() -> None:
    """Overlap of two different shapes of one size and place, at any of the angles drawn, is never near 1."""
    count = 64
    drawn = {}
    for name, shape in SHAPES.items():
        for angle in range(-22, 23, 4):
            u, v = (plane(count, ONE, SPAN // 3, a, (0, 0)) for a in (angle, angle + 64))
            drawn[name, angle] = shape(u, v)
    for (a, _), first in drawn.items():
        for (b, _), second in drawn.items():
            if a != b:
                assert (first & second).sum() / (first | second).sum() < 0.93, (a, b)


@pytest.mark.parametrize("name", TEXTURES)
def test_textures_are_textures(name: str) -> None:
    """Both tones are there, in patches of a few pixels, and no other texture looks the same."""
    s, t = (plane(256, PERIOD, SPAN // 8, a, (0, 0)) for a in (0, 64))
    noise = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8)
    drawn = {other: texture(s, t, noise) for other, texture in TEXTURES.items()}
    mine = drawn.pop(name)
    assert mine.dtype == bool
    assert 0.25 < mine.mean() < 0.75
    edges = (mine[:, 1:] != mine[:, :-1]).mean() + (mine[1:] != mine[:-1]).mean()
    assert 0.01 < edges < 0.5
    for other in drawn.values():
        assert 0.1 < (mine != other).mean() < 0.9


def test_periodic_textures_have_their_period() -> None:
    axis = np.arange(0, 3072, 8, dtype=np.int32)
    s, t = np.meshgrid(axis, axis)
    none = np.zeros(4096, np.uint8)
    for name, across, down in [
        ("stripes", 256, 8),
        ("checks", 256, 256),
        ("dots", 256, 256),
        ("zigzag", 256, 512),
        ("grid", 256, 256),
        ("bricks", 512, 384),
    ]:
        drawn = TEXTURES[name](s, t, none)
        assert np.array_equal(drawn, np.roll(drawn, (down // 8, across // 8), (0, 1))), name
        assert np.array_equal(drawn, np.roll(drawn, across // 8, 1)), name


def test_the_mask_is_where_the_shape_is() -> None:
    """The image changes at the mask's edge and nowhere does the ground hold the figure's contrast."""
    data = ShapeTex(images=120, train=0)
    for i in range(120):
        mask = np.asarray(data.mask(i))
        assert set(np.unique(mask)) == {0, data.shapes[i] + 1}
        assert 0.04 < (mask > 0).mean() < 0.5
        luma = np.asarray(data.image(i).convert("L"), np.float64)
        inside, outside = luma[mask > 0], luma[mask == 0]
        assert inside.std() > 1.5 * outside.std()


def test_masks_reach_the_network_like_any_datasets() -> None:
    data = ShapeTex(images=3, train=0)
    found = masks(data, 1, Preprocessing(size=(64, 64), crop_pct=1.0))
    assert np.array_equal(found, np.asarray(data.mask(1)))
