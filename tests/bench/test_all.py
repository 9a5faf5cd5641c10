"""The run of every benchmark: what is kept, what is repeated, what is never mixed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import all as everything
from scripts.bench import cpu

Ran = list[str]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Keys of the benchmarks that have run; nothing is measured, and encoders fail."""
    keys: Ran = []

    def run(task: everything.Task) -> dict[str, Any]:
        keys.append(task.key)
        found: dict[str, Any] = {"what": task.what, "threads": task.threads, "rows": [{"work": 1}]}
        return found | ({"failed": "no"} if "encode" in task.what else {})

    monkeypatch.setattr(everything, "run", run)
    return keys


def content(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("cores", [1, 2, 64])
def test_each_benchmark_has_a_command_that_parses(cores: int, quick: bool) -> None:
    tasks = list(everything.tasks(cores, quick))
    assert len({task.key for task in tasks}) == len(tasks)
    for task in tasks:
        if task.module == cpu.__name__:
            options = cpu.parsed(task.options)
            assert options.what == task.what.removesuffix("-bf16").removesuffix("-f16")
            assert options.rounds >= 1 and not (quick and max(options.size) > 512)
    assert {task.threads for task in tasks} == {1, cores}
    wanted = {"decode", "encode", "unet", "tiny-decode", "taef1-encode", "memory", "first"}
    assert {task.what for task in tasks} >= wanted | {"sizes", "parts", "without-numba"}
    assert ("unet-xl" in {task.what for task in tasks}) is not quick


def test_an_unknown_option_is_noticed() -> None:
    with pytest.raises(SystemExit):
        cpu.parsed(["decode", "--peers", "nobody"])
    with pytest.raises(SystemExit):
        cpu.parsed(["decode", "--dtype", "nothing"])


def test_a_run_goes_on_with_what_is_missing_or_has_failed(tmp_path: Path, ran: Ran) -> None:
    out = tmp_path / "a" / "bench.json"
    some = ["--out", str(out), "--only", "decode", "encode", "--threads", "1"]
    assert everything.main(some) == 1
    first = list(ran)
    assert first and set(content(out)["results"]) == set(first)
    failed = [key for key in first if "encode" in key]
    assert 0 < len(failed) < len(first)
    ran.clear()
    assert everything.main(some) == 1
    assert ran == failed
    assert everything.main(["--out", str(out), "--only", "memory"]) == 0
    assert set(first) < set(content(out)["results"])
    machine = content(out)["machine"]
    assert machine["cores"] > 0 and machine["packages"]["torch"] and machine["memory, GB"] > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found["machine"].update(processor="another"),
        lambda found: found["machine"]["packages"].update(torch="1.0"),
        lambda found: found["machine"].pop("sdconv"),
        lambda found: found.update(quick=True),
    ],
)
def test_figures_of_other_conditions_are_not_mixed(
    tmp_path: Path, ran: Ran, change: Callable[[Any], object]
) -> None:
    out = tmp_path / "bench.json"
    only = ["--out", str(out), "--only", "memory"]
    everything.main(only)
    found = content(out)
    found["machine"] |= {"date": "2001-01-01", "time": "01:02:03"}
    out.write_text(json.dumps(found))
    assert everything.main(only) == 0, "another day is no other machine"
    change(found)
    out.write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="give another file"):
        everything.main(only)
    assert len(ran) == 1


def test_what_would_end_too_late_is_left_out(
    tmp_path: Path, ran: Ran, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--out", str(tmp_path / "bench.json"), "--only", "decode", "tiny-decode"]
    everything.main([*given, "--minutes", "2"])
    assert ran and all("tiny-decode" in key for key in ran)
    assert "left out for want of time" in capsys.readouterr().out
    everything.main(["--list", *given])
    assert "min in all" in capsys.readouterr().out


@pytest.mark.slow
def test_one_for_real(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    only = ["taef1-encode", "parts"]
    given = ["--quick", "--out", str(out), "--threads", "1", "--only", *only]
    assert everything.main(given) == 0
    results = content(out)["results"].values()
    for row in (row for one in results if one["what"] == "taef1-encode" for row in one["rows"]):
        assert row["seconds"] > 0 and float(row["difference"]) < 1e-4 and "failed" not in row


def test_a_side_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = everything.Task("decode", 1, ("decode", "--size", "64x64", "--peers", "nobody"), 1)
    found = everything.run(task)
    assert found["rows"] == [] and "nobody" in found["failed"]
