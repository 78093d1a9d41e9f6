"""A dataset of somebody's own: every mistake in it is one sentence that names it, with exit code 3."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import probekit
from probekit.datasets.dataset import BadImage, Dataset, fingerprint_of
from probekit.errors import PluginError
from probekit.plugins.catalog import Catalog
from probekit.subject import open_dataset

PLUGIN = """
import numpy as np
from PIL import Image
from probekit import Dataset, hookimpl
from probekit.specs import DatasetSpec
PROBEKIT_API = 1
@hookimpl
def probekit_datasets():
    return [DatasetSpec(name=name, summary="s", argument="[WHAT]", target=f"mine:{name}")
            for name in ("blind", "raises", "none", "listed", "exits", "bare", "named", "image", "good")]
class Greys(Dataset):
    name = "greys"
    ids = ["a", "b"]
    def __init__(self, argument=None):
        self.labels = ["cat", "dog"] if argument == "names" else [0, 1]
        self.argument = argument
    def image(self, index):
        if self.argument == "raises":
            return 1 / 0
        image = Image.new("RGB", (32, 32), (32 * index,) * 3)
        return np.asarray(image) if self.argument == "array" else image
image = good = named = Greys
class Blind(Greys):
    def fingerprint(self, indices): return None
blind = Blind
def raises(argument): raise RuntimeError("no\\nway")
def none(argument): pass
def listed(argument): return [1]
def exits(argument): raise SystemExit(0)
def bare(): return Greys()
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    return file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raises", "dataset 'raises' of 'mine' failed: RuntimeError: no way (mine.py, line"),
        ("none", "dataset 'none' of 'mine' is a 'NoneType'"),
        ("listed", "dataset 'listed' of 'mine' is a 'list'"),
        ("exits", "dataset 'exits' of 'mine' failed: SystemExit"),
        ("bare", "dataset 'bare' of 'mine' failed: TypeError: bare() takes 0 positional arguments"),
        ("named:names", "dataset 'greys' has the label 'cat', which is no whole number"),
    ],
)
def test_a_loader_that_is_wrong(plugin, text, said):
    catalog = Catalog.load([plugin], enabled=False)
    with pytest.raises(PluginError) as caught:
        open_dataset(catalog.dataset(text), catalog)
    assert said in caught.value.message and caught.value.hint
    assert len(open_dataset(catalog.dataset("good"), catalog)) == 2


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("raises", "dataset 'greys' failed at image 'a': ZeroDivisionError: division by zero"),
        ("array", "dataset 'greys' gave a 'ndarray' for image 'a', not an image"),
    ],
)
def test_images_that_are_wrong_fail_their_cell_and_leave_the_others(
    cli, tmp_path, plugin, tiny, argument, said
):
    words = ["run", "--no-plugins", "--plugin", plugin, "--model", tiny, "--metrics", "nmi"]
    code, out, err = cli(*words, "--dataset", f"image:{argument}", "--out", tmp_path / "alone")
    assert code == 3 and f"error: {said}" in err and "Traceback" not in err
    code, out, err = cli(
        *words, "--dataset", f"image:{argument}", "--dataset", "good", "--out", tmp_path / "both"
    )
    assert code == 1 and "1 cell failed" in out and "1 cell done" in out


def test_a_dataset_that_cannot_be_opened_fails_its_cells_alone(cli, tmp_path, plugin, tiny):
    words = ["run", "--no-plugins", "--plugin", plugin, "--model", tiny, "--metrics", "nmi"]
    code, out, err = cli(*words, "--dataset", "raises", "--dataset", "good", "--out", tmp_path / "both")
    assert code == 1 and "1 cell failed" in out and "1 cell done" in out
    assert "dataset 'raises' of 'mine' failed: RuntimeError: no way (mine.py" in err
    outcome = next(c.outcome for c in probekit.open(tmp_path / "both").cells() if c.dataset == "raises")
    assert "dataset 'raises' of 'mine' failed" in outcome.reason and "in raises" in outcome.details
    code, _, err = cli(*words, "--dataset", "blind", "--out", tmp_path / "blind")
    assert code == 3 and "dataset 'greys' gave a 'NoneType' as its fingerprint" in err
    for wrong, expected in ((f"folder:{tmp_path}/none", 4), ("unheard-of", 2)):  # the user's own mistakes
        code, _, err = cli(*words, "--dataset", wrong, "--dataset", "good", "--out", tmp_path / "refused")
        assert code == expected and "error: " in err and not (tmp_path / "refused").exists()


class Parts(Dataset):
    """Two images, and whatever is wrong with the rest of it."""

    def __init__(self, **parts: object):
        self.name, self.ids, self.labels, self.classes = "parts", ["a", "b"], [0, 1], ["x", "y"]
        self.__dict__.update(parts)

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (self.labels[index],) * 3)


class Long(Parts):
    def __len__(self) -> int:
        return 100


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Parts(ids="ab"), "dataset 'parts' has a 'str' as its 'ids', not a list"),
        (Parts(ids=iter(["a", "b"])), "dataset 'parts' has a 'list_iterator' as its 'ids', not a list"),
        (Parts(ids=[1, 2]), "dataset 'parts' has ids that are not strings"),
        (Long(), "dataset 'parts' has 2 ids but says it has 100 images"),
        (Parts(labels=1), "dataset 'parts' has a 'int' as its 'labels', not a list"),
        (Parts(classes="xy"), "dataset 'parts' has a 'str' as its 'classes', not a list"),
        (Parts(classes=[0, 1]), "dataset 'parts' has classes that are not strings"),
        (Parts(classes={0: "x", 1: "y"}), "dataset 'parts' has a 'dict' as its 'classes', not a list"),
        (Parts(notes="one"), "dataset 'parts' has a 'str' as its 'notes', not a list"),
        (Parts(cues=["shape"]), "dataset 'parts' has a 'list' as its 'cues', not class numbers by cue"),
        (Parts(train=Parts()), "dataset 'parts' has image 'a' in its train split too"),
    ],
)
def test_parts_of_the_wrong_kind_are_named(data, said):
    with pytest.raises(PluginError) as caught:
        data.check()
    assert caught.value.message == said


def test_a_train_split_is_another_dataset():
    data = Parts()
    data.train = data
    with pytest.raises(PluginError, match="dataset 'parts' is its own train split"):
        data.check()
    Parts(train=Parts(labels=[1, 0])).check()  # named alike, other images
    Parts(labels=np.array([0, 1]), classes=("x", "y")).check()


@pytest.mark.parametrize(
    ("given", "said"), [(None, "a 'NoneType'"), (b"b", "a 'bytes'"), ("", "an empty text")]
)
def test_a_fingerprint_that_cannot_change_is_refused(given, said):
    class Blind(Parts):
        def fingerprint(self, indices):
            return given

    with pytest.raises(PluginError, match=f"dataset 'parts' gave {said} as its fingerprint"):
        fingerprint_of(Blind(), [0])
    assert len(fingerprint_of(Parts(), [0])) == 32


class Own(Dataset):
    name, ids = "own", ["a"]

    def __init__(self, answer: object):
        self.answer = answer

    def image(self, index: int) -> Image.Image:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]


def test_a_fingerprint_tells_a_bad_file_from_bad_code():
    assert Own(BadImage("a", "cut short")).fingerprint([0]) == Own(OSError("gone")).fingerprint([0])
    for answer in (KeyError("k"), np.zeros((2, 2))):
        with pytest.raises(PluginError, match="dataset 'own'"):
            Own(answer).fingerprint([0])
