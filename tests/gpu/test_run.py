"""The command that runs the GPU's checks: what it keeps when stages fail, hang, die or are cut."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import ROOT

from scripts.gpu.options import STAGES, limit

SCRIPT = ROOT / "scripts" / "gpu" / "run.py"


def start(folder: Path, *arguments: str, faults: str = "") -> subprocess.Popen[str]:
    """Starts the command as a user does, who has set no path."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(SCRIPT), "--out", str(folder), "--device", "cpu", "--small"]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=folder.parent,
        # compiled in the stage's own process: others would have to import torch first
        env={**kept, "SDCONV_GPU_FAULT": faults, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder: Path, *arguments: str, faults: str = "") -> tuple[int, str]:
    """The command's exit status, and what it prints."""
    process = start(folder, *arguments, faults=faults)
    printed, _ = process.communicate(timeout=900)
    return process.returncode, printed


def stage(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def test_no_failure_stops_the_next_stage(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    faults = "parity=raise,tests=hang,speed=die,profile=raise"
    chosen = ["--stages", "profile", "parity", "tests", "speed", "--minutes", "0.1"]
    status, printed = run(folder, *chosen, faults=faults)
    assert status == 1, printed
    contents = {name: stage(folder, name) for name in ("parity", "tests", "speed", "profile")}
    assert {name: content["status"] for name, content in contents.items()} == {
        "parity": "failed",
        "tests": "cut",
        "speed": "failed",
        "profile": "failed",
    }
    assert contents["parity"]["why"] == "RuntimeError: made to fail"
    assert "in inject" in contents["parity"]["traceback"]
    assert "its time limit" in contents["tests"]["why"]
    assert contents["tests"]["rows"] == [{"key": "before the hang", "figure": 1}]
    assert "SIGSEGV" in contents["speed"]["why"]
    assert "inject" in (folder / "tests.log").read_text(), "where it hung"
    report = (folder / "report.md").read_text()
    for name, content in contents.items():
        assert f"## {name}" in report
        assert content["why"] in report
    began = [content["started"] for content in contents.values()]
    assert began == sorted(began), "in the order of the stages, not in that of the option"


def test_a_stage_that_loses_the_device_goes_on_in_a_new_process(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    chosen = ["--stages", "environment", "--minutes", "3"]
    status, printed = run(folder, *chosen, faults="environment=lose")
    assert status == 0, printed
    content = stage(folder, "environment")
    assert content["status"] == "done"
    keys = [row["key"] for row in content["rows"]]
    assert keys[0] == "lost" and "copy" in keys, "what it had before, and what comes after"
    assert content["facts"]["device"] == "cpu"
    assert all(row["rate"] > 0 for row in content["rows"][1:])
    assert "passed" in (folder / "report.md").read_text()
    again, printed = run(folder, *chosen)
    assert again == 2 and "earlier run" in printed, "a second run would mix with the first"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_cut_keeps_what_it_had(tmp_path: Path, how: signal.Signals) -> None:
    folder = tmp_path / "out"
    chosen = ["--stages", "parity", "speed", "--minutes", "0.1"]
    end = time.monotonic() + 60
    with start(folder, *chosen, faults="parity=hang") as process:
        while not (folder / "parity.json").exists() or not stage(folder, "parity")["rows"]:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        process.send_signal(how)
    assert stage(folder, "parity")["rows"] == [{"key": "before the hang", "figure": 1}]
    assert stage(folder, "parity")["status"] == "running"
    assert not (folder / "speed.json").exists()
    assert "the run ended within this stage" in (folder / "report.md").read_text()
    if how == signal.SIGKILL:  # nobody is left to end the stage: it does so itself, at its limit
        while "Timeout" not in (folder / "parity.log").read_text():
            assert time.monotonic() < end
            time.sleep(0.05)


def test_time_that_a_stage_does_not_need_goes_to_the_next_ones() -> None:
    stages = list(STAGES)
    assert sum(STAGES.values()) == pytest.approx(1)
    assert limit("environment", stages, 100) == pytest.approx(6)
    # on time, the limits are the shares; with more left than that, they are longer
    left = 100 - 6
    assert limit("parity", stages, left) == pytest.approx(26)
    assert limit("parity", stages, left + 5) > 27
    assert limit("streaming", stages, 40) == 40
    assert limit("speed", ["environment", "speed"], 40) == 40


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for arguments in (("--minutes", "0"), ("--minutes", "nan"), ("--stages", "parity", "noise")):
        status, printed = run(tmp_path / "out", *arguments)
        assert status == 2, printed
        assert arguments[0] in printed
    assert not (tmp_path / "out").exists()


def test_all_stages_on_a_cpu(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    status, printed = run(folder, "--minutes", "15", "--no-compile")
    assert status == 0, printed + (folder / "report.md").read_text()
    contents = {name: stage(folder, name) for name in STAGES}
    assert {content["status"] for content in contents.values()} == {"done"}
    rows = {name: content["rows"] for name, content in contents.items()}
    networks = [row for row in rows["parity"] if not row["key"].startswith("control")]
    assert len(networks) == 7 * 2
    for row in networks:
        assert (row["reference"], row["fast"]) == ("passed", "passed")
        if row["dtype"] == "float32":
            assert row["equal"] == row["compared"] > 10
    assert len(rows["speed"]) == 3 + 3 + 2 + 1
    assert all(row["milliseconds"] > 0 for row in rows["speed"])
    assert len(rows["profile"]) > 3 and contents["profile"]["facts"]["share"] > 0
    assert {row["key"] for row in rows["streaming"]} >= {"sdconv, streamed", "diffusers, tiles"}
    assert contents["tests"]["facts"]["counts"] == {"skipped": pytest.approx(80, abs=70)}
    assert "complaint" not in (folder / "report.md").read_text()


@pytest.mark.slow
def test_compiled_networks_on_a_cpu(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    status, printed = run(folder, "--stages", "speed", "--minutes", "15")
    assert status == 0, printed + (folder / "report.md").read_text()
    rows = stage(folder, "speed")["rows"]
    compiled = [row for row in rows if row["key"].endswith("compiled")]
    assert len(rows) == 3 + 3 + 2 + 3 and len(compiled) == 2
    assert all(row["compile_seconds"] > 0 and row["difference"] < 1e-3 for row in compiled)
