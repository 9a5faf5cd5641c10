"""The wheel and the sdist, built and installed into environments without the checkout."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from helpers import loras, pipelines
from helpers.environments import attempt, run, with_every_package, with_extras
from helpers.notebooks import EXECUTE
from helpers.paths import ROOT
from safetensors.torch import save_file

import sdconv
from sdconv.checkpoint.save import original_tensors

pytestmark = pytest.mark.slow

DATA = {"manifest.toml", "photo.jpg", "tiny-unet.safetensors", "tiny-vae.safetensors"}
MAPS = """
import sdconv, torch
from sdconv.images import example_image
unet, vae = sdconv.load("tiny-unet"), sdconv.load("tiny-vae", torch_dtype=torch.float32)
with sdconv.capture(vae, "encoder.down_blocks.*") as maps, torch.inference_mode():
    vae.encode(example_image())
print(unet.config.class_name, len(maps), sdconv.__file__)
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel."""
    pytest.importorskip("hatchling", reason="needs what builds the wheel: pip install hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "hatchling", "build", "-d", folder], ROOT)
    return folder


def test_the_sdist_installs_and_runs_outside_the_checkout(dist: Path, tmp_path: Path) -> None:
    (package,) = dist.glob("*.tar.gz")
    commands = with_every_package(tmp_path / "venv", package)
    here = tmp_path / "here"
    here.mkdir()
    name, captured, home = run([commands / "python", "-c", MAPS], here).split()
    assert name == "UNet2DConditionModel" and int(captured) > 0
    assert Path(home).is_relative_to(tmp_path / "venv"), "the checkout was imported"
    assert "AutoencoderKL" in run([commands / "sdconv", "inspect", "tiny-vae"], here)


# --- with the extras that feature maps and speed need, and no other package


@pytest.fixture(scope="module")
def lean(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment with ``sdconv[maps,fast]``, and with what runs a notebook."""
    (wheel,) = dist.glob("*.whl")
    folder = tmp_path_factory.mktemp("lean") / "venv"
    return with_extras(folder, wheel, "maps,fast", ["nbclient", "ipykernel"])


def readme_snippets() -> list[str]:
    """The README's fenced Python, marked as such or not."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.S | re.M)
    return [text for language, text in fenced if language in ("", "python")]


def test_it_has_what_the_extras_ask_for_and_nothing_else(lean: Path, tmp_path: Path) -> None:
    for name in ("numba", "xarray", "matplotlib", "transformers"):
        run([lean / "python", "-c", f"import {name}"], tmp_path)
    for name in ("pytest", "onnx", "accelerate"):
        assert (
            "ModuleNotFoundError"
            in attempt([lean / "python", "-c", f"import {name}"], tmp_path).stderr
        )
    (at,) = run([lean / "python", "-c", "import sdconv; print(sdconv.__file__)"], tmp_path).split()
    assert Path(at).is_relative_to(lean.parent), "the checkout was imported"
    checked = run([lean / "sdconv", "check", "tiny-vae", "--size", "64"], tmp_path)
    assert "every module is equal, bit for bit" in checked


def test_every_snippet_of_the_readme_runs(lean: Path, tmp_path: Path) -> None:
    """The second is of a pipeline: small networks lie under the names that it opens."""
    first, second = readme_snippets()
    shown = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert shown and run([lean / "python", "-c", first], tmp_path) == shown[1]
    pipe = pipelines.pipeline("xl")
    pipe.save_pretrained(tmp_path / "pipe")
    networks = {
        "first_stage_model.": sdconv.load(tmp_path / "pipe", "vae"),
        "model.diffusion_model.": sdconv.load(tmp_path / "pipe", "unet"),
    }
    tensors = {
        f"{prefix}{name}": tensor.contiguous()
        for prefix, network in networks.items()
        for name, tensor in original_tensors(network.state_dict(), network.config).items()
    }
    save_file(tensors, tmp_path / "sd_xl_base_1.0.safetensors")
    save_file(loras.kohya(loras.matrices(pipe.unet, only="to_q")), tmp_path / "style.safetensors")
    before = """
import sdconv
from diffusers import StableDiffusionXLPipeline
pipe = StableDiffusionXLPipeline.from_pretrained("pipe")
"""
    after = """
print(type(pipe.vae).__module__, type(pipe.unet).__module__, len(style.layers))
pipe("a", num_inference_steps=1, height=64, width=64).images[0].save("image.png")
"""
    said = run([lean / "python", "-c", before + second + after], tmp_path)
    assert "sdconv.models.vae sdconv.integrations.diffusers" in said
    assert (tmp_path / "image.png").is_file()


def test_a_photo_is_reconstructed_and_its_feature_maps_open_in_xarray(
    lean: Path, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "weights" / "photo.jpg", tmp_path)
    assert "PSNR" in run([lean / "sdconv", "reconstruct", "photo.jpg"], tmp_path)
    assert (tmp_path / "reconstruction.png").is_file()
    run([lean / "sdconv", "features", "photo.jpg", "-m", "tiny-vae", "-o", "maps"], tmp_path)
    read = """
import xarray
layer = xarray.open_zarr("maps/maps.zarr/decoder.conv_out", consolidated=False)
print([(one.dims, one.shape, bool(abs(one).max() > 0)) for one in layer.values()])
"""
    said = run([lean / "python", "-W", "error", "-c", read], tmp_path)
    assert said.rstrip().endswith("(1, 1, 3, 256, 256), True)]"), said


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_the_notebooks_run(path: Path, lean: Path, tmp_path: Path) -> None:
    run([lean / "python", "-c", EXECUTE, path, tmp_path / "ran.ipynb", tmp_path], tmp_path)
    cells = json.loads((tmp_path / "ran.ipynb").read_text("utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert len([one for one in outputs if "image/png" in one.get("data", {})]) == 5


def test_the_wheel_holds_the_package_and_its_data_only(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = Parser().parsestr(
            archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
        )
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"sdconv"}
    assert {Path(name).name for name in names if name.startswith("sdconv/data/")} == DATA
    assert "sdconv/py.typed" in names
    assert {"sdconv/report/features/page/page.html"} <= set(names)
    assert len(metadata.get_all("Project-URL", [])) >= 4
    classifiers = metadata.get_all("Classifier", [])
    minors = {one.rpartition(".")[2] for one in classifiers if ":: 3." in one}
    assert minors == {"11", "12", "13", "14"}
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "](docs/" not in str(metadata.get_payload())


def test_the_sdist_builds_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    (wheel,) = dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "w"], folder)
    (again,) = (tmp_path / "w").glob("*.whl")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())
