"""A shard comes back as it was given, opens with plain tools, and damage is found."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.errors import StoreError
from probekit.store import shards
from probekit.store.writing import (
    Damaged,
    DamagedShard,
    Missing,
    NewerFormat,
    map_dataset,
    read_json,
    read_shard,
    seal_json,
    shard_name,
    shard_ok,
    shard_problem,
    shard_ranges,
    write_shard,
)

ARRAYS = {
    "nmi": np.arange(36, dtype=np.float32).reshape(3, 12),
    "layers/0/q": np.arange(60, dtype=np.float16).reshape(3, 4, 5),
    "images": np.array(["a.jpg", "é.jpg", "odd\udcff.jpg"]),
}
ATTRS = {"range": [0, 3], "metric": "nmi", "seed": None}


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "traces" / shard_name(0)
    write_shard(path, ARRAYS, ATTRS)
    return path


# ------------------------------------------------------------------------------------------- the format


def test_round_trip(shard):
    read = read_shard(shard)
    assert set(read.arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert read.arrays[name].dtype.kind == array.dtype.kind
        np.testing.assert_array_equal(read.arrays[name], array)
    assert read.arrays["layers/0/q"].dtype == np.float16
    assert read.attrs == ATTRS
    assert read.bfloat16 == frozenset()
    assert os.listdir(shard.parent) == ["shard-00000.h5"]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_characters="\0")), max_size=5),
    st.sampled_from(["?", "i1", "<u2", "<i8", ">i4", "<f2", "<f4", "<f8", "<c8"]),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(),
)
def test_round_trip_of_anything(tmp_path_factory, strings, dtype, shape, seed):
    path = tmp_path_factory.mktemp("any") / "x.h5"
    raw = np.random.default_rng(abs(seed)).integers(0, 2, size=shape)
    array = raw.astype(dtype)
    write_shard(path, {"strings": np.array(strings, dtype=object), "a/b": array}, {"text": strings})
    read = read_shard(path)
    assert list(read.arrays["strings"]) == strings
    assert read.attrs == {"text": strings}
    assert read.arrays["a/b"].dtype == array.dtype
    np.testing.assert_array_equal(read.arrays["a/b"], array)
    np.testing.assert_array_equal(map_dataset(path, "a/b"), array)


def test_same_content_gives_the_same_bytes(shard):
    first = shard.read_bytes()
    time.sleep(1.1)  # a time stamp in the file would show
    write_shard(shard, dict(reversed(ARRAYS.items())), dict(reversed(ATTRS.items())))
    assert shard.read_bytes() == first


def test_readable_with_h5py_alone_and_contiguous(shard):
    with h5py.File(shard) as file:
        assert file.attrs["format"] == b"probekit-shard"
        assert file.attrs["format_version"] == 1
        assert json.loads(file.attrs["attrs"]) == ATTRS
        dataset = file["layers/0/q"]
        assert dataset.chunks is None
        assert dataset.compression is None
        assert file["images"].asstr()[0] == "a.jpg"
        import xxhash

        assert dataset.attrs["xxh3_128"].decode() == xxhash.xxh3_128_hexdigest(ARRAYS["layers/0/q"].tobytes())


def test_some_names_only(shard):
    assert list(read_shard(shard, ["nmi"]).arrays) == ["nmi"]
    assert read_shard(shard, []).attrs == ATTRS
    with pytest.raises(StoreError, match=r"no dataset 'cka'.*\n.*images, layers/0/q, nmi"):
        read_shard(shard, ["cka"])


def test_map_is_a_view_of_the_file(shard):
    mapped = map_dataset(shard, "layers/0/q")
    assert isinstance(mapped, np.memmap)
    assert mapped.flags.aligned
    assert not mapped.flags.writeable
    np.testing.assert_array_equal(mapped, ARRAYS["layers/0/q"])
    assert shard.read_bytes()[mapped.offset : mapped.offset + mapped.nbytes] == mapped.tobytes()
    with pytest.raises(StoreError, match="strings"):
        map_dataset(shard, "images")


def test_bfloat16_bits_are_marked(tmp_path):
    path, bits = tmp_path / "x.h5", np.array([0x3F80, 0x4000], np.uint16)
    write_shard(path, {"tokens": bits, "other": bits}, {}, bfloat16=["tokens"])
    read = read_shard(path)
    assert read.bfloat16 == {"tokens"}
    np.testing.assert_array_equal(read.arrays["tokens"], bits)
    with h5py.File(path) as file:
        assert file["tokens"].attrs["dtype"] == b"bfloat16"
    with pytest.raises(TypeError, match="uint16"):
        write_shard(path, {"x": np.ones(2)}, {}, bfloat16=["x"])
    with pytest.raises(ValueError, match="no array"):
        write_shard(path, {}, {}, bfloat16=["x"])


def test_attributes_larger_than_an_hdf5_header(tmp_path):
    attrs = {"images": [f"n{i:08d}.JPEG" for i in range(20_000)]}
    write_shard(tmp_path / "x.h5", {}, attrs)
    assert read_shard(tmp_path / "x.h5").attrs == attrs


def test_what_the_format_cannot_hold_leaves_nothing_behind(tmp_path):
    for arrays, attrs in [
        ({"x": np.array([object()])}, {}),
        ({"x": np.array(["a\0b"])}, {}),
        ({"x": np.array(["2020"], "datetime64[Y]")}, {}),
        ({"/x": np.ones(1)}, {}),
        ({"a": np.ones(1), "a/b": np.ones(1)}, {}),
        ({}, {"x": object()}),
    ]:
        with pytest.raises((TypeError, ValueError)):
            write_shard(tmp_path / "x.h5", arrays, attrs)
        assert not list(tmp_path.iterdir())


def test_ranges_and_names():
    assert shard_ranges(10, 4) == [range(4), range(4, 8), range(8, 10)]
    assert shard_ranges(0, 4) == []
    assert shard_ranges(4, 4) == [range(4)]
    with pytest.raises(ValueError, match="at least 1"):
        shard_ranges(4, 0)
    assert shard_name(17) == "shard-00017.h5"


# ----------------------------------------------------------------------------------------------- damage


def test_every_flipped_bit_is_found_or_harmless(tmp_path):
    path, damaged = tmp_path / "good.h5", tmp_path / "bad.h5"
    write_shard(path, ARRAYS, ATTRS)
    whole, rng, found = path.read_bytes(), random.Random(0), 0
    for position in rng.sample(range(len(whole)), 400):
        data = bytearray(whole)
        data[position] ^= 1 << rng.randrange(8)
        damaged.write_bytes(data)
        try:
            read = read_shard(damaged)
        except StoreError as error:
            assert str(damaged) in error.message
            found += 1
        else:
            assert read.attrs == ATTRS
            assert all(np.array_equal(read.arrays[name], ARRAYS[name]) for name in ARRAYS)
    assert found > 50  # most of such a small file is padding


def test_a_flip_in_the_data_names_file_and_dataset(shard):
    offset = map_dataset(shard, "nmi").offset
    data = bytearray(shard.read_bytes())
    data[offset + 5] ^= 4
    shard.write_bytes(data)
    with pytest.raises(DamagedShard, match=r"shard-00000\.h5' is damaged: dataset 'nmi'") as caught:
        read_shard(shard)
    assert caught.value.hint
    read_shard(shard, ["images"])  # the rest can be read
    read_shard(shard, verify=False)
    assert shard_ok(shard, ATTRS)
    assert "dataset 'nmi'" in shard_problem(shard, ATTRS, verify=True)


def test_truncation_at_any_length(shard):
    whole = shard.read_bytes()
    for length in [0, 1, 8, 100, len(whole) // 2, len(whole) - 1]:
        shard.write_bytes(whole[:length])
        with pytest.raises(DamagedShard, match="shard-00000"):
            read_shard(shard)
        assert not shard_ok(shard, {})


def test_a_missing_or_foreign_file(tmp_path):
    with pytest.raises(Missing, match=r"'.*x\.h5' doesn't exist"):
        read_shard(tmp_path / "x.h5")
    assert "doesn't exist" in shard_problem(tmp_path / "x.h5", {})
    with h5py.File(tmp_path / "other.h5", "w"):
        pass
    with pytest.raises(Damaged, match="not a probekit shard"):
        read_shard(tmp_path / "other.h5")
    with pytest.raises(StoreError):
        read_shard(tmp_path)


def test_a_newer_format_is_refused_and_never_taken_for_damage(shard, monkeypatch):
    monkeypatch.setattr(shards, "FORMAT_VERSION", 2)
    write_shard(shard, ARRAYS, ATTRS)
    monkeypatch.undo()
    for read in (lambda: read_shard(shard), lambda: map_dataset(shard, "nmi"), lambda: shard_ok(shard, {})):
        with pytest.raises(NewerFormat, match=r"newer probekit \(format 2; this one reads up to 1\)"):
            read()


def test_resume_compares_attributes(shard):
    assert shard_ok(shard, {"range": (0, np.int64(3))})  # as JSON sees them
    assert shard_ok(shard, {}, verify=True)
    assert "another 'range'" in shard_problem(shard, {"range": [0, 4]})
    assert "doesn't say 'weights'" in shard_problem(shard, {"weights": "x"})


# ------------------------------------------------------------------------------------------------- JSON


def test_json_round_trip_and_errors(tmp_path):
    path = tmp_path / "deep" / "run.json"
    obj = {"format_version": 1, "b": [1, None, "\udcff"], "a": {"x": 0.1}}
    seal_json(path, {**obj, "n": np.float32(0.5), "path": Path("x")})
    assert read_json(path, "run", 1) == {**obj, "n": 0.5, "path": "x"}
    assert list(read_json(path, "run", 1)) == ["a", "b", "format_version", "n", "path"]
    with pytest.raises(Missing, match=r"run file '.*none\.json' doesn't exist"):
        read_json(tmp_path / "none.json", "run", 1)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(Damaged, match=r"run file '.*run\.json' is damaged: .*line"):
        read_json(path, "run", 1)
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(Damaged):
        read_json(path, "run", 1)
    seal_json(path, {"format_version": 3})
    with pytest.raises(NewerFormat, match="newer probekit"):
        read_json(path, "run", 2)
    with pytest.raises(TypeError):
        seal_json(path, {"x": object()})
    assert read_json(path, "run", 3) == {"format_version": 3}
    with pytest.raises(StoreError, match="can't read"):
        read_json(tmp_path, "run", 1)
