"""`Dataset`, `select` and ``folder:PATH``: layouts, odd images, fingerprints, bad input."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from probekit.datasets import dataset as dataset_module
from probekit.datasets.dataset import BadImage, Dataset, select
from probekit.datasets.folder import load, to_rgb
from probekit.errors import DataError, PluginError, UsageError


def write(path: Path, colour: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes, one with a nested folder, and things that are not images."""
    for k, name in enumerate(["b/2.png", "b/10.png", "a/deep/er/z.JPEG", "a/x.jpg", "a/deep.png"]):
        write(tmp_path / name, (40 * k, 0, 0))
    (tmp_path / "a" / "readme.txt").write_text("no image")
    (tmp_path / "a" / ".hidden.png").write_bytes(b"")
    write(tmp_path / ".cache" / "thumb.png")
    return tmp_path


# --- layouts -------------------------------------------------------------------------------------


def test_class_folders_give_sorted_ids_labels_and_classes(tree: Path) -> None:
    data = load(str(tree))
    assert data.classes == ["a", "b"]
    assert data.ids == ["a/deep.png", "a/deep/er/z.JPEG", "a/x.jpg", "b/10.png", "b/2.png"]
    assert data.labels == [0, 0, 0, 1, 1]
    assert len(data) == 5
    assert data.name == f"folder:{tree}"
    data.check()
    assert np.asarray(data.image(4))[0, 0].tolist() == [0, 0, 0]
    assert np.asarray(data.image(3))[0, 0].tolist() == [40, 0, 0]


def test_what_is_left_out_is_counted(tree: Path) -> None:
    notes = " | ".join(load(str(tree)).notes)
    assert "ignored 1 file without an image's suffix (.txt 1)" in notes
    assert "2 hidden" in notes


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    write(tmp_path / "b.png")
    write(tmp_path / "a.gif")
    (tmp_path / "empty").mkdir()
    data = load(str(tmp_path))
    assert data.ids == ["a.gif", "b.png"]
    assert data.labels is None
    assert data.classes is None


def test_images_beside_class_folders_are_named_not_mixed_in(tmp_path: Path) -> None:
    write(tmp_path / "cat" / "1.png")
    write(tmp_path / "stray.png")
    (tmp_path / "dog").mkdir()
    data = load(str(tmp_path))
    assert data.ids == ["cat/1.png"]
    assert any("1 image beside" in note for note in data.notes)
    assert any("1 of 2 class folders hold no images" in note for note in data.notes)


def test_an_empty_class_folder_keeps_its_number(tmp_path: Path) -> None:
    (tmp_path / "n01").mkdir()
    write(tmp_path / "n02" / "1.png")
    data = load(str(tmp_path))
    assert data.classes == ["n01", "n02"]
    assert data.labels == [1]


