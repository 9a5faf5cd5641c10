"""Feature maps in other people's tools: numpy, xarray, pandas, pickle, and the text of ``repr``."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from helpers import capturing, pipelines
from torch import Tensor

import sdconv
from sdconv.features import CapturedMap, Maps, Series

STEPS = (900.0, 500.0, 100.0)
CONV, TEMB, TOKENS = "conv_in", "mid_block.resnets.0:temb", "mid_block.attentions.0.proj_in"


def captured(**options: Any) -> Maps:
    names = ["conv_in", TEMB, "down_blocks.0.*.attn2.to_q", "down_blocks.0.*.attn2:probs"]
    with torch.no_grad(), sdconv.capture(capturing.unet(), names, **options) as maps:
        for step in STEPS:
            capturing.unet()(*capturing.at(step))
    return maps


@pytest.fixture(scope="module")
def maps() -> Maps:
    return captured()


def series(maps: Maps, name: str) -> Series:
    value = maps[name]
    assert isinstance(value, Series)
    return value


def test_numpy(maps: Maps) -> None:
    arrays = maps.to_numpy()
    assert list(arrays) == list(maps)
    assert (arrays[CONV] == series(maps, CONV).stack().numpy()).all()
    half = captured(dtype=torch.bfloat16)
    assert half.to_numpy()[CONV].dtype == np.float32
    assert (half.to_numpy()[CONV] == series(half, CONV).stack().float().numpy()).all()
    one = sdconv.run_until(capturing.unet(), CONV, *capturing.at(500))
    assert (one.to_numpy()[CONV] == one[CONV].numpy()).all()  # type: ignore[union-attr]


def test_xarray(maps: Maps) -> None:
    arrays = maps.to_xarray()
    conv = arrays[CONV]
    assert conv.dims == ("call", "batch", "channel", "row", "column")
    assert conv.name == CONV
    assert conv["timestep"].values.tolist() == list(STEPS)
    assert (conv.sel(call=1).values == series(maps, CONV)[1].tensor.numpy()).all()
    assert arrays[TEMB].dims == ("call", "batch", "channel")
    tokens = next(array for name, array in arrays.items() if name.endswith("to_q"))
    assert tokens.dims == ("call", "batch", "token", "channel")
    probs = next(array for name, array in arrays.items() if name.endswith(":probs"))
    assert probs.dims == ("call", "batch", "head", "query", "key")


def test_the_guidance_halves_of_a_pipeline() -> None:
    pipe = pipelines.pipeline("text")
    with sdconv.capture(pipe, "unet.mid_block") as maps:
        pipelines.run(pipe, "text")
    array = maps.to_xarray()["unet.mid_block"]
    chosen = array.where(array["half"] == "conditional", drop=True)
    assert (chosen[0].values == maps.series("unet.mid_block")[0].conditional.numpy()).all()
    table = maps.to_pandas()
    assert set(table["half"]) == {"conditional", "unconditional"}
    some = table[(table.half == "unconditional") & (table.call == 1)]
    expected = maps.series("unet.mid_block")[1].unconditional.mean((2, 3)).flatten()
    assert np.allclose(some["mean"], expected, atol=1e-6)


def test_pandas(maps: Maps) -> None:
    table = maps.to_pandas()
    rows = table[(table.layer == CONV) & (table.timestep == 500)]
    x = series(maps, CONV)[1].tensor
    assert len(rows) == x.shape[0] * x.shape[1]
    found = rows.set_index(["sample", "channel"]).loc[(1, 7)]
    assert found["mean"] == pytest.approx(float(x[1, 7].mean()), abs=1e-6)
    assert found["std"] == pytest.approx(float(x[1, 7].std(correction=0)), rel=1e-5)
    assert (found["min"], found["max"]) == (float(x[1, 7].min()), float(x[1, 7].max()))
    name = next(name for name in maps if name.endswith("to_q"))
    assert len(table[table.layer == name]) == 3 * 2 * series(maps, name)[0].shape[2]
    assert len(Maps({}, pipeline=False).to_pandas()) == 0


@pytest.mark.parametrize(("package", "method"), [("xarray", "to_xarray"), ("pandas", "to_pandas")])
def test_a_missing_package_is_named(
    maps: Maps, package: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(sdconv.SdconvError, match=f"needs the {package} package") as raised:
        getattr(maps, method)()
    assert "pip install 'sdconv[maps]'" in str(raised.value)


def test_xarray_opens_a_store(tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    maps = captured(store=tmp_path / "maps")
    with xarray.open_zarr(tmp_path / "maps" / CONV, consolidated=False) as found:
        array = found["0"]
        assert array.dims == ("call", "batch", "channel", "row", "column")
        assert array.attrs["long_name"] == CONV
        assert found["timestep"].values.tolist() == list(STEPS)
        assert set(found.coords) == {"call", "timestep"}
        first = array.isel(call=0).values
        assert (first == series(maps, CONV)[0].tensor.numpy()).all()
    with xarray.open_zarr(tmp_path / "maps" / quote(TEMB), consolidated=False) as found:
        for at, one in enumerate(series(maps, TEMB)):
            assert (found["0"].sel(call=at).values == one.tensor.numpy()).all()
        assert not (found["0"].sel(call=0).values == found["0"].sel(call=2).values).all()
    with xarray.open_datatree(tmp_path / "maps", engine="zarr", consolidated=False) as tree:
        assert len(tree.children) == len(maps)


def test_xarray_opens_feature_maps_that_change_their_size(tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    vae = capturing.vae()
    with torch.no_grad(), sdconv.capture(vae, "decoder.conv_in", store=tmp_path / "maps") as maps:
        for side, dtype in ((4, None), (4, None), (6, None)):
            vae.decode(torch.zeros(1, 4, side, side, dtype=dtype))
    with xarray.open_zarr(tmp_path / "maps" / "decoder.conv_in", consolidated=False) as found:
        assert [found[name].shape[0] for name in ("0", "1")] == [2, 1]
        assert found["1"].dims[0] == "call_1"
        assert np.isnan(found["timestep"].values).all()
        assert found["call_1"].values.tolist() == [2]
    assert [one.shape[2] for one in maps.series("decoder.conv_in")] == [4, 4, 6]


def test_other_programs_see_the_numbers_of_dtypes_that_numpy_lacks(tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    maps = captured(dtype=torch.bfloat16)
    maps.save(tmp_path / "maps")
    with xarray.open_zarr(tmp_path / "maps" / CONV, consolidated=False) as found:
        assert (found["0"].values == series(maps, CONV).stack().float().numpy()).all()
    opened = sdconv.open_maps(tmp_path / "maps").series(CONV)[0]
    assert opened.dtype == torch.bfloat16 == opened.tensor.dtype


def test_a_change_of_dtype_begins_a_new_array(tmp_path: Path) -> None:
    call = captured().series(CONV)[0].network_call
    wide = torch.full((1, 2, 2, 2), 1 / 3)
    both = [CapturedMap("a", call, lambda x=x: x) for x in (wide.bfloat16(), wide)]  # type: ignore[misc]
    Maps({"a": both}, pipeline=False).save(tmp_path / "maps")
    again = sdconv.open_maps(tmp_path / "maps").series("a")
    assert torch.equal(again[1].tensor, wide)
    assert torch.equal(again[0].tensor, wide.bfloat16())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda maps: pickle.loads(pickle.dumps(maps))])
def test_maps_can_be_pickled_and_copied(maps: Maps, copied: Any, tmp_path: Path) -> None:
    stored = captured(store=tmp_path / "maps")
    with sdconv.capture(capturing.unet(), "conv_in", grad=True) as tracked:
        capturing.unet()(*capturing.at(500))
    for one in (maps, stored, sdconv.open_maps(tmp_path / "maps"), tracked):
        again = copied(one)
        assert list(again) == list(one) and again.pipeline == one.pipeline
        for name in one:
            pairs = zip(again.series(name), one.series(name), strict=True)
            for a, b in pairs:
                assert (a.call, a.timestep, a.shape) == (b.call, b.timestep, b.shape)
                assert torch.equal(a.tensor, b.tensor)
    again = copied(maps)
    again.series(CONV)[0].tensor.zero_()
    assert maps.series(CONV)[0].tensor.any()


def test_repr_is_a_table_and_reads_nothing(maps: Maps) -> None:
    lines = repr(maps).splitlines()
    assert lines[0] == f"<maps of {len(maps)} layers>"
    line = next(line for line in lines if line.startswith(CONV))
    assert line.split("  ")[0] == CONV
    assert "3 calls of" in line and "2 \u00d7 32 \u00d7 8 \u00d7 12" in line
    assert "float32" in line and line.endswith("t = 900 to 100")

    class Unread:
        shape, dtype = torch.Size((1, 2)), torch.float16

        def __call__(self) -> Tensor:
            raise AssertionError("read")

    call = maps.series(CONV)[0].network_call
    many = {f"layer.{at}": [CapturedMap(f"layer.{at}", call, Unread())] for at in range(20)}
    words = repr(Maps(many, pipeline=False))
    assert words.endswith("and 8 more") and "1 \u00d7 2" in words and "float16" in words
    assert repr(Maps({}, pipeline=False)) == "<maps of 0 layers>"
