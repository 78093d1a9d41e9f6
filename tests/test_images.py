"""Batches: the transform against an independent one, bad images, workers, Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from math import floor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import probekit.datasets.images as images_module
from probekit.datasets.dataset import BadImage, Dataset, select
from probekit.datasets.folder import load
from probekit.datasets.images import Bad, Batch, Prepared, batches, masks
from probekit.errors import DataError, PluginError, UsageError
from probekit.specs import Preprocessing

ROOT = Path(images_module.__file__).parents[2]
SAMPLE = Path(os.environ.get("PROBEKIT_TEST_DATA", ROOT.parent / "shared" / "data")) / "imagenet-sample"
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


class Memory(Dataset):
    """Images (or exceptions to raise) held in memory."""

    name = "memory"

    def __init__(self, items: list[object]):
        self.items = items
        self.ids = [f"item-{k}" for k in range(len(items))]

    def image(self, index: int) -> Image.Image:
        item = self.items[index]
        if isinstance(item, BaseException):
            raise item
        return item


SMALL = Preprocessing(size=(16, 16), crop_pct=0.8, interpolation="bilinear")


def pictures(count: int) -> Memory:
    return Memory([Image.fromarray(noise(20 + k % 5, 24 - k % 3, seed=k)) for k in range(count)])


def everything(*args: object, **options: object) -> list[Batch]:
    return list(batches(*args, **options))


# --- the transform -------------------------------------------------------------------------------


def reference(image: Image.Image, p: Preprocessing) -> np.ndarray:
    """The evaluation transform written from its definition: (3, rows, cols) float64."""
    image = image.convert("RGB")
    width, height = image.size
    rows, cols = p.size
    tall, wide = floor(rows / p.crop_pct), floor(cols / p.crop_pct)
    if p.crop_mode == "squash":
        new = (tall, wide)
    elif p.crop_mode == "border":
        scale = min(tall / height, wide / width)
        new = (round(height * scale), round(width * scale))
    elif tall == wide:  # the longer side is truncated, as torchvision does
        new = (tall, int(tall * width / height)) if height <= width else (int(tall * height / width), tall)
    else:
        scale = max(tall / height, wide / width)
        new = (round(height * scale), round(width * scale))
    values = np.asarray(image.resize((new[1], new[0]), FILTERS[p.interpolation])).astype(np.float64)
    if p.crop_mode == "border":
        fill = [round(255 * m) for m in p.mean]
        canvas = np.empty((max(new[0], rows), max(new[1], cols), 3))
        canvas[:] = fill
        top, left = max(0, (rows - new[0]) // 2), max(0, (cols - new[1]) // 2)
        canvas[top : top + new[0], left : left + new[1]] = values
        values, new = canvas, canvas.shape[:2]
    top, left = round((new[0] - rows) / 2.0), round((new[1] - cols) / 2.0)
    values = values[top : top + rows, left : left + cols] / 255
    return ((values - p.mean) / p.std).transpose(2, 0, 1)


CASES = [
    Preprocessing(),
    Preprocessing(interpolation="bilinear", crop_pct=0.9),
    Preprocessing(interpolation="nearest", crop_pct=1.0, size=(32, 32)),
    Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.4, 0.3), crop_pct=0.95, size=(384, 384)),
    Preprocessing(size=(224, 448)),
    Preprocessing(size=(448, 224), interpolation="bilinear", crop_pct=1.0),
    Preprocessing(size=(40, 56), crop_pct=0.7),
    Preprocessing(crop_mode="squash", crop_pct=1.0),
    Preprocessing(crop_mode="squash", crop_pct=0.9, size=(48, 64), interpolation="bilinear"),
    Preprocessing(crop_mode="border", crop_pct=1.0, size=(64, 64)),
    Preprocessing(crop_mode="border", crop_pct=0.9, size=(64, 96)),
]
SIZES = [(375, 500), (500, 333), (224, 224), (256, 256), (30, 17), (1, 1), (1, 40), (40, 1), (299, 301)]


@pytest.mark.parametrize("p", CASES, ids=lambda p: f"{p.crop_mode}-{p.interpolation}-{p.size}-{p.crop_pct}")
def test_the_transform_is_the_definition(p: Preprocessing) -> None:
    data = Memory([Image.fromarray(noise(*size, seed=k)) for k, size in enumerate(SIZES)])
    (batch,) = everything(data, range(len(SIZES)), p, batch_size=99)
    assert batch.pixels.dtype == torch.float32
    assert tuple(batch.pixels.shape) == (len(SIZES), 3, *p.size)
    assert not batch.bad
    for item, pixels in zip(data.items, batch.pixels, strict=True):
        assert np.abs(pixels.numpy() - reference(item, p)).max() < 1e-6


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no ImageNet sample here")
@pytest.mark.parametrize("p", [CASES[0], CASES[1], CASES[4]], ids=["moco", "bilinear", "wide"])
def test_the_transform_on_real_photographs(p: Preprocessing) -> None:
    data = load(str(SAMPLE))
    data.check()
    assert len(data) == 800
    assert len(data.classes) == len(set(data.labels))
    indices = select(len(data), 24)
    for batch in batches(data, indices, p, batch_size=10):
        assert not batch.bad
        for index, pixels in zip(batch.indices, batch.pixels, strict=True):
            image = Image.open(SAMPLE / data.ids[index])
            assert np.abs(pixels.numpy() - reference(image, p)).max() < 1e-6


def test_odd_modes_reach_the_network_as_rgb() -> None:
    sixteen = np.full((20, 20), 65535, np.uint16)
    data = Memory(
        [Image.fromarray(sixteen), Image.new("CMYK", (20, 20)), Image.new("LA", (20, 20), (255, 0))]
    )
    (batch,) = everything(data, range(3), SMALL, batch_size=4)
    white = (1 - np.array(SMALL.mean)) / SMALL.std
    assert np.abs(batch.pixels.numpy() - white[:, None, None]).max() < 1e-5


# --- masks ---------------------------------------------------------------------------------------


class Labelled(Dataset):
    """Pictures whose colour is their class: what the image's own transform shows is what the mask must say."""

    name, has_masks, mask_ignore = "labelled", True, 9

    def __init__(self, *maps: np.ndarray):
        self.maps = maps
        self.ids = [f"map-{k}" for k in range(len(maps))]

    def image(self, index: int) -> Image.Image:
        return Image.fromarray((self.maps[index] * 20).astype(np.uint8)).convert("RGB")

    def mask(self, index: int) -> Image.Image:
        return Image.fromarray(self.maps[index].astype(np.uint8))


