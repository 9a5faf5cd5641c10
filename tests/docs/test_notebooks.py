"""The notebooks run from top to bottom, and are kept without outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.notebooks import EXECUTE
from helpers.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(notebook: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a notebook into ``folder/ran.ipynb``, in a kernel that finds this sdconv."""
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason="needs nbclient and ipykernel")
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        own[name] = str(folder / name.lower())
    command = [sys.executable, "-c", EXECUTE, notebook, folder / "ran.ipynb", folder]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, **own}
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_outside_the_checkout(path: Path, tmp_path: Path) -> None:
    done = execute(path, tmp_path)
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "ran.ipynb").read_text("utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "(256, 256) -> (1, 4, 32, 32)" in text
    assert "switched 15 of those to the fast backend" in text
    # nothing is said but what tqdm says of a kernel without widgets
    said = ["".join(output["text"]) for output in outputs if output.get("name") == "stderr"]
    assert [one for one in said if "IProgress not found" not in one] == []
    # four images of Pillow's and a plot
    assert len([one for one in outputs if "image/png" in one.get("data", {})]) == 5


@pytest.mark.slow
def test_an_error_in_a_cell_is_noticed(tmp_path: Path) -> None:
    notebook = json.loads(NOTEBOOKS[0].read_text("utf-8"))
    code = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    notebook["cells"] = [{**code, "source": "assert 1 == 2"}]
    (tmp_path / "given.ipynb").write_text(json.dumps(notebook), "utf-8")
    done = execute(tmp_path / "given.ipynb", tmp_path)
    assert done.returncode != 0
    assert "AssertionError" in done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs(path: Path) -> None:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []
