"""A result comes back as it was given, opens with plain tools, and damage is found."""

from __future__ import annotations

import random
import time

import h5py
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.errors import MetricError, StoreError
from probekit.store import results
from probekit.store.results import read_result, verify_result, write_result
from probekit.store.sealing import Damaged, Missing, NewerFormat


def example() -> xr.Dataset:
    return xr.Dataset(
        {
            "nmi": (("layer", "head"), np.arange(6.0).reshape(3, 2), {"units": "1"}),
            "seconds": (("layer",), np.array([1.0, np.nan, 3.0]), {"units": "s"}),
            "found": (("layer",), np.array([True, False, True])),
            "rank": (("layer",), np.array([1, 2, 3], np.int32), {"kept": None, "top": [1]}),
            "name": ((), "é"),
        },
        coords={
            "layer": ["blocks.0", "blocks.1", "é.2"],
            "depth": ("layer", [1.0, 2.0, 3.0], {"exact": True}),
            "head": [0, 1],
        },
        attrs={
            "metric": "nmi",
            "version": 1,
            "seed": np.int64(0),
            "renormalised": True,
            "none": None,
            "options": {"compat": "cl-vs-mim", "nested": {"x": [1, None]}},
            "layers": ["a", "b"],
            "one": [1],
            "float": 0.1,
            "empty": "",
            "looks": '{"like": "json"}',
            "big": 2**70,
        },
    )


def test_round_trip(tmp_path):
    path, given = tmp_path / "deep" / "nmi.nc", example()
    write_result(path, given)
    read = read_result(path)
    xr.testing.assert_identical(read, given)
    assert read.attrs == given.attrs
    assert {key: type(value) for key, value in read.attrs.items() if key != "seed"} == {
        key: type(value) for key, value in given.attrs.items() if key != "seed"
    }
    assert read["rank"].attrs == {"kept": None, "top": [1]}
    assert read["depth"].attrs == {"exact": True}
    assert read["rank"].dtype == np.int32
    assert [p.name for p in path.parent.iterdir()] == ["nmi.nc"]
    xr.testing.assert_identical(given, example())  # the caller's dataset is left alone


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="ascii", categories=["Ll", "Lu"]), min_size=1, max_size=8),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=5,
    )
)
def test_any_attribute_comes_back(tmp_path_factory, attrs):
    path = tmp_path_factory.mktemp("any") / "x.nc"
    write_result(path, xr.Dataset(attrs=attrs))
    assert read_result(path).attrs == attrs


def test_the_file_is_closed_and_can_be_rewritten(tmp_path):
    path = tmp_path / "x.nc"
    write_result(path, example())
    read = read_result(path)
    write_result(path, read.assign(nmi=read.nmi + 1))
    assert float(read_result(path).nmi[0, 0]) == 1.0


def test_same_dataset_gives_the_same_bytes(tmp_path):
    write_result(tmp_path / "a.nc", example())
    time.sleep(1.1)
    write_result(tmp_path / "b.nc", read_result(tmp_path / "a.nc"))
    assert (tmp_path / "a.nc").read_bytes() == (tmp_path / "b.nc").read_bytes()


def test_merged_results_keep_long_names(tmp_path):
    """xarray remembers the width of the first file's strings and cuts the others to it."""
    for name in ("vit", "a_much_longer_name"):
        ds = xr.Dataset({"nmi": ("model", [1.0])}, coords={"model": [name]})
        ds.to_netcdf(tmp_path / f"{name}.nc", engine="h5netcdf")
    opened = [xr.load_dataset(tmp_path / f"{name}.nc") for name in ("vit", "a_much_longer_name")]
    merged = xr.concat(opened, "model")
    merged["model"].encoding["dtype"] = np.dtype("<U3")
    merged["nmi"].encoding.update(dtype="int16", scale_factor=10.0)
    write_result(tmp_path / "merged.nc", merged)
    assert list(read_result(tmp_path / "merged.nc").model.values) == ["vit", "a_much_longer_name"]
    assert list(read_result(tmp_path / "merged.nc").nmi.values) == [1.0, 1.0]


