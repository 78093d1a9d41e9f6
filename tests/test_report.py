"""The built-in reports: what they show, that nothing in a run can break out of them, the same bytes."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from run_folders import MAE, SMALL, SWIN, VIT, layers, make_run

from probekit.reports import csv as csv_report
from probekit.reports import html
from probekit.reports.charts import Baseline, Point, clean
from probekit.reports.curves import baselines_of, charts, curve_of
from probekit.reports.figures import NARROW, WIDE, caption, lines_of, panel_svg
from probekit.reports.looks import SERIES, UNTRAINED, styles
from probekit.reports.placing import apart, fitting, shortened
from probekit.store.cells import Outcome
from probekit.store.results import write_result
from probekit.store.runfolder import Run

ROOT = Path(__file__).parent.parent
HOSTILE = (
    "<script>alert(1)</script>",
    "a\"b' $x_1$ & 🦊",
    "</style><img src=x onerror=alert(2)>{{ 7*7 }}{% raw %}",
)
VOID = {"meta", "link", "br", "img", "input", "hr", "col"}


class Page(HTMLParser):
    """A page's elements, texts by element, and whether tags nest."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, *tags: str) -> str:
        return " ".join(
            text.strip() for tag, text in self.texts if (tag in tags or not tags) and text.strip()
        )


def rendered(run: Run) -> str:
    return html.render(run, run.path / "report.html").read_text(encoding="utf-8")


def svg_of(run: Run, metric: str, form=WIDE) -> ElementTree.Element:
    chart = next(c for c in charts(run)[0] if c.metric == metric)
    return ElementTree.fromstring(
        panel_svg(chart, chart.panels[0], styles(run.models, run.untrained), form, "k")
    )


def texts_of(svg: ElementTree.Element) -> list[str]:
    return [t.text or "" for t in svg.iter() if t.tag.endswith("text")]


# --- from results to curves


def test_curves_hold_the_results_numbers(tmp_path):
    run = make_run(tmp_path / "r", {"moco": VIT, "moco@random": VIT}, metrics=["nmi"])
    (chart,), troubles = charts(run)
    assert troubles == []
    result = run.result("nmi", model="moco")
    curve, untrained = chart.panels[0].curves
    assert [p.mean for p in curve.points] == result["nmi_curve"].values.tolist()
    assert [p.low for p in curve.points] == result["nmi_curve_low"].values.tolist()
    assert [p.high for p in curve.points] == result["nmi_curve_high"].values.tolist()
    assert [p.spread for p in curve.points] == result["nmi_head_sd"].values.tolist()
    assert [p.depth for p in curve.points] == list(range(1, 13))
    assert [p.layer for p in curve.points] == [name for name, *_ in layers(VIT)]
    assert (curve.images, curve.averaged) == (20, True)
    assert [run.untrained(c.model) for c in (curve, untrained)] == [False, True]
    assert (chart.figure, chart.units, chart.others) == ("Fig. 4", "", ("nmi_global",))
    assert chart.reading.startswith("0: every query") and "peaked" in chart.limits
    assert dict(chart.conventions) == {"log": "natural"}


def test_a_baseline_belongs_to_the_value_whose_ending_it_has(tmp_path):
    run = make_run(tmp_path / "r", {"moco": VIT}, metrics=["nmi", "fourier"])
    result = run.result("nmi")
    for value, expected in (("nmi", 0.0), ("nmi_global", 0.2)):
        ((name, points),) = baselines_of(result, value)
        assert name == "uniform" and [p.mean for p in points] == [expected] * 12
    ((name, points),) = baselines_of(run.result("fourier"), "fourier")
    assert name == "white noise"
    assert [p.mean for p in points] == pytest.approx(
        [0.5 * math.log(2)] * 25
    )  # the last frequency's, not 0's
    assert baselines_of(run.result("fourier"), "floor_channels") == []


def test_token_sites_draw_embedding_and_outputs_and_keep_what_lies_between(tmp_path):
    run = make_run(tmp_path / "r", {"moco": VIT}, metrics=["fourier"])
    curve = charts(run)[0][0].panels[0].curves[0]
    assert [p.depth for p in curve.line] == list(range(13))
    assert [p.depth for p in curve.between] == [n + 0.5 for n in range(12)]
    assert [len(s) for s in curve.segments] == [13]
    assert curve.at == "frequency 0.857"  # 6/7 on a 14 x 14 grid, in units of pi


