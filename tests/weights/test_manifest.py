"""``weights/manifest.toml``: well-formed, in agreement with known headers, and strictly read."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path

import pytest

from sdconv.errors import SdconvError
from sdconv.hub.manifest import COMPONENTS, FAMILIES, load_manifest

GOOD = {
    "repository": '"owner/name"',
    "file": '"folder/model.safetensors"',
    "components": '["vae"]',
    "family": '"sd1"',
    "size": "1000",
    "licence": '"mit"',
}

BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}
# a checkpoint, a header of the same tensors, and the dtype of its floats where the header's differs
SAME_TENSORS = [
    ("sd15", "sd15-ldm", "F32"),
    ("sd-vae-ft-mse", "sd-vae-ldm", "F32"),
    ("sd-vae-ft-ema", "sd-vae-ldm", "F32"),
    ("sdxl-vae", "sd-vae-ldm", "F32"),
    ("sdxl-vae-fp16-fix", "sd-vae-ldm", "F32"),
    ("flux1-vae", "sd3-flux-vae-ldm", "F32"),
    ("sd3-vae", "sd3-flux-vae-ldm", "F16"),
]


def manifest(folder: Path, **changes: str | None) -> Path:
    lines = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    path = folder / "manifest.toml"
    path.write_text("\n".join(["[one]", *(f"{key} = {value}" for key, value in lines.items())]))
    return path


def test_the_manifest_is_well_formed() -> None:
    known = load_manifest()
    assert {entry.family for entry in known.values()} == FAMILIES
    assert {part for entry in known.values() for part in entry.components} == set(COMPONENTS)
    files = [(entry.repository, entry.file) for entry in known.values()]
    assert len(set(files)) == len(files)
    for name, entry in known.items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert entry.name == name
        assert entry.file.endswith(".safetensors")
        assert len(set(entry.components)) == len(entry.components)
        assert (entry.size or entry.approximate_size or 0) > 1_000_000
        assert ("unet" in entry.components) == ((entry.size or 0) > 1_000_000_000)


@pytest.mark.shared
@pytest.mark.parametrize(("name", "header", "floats"), SAME_TENSORS)
def test_a_size_is_that_of_the_tensors_and_a_header(
    shared_dir: Path, name: str, header: str, floats: str
) -> None:
    tensors = json.loads((shared_dir / "headers" / f"{header}.json").read_text())
    data = sum(prod(s) * BYTES[d if d == "I64" else floats] for s, d in tensors.values())
    entry = load_manifest()[name]
    if entry.size is None:
        assert entry.approximate_size == pytest.approx(data, rel=0.01)
    else:
        # a tensor's line in a safetensors header: its name, dtype, shape and two offsets
        assert 60 * len(tensors) < entry.size - data < 250 * len(tensors)


def test_an_entry_may_be_minimal(tmp_path: Path) -> None:
    entry = load_manifest(manifest(tmp_path))["one"]
    assert (entry.size, entry.approximate_size, entry.gated) == (1000, None, False)
    assert entry.components == ("vae",)
    assert str(entry) == "one (owner/name, folder/model.safetensors)"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"repository": None}, "wrong fields"),
        ({"sizes": "1000"}, "wrong fields"),
        ({"name": '"two"'}, "wrong fields"),
        ({"repository": "7"}, "repository is not a string"),
        ({"repository": '"owner"'}, "repository is not a name on the hub"),
        ({"repository": '"../etc"'}, "repository is not a name on the hub"),
        ({"file": '""'}, "file is not a string"),
        ({"file": '"../model.safetensors"'}, "file is not a path inside the repository"),
        ({"file": '"/model.safetensors"'}, "file is not a path inside the repository"),
        ({"file": "'folder\\model.safetensors'"}, "file is not a path inside the repository"),
        ({"family": '"sd9"'}, "unknown family"),
        ({"components": '"vae"'}, "components is not a list of networks"),
        ({"components": "[]"}, "components is not a list of networks"),
        ({"components": '["text_encoder"]'}, "components is not a list of networks"),
        ({"components": "[[]]"}, "components is not a list of networks"),
        ({"size": None}, "size or approximate_size"),
        ({"size": "0"}, "size or approximate_size"),
        ({"size": "true"}, "size or approximate_size"),
        ({"size": "1.5"}, "size or approximate_size"),
        ({"approximate_size": "1000"}, "size or approximate_size"),
        ({"gated": '"yes"'}, "gated is not a boolean"),
    ],
)
def test_a_malformed_entry_is_named(
    tmp_path: Path, changes: dict[str, str | None], text: str
) -> None:
    path = manifest(tmp_path, **changes)
    with pytest.raises(SdconvError, match=text) as caught:
        load_manifest(path)
    assert str(caught.value).startswith(f"{path} [one]: ")
    assert "expected: " in str(caught.value)


def test_an_invalid_manifest(tmp_path: Path) -> None:
    path = tmp_path / "manifest.toml"
    with pytest.raises(SdconvError, match="the manifest cannot be read"):
        load_manifest(path)
    for content in (b"[one\n", b"\xff\xfe", b"[one]\na = 1\n[one]\n"):
        path.write_bytes(content)
        with pytest.raises(SdconvError, match="not a TOML file"):
            load_manifest(path)
    path.write_text("one = 1")
    with pytest.raises(SdconvError, match="the entry is not a table"):
        load_manifest(path)
