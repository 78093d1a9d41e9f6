"""``cifar10:PATH``: zips, folders and the official batches, which are pickles and may say anything."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from probekit.datasets.cifar10 import CLASSES, load
from probekit.datasets.dataset import BadImage
from probekit.datasets.images import batches
from probekit.errors import DataError, UsageError
from probekit.specs import Preprocessing


def png(value: int, size: tuple[int, int] = (32, 32)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (value, 0, 255 - value)).save(file, "PNG")
    return file.getvalue()


FILES = {
    f"{split}/{name}/{k}.png": png(20 * number + k + 10 * (split == "train"))  # no image is in both
    for split, count in (("train", 3), ("test", 2))
    for number, name in enumerate(CLASSES)
    for k in range(count)
}


def write_zip(path: Path, files: dict[str, bytes], prefix: str = "cifar10/") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(prefix + name, content)
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def python2(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 pickled the official ones, opcode by opcode."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    shape = b"M" + struct.pack("<H", len(pixels)) + b"M" + struct.pack("<H", pixels.shape[1]) + b"\x86"
    minus = b"J\xff\xff\xff\xff"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + minus + minus + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01" + shape + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    items = text(b"batch_label") + text(b"testing batch 1 of 1")
    items += text(b"labels") + b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    items += text(b"data") + array
    return b"\x80\x02}(" + items + b"u."


def batch(seed: int, count: int = 4) -> tuple[np.ndarray, list[int]]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, 3072), dtype=np.uint8), random.integers(0, 10, count).tolist()


OFFICIAL = {
    f"cifar-10-batches-py/{name}": python2(*batch(k))
    for k, name in enumerate(["test_batch", *(f"data_batch_{n}" for n in range(1, 6))])
}


# --- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "zip without a folder", "folder", "folder in a folder"])
def test_images_in_class_folders(tmp_path: Path, form: str) -> None:
    if form.startswith("zip"):
        path = write_zip(tmp_path / "c.zip", FILES, "" if "without" in form else "cifar10/")
    else:
        path = write_folder(tmp_path / "c" if form == "folder" else tmp_path / "c" / "CIFAR-10", FILES)
        path = tmp_path / "c"
    data = load(str(path))
    data.check()
    assert data.name == f"cifar10:{path}"
    assert data.classes == list(CLASSES)
    assert (len(data), len(data.train)) == (20, 30)
    assert data.ids[:3] == ["airplane/0.png", "airplane/1.png", "automobile/0.png"]
    assert data.labels == [k // 2 for k in range(20)]
    assert data.train.labels == [k // 3 for k in range(30)]
    assert data.image(5).getpixel((3, 3)) == (41, 0, 214)
    assert data.train.image(5).getpixel((3, 3)) == (32, 0, 223)


def test_folders_in_capitals_and_missing_ones_keep_cifars_numbers(tmp_path: Path) -> None:
    data = load(str(write_folder(tmp_path, {"test/Truck/1.png": png(1), "test/frog/2.png": png(2)})))
    assert sorted(zip(data.ids, data.labels, strict=True)) == [("Truck/1.png", 9), ("frog/2.png", 6)]
    assert data.train is None


def test_a_zips_fingerprint_is_its_contents(tmp_path: Path) -> None:
    first = load(str(write_zip(tmp_path / "a.zip", FILES)))
    second = load(str(write_zip(tmp_path / "b.zip", dict(reversed(FILES.items())), "other/")))
    assert first.ids == second.ids
    assert first.fingerprint(range(20)) == second.fingerprint(range(20))
    changed = load(str(write_zip(tmp_path / "c.zip", FILES | {"test/cat/1.png": png(200)})))
    index = first.ids.index("cat/1.png")
    assert changed.fingerprint([index]) != first.fingerprint([index])
    assert changed.fingerprint([0, 1]) == first.fingerprint([0, 1])


def test_a_zip_is_read_by_several_processes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        f"test/{name}/{k:02d}.png": png(k + 25 * number)
        for number, name in enumerate(CLASSES)
        for k in range(25)
    }
    data = load(str(write_zip(tmp_path / "a.zip", files)))
    p = Preprocessing(size=(32, 32), crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    data.image(0)  # open before the fork
    order = [(k * 77) % 250 for k in range(250)]
    seen = []
    for found in batches(data, order, p, batch_size=4, workers=2):
        assert not found.bad
        seen += (found.pixels[:, 0, 0, 0] * 255).round().int().tolist()
    assert seen == order
    mine = data.archive.opened()
    assert mine is data.archive.opened()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("os.getpid", lambda: -1)
        assert data.archive.opened() is not mine
    copy = pickle.loads(pickle.dumps(data))
    assert np.array_equal(np.asarray(copy.image(33)), np.asarray(data.image(33)))


def test_the_real_zip(real_data: Path) -> None:
    data = load(str(real_data / "cifar10.zip"))
    data.check()
    assert (len(data), len(data.train)) == (10_000, 50_000)
    assert np.bincount(data.labels).tolist() == [1000] * 10
    assert np.bincount(data.train.labels).tolist() == [5000] * 10
    assert {data.image(k).size for k in range(0, 10_000, 1000)} == {(32, 32)}
    assert len(data.train.fingerprint(range(50_000))) == 32


# --- official batches ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "its parent", "zip", "tar.gz", "python 3"])
def test_official_batches(tmp_path: Path, form: str) -> None:
    files = OFFICIAL
    if form == "python 3":
        contents = {
            name: dict(zip(("data", "labels"), batch(k), strict=True)) for k, name in enumerate(OFFICIAL)
        }
        files = {name: pickle.dumps(content, protocol=4) for name, content in contents.items()}
    if form == "zip":
        path = write_zip(tmp_path / "c.zip", files, "")
    elif form == "tar.gz":
        path = tmp_path / "cifar-10-python.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        path = write_folder(tmp_path, files)
        path = path / "cifar-10-batches-py" if form == "folder" else path
    data = load(str(path))
    data.check()
    assert (len(data), len(data.train)) == (4, 20)
    pixels, labels = batch(0)
    assert data.labels == labels
    assert data.ids[1] == "test_batch/00001"
    assert data.train.ids[5] == "data_batch_2/00001"
    assert data.train.labels == [label for k in range(1, 6) for label in batch(k)[1]]
    # a row holds 1,024 reds, then greens, then blues, each line by line
    image = np.asarray(data.image(2))
    assert image[5, 7].tolist() == [pixels[2, 5 * 32 + 7 + 1024 * c] for c in range(3)]
    shown = np.asarray(data.train.image(19))
    assert np.array_equal(shown.transpose(2, 0, 1).ravel(), batch(5)[0][3])
    assert data.fingerprint([0, 1]) != data.fingerprint([0, 2])


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["whole", "data", "key"])
def test_a_batch_runs_no_code(tmp_path: Path, place: str) -> None:
    evil = Evil(tmp_path / "made")
    content = {"whole": evil, "data": {"data": evil, "labels": [1]}, "key": {"data": b"", "x": [evil]}}[place]
    write_folder(tmp_path, {"cifar-10-batches-py/test_batch": pickle.dumps(content)})
    with pytest.raises(DataError, match=r"holds 'posix.mkdir', which could run code") as caught:
        load(str(tmp_path))
    assert "official file" in caught.value.hint
    assert not (tmp_path / "made").exists()


def test_not_even_numpys_own_functions_are_called(tmp_path: Path) -> None:
    stream = b"cnumpy\nload\n(" + b"U\x01xtR."
    write_folder(tmp_path, {"test_batch": stream})
    with pytest.raises(DataError, match=r"holds 'numpy\.load'"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        OFFICIAL["cifar-10-batches-py/test_batch"][:-900],
        pickle.dumps([1, 2]),
        pickle.dumps({"data": 3, "labels": [1]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.float32), "labels": [1, 2]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 12]}),
        pickle.dumps({"data": np.zeros((2, 30), np.uint8), "labels": [1, 2]}),
    ],
)
def test_damaged_batches(tmp_path: Path, content: bytes) -> None:
    write_folder(tmp_path, {"test_batch": content})
    with pytest.raises(DataError, match=r"'test_batch' in .* is damaged, or no batch of CIFAR-10") as caught:
        load(str(tmp_path))
    assert "\n" not in caught.value.message


def test_training_batches_alone(tmp_path: Path) -> None:
    write_folder(tmp_path, {"data_batch_1": python2(*batch(1))})
    with pytest.raises(DataError, match="no 'test_batch'"):
        load(str(tmp_path))


# --- bad input -----------------------------------------------------------------------------------


def one_sentence(error: DataError) -> None:
    assert "\n" not in error.message
    assert error.message[0].islower() or error.message[0] == "'"


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    for argument, message in [
        (str(tmp_path / "no.zip"), "there is no file or folder"),
        (str(tmp_path), "holds no CIFAR-10"),
        ("a\0b", "there is no|can't be read"),
        ("x" * 5000, "there is no|can't be read"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            load(argument)
        one_sentence(caught.value)
    with pytest.raises(UsageError, match="needs a path"):
        load("")


@pytest.mark.parametrize("name", ["c.zip", "c.tar.gz"])
@pytest.mark.parametrize("content", [b"", b"no archive", "torn"])
def test_damaged_archives(tmp_path: Path, name: str, content: bytes | str) -> None:
    path = tmp_path / name
    if content == "torn":
        if name == "c.zip":
            write_zip(path, FILES)
        else:
            with tarfile.open(path, "w:gz") as archive:
                archive.add(write_folder(tmp_path / "x", OFFICIAL), "x")
        content = path.read_bytes()[:-200]
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is damaged, or no (zip|tar) file|can't be read") as caught:
        load(str(path))
    one_sentence(caught.value)


def test_a_damaged_image_in_a_zip_is_one_bad_image(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "c.zip", FILES)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("cifar10/test/cat/0.png")
    content = bytearray(path.read_bytes())
    for offset in range(info.header_offset + 60, info.header_offset + 70):
        content[offset] ^= 255
    path.write_bytes(content)
    data = load(str(path))
    index = data.ids.index("cat/0.png")
    with pytest.raises(BadImage, match=r"'cat/0\.png' can't be used: it is damaged in the zip file"):
        data.image(index)
    data.image(index + 1)
    write_zip(path, FILES | {"test/cat/0.png": b"text"})
    with pytest.raises(BadImage, match="not an image"):
        load(str(path)).image(index)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probekit.datasets.archive._MOST_BYTES", 1000)
    data = load(str(write_zip(tmp_path / "c.zip", FILES | {"test/cat/0.png": b"0" * 1001})))
    with pytest.raises(BadImage, match="has 1001 bytes"):
        data.image(data.ids.index("cat/0.png"))


def test_classes_that_are_not_cifars(tmp_path: Path) -> None:
    for path in (
        write_zip(tmp_path / "a.zip", {"test/lion/1.png": png(1)}),
        write_folder(tmp_path / "f", {"test/lion/1.png": png(1)}),
    ):
        with pytest.raises(DataError, match=r"folder 'lion' in .* is no class of CIFAR-10") as caught:
            load(str(path))
        assert "folder:PATH" in caught.value.hint
    with pytest.raises(DataError, match="no images in folders named by class"):
        load(str(write_folder(tmp_path / "g", {"test/1.png": png(1)})))
    with pytest.raises(DataError, match="holds no CIFAR-10"):
        load(str(write_zip(tmp_path / "b.zip", {"train/cat/1.png": png(1)})))