def test_ragged_stages_are_drawn_in_stages(tmp_path):
    run = make_run(tmp_path / "r", {"swin": SWIN}, metrics=["attention_distance", "fourier"])
    distance, fourier = (chart.panels[0] for chart in charts(run)[0])
    sections = distance.curves[0].sections
    assert [s.label for s in sections] == ["stage 0", "stage 1", "stage 2", "stage 3"]
    assert [(s.start, s.stop) for s in sections] == [(1, 2.5), (2.5, 4.5), (4.5, 10.5), (10.5, 12)]
    assert [len(s) for s in distance.baselines[0].segments] == [2, 2, 8]  # two stages share a baseline
    assert all(np.isfinite(p.mean) for p in fourier.curves[0].points)
    assert [[p.depth for p in s] for s in fourier.curves[0].segments][:2] == [[0, 1, 2], [2, 3, 4]]
    assert "in the order of the layers" in fourier.curves[0].at
    assert [s.start for s in fourier.curves[0].sections] == [0, 2, 4, 10]


def test_encoder_and_decoder_are_two_lines(tmp_path):
    run = make_run(tmp_path / "r", {"mae": MAE}, metrics=["attention_distance", "fourier"])
    for chart in charts(run)[0]:
        curve = chart.panels[0].curves[0]
        assert [s.label for s in curve.sections] == ["encoder", "decoder"]
        assert [{p.part for p in s} for s in curve.segments] == [{"encoder"}, {"decoder"}]
    assert [s[0].depth for s in curve.segments] == [
        0,
        12,
    ]  # depth 12 twice: encoder's end, decoder's embedding


def test_models_share_a_baseline_where_it_is_one(tmp_path):
    run = make_run(
        tmp_path / "r", {"a": VIT, "small": SMALL, "swin": SWIN}, metrics=["attention_distance", "nmi"]
    )
    distance, nmi = (chart.panels[0] for chart in charts(run)[0])
    assert [b.models for b in distance.baselines] == [("a", "small"), ("swin",)]
    assert len(distance.baselines[0].points) == 12
    assert [b.models for b in nmi.baselines] == [("a", "small", "swin")]  # 0 everywhere
    names = [line.name for line in lines_of(distance, styles(run.models, run.untrained))]
    assert names == ["a", "small", "swin", "uniform: a and 1 more", "uniform: swin"]


def test_the_table_lines_models_up_by_depth_and_part(tmp_path):
    run = make_run(tmp_path / "r", {"mae": MAE, "swin": SWIN}, metrics=["fourier"])
    panel = charts(run)[0][0].panels[0]
    rows = panel.table()
    assert [r.depth for r in rows] == sorted(r.depth for r in rows)
    twelve = [(r.site, r.part, sorted(r.points)) for r in rows if r.depth == 12]
    assert twelve == [("out", "encoder", ["mae", "swin"]), ("embed", "decoder", ["mae"])]
    two = [(r.site, r.stage, sorted(r.points)) for r in rows if r.depth == 2]
    assert two == [("out", "0", ["mae", "swin"]), ("embed", "1", ["swin"])]
    assert sum(len(r.points) for r in rows) == sum(len(c.points) for c in panel.curves)


def test_a_result_of_its_own_making_is_drawn_without_interval(tmp_path):
    run = make_run(tmp_path / "r", {"moco": VIT}, metrics=["nmi"])
    result = run.result("nmi")
    own = result.drop_vars([n for n in result.data_vars if n != "nmi"])
    curve = curve_of(own, "nmi", "moco")
    assert [p.mean for p in curve.points] == pytest.approx(result["nmi"].mean("head").values.tolist())
    assert all(math.isnan(p.low) and math.isnan(p.high) for p in curve.points)
    assert not curve.averaged, "nothing says that its values are means over images"