def blocks(height: int, width: int, seed: int = 0) -> np.ndarray:
    classes = np.random.default_rng(seed).integers(0, 9, (height // 8 + 1, width // 8 + 1))
    return np.kron(classes, np.ones((8, 8), int))[:height, :width]


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("shape", [(64, 64), (90, 41), (33, 77)])
@pytest.mark.parametrize("size", [(32, 32), (48, 24)])
def test_masks_go_where_the_pixels_go(mode: str, shape: tuple[int, int], size: tuple[int, int]) -> None:
    data = Labelled(blocks(*shape), blocks(*shape, seed=1))
    p = Preprocessing(size=size, crop_pct=0.8, crop_mode=mode, mean=(0.0,) * 3, std=(1.0,) * 3)
    for index in range(2):
        found = masks(data, index, p)
        assert (found.shape, found.dtype) == (size, np.int64)
        # nearest pixels of the image itself, through the reference written from the transform's definition
        exact = p.model_copy(update={"interpolation": "nearest", "mean": (1.0,) * 3})
        expected = (reference(data.image(index), exact)[0] + 1) * 255 / 20  # a border is white: 12.75
        assert np.abs(np.where(expected > 9, -1, expected) - found).max() < 1e-9
        # and the smoothed image agrees wherever it is of one colour
        smooth = everything(data, [index], p, batch_size=1)[0].pixels[0, 0].numpy() * 255 / 20
        assert (np.abs(smooth - found) < 0.5)[found >= 0].mean() > 0.6


def test_what_counts_as_no_class() -> None:
    numbers = np.full((32, 32), 3)
    numbers[:, 16:] = 9
    same = Preprocessing(size=(32, 32), crop_pct=1.0)
    assert masks(Labelled(numbers), 0, same).tolist() == [[3] * 16 + [-1] * 16] * 32

    class Wide(Labelled):
        mask_ignore = None

        def mask(self, index: int) -> Image.Image:
            return Image.fromarray(self.maps[index].astype(np.int32))

    assert masks(Wide(numbers), 0, same).max() == 9
    great = np.where(numbers == 9, -5, (1 << 24) - 2)
    assert masks(Wide(great), 0, same).tolist() == [[(1 << 24) - 2] * 16 + [-1] * 16] * 32
    with pytest.raises(BadImage, match="class number 16777215"):
        masks(Wide(great + 1), 0, same)
    around = masks(
        Labelled(np.zeros((16, 32))), 0, Preprocessing(size=(32, 32), crop_pct=1, crop_mode="border")
    )
    assert (around == 0).sum() == 16 * 32
    assert set(np.unique(around)) == {-1, 0}


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (Image.new("RGB", (9, 9)), "its mask has mode 'RGB'"),
        (Image.new("F", (9, 9)), "its mask has mode 'F'"),
        (np.zeros((9, 9)), "its mask has type 'ndarray'"),
        (None, "its mask has type 'NoneType'"),
        (OSError("image file is truncated (3 bytes not processed)"), "its mask: the file is truncated"),
        (BadImage("x", "torn"), "torn"),
        (DataError("lost"), "lost"),
    ],
)
def test_masks_that_cannot_be_used(mask: object, reason: str) -> None:
    class Odd(Memory):
        def mask(self, index: int) -> Image.Image:
            if isinstance(mask, Exception):
                raise mask
            return mask

    with pytest.raises(BadImage, match=r"image 'item-0' can't be used: ") as caught:
        masks(Odd([Image.new("RGB", (9, 9))]), 0, SMALL)
    assert caught.value.reason.startswith(reason)


