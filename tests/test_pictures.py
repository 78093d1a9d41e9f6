"""Pictures of results: what is drawn is asked for by attributes, is what the result holds, and stays text."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import xarray as xr

sys.path.insert(0, str(Path(__file__).parent))
from run_folders import MAE, SMALL, SWIN, VIT, make_run
from test_report import HOSTILE, PROBE, Page, browser  # noqa: F401

from probekit.errors import StoreError
from probekit.reports import decisions, html, paper_figures
from probekit.reports.charts import clean
from probekit.reports.contents import place
from probekit.reports.looks import styles
from probekit.reports.pictures import asking, pictures
from probekit.reports.pictures_drawing import groups, picture_svg
from probekit.reports.pictures_panels import Dots, Maps, Matrix, Picture, Points, Profile
from probekit.reports.pictures_reading import Unfit, add
from probekit.store.results import write_result
from probekit.store.runfolder import Run

NAN = np.nan


def coordinates(layers: int = 4, *, sites=None, parts=None) -> dict:
    """A layer axis as `summaries.layer_coordinates` makes it: an embedding and layer outputs."""
    sites = sites or ["embed", *["out"] * (layers - 1)]
    depths = [n / 2 if "mid" in sites else float(n) for n in range(layers)]
    return {
        "layer": [f"b.{n}" for n in range(layers)],
        "depth": ("layer", depths),
        "site": ("layer", sites),
        "part": ("layer", parts or ["encoder"] * layers),
        "stage": ("layer", [0] * layers),
        "grid_rows": ("layer", [4] * layers),
        "grid_cols": ("layer", [8] * layers),
    }


def result_of(variables: dict, layers: int = 4, more: dict | None = None, **options) -> xr.Dataset:
    about = {"metric": "mine", "version": 1, "images": 5, "of": 20, "figure": "Fig. 9"}
    return xr.Dataset(variables, {**coordinates(layers, **options), **(more or {})}, about)


def picture_of(result: xr.Dataset, name: str = "x", models=("a",)) -> Picture:
    picture = Picture("mine", name, result[name].attrs["picture"], "Title", "nats", "Fig. 9", "d")
    for model in models:
        add(picture, result, model)
    return picture


def svg_of(picture: Picture, models=("a",)) -> ElementTree.Element:
    looks = styles(models, lambda model: model.endswith("@random"))
    return ElementTree.fromstring(picture_svg(picture, groups(picture)[0], looks, "k").encode())


def tags(svg: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [e for e in svg.iter() if e.tag.rpartition("}")[2] == name]


def texts(svg: ElementTree.Element) -> list[str]:
    return ["".join(e.itertext()).strip() for e in tags(svg, "text")]


# --- from results to data


def test_profile_is_a_line_a_layer_without_holes():
    values = np.arange(12.0).reshape(4, 3)
    values[2, 1] = NAN
    values[3] = NAN
    result = result_of(
        {"x": (("layer", "frequency"), values, {"picture": "profile"})},
        more={"frequency": ("frequency", [0.0, 0.5, 1.0], {"units": "pi"})},
    )
    picture = picture_of(result)
    (panel,) = picture.panels
    assert isinstance(panel, Profile)
    assert [line.layer for line in panel.lines] == ["embedding", "layer 1", "layer 2"]
    assert panel.lines[1].y.tolist() == [3, 4, 5] and panel.lines[1].x.tolist() == [0, 0.5, 1]
    assert panel.lines[2].y.tolist() == [6, 8] and panel.lines[2].x.tolist() == [0, 1]
    assert picture.across == "frequency (pi)" and picture.up == "x"
    assert "Measured on 5 of 20 images." in picture.caption


def test_profile_uses_each_layers_own_axis_and_leaves_out_mid_sites():
    own = np.array([[0, 1, NAN], [0, 1, NAN], [0, 0.5, 1]])
    result = result_of(
        {"x": (("layer", "rank"), np.where(np.isnan(own), NAN, 2 * own), {"picture": "profile"})},
        3,
        {"rank_by_layer": (("layer", "rank"), own)},
        sites=["embed", "mid", "out"],
        parts=["encoder", "encoder", "decoder"],
    )
    (panel,) = picture_of(result).panels
    assert [line.x.tolist() for line in panel.lines] == [[0, 1], [0, 0.5, 1]]
    assert [line.part for line in panel.lines] == ["encoder", "decoder"] and panel.second == ("decoder",)
    assert panel.lines[1].layer == "decoder layer 1"


def test_long_profiles_are_thinned_to_their_ends():
    values = np.tile(np.arange(5000.0), (100, 1))
    result = result_of({"x": (("layer", "rank"), values, {"picture": "profile"})}, 100)
    (panel,) = picture_of(result).panels
    assert len(panel.lines) == 33 and panel.lines[-1].depth == 99
    assert all(len(line.x) == 400 and line.x[0] == 1 and line.x[-1] == 5000 for line in panel.lines)


def test_matrix_has_depths_on_both_sides_and_no_empty_rows():
    values = np.array([[1, 0.5, NAN], [0.5, 1, NAN], [NAN, NAN, NAN]])
    result = result_of(
        {"x": (("layer", "other_layer"), values, {"picture": "matrix"})},
        3,
        {"other_depth": ("other_layer", [0.0, 1.0, 2.0])},
    )
    picture = picture_of(result)
    (panel,) = picture.panels
    assert isinstance(panel, Matrix) and panel.values.tolist() == [[1, 0.5], [0.5, 1]]
    assert panel.rows.tolist() == [0, 1] == panel.columns.tolist()
    assert picture.across == "other depth" and picture.up == "depth (attention layer)"


def test_a_pair_of_models_is_drawn_once():
    one = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])

    def of(values, other):
        return result_of(
            {"x": (("model", "layer", "model_layer"), values[None], {"picture": "matrix"})},
            values.shape[0],
            {"model": [other], "model_depth": (("model", "model_layer"), [np.arange(values.shape[1]) + 0.0])},
        )

    picture = Picture("mine", "x", "matrix", "T", "", "", "d")
    add(picture, of(one, "b"), "a")
    add(picture, of(one.T, "a"), "b")
    assert [(p.model, p.beside) for p in picture.panels] == [("a", "b")]
    add(picture, of(one.T + 0.01, "a"), "b")  # on other images: not the same numbers
    assert len(picture.panels) == 2


def test_dots_are_of_the_last_layer_that_has_any():
    values = np.array([[1, 2], [3, 4], [50, NAN], [NAN, NAN]])
    result = result_of(
        {
            "x": (("layer", "category"), values, {"picture": "dots", "picture_line": "whole"}),
            "x_low": (("layer", "category"), values - 1),
            "whole": ("layer", [1.0, 2.0, 33.0, NAN]),
        },
        more={"category": ["cat", "dog"]},
    )
    picture = picture_of(result, models=("a", "b"))
    panel = picture.panels[0]
    assert isinstance(panel, Dots) and panel.layer == "layer 2" and panel.line == 33
    assert panel.values[0] == 50 and np.isnan(panel.values[1])
    assert panel.low[0] == 49 and np.isnan(panel.high).all()
    assert len(groups(picture)) == 1 and {"cat", "dog"} <= set(texts(svg_of(picture, ("a", "b"))))


def test_points_by_label_and_by_group():
    points = np.zeros((5, 6, 2))
    points[:, 5] = NAN
    result = result_of(
        {
            "x": (("layer", "token", "axis"), points, {"picture": "points", "picture_colour": "kind"}),
            "kind": ("token", ["u", "v", "u", "v", "u", "v"]),
        },
        5,
    )
    picture = picture_of(result)
    (panel,) = picture.panels
    assert isinstance(panel, Points) and [s.layer for s in panel.scatters] == [
        "embedding",
        "layer 2",
        "layer 4",
    ]
    assert [(c.name, len(c.points)) for c in panel.scatters[0].clouds] == [("u", 3), ("v", 2)]
    assert "First, middle and last layer." in picture.caption

    pair = np.random.default_rng(0).normal(size=(2, 1, 2, 7, 3))
    attrs = {"picture": "points", "picture_with": "later", "picture_share": "share"}
    result = result_of(
        {
            "x": (("layer", "image", "token", "axis3"), pair[0], attrs),
            "later": (("layer", "image", "token", "axis3"), pair[1]),
            "share": (("layer", "axis3"), [[0.625, 0.25, NAN]]),
        },
        1,
        {"image": ["one", "two"]},
        sites=["attention"],
    )
    picture = picture_of(result)
    scatter = picture.panels[0].scatters[0]
    assert scatter.axes == ("axis 1 (62 %)", "axis 2 (25 %)", "axis 3")
    assert [c.name for c in scatter.clouds] == ["one", "two"]
    np.testing.assert_array_equal(scatter.clouds[1].points, pair[0, 0, 1])
    np.testing.assert_array_equal(scatter.clouds[1].after, pair[1, 0, 1])


def maps_result(maps: np.ndarray, **attrs) -> xr.Dataset:
    dims = ("layer", "image", "head", "query", "row", "col")
    return result_of(
        {
            "x": (dims, maps, {"picture": "maps", **attrs}),
            "at_row": (("layer", "query"), np.full(maps.shape[:1] + maps.shape[3:4], 1)),
            "at_col": (("layer", "query"), np.full(maps.shape[:1] + maps.shape[3:4], 4)),
        },
        len(maps),
        {"query": ["middle", "corner"], "image": ["i0", "i1"]},
        sites=["attention"] * len(maps),
    )


def test_maps_are_cut_to_the_layer_and_marked():
    maps = np.arange(4 * 2 * 9 * 2 * 3 * 5.0).reshape(4, 2, 9, 2, 3, 5)
    maps[:, :, 7:] = NAN  # no such heads
    maps[3, ..., 2:, :] = NAN
    maps[3, ..., 4:] = NAN
    attrs = {"picture_rows": "query", "picture_columns": "head", "picture_mark": "at_row at_col"}
    result = maps_result(maps, **attrs)
    own = [[8.0, 16, NAN] if layer == 3 else [8.0, 16, 24] for layer in range(4)]
    result = result.assign_coords(
        row_by_layer=(("layer", "row"), own),
        col_by_layer=(("layer", "col"), [[0, 1, 2, 3, NAN if layer == 3 else 4] for layer in range(4)]),
    )
    picture = picture_of(result)
    (panel,) = picture.panels
    assert isinstance(panel, Maps) and [b.title for b in panel.blocks] == ["layer 0", "layer 2", "layer 3"]
    first, last = panel.blocks[0], panel.blocks[-1]
    assert first.columns == ("head 0", "head 1", "head 2", "head 4", "head 5", "head 6")
    assert first.rows == ("middle", "corner") and last.maps.shape == (2, 6, 2, 4)
    np.testing.assert_array_equal(first.maps[1, 3], maps[0, 0, 4, 1])
    np.testing.assert_array_equal(last.maps[0, 5], maps[3, 0, 6, 0, :2, :4])
    assert first.marks == ((1 / 4, 4 / 8, 1 / 4, 1 / 8),) * 2
    assert "One image of 2: i0." in picture.caption and "Not more than 6 heads" in picture.caption


def test_maps_with_layers_along():
    rollout = np.random.default_rng(0).random((9, 2, 4, 4))
    rollout[7:] = NAN
    attrs = {"picture": "maps", "picture_rows": "image", "picture_columns": "layer"}
    result = result_of({"x": (("layer", "image", "row", "col"), rollout, attrs)}, 9, {"image": ["p", "q"]})
    (block,) = picture_of(result).panels[0].blocks
    assert block.rows == ("p", "q") and block.columns[0] == "embedding" and block.columns[-1] == "layer 6"
    np.testing.assert_array_equal(block.maps[1, -1], rollout[6, 1])


def test_large_maps_are_made_small():
    result = result_of({"x": (("layer", "row", "col"), np.ones((1, 700, 300)), {"picture": "maps"})}, 1)
    (block,) = picture_of(result).panels[0].blocks
    assert max(block.maps.shape[-2:]) <= 64


def test_nothing_but_nan_is_no_picture():
    full = {
        "profile": np.full((2, 3), NAN),
        "matrix": np.full((2, 3), NAN),
        "dots": np.full((2, 3), NAN),
        "points": np.full((2, 3, 2), NAN),
        "maps": np.full((2, 3, 2), NAN),
    }
    for kind, values in full.items():
        dims = ("layer", "b", "c")[: values.ndim]
        assert picture_of(result_of({"x": (dims, values, {"picture": kind})}, 2)).panels == []


@pytest.mark.parametrize(
    "dims,shape,attrs,said",
    [
        (("layer",), (2,), {"picture": "profile"}, "not layer and one more"),
        (("layer", "b"), (2, 3), {"picture": "pie"}, "there is profile, matrix"),
        (("a", "b"), (2, 3), {"picture": "profile"}, "no axis 'layer'"),
        (("layer", "b"), (2, 3), {"picture": "points"}, "points and 2 or more axes"),
        (("layer", "b"), (2, 3), {"picture": "dots", "picture_line": "no"}, "picture_line is 'no'"),
        (("layer", "b", "c"), (2, 3, 2), {"picture": "points", "picture_colour": "no"}, "it names 'no'"),
        (("layer", "b", "c"), (2, 3, 2), {"picture": "maps", "picture_rows": "c"}, "names the axis 'c'"),
        (("layer", "b", "c"), (2, 3, 2), {"picture": "maps", "picture_mark": "no"}, "picture_mark"),
        (("b", "layer"), (3, 2), {"picture": "matrix"}, "its axes are b, layer"),
    ],
)
def test_attributes_that_do_not_fit_say_why(dims, shape, attrs, said):
    with pytest.raises(Unfit, match=said):
        picture_of(result_of({"x": (dims, np.ones(shape), attrs)}, 2))


# --- drawings


def every_kind() -> xr.Dataset:
    """One result that asks for every kind of picture, with hostile labels."""
    rng = np.random.default_rng(0)
    a, b, c = HOSTILE
    kinds = {
        "lines": (("layer", "rank"), rng.normal(size=(3, 9)), {"picture": "profile", "long_name": a}),
        "square": (("layer", "other"), rng.random((3, 3)), {"picture": "matrix", "units": b}),
        "pair": (("model", "layer", "theirs"), rng.random((1, 3, 5)), {"picture": "matrix"}),
        "dots": (("layer", "category"), rng.random((3, 3)), {"picture": "dots", "picture_line": "mine"}),
        "cloud": (
            ("layer", "group", "token", "axis"),
            rng.normal(size=(3, 2, 40, 3)),
            {"picture": "points", "picture_with": "later"},
        ),
        "later": (("layer", "group", "token", "axis"), rng.normal(size=(3, 2, 40, 3))),
        "maps": (
            ("layer", "query", "head", "y", "x"),
            rng.random((3, 2, 3, 4, 4)),
            {"picture": "maps", "picture_rows": "query", "picture_columns": "head"},
        ),
        "wrong": (("layer", "rank"), rng.normal(size=(3, 9)), {"picture": b}),
        "mine": ("layer", rng.random(3), {"units": "1", "role": "mean"}),
    }
    named = {"category": [a, b, c], "group": [a, c], "model": [c], "query": [a, b], "head": [b, c, "h"]}
    return result_of(kinds, 3, named)


def run_with(path: Path, result: xr.Dataset, models=("a",), metric="nmi", **options) -> Run:
    """A run whose results of one metric are `result`."""
    run = make_run(path, dict.fromkeys(models, SMALL), metrics=[metric], images=3, **options)
    for model in run.models:
        for dataset in run.datasets:
            one = result.copy()
            one.attrs |= {"metric": metric, "model": model, "dataset": dataset}
            file = run.folder(model, dataset).result(metric)
            file.unlink()
            write_result(file, one)
    return run


def test_every_kind_is_valid_svg_with_png_inside(tmp_path):
    found, troubles = pictures(run_with(tmp_path / "r", every_kind()))
    assert [p.variable for p in found] == ["lines", "square", "pair", "dots", "cloud", "maps"]
    assert [t.message.split(":")[0] for t in troubles] == [f"its 'wrong' can't be drawn as '{HOSTILE[1]}'"]
    for number, picture in enumerate(found):
        again = [
            picture_svg(picture, g, styles(["a"], lambda model: False), f"k{number}") for g in groups(picture)
        ]
        assert again == [
            picture_svg(picture, g, styles(["a"], lambda model: False), f"k{number}") for g in groups(picture)
        ]
        for text in again:
            svg = ElementTree.fromstring(text)
            assert svg.get("role") == "img" and picture.title in svg.get("aria-label")
            assert not tags(svg, "script") and not tags(svg, "foreignObject")
            for image in tags(svg, "image"):
                kind, _, data = image.get("href").partition(",")
                assert kind == "data:image/png;base64"
                assert base64.b64decode(data).startswith(b"\x89PNG\r\n\x1a\n")
            ids = [e.get("id") for e in svg.iter() if e.get("id")]
            assert all(i.startswith(f"k{number}") for i in ids) and len(set(ids)) == len(ids)
    assert len(tags(svg, "image")) == 3 * 2 * 3  # layers, queries, heads


def test_a_map_has_its_values_as_colours_and_holes_are_transparent():
    from matplotlib.image import imread

    maps = np.array([[[0.0, 1.0], [NAN, 0.5]]])
    picture = picture_of(result_of({"x": (("layer", "row", "col"), maps, {"picture": "maps"})}, 1))
    (image,) = tags(svg_of(picture), "image")
    pixels = imread(io.BytesIO(base64.b64decode(image.get("href").partition(",")[2])), format="png")
    pixels = pixels if "scale(1 -1)" not in image.get("transform", "") else pixels[::-1]
    assert pixels.shape == (2, 2, 4)
    dark, light, hole, half = pixels[0, 0], pixels[0, 1], pixels[1, 0], pixels[1, 1]
    assert hole[3] == 0 and dark[3] == light[3] == half[3] == 1
    assert dark[:3].sum() < half[:3].sum() < light[:3].sum()


@pytest.mark.parametrize("count,crowd", [(100, False), (4000, True)])
def test_many_points_become_pixels(count, crowd):
    points = np.random.default_rng(0).normal(size=(1, count, 2))
    picture = picture_of(result_of({"x": (("layer", "t", "axis"), points, {"picture": "points"})}, 1))
    svg = svg_of(picture)
    assert bool(tags(svg, "image")) == crowd
    assert (len(tags(svg, "use")) >= count) != crowd


def test_one_layer_and_one_value():
    for values in ([[1.0]], [[1.0, 1.0]]):
        result = result_of({"x": (("layer", "rank"), values, {"picture": "profile"})}, 1, sites=["out"])
        assert "nan" not in " ".join(texts(svg_of(picture_of(result)))).lower()
    result = result_of({"x": (("layer", "other"), [[0.5]], {"picture": "matrix"})}, 1)
    assert tags(svg_of(picture_of(result)), "image")


# --- the page


def test_hostile_labels_stay_text_in_the_page(tmp_path):
    models = (HOSTILE[0], f"{HOSTILE[2]}$x_1$@random")
    run = run_with(tmp_path / "r", every_kind(), models, datasets=[f"folder:{HOSTILE[1]}"])
    html.render(run, run.path / "report.html")
    source = (run.path / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.wrong == [] and page.open == []
    assert {tag for tag, _ in page.elements} & {"script", "img", "foreignobject"} == set()
    assert not [n for _, attrs in page.elements for n in attrs if n.startswith("on")]
    assert sum(tag == "style" for tag, _ in page.elements) == 1
    assert any(HOSTILE[0] in text for tag, text in page.texts if tag == "summary")
    assert "there is profile, matrix, dots, points, maps" in page.text()
    ids = [attrs["id"] for _, attrs in page.elements if attrs.get("id")]
    assert len(set(ids)) == len(ids)
    closed = [a for tag, a in page.elements if tag == "details" and a.get("class") == "pictures"]
    assert closed and not any("open" in a for a in closed)


def test_a_third_partys_result_is_drawn_like_a_built_in_one(tmp_path):
    result = result_of({"lines": (("layer", "rank"), np.ones((3, 4)), {"picture": "profile"})}, 3)
    result["theirs"] = ("layer", np.ones(3), {"role": "mean"})
    run = run_with(tmp_path / "r", result.assign_attrs(metric="theirs"))
    assert asking(run.result("nmi")) == ["lines"]
    html.render(run, run.path / "report.html")
    text = Page((run.path / "report.html").read_text(encoding="utf-8")).text()
    assert "Picture: lines" in text and "Measured on 5 of 20 images" in text


def test_built_in_fourier_asks_for_its_profile():
    from probekit.metric import Row, Traces
    from probekit.metrics.fourier import Fourier

    rows = [Row(f"b.{n}.out", float(n), "out", "encoder", 0, 2, (4, 4), (8.0, 8.0)) for n in (1, 2)]
    one = np.random.default_rng(0).normal(size=(3, 2, 2))
    values = {
        "fourier": one,
        "log_amplitude": one,
        "fourier_common": one[..., 0],
        "floor_channels": one[..., 0],
    }
    traces = Traces(values, rows, ["a", "b", "c"], None, {"frequency": np.array([[0, 0.5]] * 2)}, 0)
    picture = Picture("fourier", "fourier", "profile", "T", "", "", "d")
    add(picture, Fourier().summarize(traces), "a")
    np.testing.assert_allclose(picture.panels[0].lines[1].y, one.mean(0)[1])
    assert picture.across == "frequency (pi)"


def test_sections_follow_the_papers_figures(tmp_path):
    figures = ["Fig. 3", "Fig. 8a", "Fig. 8b", "Fig. 11", "Fig. E.2", "Fig. F.3", "Table G.1", ""]
    assert sorted(reversed(figures), key=place) == figures
    run = make_run(tmp_path / "r", {"a": SMALL}, metrics=["fourier", "nmi", "attention_distance"])
    html.render(run, run.path / "report.html")
    source = (run.path / "report.html").read_text(encoding="utf-8")
    heads = re.findall(r'id="metric-\d-title"><bdi class="name">(\w+)', source)
    assert heads == ["attention_distance", "nmi", "fourier"]


def test_contents_lead_to_every_section(tmp_path):
    metrics = ["nmi", "nmi:compat=cl-vs-mim", "fourier", "attention_distance"]
    run = make_run(tmp_path / "r", {"a": SMALL}, metrics=metrics)
    html.render(run, run.path / "report.html")
    page = Page((run.path / "report.html").read_text(encoding="utf-8"))
    ids = {attrs.get("id") for _, attrs in page.elements}
    links = [a["href"] for tag, a in page.elements if tag == "a" and a["href"].startswith("#")]
    assert len(links) >= 5 and all(link[1:] in ids for link in links)


def test_a_page_of_many_models_stays_small(tmp_path):
    """120 cells with a heavy picture each (token scatter, or 3 x 18 maps) would be 24 times this page."""
    rng = np.random.default_rng(0)
    attrs = {"picture": "maps", "picture_rows": "query", "picture_columns": "head"}
    variables = {
        "mine": ("layer", rng.random(12), {"role": "mean"}),
        "maps": (("layer", "query", "head", "y", "x"), rng.random((12, 3, 12, 14, 14)), attrs),
        "lines": (("layer", "rank"), rng.random((12, 196)), {"picture": "profile"}),
    }
    run = run_with(tmp_path / "r", result_of(variables, 12, sites=["out"] * 12), tuple("abcde"))
    html.render(run, run.path / "report.html")
    assert (run.path / "report.html").stat().st_size < 1_400_000


@pytest.mark.parametrize("width", [1280, 400])
def test_pictures_fit_in_a_browser(browser, tmp_path, width):  # noqa: F811
    run = run_with(tmp_path / "r", every_kind(), ("a", HOSTILE[0]))
    html.render(run, run.path / "report.html")
    page = run.path / "report.html"
    page.write_text(
        page.read_text(encoding="utf-8").replace(
            '<details class="pictures"', '<details open class="pictures"'
        ),
        encoding="utf-8",
    )
    folder = tmp_path / "page"
    folder.mkdir()
    shutil.copy(page, folder)
    folder.joinpath("probe.html").write_text(PROBE.replace("WIDTH", str(width)))
    dom, console, asked = browser(folder, "probe.html", f"{max(width, 600)},3200")
    assert console == []
    assert set(asked) <= {"/probe.html", "/report.html", "/favicon.ico"}
    found = json.loads(Page(dom).text("pre"))
    assert found["scripts"] == 0 and found["overflow"] == 0
    assert sum(plot == "plot picture" for plot in found["plots"]) == 11  # two of each, dots in one
    assert found["cut"] == []
    assert found["overlaps"] == []


# --- other reports


def test_figures_are_files_named_by_the_papers_figure(tmp_path):
    run = make_run(tmp_path / "r", {"vit": VIT, "swin": SWIN, "mae": MAE}, images=4)
    folder = paper_figures.render(run, tmp_path / "out")
    names = {"fig-3--attention_distance", "fig-4--nmi", "fig-9--fourier"}
    assert {p.name for p in folder.iterdir()} == {
        *(f"{n}.{kind}" for n in names for kind in ("svg", "png")),
        "captions.md",
    }
    for name in names:
        ElementTree.parse(folder / f"{name}.svg")
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert f"`{name}`" in (folder / "captions.md").read_text()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    paper_figures.render(run, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_figures_of_pictures_and_hostile_names(tmp_path):
    run = run_with(tmp_path / "r", every_kind(), (HOSTILE[1], "d"), datasets=["folder:../x", "folder:y"])
    folder = paper_figures.render(run, tmp_path / "out")
    files = sorted(p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*.svg"))
    assert set(files) == {"out"} and len(files) == 2 * 7
    for file in folder.glob("*.svg"):
        assert not tags(ElementTree.parse(file).getroot(), "script")
    assert len((folder / "captions.md").read_text().splitlines()) == 2 * 7


def test_no_result_no_figures(tmp_path):
    run = make_run(tmp_path / "r", {"a": SMALL}, metrics=["nmi"], shards={("a", "nmi"): 0})
    with pytest.raises(StoreError, match="no result to draw"):
        paper_figures.render(run, tmp_path / "out")


def trials_result() -> xr.Dataset:
    variables = {
        "mine": ("layer", [50.0, 100.0], {"role": "mean"}),
        "decisions": (("layer", "image"), [[0, 1, 2], [0, 0, 1]]),
        "shape": ("image", [0, 0, 1]),
        "texture": ("image", [1, 1, 1]),
        "counted": ("image", [1, 1, 0]),
    }
    return result_of(variables, 2, {"image": ["i,1", "i2", "i3"], "class": ["cat", "dog", HOSTILE[1]]})


def test_decisions_of_every_cell_are_one_table(tmp_path):
    run = run_with(tmp_path / "r", trials_result(), ("a", HOSTILE[0]))
    decisions.render(run, tmp_path / "d.csv")
    with open(tmp_path / "d.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3 and tuple(rows[0]) == decisions.COLUMNS
    assert {row["model"] for row in rows} == {"a", clean(HOSTILE[0])}
    mine = [row for row in rows if row["model"] == "a" and row["layer"] == "b.0"]
    assert [row["image"] for row in mine] == ["i,1", "i2", "i3"]
    assert [(r["decision"], r["shape"], r["texture"], r["cue"]) for r in mine] == [
        ("cat", "cat", "dog", "shape"),
        ("dog", "cat", "dog", "texture"),
        (HOSTILE[1], "dog", "dog", ""),
    ]


def test_a_run_without_decisions_says_so(tmp_path):
    run = make_run(tmp_path / "r", {"a": SMALL}, metrics=["nmi"])
    with pytest.raises(StoreError, match="no decisions"):
        decisions.render(run, tmp_path / "d.csv")
    assert not (tmp_path / "d.csv").exists()


def test_reports_by_name(tmp_path):
    from probekit.plugins.catalog import Catalog

    catalog = Catalog.load(enabled=False)
    for name, suffix in (("figures", "-figures"), ("decisions", "-decisions.csv")):
        entry = catalog.report(name)
        assert entry.spec.suffix == suffix and callable(catalog.resolve_target(entry))
