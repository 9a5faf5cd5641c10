"""The errors: their text, and Python's own errors that they derive from."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

import sdconv
from sdconv.errors import MissingFileError

EVERY = (
    sdconv.CheckpointError,
    sdconv.InputError,
    MissingFileError,
    sdconv.SdconvError,
    sdconv.UnknownNetworkError,
    sdconv.WeightsMismatchError,
)


@pytest.mark.parametrize("kind", EVERY)
def test_the_parts_are_in_order_and_unknown_ones_left_out(kind: type[sdconv.SdconvError]) -> None:
    error = kind("is empty", where="a.ckpt", expected="weights", got=0, hint="copy it again")
    assert str(error) == ("a.ckpt: is empty\n  expected: weights\n  got: 0\n  hint: copy it again")
    assert str(kind("is empty")) == "is empty"
    assert isinstance(error, sdconv.SdconvError)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind and str(again) == str(error)


def test_a_missing_file_is_a_file_not_found_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "absent.safetensors", tmp_path / "absent", tmp_path / "file" / "in it"):
        for call in (sdconv.load, sdconv.read_header, sdconv.AutoencoderKL.from_pretrained):
            with pytest.raises(FileNotFoundError, match="does not exist") as caught:
                call(path)
            assert isinstance(caught.value, sdconv.CheckpointError)
    # but a file that exists is not missing
    with pytest.raises(sdconv.CheckpointError, match="is empty") as caught_other:
        sdconv.load(tmp_path / "file")
    assert not isinstance(caught_other.value, OSError | ValueError)


def test_a_bad_argument_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="backend") as caught:
        sdconv.load(tmp_path, backend="slow")
    assert isinstance(caught.value, sdconv.InputError)
    with pytest.raises(ValueError, match="not a path"):
        sdconv.read_header(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown family"):
        sdconv.infer({"a": (1,)}, family="sd9")