def test_class_order_is_by_name_even_where_ids_sort_otherwise(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1.png")
    write(tmp_path / "a-b" / "1.png")  # "a-b/1" < "a/1" as text
    data = load(str(tmp_path))
    assert (data.ids, data.labels) == (["a/1.png", "a-b/1.png"], [0, 1])


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_a_folder_of_splits_is_the_held_out_one_with_its_train_split(tmp_path: Path, held_out: str) -> None:
    for k in range(3):
        write(tmp_path / "train" / "cat" / f"{k}.png")
    write(tmp_path / held_out / "cat" / "9.png", (7, 7, 7))
    write(tmp_path / held_out / "dog" / "8.png")
    data = load(str(tmp_path))
    data.check()
    assert (data.ids, data.labels, data.classes) == (["cat/9.png", "dog/8.png"], [0, 1], ["cat", "dog"])
    assert np.asarray(data.image(0))[0, 0].tolist() == [7, 7, 7]
    assert (data.train.ids, data.train.classes) == (["cat/0.png", "cat/1.png", "cat/2.png"], ["cat"])
    assert data.train.image(1).size == (8, 6)
    assert any(repr(held_out) in note and "'train'" in note for note in data.notes)
    assert data.name == f"folder:{tmp_path}"
    assert data.train.name == f"folder:{tmp_path / 'train'}"
    assert data.fingerprint([0]) == load(str(tmp_path / held_out)).fingerprint([0])


@pytest.mark.parametrize("folders", [["train"], ["val"], ["train", "val", "test"], ["Train", "val"]])
def test_other_folders_called_like_splits_are_classes_and_say_so(tmp_path: Path, folders: list[str]) -> None:
    for folder in folders:
        write(tmp_path / folder / "1.png")
    data = load(str(tmp_path))
    assert data.train is None
    assert data.classes == sorted(folders)
    assert any("name its own folder" in note for note in data.notes)


def test_a_class_beside_the_splits_makes_them_classes(tmp_path: Path) -> None:
    for folder in ("train", "val", "truck"):
        write(tmp_path / folder / "1.png")
    assert load(str(tmp_path)).classes == ["train", "truck", "val"]


def test_an_empty_split(tmp_path: Path) -> None:
    write(tmp_path / "val" / "cat" / "1.png")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train' holds no images"):
        load(str(tmp_path))


def test_links_are_followed_but_not_in_circles(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere / "linked.png")
    (tree / "c").symlink_to(elsewhere, target_is_directory=True)
    (tree / "b" / "link.png").symlink_to(elsewhere / "linked.png")
    (tree / "a" / "up").symlink_to(tree, target_is_directory=True)
    (tree / "a" / "deep" / "er" / "self").symlink_to(tree / "a", target_is_directory=True)
    (tree / "b" / "me").symlink_to(tree / "b" / "me")
    (tree / "zzz").symlink_to(tree, target_is_directory=True)
    data = load(str(tree))
    assert data.ids[-1] == "c/linked.png"
    assert "b/link.png" in data.ids
    assert len(data) == 7
    assert any("did not follow 3 links" in note for note in data.notes)
    data.image(data.ids.index("b/link.png"))


def test_a_dangling_link_is_an_unreadable_image_not_silence(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    data = load(str(tmp_path))
    assert data.ids == ["a.png", "b.png"]
    with pytest.raises(BadImage, match=r"'b\.png'.*no such file"):
        data.image(1)
    before = data.fingerprint([0, 1])
    write(tmp_path / "gone.png")
    assert data.fingerprint([0, 1]) != before


def test_a_pipe_named_like_an_image_blocks_nobody(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert load(str(tmp_path)).ids == ["a.png"]


def test_suffixes(tmp_path: Path) -> None:
    images = ["a.jpg", "b.JPEG", "c.png", "d.bmp", "e.webp", "f.tif", "g.tiff", "h.ppm", "i.pgm", "j.GIF"]
    for name in [*images, "k.txt", "l.h5", "m.ps", "n.heic"]:
        (tmp_path / name).write_bytes(b"x")
    data = load(str(tmp_path))
    assert data.ids == images
    assert any(".heic" in note and "decoder" in note for note in data.notes)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "pictures" / "a.png")
    assert load("~/pictures").ids == ["a.png"]


def test_names_that_are_not_utf8_can_be_stored(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        Path(os.fsdecode(raw)).write_bytes(write(tmp_path / "a.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    data = load(str(tmp_path))
    assert data.ids == ["a.png", "caf\\xe9.png"]
    data.ids[1].encode("utf-8")
    assert data.image(1).size == (8, 6)
    data.fingerprint([0, 1])


# --- folders that can't be used ------------------------------------------------------------------


def one_sentence(error: DataError) -> None:
    assert "\n" not in error.message
    assert error.message[0].islower() or error.message[0] == "'"
    assert error.hint


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder") as caught:
        load(str(tmp_path / "x" / "y"))
    one_sentence(caught.value)
    assert caught.value.exit_code == 4
    assert str(tmp_path) in caught.value.hint


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png")
    with pytest.raises(DataError, match="is a file, not a folder") as caught:
        load(str(path))
    one_sentence(caught.value)
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(DataError) as caught:
        load(str(tmp_path / "a.zip"))
    assert "unpack" in caught.value.hint
    with pytest.raises(DataError, match="no folder"):
        load(str(path / "below"))


@pytest.mark.parametrize("content", [[], ["notes.txt"], ["class/notes.txt"], [".hidden/a.png"]])
def test_no_images(tmp_path: Path, content: list[str]) -> None:
    for name in content:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match="holds no images") as caught:
        load(str(tmp_path))
    one_sentence(caught.value)


def test_a_path_no_system_takes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be opened"):
        load("a\0b")
    with pytest.raises(DataError, match="can't be opened"):
        load("x" * 5000)
    with pytest.raises(UsageError, match="needs a path"):
        load("")


@pytest.mark.parametrize("denied", ["", "b"])
def test_unreadable_folder(tree: Path, monkeypatch: pytest.MonkeyPatch, denied: str) -> None:
    real = os.scandir

    def scandir(path: str) -> object:  # root, who runs many CI jobs, may read anything
        if Path(path) == tree / denied:
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"can't be read: it may not be read") as caught:
        load(str(tree))
    one_sentence(caught.value)


# --- odd images ----------------------------------------------------------------------------------


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def read_back(tmp_path: Path, name: str, image: Image.Image, **options: object) -> np.ndarray:
    image.save(tmp_path / name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = load(str(tmp_path)).image(0)
    assert result.mode == "RGB"
    pickle.dumps(result)
    return np.asarray(result)


def test_grey_and_grey_with_alpha(tmp_path: Path) -> None:
    values = noise(5, 7, 2)
    rgb = read_back(tmp_path, "a.png", Image.fromarray(values[..., 0]))
    assert (rgb == values[..., :1]).all()
    rgb = read_back(tmp_path, "a.png", Image.fromarray(values, "LA"))
    assert (rgb == values[..., :1]).all()


def test_alpha_is_dropped_not_composited(tmp_path: Path) -> None:
    values = noise(5, 7, 4)
    values[0, 0, 3] = 0
    rgb = read_back(tmp_path, "a.png", Image.fromarray(values, "RGBA"))
    assert (rgb == values[..., :3]).all()


@pytest.mark.parametrize("transparency", [None, 3, bytes([0, 128, 255])])
def test_palette_with_transparency(tmp_path: Path, transparency: object) -> None:
    index = np.arange(12, dtype=np.uint8).reshape(3, 4) % 5
    palette = noise(5, 3, 1)[..., 0]
    image = Image.fromarray(index, "P")
    image.putpalette(palette.ravel().tolist())
    options = {} if transparency is None else {"transparency": transparency}
    rgb = read_back(tmp_path, "a.png", image, **options)
    assert (rgb == palette[index]).all()


def test_gif_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]]
    rgb = read_back(tmp_path, "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert (rgb == [255, 0, 0]).all()


def test_cmyk_jpeg(tmp_path: Path) -> None:
    rgb = read_back(tmp_path, "a.jpg", Image.new("CMYK", (9, 5), (0, 255, 255, 0)), quality=100)
    assert rgb.shape == (5, 9, 3)
    assert np.abs(rgb.astype(int) - [255, 0, 0]).max() <= 3


def test_one_bit(tmp_path: Path) -> None:
    bits = noise(5, 7, 1)[..., 0] > 127
    rgb = read_back(tmp_path, "a.png", Image.fromarray(bits))
    assert (rgb == bits[..., None] * 255).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    values = np.array([[0, 100, 128, 129], [257, 256 * 100, 65534, 65535]], dtype=np.uint16)
    rgb = read_back(tmp_path, name, Image.fromarray(values))
    assert (
        rgb[..., 0].tolist()
        == np.rint(values / 257).astype(int).tolist()
        == [[0, 0, 0, 1], [1, 100, 255, 255]]
    )


def test_a_dark_sixteen_bit_image_stays_dark(tmp_path: Path) -> None:
    assert read_back(tmp_path, "a.png", Image.fromarray(np.full((3, 3), 200, np.uint16))).max() == 1


def test_big_endian_sixteen_bit_tiff(tmp_path: Path) -> None:
    values = np.array([[0, 257, 65535]], dtype=">u2")
    fields = [
        (256, 3, 3),
        (257, 3, 1),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (278, 3, 1),
        (279, 4, 6),
    ]
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1) + struct.pack(">H2x" if kind == 3 else ">I", value)
        for tag, kind, value in fields
    )
    header = b"MM\0*" + struct.pack(">I", 14)
    (tmp_path / "a.tif").write_bytes(header + values.tobytes() + struct.pack(">H", 8) + entries + b"\0" * 4)
    assert np.asarray(load(str(tmp_path)).image(0))[0, :, 0].tolist() == [0, 1, 255]


def test_integers_and_floats() -> None:
    def grey(values: object, dtype: type) -> list[int]:
        return np.asarray(to_rgb(Image.fromarray(np.array([values], dtype=dtype))))[0, :, 0].tolist()

    assert grey([0, 7, 255], np.int32) == [0, 7, 255]
    assert grey([0, 257, 65535], np.int32) == [0, 1, 255]
    assert grey([0, 0.5, 1], np.float32) == [0, 128, 255]
    assert grey([0, 100.4, 255], np.float32) == [0, 100, 255]
    for values, dtype in [([0, 70000], np.int32), ([-1, 5], np.int32), ([0, 300], np.float32)]:
        with pytest.raises(DataError, match="values run from"):
            grey(values, dtype)
    with pytest.raises(DataError, match="not finite"):
        grey([0, np.nan], np.float32)


@pytest.mark.parametrize("mode", sorted(Image.MODES))
def test_every_mode_pillow_has(mode: str) -> None:
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_rgb_is_left_alone() -> None:
    image = Image.fromarray(noise(4, 4))
    assert to_rgb(image) is image


def test_exif_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    rgb = read_back(tmp_path, "a.jpg", Image.fromarray(noise(4, 9)), exif=exif)
    assert rgb.shape == (4, 9, 3)


def test_one_pixel(tmp_path: Path) -> None:
    assert read_back(tmp_path, "a.png", Image.new("RGB", (1, 1), (1, 2, 3))).tolist() == [[[1, 2, 3]]]


def jpeg(size: int = 64) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(noise(size, size)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"this is no picture", "can identify"),
        (jpeg()[:-1500], "truncated"),
        (jpeg()[:200], "truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "identify"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(BadImage, match=r"image 'bad\.jpg' can't be used: ") as caught:
        load(str(tmp_path)).image(0)
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 4
    assert reason in caught.value.reason
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_every_truncation_is_named_or_harmless(tmp_path: Path, format: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(noise(16, 16)).save(stream, format)
    whole = stream.getvalue()
    failures = 0
    for length in range(0, len(whole) - 32, max(1, len(whole) // 40)):
        (tmp_path / "a.png").write_bytes(whole[:length])
        try:
            load(str(tmp_path)).image(0)
        except BadImage as error:
            assert "\n" not in error.message
            failures += 1
    assert failures > 5


def test_truncated_images_are_refused_even_where_a_library_allowed_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg()[:-1500])
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(BadImage, match="truncated"):
        load(str(tmp_path)).image(0)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.png", size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(BadImage, match="decompression bomb"):
        load(str(tmp_path)).image(0)


def test_running_out_of_file_handles_is_not_the_images_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.png")
    data = load(str(tmp_path))

    def no_handles(index: int) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(data, "open", no_handles)
    for call in (lambda: data.image(0), lambda: data.fingerprint([0])):
        with pytest.raises(OSError, match="Too many"):
            call()


def test_bad_image_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadImage("a.png", "torn", hint="mend it")))
    assert (error.id, error.reason, error.hint, type(error)) == ("a.png", "torn", "mend it", BadImage)


# --- fingerprint ---------------------------------------------------------------------------------


def test_fingerprint_changes_with_content_even_at_the_same_size_and_time(tree: Path) -> None:
    everything = range(5)
    data = load(str(tree))
    before = data.fingerprint(everything)
    assert before == load(str(tree)).fingerprint(list(everything))
    assert len(before) == 32
    int(before, 16)
    path = tree / "b" / "2.png"
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert data.fingerprint(everything) != before
    assert data.fingerprint(range(4)) == load(str(tree)).fingerprint(range(4))  # b/2.png is the last


def test_fingerprint_depends_on_selection_and_order_but_not_on_place(tree: Path, tmp_path: Path) -> None:
    data = load(str(tree))
    prints = [data.fingerprint(i) for i in ([], [0], [1], [0, 1], [1, 0], [0, 1, 2], range(5))]
    assert len(set(prints)) == len(prints)
    copy = tmp_path.parent / f"{tmp_path.name}-copy"
    shutil.copytree(tree, copy)
    (copy / "a" / "more.txt").write_text("ignored")
    assert load(str(copy)).fingerprint(range(5)) == prints[-1]


def test_fingerprint_changes_with_a_name_or_a_label(tree: Path) -> None:
    before = load(str(tree)).fingerprint(range(5))
    data = load(str(tree))
    data.labels[0] = 1
    assert data.fingerprint(range(5)) != before
    data = load(str(tree))
    data.labels = None
    assert data.fingerprint(range(5)) != before
    (tree / "b" / "2.png").rename(tree / "b" / "3.png")
    assert load(str(tree)).fingerprint(range(5)) != before


def test_fingerprint_over_more_files_than_one_chunk(tmp_path: Path) -> None:
    content = write(tmp_path / "0000.png").read_bytes()
    for k in range(1, 1100):
        (tmp_path / f"{k:04}.png").write_bytes(content + bytes([k % 256]))
    data = load(str(tmp_path))
    before = data.fingerprint(range(1100))
    assert data.fingerprint(range(1100)) == before
    (tmp_path / "1050.png").write_bytes(content)
    assert data.fingerprint(range(1100)) != before


class Memory(Dataset):
    """Images held in memory, for the defaults."""

    name = "memory"

    def __init__(self, images: list[Image.Image]):
        self.images = images
        self.ids = [f"{k}" for k in range(len(images))]

    def image(self, index: int) -> Image.Image:
        return self.images[index]


def test_default_fingerprint_sees_pixels_size_palette_labels_and_ids() -> None:
    base = noise(4, 6)
    changed = base.copy()
    changed[3, 5, 2] ^= 1
    index = np.arange(24, dtype=np.uint8).reshape(4, 6)
    palettes = []
    for shift in (0, 1):
        image = Image.fromarray(index, "P")
        image.putpalette([(3 * k + shift) % 256 for k in range(768)])
        palettes.append(image)
    images = [Image.fromarray(a) for a in (base, changed, base.reshape(6, 4, 3))] + palettes
    prints = [Memory([image]).fingerprint([0]) for image in images]
    renamed, labelled = Memory(images[:1]), Memory(images[:1])
    renamed.ids = ["other"]
    labelled.labels = [0]
    prints += [renamed.fingerprint([0]), labelled.fingerprint([0])]
    assert len(set(prints)) == len(prints)
    assert Memory([Image.fromarray(base)]).fingerprint([0]) == prints[0]


def test_id_and_label_do_not_run_into_each_other() -> None:
    image = Image.new("RGB", (2, 2))
    one, other = Memory([image]), Memory([image])
    one.ids, one.labels = ["a1"], [2]
    other.ids, other.labels = ["a"], [12]
    assert one.fingerprint([0]) != other.fingerprint([0])


# --- select --------------------------------------------------------------------------------------


@given(st.integers(0, 3000), st.integers(1, 4000))
def test_select_is_even_sorted_and_distinct(total: int, limit: int) -> None:
    chosen = select(total, limit)
    assert len(chosen) == min(total, limit)
    assert chosen == sorted(set(chosen))
    assert all(0 <= index < total for index in chosen)
    if 0 < limit < total:
        assert chosen == [int(np.floor(i * total / limit)) for i in range(limit)]
        gaps = np.diff(chosen)
        assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_select_is_balanced_over_classes() -> None:
    labels = np.repeat(np.arange(100), 50)
    assert (np.bincount(labels[select(5000, 200)], minlength=100) == 2).all()
    assert set(np.bincount(labels[select(5000, 64)], minlength=100)) == {0, 1}


def test_select_everything_or_nothing() -> None:
    assert select(5, None) == select(5, 5) == select(5, 99) == [0, 1, 2, 3, 4]
    with pytest.raises(UsageError, match="selects nothing"):
        select(5, 0)


# --- the base class ------------------------------------------------------------------------------


def test_the_docstrings_example_is_a_dataset() -> None:
    lines = Dataset.__doc__.split("::\n", 1)[1].split("With several workers", 1)[0]
    example = textwrap.dedent(lines)
    assert len([line for line in example.splitlines() if line.strip()]) <= 8
    scope = {"Dataset": Dataset, "Image": Image}
    exec(example, scope)
    greys = scope["Greys"]()
    greys.check()
    assert len(greys) == 8
    assert greys.image(7).getpixel((0, 0)) == (224, 224, 224)
    assert greys.fingerprint([0, 1]) != greys.fingerprint([0, 2])
    assert greys.notes == ()


def test_image_is_the_subclass_business() -> None:
    class Nothing(Dataset):
        name = "nothing"
        ids = ("a",)

    with pytest.raises(NotImplementedError, match=r"Nothing\.image"):
        Nothing().image(0)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"ids": ["a"]}, "no 'name'"),
        ({"name": "x"}, "no 'ids'"),
        ({"name": "x", "ids": ["a", "b", "a"]}, "the id 'a' more than once"),
        ({"name": "x", "ids": [1]}, "not strings"),
        ({"name": "x", "ids": ["a"], "labels": [0, 1]}, "1 ids but 2 labels"),
        ({"name": "x", "ids": ["a", "b"], "labels": [0, 2], "classes": ["p", "q"]}, "label 2 but 2 classes"),
        ({"name": "x", "ids": ["a"], "labels": [-1], "classes": ["p"]}, "label -1"),
        ({"name": "x", "ids": ["a"], "cues": {"shape": [0, 1]}}, "1 ids but 2 shape cues"),
        ({"name": "x", "ids": ["a"], "cues": {"shape": [1]}, "classes": ["p"]}, "shape cue 1 but 1 classes"),
        ({"name": "x", "ids": ["a"], "has_masks": True}, "says it has masks but has no method 'mask'"),
        ({"name": "x", "ids": ["a"], "train": ["a"]}, "a 'list' as its train split"),
    ],
)
def test_check_names_contradictions(parts: dict[str, object], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        type("Odd", (Dataset,), parts)().check()


def test_a_broken_train_split_is_found() -> None:
    class Split(Dataset):
        name, ids = "train-of-x", ["a", "a"]

    class Whole(Dataset):
        name, ids, train = "x", ["a"], Split()

    with pytest.raises(PluginError, match="'train-of-x' has the id 'a' more than once"):
        Whole().check()


def test_another_datasets_class_is_found_by_name() -> None:
    class Pets(Dataset):
        name, ids, classes = "pets", [], ["Cat", "dog"]

    assert [Pets().class_of(name) for name in ("cat", "DOG", "bird")] == [0, 1, None]
    Pets.classes = None
    assert Pets().class_of("cat") is None


def test_no_torch_is_imported() -> None:
    names = ("dataset", "folder", "images", "shapetex", "cifar10", "cue_conflict", "segmentation")
    modules = ", ".join(f"probekit.datasets.{name}" for name in names)
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    root = Path(dataset_module.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert result.stdout.strip() == "False"
