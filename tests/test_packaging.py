"""The wheel and the sdist, built and installed into an environment without the checkout.

No index is asked: the environment sees the packages of the running one, but not its sdconv.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from helpers.paths import ROOT

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


def run(command: list[str | Path], folder: Path) -> str:
    """What a command prints, in an environment without the checkout."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_"))}
    ran = subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, env=env
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel."""
    pytest.importorskip("hatchling", reason="needs what builds the wheel: pip install hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "hatchling", "build", "-d", folder], ROOT)
    return folder


def environment(folder: Path, package: Path) -> Path:
    """The folder of the commands of a new environment, into which a package is installed."""
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    # a plain path: the .pth files in it, such as the one of an editable sdconv, are not read
    (site / "packages_of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"])
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run([*pip, "--no-deps", "--no-index", "--no-build-isolation", package], folder.parent)
    return python.parent


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_an_installed_package_runs_outside_the_checkout(
    dist: Path, pattern: str, tmp_path: Path
) -> None:
    (package,) = dist.glob(pattern)
    commands = environment(tmp_path / "venv", package)
    here = tmp_path / "here"
    here.mkdir()
    name, captured, home = run([commands / "python", "-c", MAPS], here).split()
    assert name == "UNet2DConditionModel" and int(captured) > 0
    assert Path(home).is_relative_to(tmp_path / "venv"), "the checkout was imported"

    readme = (ROOT / "README.md").read_text()
    code, shown = (re.search(rf"```{kind}\n(.*?)```", readme, re.S) for kind in ("python", "text"))
    assert code and shown
    assert run([commands / "python", "-c", code[1]], here) == shown[1]

    sdconv = commands / "sdconv"
    assert "AutoencoderKL" in run([sdconv, "inspect", "tiny-vae"], here)
    said = run([sdconv, "reconstruct", here / "decoded.png", "--model", "tiny-vae"], here)
    assert "PSNR" in said and (here / "reconstruction.png").is_file()
    assert "every module is equal, bit for bit" in run(
        [sdconv, "check", "tiny-vae", "--size", "64"], here
    )


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
