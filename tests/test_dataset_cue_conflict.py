"""``cue-conflict:PATH`` and ``stylized:PATH``: cues from names, and which ImageNet class is which category."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from probekit.datasets.cue_conflict import CATEGORIES, category, load, load_stylized
from probekit.errors import DataError


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "cat/cat7-elephant1.png",
        "cat/cat10-cat2.png",
        "car/car1-bottle12.jpg",
        "truck/truck3-car3.png",
    ):
        write(tmp_path / name)
    return tmp_path


def test_cues_come_from_folder_and_name(tree: Path) -> None:
    data = load(str(tree))
    data.check()
    assert data.ids == ["car/car1-bottle12.jpg", "cat/cat7-elephant1.png", "truck/truck3-car3.png"]
    assert data.classes == list(CATEGORIES) == sorted(CATEGORIES)
    assert [data.classes[k] for k in data.labels] == ["car", "cat", "truck"]
    assert list(data.cues["shape"]) == data.labels
    assert [data.classes[k] for k in data.cues["texture"]] == ["bottle", "elephant", "car"]
    assert any("left out 1 of 4 images" in note for note in data.notes)
    assert all(data.image(k).size == (8, 8) for k in range(3))


def test_same_shape_and_texture_can_be_kept(tree: Path) -> None:
    data = load(str(tree), keep_same=True)
    data.check()
    assert "cat/cat10-cat2.png" in data.ids
    assert len(data) == 4
    assert not any("left out" in note for note in data.notes)


def test_the_published_images(real_data: Path) -> None:
    data = load(str(real_data / "cue-conflict"))
    data.check()
    assert len(data) == 1200
    assert set(Counter(data.labels).values()) == set(Counter(data.cues["texture"]).values()) == {75}
    assert len(load(str(real_data / "cue-conflict"), keep_same=True)) == 1280


def test_207_imagenet_classes_have_a_category() -> None:
    """The published numbers of classes by category, and one WordNet id of each as published."""
    from timm.data import ImageNetInfo

    counts = Counter(found for wnid in ImageNetInfo().label_names() if (found := category(wnid)) is not None)
    published = {
        "airplane": (1, "n02690373"), "bear": (4, "n02134418"), "bicycle": (2, "n03792782"),
        "bird": (49, "n02056570"), "boat": (5, "n04612504"), "bottle": (7, "n04591713"), "car": (3, "n04285008"),
        "cat": (6, "n02125311"), "chair": (4, "n04429376"), "clock": (3, "n04548280"), "dog": (109, "n02113978"),
        "elephant": (2, "n02504458"), "keyboard": (2, "n04505470"), "knife": (1, "n03041632"),
        "oven": (1, "n04111531"), "truck": (8, "n04467665"),
    }  # fmt: skip
    assert {CATEGORIES[k]: n for k, n in counts.items()} == {name: n for name, (n, _) in published.items()}
    assert all(CATEGORIES[category(wnid)] == name for name, (_, wnid) in published.items())
    assert sum(counts.values()) == 207


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("airplane", "airplane"), ("automobile", "car"), ("ship", "boat"), ("Truck", "truck"), ("deer", None),
        ("frog", None), ("horse", None), ("airliner", "airplane"), ("trailer truck", "truck"),
        ("trailer_truck", "truck"), ("tabby, tabby cat", "cat"), ("tench", None), ("tench, Tinca tinca", None),
        ("n02085620", None),  # chihuahua: not on the published list
        ("n02085782", "dog"), ("crane", None),  # a bird and a machine
        ("wagon", None), ("partridge", None), ("panther", None),  # each the name of two classes
        ("", None),
    ],
)  # fmt: skip
def test_other_datasets_names(tree: Path, name: str, expected: str | None) -> None:
    found = load(str(tree)).class_of(name)
    assert (None if found is None else CATEGORIES[found]) == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lion/lion1-cat1.png"], "folder 'lion' in .* is none of the 16 categories"),
        (["cat/cat1-lion1.png"], "'cat/cat1-lion1.png' doesn't say its texture"),
        (["cat/elephant1.png"], "doesn't say its texture"),
        (["cat1-elephant1.png"], "holds no cue-conflict images"),
        (["cat/cat1-cat2.png"], "holds no cue-conflict images"),
        ([], "holds no cue-conflict images"),
    ],
)
def test_folders_of_other_things(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        write(tmp_path / name)
    with pytest.raises(DataError, match=message) as caught:
        load(str(tmp_path))
    assert caught.value.hint
    with pytest.raises(DataError, match="there is no folder"):
        load(str(tmp_path / "nothing"))


def test_stylized_images_have_a_shape_and_no_texture_class(tmp_path: Path) -> None:
    for name in ("val/n01440764/1.png", "val/n02690373/2.png", "train/n02690373/3.png"):
        write(tmp_path / name)
    data = load_stylized(str(tmp_path))
    data.check()
    assert data.name == f"stylized:{tmp_path}"
    assert data.classes == ["n01440764", "n02690373"]
    assert dict(data.cues) == {"shape": [0, 1]}
    assert any("AdaIN" in note for note in data.notes)
    assert data.train.classes == ["n02690373"]
    with pytest.raises(DataError, match="no class folders"):
        load_stylized(str(tmp_path / "val" / "n01440764"))
