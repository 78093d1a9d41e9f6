"""A dataset of somebody's own: every mistake in it is one sentence that names it, with exit code 3."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from probekit.datasets.dataset import BadImage, Dataset
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
            for name in ("raises", "none", "listed", "exits", "bare", "named", "image", "good")]
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