@pytest.mark.parametrize("curve", [np.array(["a"] * 12), np.ones((12, 2))])
def test_a_result_of_another_shape_costs_only_itself(tmp_path, curve):
    run = make_run(tmp_path / "r", {"moco": VIT, "swin": SWIN}, metrics=["nmi"])
    result = run.result("nmi", model="moco")
    result["nmi_curve"] = (("layer", "two")[: curve.ndim], curve, {"role": "curve"})
    write_result(run.folder("moco", run.datasets[0]).result("nmi"), result)
    (chart,), (trouble,) = charts(run)
    assert [c.model for c in chart.panels[0].curves] == ["swin"]
    assert trouble.model == "moco" and "can't be drawn over layers" in trouble.message
    assert trouble.message.split(":")[0] in rendered(run).replace("&#39;", "'")


def test_a_network_its_pack_calls_untrained_is_drawn_as_one(tmp_path):
    names = {"moco": VIT, "untrained:mini": VIT, "a:b@/x/random": VIT, "fresh@random": VIT}
    run = make_run(tmp_path / "r", names, metrics=["nmi"])
    cell = run.folder("untrained:mini", run.datasets[0])
    cell.write({**cell.read(), "objective": "untrained"})
    assert [name for name in names if run.untrained(name)] == ["untrained:mini", "fresh@random"]
    looks = styles(run.models, run.untrained)
    assert looks["untrained:mini"].colour == UNTRAINED and looks["moco"].colour == SERIES[0]
    names = [line.name for line in lines_of(charts(run)[0][0].panels[0], looks)]
    assert names[1] == "untrained:mini" and names[3] == "fresh (untrained)"


def test_more_models_than_colours_are_told_apart_by_their_dashes():
    looks = styles([f"m{n}" for n in range(13)], lambda model: False)
    assert len({(look.colour, look.dash) for look in looks.values()}) == 13
    assert {look.dash for look in list(looks.values())[:6]} == {"solid"}


def test_intervals_of_many_models_are_left_to_the_table(tmp_path):
    run = make_run(tmp_path / "r", {f"m{n}": SMALL for n in range(9)}, metrics=["nmi"])
    assert not [e for e in svg_of(run, "nmi").iter() if "fill-opacity: 0.2" in e.get("style", "")]
    panel = charts(run)[0][0].panels[0]
    assert "intervals over images are in the table" in caption(
        panel, "mean", styles(run.models, run.untrained)
    )


# --- figures


def test_a_line_for_every_model_a_band_for_every_interval(tmp_path):
    run = make_run(tmp_path / "r", {"a": VIT, "b": VIT, "c@random": VIT}, metrics=["nmi"])
    svg = svg_of(run, "nmi")
    strokes = [e.get("style", "") for e in svg.iter() if e.tag.endswith("path") and e.get("clip-path")]
    for number, colour in ((1, SERIES[0]), (2, SERIES[1])):
        assert sum(f"var(--s{number}, {colour})" in s and "dasharray" not in s for s in strokes) == 1
    assert sum(f"var(--untrained, {UNTRAINED})" in s and "dasharray" in s for s in strokes) == 1
    bands = [e.get("style") for e in svg.iter() if "fill-opacity: 0.2" in e.get("style", "")]
    assert len(bands) == 3
    labels = texts_of(svg)
    assert {"a", "b", "c (untrained)", "uniform", "depth (attention layer)", "nmi"} <= set(labels)


def test_untrained_models_alone_are_told_apart_by_colour():
    looks = styles(["a@random", "b@random"], lambda model: True)
    assert [look.dash for look in looks.values()] == ["untrained"] * 2
    assert len({look.colour for look in looks.values()}) == 2 and UNTRAINED not in {
        x.colour for x in looks.values()
    }
    mixed = styles(["a", "b@random"], lambda model: model != "a")
    assert (mixed["a"].dash, mixed["b@random"].colour) == ("solid", UNTRAINED)