def test_float16_becomes_float32(tmp_path):
    ds = xr.Dataset({"x": ("layer", np.array([0.1, 2], np.float16), {"units": "1"})}, {"layer": [1, 2]})
    ds = ds.assign_coords(depth=("layer", np.array([1, 2], np.float16)))
    write_result(tmp_path / "x.nc", ds)
    read = read_result(tmp_path / "x.nc")
    assert read.x.dtype == read.depth.dtype == np.float32
    assert read.x.attrs == {"units": "1"}
    np.testing.assert_array_equal(read.x, ds.x)
    with h5py.File(tmp_path / "x.nc") as file:
        assert {file[name].dtype.itemsize for name in ("x", "depth")} == {4}


def test_plain_tools_open_it(tmp_path):
    path = tmp_path / "x.nc"
    write_result(path, example())
    with xr.open_dataset(path) as ds:
        np.testing.assert_array_equal(ds.nmi, example().nmi)
        assert list(ds.layer.values) == list(example().layer.values)
        assert ds.attrs["metric"] == "nmi"
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["nmi"], example().nmi)
        assert file["nmi"].attrs["units"] in ("1", b"1")
        assert file["layer"].asstr()[2] == "é.2"


@pytest.mark.parametrize(
    ("ds", "reason"),
    [
        (xr.Dataset({"a/b": ("x", [1.0])}), "'a/b' can't name a variable"),
        (xr.Dataset({"a": ("x/y", [1.0])}), "'x/y' can't name a variable"),
        (xr.Dataset({1: ("x", [1.0])}), "'1' can't name"),
        (xr.Dataset({"..": ("x", [1.0])}), "'..' can't name"),
        (xr.Dataset({"a": ("x", np.array(["2020"], "datetime64[s]"))}), "variable 'a' has dtype datetime64"),
        (xr.Dataset({"a": ("x", np.array([1j]))}), "variable 'a' has dtype complex128"),
        (xr.Dataset({"a": ("x", np.array([None], object))}), "variable 'a' has dtype object"),
        (xr.Dataset(attrs={"x": object()}), "attribute 'x': object can't be stored"),
        (xr.Dataset(attrs={"probekit_json": "x"}), "'probekit_json' can't name an attribute"),
        (
            xr.Dataset({"a": ("x", [1.0], {"scale_factor": 2.0})}),
            "'scale_factor' of variable 'a' can't name an attribute",
        ),
    ],
)
def test_what_netcdf_cannot_hold(tmp_path, ds, reason):
    with pytest.raises(MetricError) as caught:  # the metric's fault, which no other one has to suffer
        write_result(tmp_path / "x.nc", ds)
    assert reason in caught.value.message
    assert str(tmp_path / "x.nc") in caught.value.message
    assert not list(tmp_path.iterdir())


def test_every_flipped_bit_and_every_truncation_is_found(tmp_path, capfd):
    path = tmp_path / "x.nc"
    write_result(path, example())
    verify_result(path)
    whole, rng = path.read_bytes(), random.Random(0)
    for position in rng.sample(range(len(whole)), 300):
        data = bytearray(whole)
        data[position] ^= 1 << rng.randrange(8)
        if len(whole) - 24 <= position < len(whole) - 16:
            continue  # in the mark itself: below
        path.write_bytes(data)
        with pytest.raises(Damaged, match=r"x\.nc' is damaged"):
            read_result(path)
    mark = bytearray(whole)
    mark[-20] ^= 1
    for data in [mark, whole[:-24], whole[:-1], whole[: len(whole) // 2], whole[:100], b""]:
        path.write_bytes(data)
        with pytest.raises(Damaged, match=r"x\.nc' is damaged") as caught:
            verify_result(path)
        assert caught.value.hint
    assert "Traceback" not in capfd.readouterr().err


def test_missing_foreign_and_newer_files(tmp_path, monkeypatch):
    with pytest.raises(Missing, match=r"result '.*none\.nc' doesn't exist"):
        read_result(tmp_path / "none.nc")
    with pytest.raises(StoreError, match="can't read result"):
        read_result(tmp_path)
    example().drop_attrs().to_netcdf(tmp_path / "foreign.nc", engine="h5netcdf")
    xr.testing.assert_equal(read_result(tmp_path / "foreign.nc"), example())
    with pytest.raises(Damaged, match="not a probekit result"):
        verify_result(tmp_path / "foreign.nc")
    monkeypatch.setattr(results, "FORMAT_VERSION", 2)
    write_result(tmp_path / "newer.nc", example())
    monkeypatch.undo()
    with pytest.raises(NewerFormat, match="written by a newer probekit"):
        read_result(tmp_path / "newer.nc")
