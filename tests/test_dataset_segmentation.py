"""``segmentation:PATH``: two layouts, what counts as no class, masks that don't fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from probekit.datasets.dataset import BadImage
from probekit.datasets.images import masks
from probekit.datasets.segmentation import load
from probekit.errors import DataError, PluginError
from probekit.specs import Preprocessing


def write(path: Path, values: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8))
    (image if mode is None else image.convert(mode)).save(path)


def picture(seed: int, split: str = "") -> np.ndarray:
    """No image is in two splits, though their names are."""
    seed += 100 * split.startswith("train")
    return np.random.default_rng(seed).integers(0, 256, (12, 16, 3))


def classes(seed: int, low: int = 0, high: int = 150) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high + 1, (12, 16))


def ade(root: Path) -> Path:
    for split, count in (("training", 3), ("validation", 2)):
        for k in range(count):
            write(root / "images" / split / f"ADE_{k}.jpg", picture(k, split))
            write(root / "annotations" / split / f"ADE_{k}.png", classes(k))
    return root


def simple(root: Path, *splits: str) -> Path:
    for k in range(3):
        for split in splits or ("",):
            write(root / "images" / split / f"{k}.png", picture(k, split))
            write(root / "masks" / split / f"{k}.png", classes(k, 0, 5))
    return root


def test_ade20k_numbers_from_one_and_0_is_nothing(tmp_path: Path) -> None:
    data = load(str(ade(tmp_path)))
    data.check()
    assert (data.ids, data.train.ids) == (["ADE_0.jpg", "ADE_1.jpg"], ["ADE_0.jpg", "ADE_1.jpg", "ADE_2.jpg"])
    assert data.has_masks and data.train.has_masks
    assert (len(data.classes), data.classes[0]) == (150, "1")
    found = masks(data, 1, Preprocessing(size=(12, 16), crop_pct=1.0))
    assert np.array_equal(found, classes(1) - 1)  # so 0, nothing, is -1
    assert data.image(1).size == (16, 12)


def test_ade20ks_own_names(tmp_path: Path) -> None:
    lines = ["Idx\tRatio\tTrain\tVal\tName"]
    lines += [f"{k}\t0.1\t1\t1\t{'wall' if k == 1 else f'thing {k}, object {k}'}" for k in range(1, 151)]
    (ade(tmp_path) / "objectInfo150.txt").write_text("\n".join(lines))
    data = load(str(tmp_path))
    assert data.classes[:2] == ["wall", "thing 2"]
    assert len(data.classes) == 150


@pytest.mark.parametrize("splits", [(), ("train", "val"), ("train", "test"), ("train",), ("val",)])
def test_images_and_masks(tmp_path: Path, splits: tuple[str, ...]) -> None:
    data = load(str(simple(tmp_path, *splits)))
    data.check()
    assert data.ids == ["0.png", "1.png", "2.png"]
    assert (data.train is not None) == (len(splits) == 2)
    assert data.classes is None
    assert np.array_equal(np.asarray(data.mask(2)), classes(2, 0, 5))
    if data.train:
        assert data.train.ids == data.ids and data.train.fingerprint([0]) != data.fingerprint([0])


def test_an_image_in_both_splits_is_refused(tmp_path: Path) -> None:
    simple(tmp_path, "train", "val")
    write(tmp_path / "images" / "train" / "0.png", picture(0))
    with pytest.raises(PluginError, match=r"has image '0\.png' in its train split too"):
        load(str(tmp_path)).check()


def test_palettes_and_255(tmp_path: Path) -> None:
    simple(tmp_path)
    values = classes(0, 0, 5)
    values[:4] = 255
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette([k % 256 for k in range(768)])
    assert image.mode == "P"
    image.save(tmp_path / "masks" / "0.png")
    data = load(str(tmp_path), classes=6)
    assert data.classes == [str(k) for k in range(6)]
    expected = values.copy()
    expected[:4] = -1
    assert np.array_equal(masks(data, 0, Preprocessing(size=(12, 16), crop_pct=1.0)), expected)


def test_the_fingerprint_holds_image_and_mask(tmp_path: Path) -> None:
    before = load(str(simple(tmp_path))).fingerprint([0, 1, 2])
    write(tmp_path / "masks" / "1.png", classes(9, 0, 5))
    after = load(str(tmp_path)).fingerprint([0, 1, 2])
    write(tmp_path / "images" / "1.png", picture(9))
    assert len({before, after, load(str(tmp_path)).fingerprint([0, 1, 2])}) == 3


def test_masks_that_do_not_fit(tmp_path: Path) -> None:
    simple(tmp_path)
    write(tmp_path / "masks" / "0.png", classes(0)[:6])
    write(tmp_path / "masks" / "1.png", classes(1), "RGB")
    whole = (tmp_path / "masks" / "2.png").read_bytes()
    (tmp_path / "masks" / "2.png").write_bytes(whole[: len(whole) // 2])
    data = load(str(tmp_path))
    for index, reason in [(0, "16 x 6 pixels, the image 16 x 12"), (1, "mode 'RGB'"), (2, "its mask: ")]:
        with pytest.raises(BadImage, match=reason) as caught:
            data.mask(index)
        assert caught.value.id == f"{index}.png"
        data.image(index)
    Image.fromarray(classes(0).astype(np.uint8)).save(tmp_path / "masks" / "0.png", format="JPEG")
    with pytest.raises(BadImage, match="not an image"):  # lossy: its numbers are no classes
        data.mask(0)
    write(tmp_path / "masks" / "0.png", np.full((12, 16), 6))
    with pytest.raises(BadImage, match="class 6, and there are 6"):
        load(str(tmp_path), classes=6).mask(0)


def test_layouts_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images with masks") as caught:
        load(str(tmp_path))
    assert "images/ and masks/" in caught.value.hint
    simple(tmp_path, "train", "val")
    (tmp_path / "masks" / "val" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images in '.*val' have no mask, '1.png' the first"):
        load(str(tmp_path))
    (tmp_path / "masks" / "val").rename(tmp_path / "masks" / "elsewhere")
    with pytest.raises(DataError, match=r"there is no folder '.*masks.val'"):
        load(str(tmp_path))
    (tmp_path / "empty" / "images").mkdir(parents=True)
    (tmp_path / "empty" / "masks").mkdir()
    with pytest.raises(DataError, match="holds no images with masks"):
        load(str(tmp_path / "empty"))