def test_a_line_goes_through_the_values(tmp_path):
    run = make_run(tmp_path / "r", {"a": VIT}, metrics=["nmi"])
    svg = svg_of(run, "nmi")
    line = next(
        e.get("d")
        for e in svg.iter()
        if e.tag.endswith("path") and "var(--s1" in e.get("style", "") and e.get("clip-path")
    )
    places = np.array([[float(n) for n in pair] for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", line)])
    points = charts(run)[0][0].panels[0].curves[0].points
    assert len(places) == 12
    assert np.allclose(np.diff(places[:, 0]), np.diff(places[:, 0])[0])
    # y is a falling linear function of the value
    slope, start = np.polyfit([p.mean for p in points], places[:, 1], 1)
    assert slope < 0 and np.allclose(
        places[:, 1], slope * np.array([p.mean for p in points]) + start, atol=1e-3
    )


def test_stages_and_parts_are_named_and_ruled(tmp_path):
    run = make_run(tmp_path / "r", {"mae": MAE, "swin": SWIN}, metrics=["attention_distance"])
    for form in (WIDE, NARROW):
        texts = texts_of(svg_of(run, "attention_distance", form))
        assert {"encoder", "decoder", "stage 2", "mae:", "swin:"} <= set(texts)
    rules = [
        e for e in svg_of(run, "attention_distance").iter() if "stroke-opacity: 0.55" in e.get("style", "")
    ]
    assert len(rules) == 4  # one between encoder and decoder, three between stages


def test_a_far_baseline_is_named_at_the_edge(tmp_path):
    run = make_run(tmp_path / "r", {"a": VIT}, metrics=["nmi"])
    chart = charts(run)[0][0]
    panel = chart.panels[0]
    far = Baseline(
        "noise $", tuple(Point(p.depth, "", "attention", "", 0, 99.0) for p in panel.curves[0].points), ("a",)
    )
    changed = type(panel)(panel.dataset, panel.curves, (far,))
    chart = type(chart)(**{**chart.__dict__, "panels": (changed,)})
    svg = ElementTree.fromstring(panel_svg(chart, changed, styles(["a"], lambda model: False), WIDE, "k"))
    assert "↑ noise $ 99" in texts_of(svg)
    ticks = [float(t.replace("\u2212", "-")) for t in texts_of(svg) if re.fullmatch(r"\u2212?\d\.\d+", t)]
    assert ticks and max(ticks) < 2


def test_datasets_share_one_axis(tmp_path):
    run = make_run(tmp_path / "r", {"a": VIT}, datasets=["folder:x", "folder:y"], metrics=["nmi"])
    chart = charts(run)[0][0]
    ticks = []
    for number, panel in enumerate(chart.panels):
        svg = ElementTree.fromstring(
            panel_svg(chart, panel, styles(["a"], lambda model: False), NARROW, f"k{number}")
        )
        ticks.append([t for t in texts_of(svg) if re.fullmatch(r"\u2212?\d\.\d+", t)])
    assert ticks[0] == ticks[1]
    means = [[p.mean for p in panel.curves[0].points] for panel in chart.panels]
    assert means[0] != means[1]


@given(st.lists(st.floats(-50, 150), max_size=9), st.floats(1, 12))
def test_labels_move_apart_as_little_as_needed(places, gap):
    places = sorted(places)
    moved = apart(places, gap, 100)
    assert len(moved) == len(places)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(moved))
    if (len(places) - 1) * gap <= 100:
        assert all(-1e-9 <= m <= 100 + 1e-9 for m in moved)
    if all(0 <= p <= 100 for p in places) and all(b - a >= gap for a, b in pairwise(places)):
        assert moved == pytest.approx(places)


def test_shortened_and_fitting():
    assert shortened("abc", 3) == "abc"
    assert len(shortened("timm:vit_small_patch14_reg4_dinov2.lvd142m", 20)) == 20
    assert shortened("timm:vit_small.lvd142m", 12).startswith("timm:") and shortened(
        "x" * 9 + "y", 5
    ).endswith("y")
    assert [fitting("stage 2", room) for room in (9, 3, 0.5)] == ["stage 2", "2", ""]
    assert [fitting("encoder", room) for room in (9, 5, 2)] == ["encoder", "enc.", ""]


def test_clean_leaves_nothing_that_breaks_xml_or_turns_text():
    text = "a\x00\x1b[31m\ud800\u202eb é🦊\n"
    assert clean(text) == "a\ufffd\ufffd[31m\ufffd\ufffdb é🦊\n"
    ElementTree.fromstring(
        f"<a>{clean(''.join(map(chr, range(0x20, 0x3000)))).replace('&', '').replace('<', '')}</a>"
    )


# --- the page


def test_the_page_is_self_contained_and_well_formed(tmp_path):
    run = make_run(tmp_path / "r", {"mae": MAE, "swin": SWIN, "vit@random": VIT})
    source = rendered(run)
    page = Page(source)
    assert page.wrong == [] and page.open == []
    assert {tag for tag, _ in page.elements} & {"script", "iframe", "object", "img", "embed", "form"} == set()
    links = [
        value
        for _, attrs in page.elements
        for name, value in attrs.items()
        if name in ("href", "src", "xlink:href")
    ]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", source))
    assert "@import" not in source
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "script" not in policy
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    references = {link[1:] for link in links if link.startswith("#")} | set(
        re.findall(r"url\(#([^)]*)\)", source)
    )
    assert references <= set(ids)
    figures = [attrs for tag, attrs in page.elements if tag == "svg" and attrs.get("role") == "img"]
    assert len(figures) == 6 and all("on folder:photos" in f["aria-label"] for f in figures)
    assert sum(tag == "table" for tag, _ in page.elements) == 3
    assert "nan" not in page.text("td", "th", "span", "text", "figcaption").lower().split()


def test_the_page_tells_what_was_run(tmp_path):
    run = make_run(tmp_path / "my run", {"moco:vit-b16": VIT, "moco:vit-b16@random": VIT}, images=30)
    text = Page(rendered(run)).text()
    models = "--model moco:vit-b16 --model moco:vit-b16@random"
    rest = "--metrics attention_distance,nmi,fourier --dataset folder:photos --out 'my run'"
    assert f"probekit run {models} {rest}" in text
    for said in (
        "2 models, 3 metrics, 1 dataset, begun 2026-11-22 10:00 UTC on bench",
        "python 3.12.1, torch 2.9.0, vit-probekit 0.1.0",
        "6 cells (a metric of a model on a dataset): 6 done.",
        "Fig. 3 · px",
        "0: every query sees the same map",
        "What this does not show:",
        "random but peaked attention",
        "Mean over 30 images, band: 95 % interval over images. Dotted: uniform.",
        "Dashed: untrained networks, random weights.",
        "95 % percentile bootstrap over images, 1000 resamples, seed 0",
        "faint points: between attention and MLP",
        "At frequency 0.857",
        f"{1:064x}",
        f"{10:032x}",
        "CC BY-NC 4.0",
        "Chen et al. 2021",
        "mean (0.485, 0.456, 0.406), size 224 x 224",
    ):
        assert said in text, said
    mean = run.result("nmi", model="moco:vit-b16")["nmi_curve"].values[3]
    assert f"{mean:#.4g}" in text


def test_the_command_repeats_every_setting(tmp_path):
    run = make_run(tmp_path / "r", {"a": SMALL}, metrics=["nmi"])
    run.info["settings"].update(limit=8, seed=3, dtype="bfloat16", image_size=[224, 448], on_bad_image="fail")
    run.info["settings"].update(allow_unwatched=True)
    code = re.search("<code>(.*?)</code>", rendered(run))[1]
    text = Page(code).text()
    options = "--limit 8 --seed 3 --dtype bfloat16 --image-size 224x448 --on-bad-image fail --allow-unwatched"
    assert text == f"probekit run --model a --metrics nmi --dataset folder:photos {options} --out r"
    from typer.main import get_command

    from probekit.cli.app import app

    known = {opt for p in get_command(app).commands["run"].params for opt in p.opts}
    assert set(re.findall(r"--[a-z-]+", text)) <= known


def test_hostile_names_stay_text(tmp_path):
    outcomes = {
        (HOSTILE[0], "nmi"): Outcome("failed", HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[2], HOSTILE[0])
    }
    bad = [{"index": 1, "id": HOSTILE[2], "reason": HOSTILE[0]}]
    about = {
        "notes": [HOSTILE[0]],
        "citation": HOSTILE[2],
        "licence": "\ud800\u202e",
        "weights": {"kind": "file", "source": HOSTILE[2]},
        "anatomy": {"warnings": [HOSTILE[1]], "others": [{"name": HOSTILE[0], "why": HOSTILE[2]}]},
    }
    run = make_run(
        tmp_path / "a<b>'\"&$",
        {**dict.fromkeys(HOSTILE, SMALL), "$x_1$@random": SMALL},
        datasets=[f"folder:{name}" for name in HOSTILE],
        metrics=["attention_distance", "nmi"],
        outcomes=outcomes,
        bad=bad,
        about=about,
        images=4,
    )
    source = rendered(run)
    page = Page(source)
    assert page.wrong == [] and page.open == []
    assert {tag for tag, _ in page.elements} & {"script", "img"} == set()
    assert sum(tag == "style" for tag, _ in page.elements) == 1
    for name in HOSTILE:
        assert name in page.text("bdi")
        assert f"folder:{name}" in page.text("bdi")
        assert any(name in text for tag, text in page.texts if tag == "li")
    assert "49" not in page.text("bdi")
    assert "$x_1$ (untrained)" in page.text("bdi")
    assert "\u202e" not in source


def test_dollar_signs_in_figures_are_no_formulas(tmp_path):
    run = make_run(tmp_path / "r", {"$x_1$": SMALL, "🦊</svg>": SMALL, "a & <b>": SMALL}, metrics=["nmi"])
    assert {"$x_1$", "🦊</svg>", "a & <b>"} <= set(texts_of(svg_of(run, "nmi")))


def test_one_image_has_no_interval_and_says_so(tmp_path):
    run = make_run(tmp_path / "r", {"a": SWIN}, images=1)
    page = Page(rendered(run))
    assert "Mean over 1 image: one image gives no interval" in page.text("figcaption")
    assert "[" not in page.text("td", "span") and "95 % interval" not in page.text("caption")
    assert charts(run)[0][0].interval == "none"
    assert "nan" not in page.text("td", "th", "span", "text").lower()
    svg = svg_of(run, "nmi")
    assert not any("fill-opacity: 0.2" in e.get("style", "") for e in svg.iter())


def test_what_has_no_result_is_listed_with_the_reason(tmp_path):
    outcomes = {
        ("a", "nmi"): Outcome(
            "failed", "'nmi' is NaN at 'b.3'", "ask its author", "Traceback: line 7", "mypack", "1.2"
        ),
        ("b", "fourier"): Outcome(
            "does not apply", "a grid of 2 x 2 tokens has no frequency", pack="probekit"
        ),
    }
    run = make_run(
        tmp_path / "r",
        {"a": SMALL, "b": SMALL},
        outcomes=outcomes,
        shards={("a", "fourier"): 0},
        images=20,
        bad=[{"index": 2, "id": "image-0002.jpg", "reason": "it is truncated"}],
    )
    text = Page(rendered(run)).text()
    for said in (
        "6 cells (a metric of a model on a dataset): 3 done, 1 failed, 1 unfinished, 1 does not apply.",
        "'nmi' is NaN at 'b.3'",
        "(mypack 1.2)",
        "What to do: ask its author",
        "Traceback: line 7",
        "a grid of 2 x 2 tokens has no frequency",
        "Not finished",
        "1 image of",
        "image-0002.jpg",
        "it is truncated",
        "19 of 20 used",
    ):
        assert said in text, said


def test_a_damaged_result_and_shard_spoil_nothing_else(tmp_path):
    run = make_run(tmp_path / "r", {"a": SMALL, "b": SMALL})
    file = run.folder("a", "folder:photos").result("nmi")
    file.write_bytes(file.read_bytes()[:-40])
    shard = next((run.folder("b", "folder:photos").path / "traces").glob("attention*/*/shard-00000.h5"))
    shard.write_bytes(b"nonsense")
    text = Page(rendered(run)).text()
    assert "Results that can't be shown" in text and "is damaged" in text
    assert "6 done" in text
    assert len(charts(run)[0]) == 3


def test_an_empty_run_has_a_page(tmp_path):
    run = make_run(
        tmp_path / "r", {"a": SMALL}, shards={("a", m): 0 for m in ("attention_distance", "nmi", "fourier")}
    )
    text = Page(rendered(run)).text()
    assert "No results yet" in text and "3 unfinished" in text
    shutil.rmtree(run.path / "cells")
    assert "No results yet" in rendered(run)


@pytest.fixture(scope="module")
def rich(tmp_path_factory) -> Run:
    """A run with a little of everything."""
    models = {
        "mae:vit-b16": MAE,
        "timm:swin_tiny_patch4_window7_224": SWIN,
        HOSTILE[0]: VIT,
        "timm:swin_tiny@random": SWIN,
    }
    outcomes = {("mae:vit-b16", "nmi"): Outcome("failed", "'nmi' is NaN", pack="mypack", version="1")}
    run = make_run(tmp_path_factory.mktemp("rich") / "run", models, outcomes=outcomes)
    html.render(run, run.path / "report.html")
    return run


def test_same_run_same_bytes_anywhere(rich, tmp_path):
    again = tmp_path / "elsewhere" / "run"
    shutil.copytree(rich.path, again)
    settings = tmp_path / "matplotlibrc"
    settings.write_text("font.size: 30\nsvg.fonttype: path\naxes.facecolor: red\ntext.usetex: True\n")
    code = (
        "import sys; from probekit.store.runfolder import Run; from probekit.reports import csv, html; "
        "from pathlib import Path; r = Run(sys.argv[1]); "
        "html.render(r, Path('a.html')); csv.render(r, Path('a.csv')); "
        "print(sorted({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MATPLOTLIBRC": str(settings),
        "PYTHONHASHSEED": "7",
        "TZ": "Asia/Tokyo",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(again)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert (tmp_path / "a.html").read_bytes() == (rich.path / "report.html").read_bytes()
    csv_report.render(rich, tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


# --- csv


def test_csv_has_every_number_once(tmp_path):
    run = make_run(tmp_path / "r", {'a"b,c': SWIN, "vit": VIT}, metrics=["nmi", "fourier"])
    csv_report.render(run, tmp_path / "r.csv")
    with open(tmp_path / "r.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == set(csv_report.COLUMNS)
    keys = [tuple(r[c] for c in ("model", "metric", "kind", "value", "layer", "axis", "at")) for r in rows]
    assert len(set(keys)) == len(keys)
    for model in run.models:
        result = run.result("nmi", model=model)
        mine = [r for r in rows if r["model"] == model and r["value"] == "nmi" and r["kind"] == "mean"]
        assert len(mine) == np.isfinite(result["nmi"].values).sum()  # ragged heads have no rows
        for row in mine[:40]:
            place = {"layer": row["layer"], "head": int(row["at"])}
            for column, name in (("mean", "nmi"), ("sd", "nmi_sd"), ("low", "nmi_low"), ("high", "nmi_high")):
                assert float(row[column]) == float(result[name].sel(place))
        curve = [
            float(r["mean"])
            for r in rows
            if r["model"] == model and r["value"] == "nmi" and r["kind"] == "curve"
        ]
        assert curve == result["nmi_curve"].values.tolist()
    swin = [r for r in rows if r["model"] == 'a"b,c' and r["value"] == "fourier" and r["kind"] == "mean"]
    assert len(swin) == np.isfinite(run.result("fourier", model='a"b,c')["fourier"].values).sum()
    last = [float(r["at"]) for r in swin if r["layer"].endswith("layers.3.blocks.1.attn.out")]
    assert last == pytest.approx([0, 2 / 7, 4 / 7, 6 / 7])
    noise = [
        r for r in rows if r["kind"] == "baseline" and r["value"] == "white_noise" and r["model"] == "vit"
    ]
    assert len(noise) == 25 * 7 and {r["images"] for r in noise} == {""}


# --- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr"),
    "--virtual-time-budget=8000",
)
# Looks at the report in a frame: its own policy forbids scripts, this page of the test's has one.
PROBE = """<!doctype html><meta charset="utf-8"><title>probe</title>
<style>body { margin: 0 } iframe { border: 0; width: WIDTHpx; height: 3000px }</style>
<iframe src="report.html"></iframe><pre id="out">not yet</pre><script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, out = { overlaps: [], cut: [] };
  out.scripts = page.scripts.length;
  out.overflow = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  const shown = [...page.querySelectorAll("svg.plot")].filter(s => s.getBoundingClientRect().width > 0);
  out.plots = shown.map(s => s.getAttribute("class"));
  const legends = [...page.querySelectorAll(".legend")];
  out.legends = legends.filter(e => e.getBoundingClientRect().height > 0).length;
  for (const svg of shown) {
    const frame = svg.getBoundingClientRect();
    const boxes = [...svg.querySelectorAll("text")].filter(t => t.textContent.trim())
      .map(t => [t.textContent, t.getBoundingClientRect()]);
    boxes.forEach(([a, p], i) => {
      const sides = [frame.left - p.left, p.right - frame.right, frame.top - p.top, p.bottom - frame.bottom];
      if (Math.max(...sides) > 1) out.cut.push(a);
      for (const [b, q] of boxes.slice(i + 1)) {
        const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
        const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
        if (wide > 1 && high > 3) out.overlaps.push([a, b]);
      }
    });
  }
  out.font = parseFloat(page.defaultView.getComputedStyle(shown[0].querySelector("text")).fontSize)
    * shown[0].getBoundingClientRect().width / shown[0].viewBox.baseVal.width;
  document.getElementById("out").textContent = JSON.stringify(out);
};
</script>"""


@pytest.fixture
def browser(tmp_path):
    """Opens a page of a folder and returns (its DOM, console messages, paths asked for)."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")

    def visit(
        folder: Path, name: str, size: str = "1280,1000", *more: str
    ) -> tuple[str, list[str], list[str]]:
        asked: list[str] = []

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                super().do_GET()

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            profile = tmp_path / f"profile-{len(list(tmp_path.glob('profile-*')))}"
            url = f"http://127.0.0.1:{server.server_port}/{name}"
            command = [CHROMIUM, *FLAGS, *more, f"--user-data-dir={profile}", f"--window-size={size}"]
            done = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=120)
        finally:
            server.shutdown()
            server.server_close()
        assert done.returncode == 0, done.stderr
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], asked

    return visit


def test_the_browser_test_would_notice(browser, tmp_path):
    page = tmp_path / "bad"
    page.mkdir()
    page.joinpath("bad.html").write_text(
        "<img src=x.png><script>console.error('seen'); document.title = 'ran'</script>"
    )
    dom, console, asked = browser(page, "bad.html")
    assert any("seen" in line for line in console)
    assert "/x.png" in asked and "<title>ran</title>" in dom


def test_hostile_page_in_a_browser(browser, tmp_path):
    names = {**dict.fromkeys(HOSTILE, SMALL), "$x_1$@random": SMALL}
    run = make_run(
        tmp_path / "r", names, datasets=[f"folder:{HOSTILE[2]}", "folder:b"], metrics=["nmi"], images=3
    )
    html.render(run, run.path / "report.html")
    dom, console, asked = browser(run.path, "report.html")
    assert console == []
    assert asked == ["/report.html"]
    assert "<script" not in dom.lower() and "onerror=alert(2)&gt;" in dom
    assert Page(dom).text("h1", "bdi").startswith("r")


@pytest.mark.parametrize("width,form", [(1280, "wide"), (420, "narrow")])
def test_layout_in_a_browser(browser, rich, tmp_path, width, form):
    folder = tmp_path / "page"
    folder.mkdir()
    shutil.copy(rich.path / "report.html", folder)
    folder.joinpath("probe.html").write_text(PROBE.replace("WIDTH", str(width)))
    dom, console, _ = browser(folder, "probe.html", f"{max(width, 600)},3200")
    assert console == []
    found = json.loads(Page(dom).text("pre"))
    assert found["scripts"] == 0
    assert found["overflow"] == 0
    assert found["plots"] == [f"plot {form}"] * 3
    assert found["legends"] == (3 if form == "narrow" else 0)  # wide figures label their lines
    assert found["overlaps"] == []
    assert found["cut"] == []
    assert found["font"] >= 11
