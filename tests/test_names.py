"""References, selectors and folder names."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from probekit.errors import UsageError
from probekit.names import (
    DatasetRef,
    MetricRef,
    ModelRef,
    expand,
    nearest,
    parse_dataset,
    parse_metric,
    parse_model,
    slug,
)

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,12}", fullmatch=True)
packs = st.none() | names
visible = st.characters(blacklist_categories=("Cc", "Cs"))
values = st.text(visible.filter(lambda c: c not in ":@"), max_size=12)
options = st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True), values, max_size=3)
tails = st.text(visible, min_size=1, max_size=30).filter(str.strip)
variants = st.just("") | st.text(visible.filter(lambda c: c not in ":@="), min_size=1, max_size=20).filter(
    lambda text: text == text.strip()
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("moco", ModelRef(None, "moco")),
        ("moco:vit-b16", ModelRef(None, "moco", "vit-b16")),
        ("mypack/moco:vit-b16", ModelRef("mypack", "moco", "vit-b16")),
        (
            "moco:vit-b16:encoder=momentum@/ckpt.pth.tar",
            ModelRef(None, "moco", "vit-b16", {"encoder": "momentum"}, "/ckpt.pth.tar"),
        ),
        ("moco:encoder=momentum", ModelRef(None, "moco", "", {"encoder": "momentum"})),
        ("moco:a=1=2:b=", ModelRef(None, "moco", "", {"a": "1=2", "b": ""})),
        ("simmim:vit-b16@random", ModelRef(None, "simmim", "vit-b16", {}, "random")),
        ("mae@c:/a@b/epoch=3.pth", ModelRef(None, "mae", "", {}, "c:/a@b/epoch=3.pth")),
        ("hf:facebook/vit-mae-base", ModelRef(None, "hf", "facebook/vit-mae-base")),
        ("mypack/hf:facebook/vit.x", ModelRef("mypack", "hf", "facebook/vit.x")),
        ("pkg.module:build", ModelRef(None, "pkg.module", "build")),
        ("./file.py:build", ModelRef(None, "./file.py", "build")),
        ("timm:hf-hub:org/vit.x@random", ModelRef(None, "timm", "hf-hub:org/vit.x", {}, "random")),
        (
            "timm:local-dir:./runs/a=b:container=ema@w.pth",
            ModelRef(None, "timm", "local-dir:./runs/a=b", {"container": "ema"}, "w.pth"),
        ),
        ("sub/file.py:build:depth=3", ModelRef(None, "sub/file.py", "build", {"depth": "3"})),
        ("/a/b/file.py:Some.build@x", ModelRef(None, "/a/b/file.py", "Some.build", {}, "x")),
    ],
)
def test_model_references(text, expected):
    assert parse_model(text) == expected
    assert str(expected) == text


def test_file_and_module_references_are_told_apart():
    assert parse_model("./file.py:build").is_file and not parse_model("./file.py:build").is_module
    assert parse_model("pkg.module:build").is_module and not parse_model("pkg.module:build").is_file
    assert not parse_model("moco:vit-b16").is_module
    assert not parse_model("pkg.module").is_module
    assert not parse_model("pkg.module:not-python").is_module


def test_options_are_canonical():
    assert str(parse_model("m:v:b=2:a=1@w")) == "m:v:a=1:b=2@w"
    assert parse_metric("nmi:b=2:a=1") == parse_metric("nmi:a=1:b=2")


def test_references_can_be_keys():
    assert len({parse_model("m:a=1"), parse_model("m:a=1"), parse_model("m:a=2")}) == 2


@pytest.mark.parametrize(
    ("parse", "text", "says"),
    [
        (parse_model, "", "empty"),
        (parse_model, "  ", "empty"),
        (parse_model, 3, "not text"),
        (parse_model, "@random", "before the first"),
        (parse_model, ":vit", "before the first"),
        (parse_model, "moco@", "follows the '@'"),
        (parse_model, "moco:", "colons"),
        (parse_model, "moco::a=1", "colons"),
        (parse_model, "moco:vit:", "colons"),
        (parse_model, "moco:vit:other", "'other' is not key=value"),
        (parse_model, "timm:hf-hub", "nothing follows 'hf-hub:'"),
        (parse_model, "timm:local-dir:@random", "nothing follows 'local-dir:'"),
        (parse_model, "timm:hf-hub:a/b:c", "'c' is not key=value"),
        (parse_model, "moco:a=1:vit", "'vit' is not key=value"),
        (parse_model, "moco:vit:1a=2", "'1a'"),
        (parse_model, "moco:=2", "option's name"),
        (parse_model, "moco:a=1:a=2", "twice"),
        (parse_model, "mo co", "'mo co'"),
        (parse_model, "-moco", "'-moco'"),
        (parse_model, "a/", "next to '/'"),
        (parse_model, "a/b/c:vit", "'.py'"),
        (parse_model, "/ckpt.pth", "'.py'"),
        (parse_model, "./file.py", "names no function"),
        (parse_model, "./file.py:a-b", "'a-b' is not a Python name"),
        (parse_model, "./a@b.py:build", "'.py'"),
        (parse_model, "moco:vit\nb", "line break"),
        (parse_model, "moco: vit", "space"),
        (parse_metric, "", "empty"),
        (parse_metric, "nmi:fast", "'fast' is not key=value"),
        (parse_metric, "nmi:", "colons"),
        (parse_metric, "./m.py:Entropy", "is not a metric name"),
        (parse_metric, "a/b/nmi", "'a/b'"),
        (parse_dataset, "", "empty"),
        (parse_dataset, "folder:", "follows the ':'"),
        (parse_dataset, ":x", "before the first"),
        (parse_dataset, "/data/val", "is not a dataset name"),
        (parse_dataset, "folder:a\0b", "control"),
    ],
)
def test_malformed_texts_get_one_sentence(parse, text, says):
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert says in caught.value.message
    assert "\n" not in caught.value.message and "\0" not in caught.value.message
    assert caught.value.hint


def test_a_path_as_dataset_is_shown_the_way():
    with pytest.raises(UsageError) as caught:
        parse_dataset("./data/val")
    assert "folder:./data/val" in caught.value.hint


def test_dataset_and_metric_references():
    assert parse_dataset("folder:/a:b@c") == DatasetRef(None, "folder", "/a:b@c")
    assert parse_dataset("shapetex") == DatasetRef(None, "shapetex")
    assert parse_dataset("p/folder:x/y") == DatasetRef("p", "folder", "x/y")
    assert parse_metric("p/nmi:compat=cl-vs-mim") == MetricRef("p", "nmi", {"compat": "cl-vs-mim"})


@given(packs, names, variants, options, st.none() | tails)
def test_model_round_trip(pack, name, variant, options, weights):
    assume(not name.endswith(".py"))
    ref = ModelRef(pack, name, variant, options, weights)
    assert parse_model(str(ref)) == ref


@given(packs, names, options)
def test_metric_round_trip(pack, name, options):
    ref = MetricRef(pack, name, options)
    assert parse_metric(str(ref)) == ref


@given(packs, names, st.none() | tails)
def test_dataset_round_trip(pack, name, argument):
    ref = DatasetRef(pack, name, argument)
    assert parse_dataset(str(ref)) == ref


@given(st.text(max_size=30), st.sampled_from([parse_model, parse_metric, parse_dataset]))
def test_any_text_parses_to_itself_or_is_refused(text, parse):
    try:
        ref = parse(text)
    except UsageError as error:
        assert "\n" not in error.message
    else:
        assert parse(str(ref)) == ref


# --- folder names

tricky = st.text(st.sampled_from("aAb0:-./@ ~_é"), max_size=8)


@given(tricky | st.text(max_size=200))
def test_slugs_are_safe(text):
    name = slug(text)
    assert re.fullmatch(r"[A-Za-z0-9._@\-]+", name)
    assert name[0] not in ".-" and name[-1] != "." and len(name) <= 100


@given(st.lists(tricky, min_size=2, max_size=2, unique=True))
def test_different_texts_have_different_folders(pair):
    assert slug(pair[0]).lower() != slug(pair[1]).lower()


def test_slugs_read_well():
    assert slug("moco:vit-b16@random") == "moco--vit-b16@random"
    assert slug("nmi") == "nmi"
    assert re.fullmatch(r"folder--data-val\.[0-9a-f]{8}", slug("folder:/data/val").replace("---", "--"))
    assert slug("hf:a/b") != slug("hf:a-b")
    assert slug(slug("hf:a/b")) != slug("hf:a/b")  # a name that looks hashed is hashed


# --- selectors

KNOWN = ["attention_distance", "nmi", "fourier", "moco:vit-s16", "moco:vit-b16", "timm"]


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        (["nmi"], ["nmi"]),
        (["nmi, fourier", "nmi"], ["nmi", "fourier"]),
        (["all"], KNOWN),
        (["moco:*"], ["moco:vit-s16", "moco:vit-b16"]),
        (
            ["fourier", "moco:*", "all"],
            ["fourier", "moco:vit-s16", "moco:vit-b16", "attention_distance", "nmi", "timm"],
        ),
        (["!nmi", "all"], [n for n in KNOWN if n != "nmi"]),
        (["!moco", "!timm"], ["attention_distance", "nmi", "fourier"]),
        (["!moco:*,!timm,!*i*e*"], ["nmi"]),
        (["nmi:compat=cl-vs-mim", "nmi"], ["nmi:compat=cl-vs-mim", "nmi"]),
        (["nmi:compat=x,fourier,!nmi"], ["fourier"]),
        (["moco:*@random"], ["moco:vit-s16@random", "moco:vit-b16@random"]),
        (["moco:vit-b16:encoder=momentum@/x"], ["moco:vit-b16:encoder=momentum@/x"]),
        (["timm:vit_tiny@random"], ["timm:vit_tiny@random"]),
        ("nmi,fourier", ["nmi", "fourier"]),
        ([], []),
    ],
)
def test_expand(selectors, expected):
    assert expand(selectors, KNOWN) == expected


@pytest.mark.parametrize(
    ("selectors", "says", "hint"),
    [
        (["nmj"], "'nmj'", "'nmi'"),
        (["NMI"], "'NMI'", "'nmi'"),
        (["distance"], "'distance'", "attention_distance"),
        (["!nmj"], "'nmj'", "'nmi'"),
        (["zzz*"], "matches no name", ""),
        (["nmi,!nmi"], "leaves nothing", None),
        ([" , "], "no name", "all"),
        (["moco"], "'moco'", "moco:vit"),
    ],
)
def test_expand_refuses(selectors, says, hint):
    with pytest.raises(UsageError) as caught:
        expand(selectors, KNOWN)
    assert says in caught.value.message
    assert hint is None or hint in caught.value.hint


plain = st.text(string.ascii_lowercase, min_size=1, max_size=5).filter(lambda name: name != "all")


@given(st.lists(plain, unique=True, min_size=1), st.data())
def test_expand_laws(known, data):
    chosen = data.draw(st.lists(st.sampled_from(known), min_size=1))
    once = list(dict.fromkeys(chosen))
    assert expand(chosen, known) == expand([",".join(chosen)], known) == once
    rest = [name for name in known if name not in once]
    if rest:
        assert expand([f"!{name}" for name in once], known) == rest
    assert expand(["all"], known) == known


def test_nearest():
    assert nearest("simim", ["simmim", "moco", "mae"]) == ["simmim"]
    assert nearest("MOCO", ["moco"]) == ["moco"]
    assert nearest("zzzz", ["simmim"]) == []
    assert len(nearest("vit", [f"vit{i}" for i in range(9)])) == 3


def test_options_of_a_dataset():
    ref = parse_dataset("shapetex:cue-conflict?size=32&classes=4")
    assert (ref.name, ref.argument, ref.options) == (
        "shapetex",
        "cue-conflict",
        {"size": "32", "classes": "4"},
    )
    assert str(ref) == "shapetex:cue-conflict?classes=4&size=32"
    assert parse_dataset("folder:/a?b/c=d").argument == "/a?b/c=d"  # no option, a path
    assert parse_dataset(str(ref)) == ref