# --- the same bits -------------------------------------------------------------------------------


def joined(found: list[Batch]) -> tuple[list[int], torch.Tensor, list[Bad]]:
    return (
        [index for batch in found for index in batch.indices],
        torch.cat([batch.pixels for batch in found]),
        [bad for batch in found for bad in batch.bad],
    )


def test_workers_and_batch_size_change_no_bit() -> None:
    data = pictures(23)
    data.items[5] = BadImage("item-5", "torn")
    data.items[22] = OSError("image file is truncated (3 bytes not processed)")
    order = [*range(22, -1, -1), 3, 3]
    expected = joined(everything(data, order, SMALL, batch_size=1))
    assert expected[0] == [index for index in order if index not in (5, 22)]
    assert expected[2] == [Bad(22, "item-22", "the file is truncated"), Bad(5, "item-5", "torn")]
    for batch_size in (1, 4, 7, 100):
        for workers in (0, 1, 2):
            found = everything(data, order, SMALL, batch_size=batch_size, workers=workers)
            assert len(found) == -(-len(order) // batch_size)
            indices, pixels, bad = joined(found)
            assert (indices, bad) == (expected[0], expected[2])
            assert torch.equal(pixels, expected[1])


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no ImageNet sample here")
def test_workers_change_no_bit_of_real_photographs() -> None:
    data = load(str(SAMPLE))
    indices = select(len(data), 20)
    one = joined(everything(data, indices, Preprocessing(), batch_size=20))
    two = joined(everything(data, indices, Preprocessing(), batch_size=3, workers=2))
    assert one[0] == two[0] == indices
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_random_state_is_left_alone(workers: int) -> None:
    before = torch.get_rng_state()
    everything(pictures(5), range(5), SMALL, batch_size=2, workers=workers)
    assert torch.equal(before, torch.get_rng_state())


def test_a_float64_default_changes_nothing() -> None:
    expected = joined(everything(pictures(3), range(3), SMALL, batch_size=2))[1]
    torch.set_default_dtype(torch.float64)
    try:
        (batch,) = everything(pictures(3), range(3), SMALL, batch_size=3)
        (empty,) = everything(Memory([BadImage("x", "torn")]), [0], SMALL, batch_size=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert batch.pixels.dtype == empty.pixels.dtype == torch.float32
    assert torch.allclose(batch.pixels, expected, atol=1e-6)


# --- bad images ----------------------------------------------------------------------------------


def test_a_bad_image_shifts_no_other(tmp_path: Path) -> None:
    for k in range(6):
        Image.fromarray(noise(20, 20, seed=k)).save(tmp_path / f"{k}.png")
    good = joined(everything(load(str(tmp_path)), range(6), SMALL, batch_size=2))[1]
    (tmp_path / "2.png").write_bytes(b"")
    (tmp_path / "3.png").write_text("text")
    whole = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(whole[: len(whole) // 2])
    for workers in (0, 2):
        first, second, third = everything(load(str(tmp_path)), range(6), SMALL, batch_size=2, workers=workers)
        assert (first.indices, second.indices, third.indices) == ([0, 1], [], [4])
        assert len(second) == 0
        assert tuple(second.pixels.shape) == (0, 3, 16, 16)
        assert [bad.index for bad in second.bad] == [2, 3]
        assert [bad.id for bad in second.bad + third.bad] == ["2.png", "3.png", "5.png"]
        reasons = [bad.reason for bad in second.bad + third.bad]
        assert reasons[0] == "the file is empty"
        assert reasons[1] == "not an image that Pillow can identify"
        assert "truncated" in reasons[2]
        assert torch.equal(first.pixels, good[:2])
        assert torch.equal(third.pixels, good[4:5])


@pytest.mark.parametrize("workers", [0, 2])
def test_fail_stops_at_the_first_bad_image(tmp_path: Path, workers: int) -> None:
    for k in range(6):
        Image.fromarray(noise(20, 20, seed=k)).save(tmp_path / f"{k}.png")
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "5.png").write_bytes(b"")
    source = batches(load(str(tmp_path)), range(6), SMALL, batch_size=2, workers=workers, on_bad="fail")
    assert next(source).indices == [0, 1]
    with pytest.raises(DataError, match=r"image '3\.png' can't be used: the file is empty") as caught:
        next(source)
    assert "--on-bad-image skip" in caught.value.hint
    assert multiprocessing.active_children() == []


def test_what_a_third_partys_image_may_raise() -> None:
    items = [DataError("it is lost"), ValueError("odd value"), SyntaxError("broken PNG file"), OSError("no")]
    (batch,) = everything(Memory(items), range(4), SMALL, batch_size=9)
    assert [bad.reason for bad in batch.bad] == [
        "it is lost",
        "the file is damaged (odd value)",
        "the file is damaged (broken PNG file)",
        "the file is damaged (no)",
    ]


def test_an_image_only_opened_is_loaded_here(tmp_path: Path) -> None:
    Image.fromarray(noise(64, 64)).save(tmp_path / "a.jpg")
    torn = tmp_path / "b.jpg"
    torn.write_bytes((tmp_path / "a.jpg").read_bytes()[:-800])
    data = Memory([Image.open(tmp_path / "a.jpg"), Image.open(torn)])
    (batch,) = everything(data, range(2), SMALL, batch_size=2)
    assert (batch.indices, batch.bad) == ([0], [Bad(1, "item-1", "the file is truncated")])


def test_values_without_a_range_are_bad_images() -> None:
    (batch,) = everything(Memory([Image.new("I", (9, 9), 1 << 20)]), [0], SMALL, batch_size=2)
    assert batch.bad[0].reason.startswith("its integer values run from")


def test_a_thread_of_pixels_does_not_fill_the_memory() -> None:
    long, wide = Image.new("RGB", (30_000, 1)), Image.new("RGB", (1, 30_000))
    for p in (Preprocessing(), Preprocessing(size=(112, 224)), Preprocessing(crop_mode="border")):
        (batch,) = everything(Memory([long, wide]), [0, 1], p, batch_size=2)
        assert not batch.indices
        assert all("too long and thin" in bad.reason for bad in batch.bad)
    (batch,) = everything(Memory([long, wide]), [0, 1], Preprocessing(crop_mode="squash"), batch_size=2)
    assert batch.indices == [0, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_of_the_datasets_code_is_not_a_bad_image(workers: int) -> None:
    data = Memory([Image.new("RGB", (9, 9)), KeyError("no such key")])
    with pytest.raises(PluginError, match="dataset 'memory' failed at image 'item-1': KeyError") as caught:
        everything(data, [0, 1], SMALL, batch_size=2, workers=workers)
    assert any("Traceback" in note for note in caught.value.__notes__)
    with pytest.raises(PluginError, match="gave a 'str' for image 'item-0'"):
        everything(Memory(["no image"]), [0], SMALL, batch_size=2, workers=workers)
    for shortage in (MemoryError(), OSError(24, "Too many open files")):
        with pytest.raises(DataError, match="failed at image 'item-0'") as caught:
            everything(Memory([shortage]), [0], SMALL, batch_size=2, workers=workers)
        assert not isinstance(caught.value, BadImage)


class Unpicklable(PluginError):
    def __init__(self, first: str, second: str):
        super().__init__(first + second, hint="mend it")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_that_cannot_be_pickled_still_arrives(workers: int) -> None:
    with pytest.raises(PluginError, match="one two") as caught:
        everything(
            pictures(2),
            [0, 1],
            SMALL,
            batch_size=2,
            workers=workers,
            variant=_raise(Unpicklable("one ", "two")),
        )
    assert caught.value.hint == "mend it"


def _raise(error: Exception):
    def variant(pixels: torch.Tensor, index: int) -> torch.Tensor:
        raise error

    return variant


# --- arguments and variants ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 0}, "batch size of 0"),
        ({"workers": -1}, "-1 workers"),
        ({"on_bad": "ignore"}, "'skip' or 'fail'"),
        ({"indices": [0, 3]}, "has 3 images, so no index 3"),
        ({"indices": [-1, 0]}, "no index -1"),
    ],
)
def test_arguments_are_checked_at_once(changed: dict[str, object], message: str) -> None:
    given = {"indices": [0, 1], "batch_size": 2, **changed}
    with pytest.raises(UsageError, match=message):
        batches(pictures(3), given.pop("indices"), SMALL, **given)


def test_no_indices_no_batches() -> None:
    assert everything(pictures(3), [], SMALL, batch_size=2, workers=2) == []
    assert everything(pictures(3), np.arange(2), SMALL, batch_size=2)[0].indices == [0, 1]


def test_variants_are_applied_after_normalisation_with_the_index() -> None:
    plain = joined(everything(pictures(5), [4, 2], SMALL, batch_size=1))[1]
    for workers in (0, 2):
        found = everything(
            pictures(5), [4, 2], SMALL, batch_size=1, workers=workers, variant=lambda x, i: x * 2 + i
        )
        assert torch.equal(joined(found)[1], plain * 2 + torch.tensor([4.0, 2.0]).view(2, 1, 1, 1))
    with pytest.raises(PluginError, match=r"returned shape \(16, 16\), not \(3, 16, 16\)"):
        everything(pictures(1), [0], SMALL, batch_size=1, variant=lambda x, i: x[0])
    with pytest.raises(PluginError, match="a variant of dataset 'memory' failed at image 'item-0': ZeroDiv"):
        everything(pictures(1), [0], SMALL, batch_size=1, variant=_raise(ZeroDivisionError("by zero")))


def test_prepared_images_are_decoded_once_while_there_is_room_and_no_variant_changes_them() -> None:
    class Counted(Memory):
        seen: list[int] = []

        def image(self, index: int) -> Image.Image:
            self.seen.append(index)
            return super().image(index)

    counted = Counted(pictures(4).items)
    plain = joined(everything(pictures(4), range(4), SMALL, batch_size=2))[1]
    prepared = Prepared(room=3 * plain[0].nbytes)
    for _ in range(3):
        found = joined(
            everything(
                counted, range(4), SMALL, batch_size=2, variant=lambda x, i: x.add_(1), prepared=prepared
            )
        )[1]
        assert torch.equal(found, plain + 1)
    assert len(prepared) == 3 and counted.seen == [0, 1, 2, 3, 3, 3]


# --- processes -----------------------------------------------------------------------------------


def test_leaving_early_leaves_no_process() -> None:
    source = batches(pictures(40), range(40), SMALL, batch_size=2, workers=2)
    next(source)
    assert len(multiprocessing.active_children()) == 2
    source.close()
    assert multiprocessing.active_children() == []


class Sleepy(Memory):
    def image(self, index: int) -> Image.Image:
        time.sleep(0.2)
        return super().image(index)


def test_an_exception_that_is_kept_keeps_no_process() -> None:
    """Its traceback holds the DataLoader's frames, so that dropping the iterator would not end it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    source = batches(Sleepy(pictures(40).items), range(40), SMALL, batch_size=8, workers=2)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.6)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            next(source)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert caught.tb is not None
    assert multiprocessing.active_children() == []


class Deadly(Memory):
    def image(self, index: int) -> Image.Image:
        if index == 3:
            os._exit(9)
        return super().image(index)


def test_a_dead_worker_is_an_error_not_a_hang() -> None:
    data = Deadly(pictures(4).items)
    with pytest.raises(DataError, match="a process that prepares images died") as caught:
        everything(data, range(4), SMALL, batch_size=2, workers=1)
    assert "--workers 0" in caught.value.hint
    assert multiprocessing.active_children() == []


SLOW = """
    import os, sys, time
    from PIL import Image
    from probekit.datasets.dataset import Dataset
    from probekit.datasets.images import batches
    from probekit.specs import Preprocessing

    class Slow(Dataset):
        name, ids = "slow", [str(k) for k in range(1000)]
        def image(self, index):
            time.sleep(0.05)
            return Image.new("RGB", (20, 20))

    p = Preprocessing(size=(16, 16))
    try:
        for k, batch in enumerate(batches(Slow(), range(1000), p, batch_size=2, workers=2)):
            print(k, flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
@pytest.mark.parametrize("how", ["ctrl-c", "killed"])
def test_nothing_survives(tmp_path: Path, how: str) -> None:
    """Ctrl-C to the whole group, as a terminal sends it; or the parent alone killed outright."""
    script = tmp_path / "slow.py"
    script.write_text(textwrap.dedent(SLOW))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout.readline().strip() == "0"
        if how == "ctrl-c":
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=30)
            assert process.returncode == 130
            assert "interrupted" in out
            assert "Traceback" not in err
        else:
            process.kill()
            process.wait()
        deadline = time.monotonic() + 20
        while group_lives(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not group_lives(process.pid)
    finally:
        if group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    # a group of unreaped children only is as good as gone
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            states.append(fields[0])
    return any(state not in "ZX" for state in states) if Path("/proc/self/stat").exists() else True
