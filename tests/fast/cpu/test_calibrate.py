"""The cost model's constants: fitted to times, kept by conditions, never trusted blindly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers.commands import answer, run
from helpers.paths import ROOT, WEIGHTS

import sdconv
from sdconv.analysis.explain import Explanation, explain
from sdconv.errors import SdconvWarning
from sdconv.fast.cpu import cost_constants
from sdconv.fast.cpu.calibrate import SHAPES, Case, Timer, calibrate, cases, fit
from sdconv.fast.cpu.cost_constants import SHIPPED, Calibration, CostConstants, constants_in_force
from sdconv.fast.cpu.cost_model import plan_conv, terms_of

# of an imaginary machine: transforms are so slow that nothing but torch's kernel pays
SLOW = CostConstants(
    reorder=10.0,
    read=40.0,
    kernel=500.0,
    transform=5000.0,
    call=5e6,
    normalise=100.0,
    prologue=30.0,
    direct=0.8,
)
SHAPE = (1, 512, 512, 64, 64)


def seconds(case: Case, constants: CostConstants = SLOW) -> float:
    """What a case takes on a machine with these constants and 10 ps for each product."""
    prices = {"product": 1.0, **asdict(constants)}
    found = terms_of("conv3x3", case.shape, case.normalised)[case.method]
    return 1e-11 * sum(prices[name] * count for name, count in found.items())


def methods(found: Explanation) -> set[str]:
    """Those that the cost model has chosen for 3x3 convolutions with stride 1."""
    own = {layer.method for layer in found.layers if layer.kind == "conv3x3"}
    return own - {"torch", "image_conv"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the cache."""
    monkeypatch.setenv(cost_constants.ENVIRONMENT, str(tmp_path))
    cost_constants.forget()
    yield tmp_path
    cost_constants.forget()


@pytest.fixture
def calibration() -> Calibration:
    return calibrate(seconds)


def test_exact_times_give_the_constants_back(calibration: Calibration) -> None:
    assert asdict(calibration.constants) == pytest.approx(asdict(SLOW), rel=1e-6)
    assert calibration.error < 1e-9 and calibration.shapes == len(cases())


def test_noise_moves_them_little_and_none_is_negative() -> None:
    random = torch.Generator().manual_seed(0)
    noisy = {
        case: seconds(case) * float(1 + 0.1 * torch.rand((), generator=random)) for case in cases()
    }
    fitted = fit(noisy)
    assert 0.005 < fitted.error < 0.1
    assert all(value >= 0 for value in asdict(fitted.constants).values())
    assert fitted.constants.transform == pytest.approx(SLOW.transform, rel=0.3)
    # a constant that is zero comes out as zero or nearly so, never below it
    free = replace(SLOW, call=0.0)
    noise = {case: seconds(case, free) * noisy[case] / seconds(case) for case in cases()}
    assert 0 <= fit(noise).constants.call < 4 * SLOW.call


def test_disturbed_times_count_little() -> None:
    every = cases()
    times = {case: seconds(case) * (3 if n % 7 == 0 else 1) for n, case in enumerate(every)}
    fitted = fit(times)
    assert asdict(fitted.constants) == pytest.approx(asdict(SLOW), rel=0.1)
    assert fitted.error < 0.01


@pytest.mark.parametrize("wrong", [0.0, float("nan"), -1.0])
def test_impossible_times_are_refused(wrong: float) -> None:
    with pytest.raises(sdconv.InputError, match="do not fit the cost model"):
        fit({case: wrong for case in cases()})


def test_calibrating_changes_the_methods_of_these_conditions_only(
    folder: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sdconv.infer(sdconv.read_header(WEIGHTS / "tiny-vae.safetensors"))["vae"]
    assert plan_conv("conv3x3", *SHAPE).method == "winograd"
    shipped = explain(config, (64, 64))
    assert (shipped.constants, shipped.calibrated) == (SHIPPED, None)
    assert cost_constants.keep(calibration) == folder / "cost-model.json"
    assert plan_conv("conv3x3", *SHAPE).method == "direct"
    fitted = explain(config, (64, 64))
    assert fitted.calibrated == calibration.day
    assert methods(shipped) > {"winograd", "direct"} and methods(fitted) == {"direct"}
    cost_constants.forget()
    assert constants_in_force() == calibration.constants, "it is read from the file"
    # another number of threads, another processor, other kernels
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert constants_in_force() == SHIPPED
    assert plan_conv("conv3x3", *SHAPE).method == "winograd"
    monkeypatch.undo()
    for changed in ({"processor": "another"}, {"kernels": "newer"}):
        other = replace(calibration, conditions=replace(calibration.conditions, **changed))
        monkeypatch.setenv(cost_constants.ENVIRONMENT, str(folder / str(changed)))
        cost_constants.forget()
        cost_constants.keep(other)
        assert constants_in_force() == SHIPPED
        assert cost_constants.other_conditions() == [other.conditions]


def test_entries_of_other_conditions_stay(folder: Path, calibration: Calibration) -> None:
    two = replace(calibration, conditions=replace(calibration.conditions, threads=99))
    for one in (two, calibration, replace(calibration, constants=SHIPPED)):
        cost_constants.keep(one)
    kept = json.loads((folder / "cost-model.json").read_text())["calibrations"]
    assert [one["conditions"]["threads"] for one in kept] == [99, torch.get_num_threads()]
    assert constants_in_force() == SHIPPED


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: text.replace('"format": 2', '"format": 3'),
        lambda text: text.replace('"transform": ', '"transform": -'),
        lambda text: text.replace('"read"', '"bread"'),
        lambda text: text.replace('"threads"', '"thread"'),
        lambda text: text.replace('"call": ', '"call": 1e999, "old": '),
    ],
)
def test_a_damaged_file_is_said_once_and_not_used(
    folder: Path, calibration: Calibration, damage: object
) -> None:
    path = cost_constants.keep(calibration)
    assert constants_in_force() != SHIPPED
    path.write_text(damage(path.read_text()))  # type: ignore[operator]
    cost_constants.forget()
    with pytest.warns(SdconvWarning, match="not a file of cost constants") as said:
        assert constants_in_force() == SHIPPED
    assert len(said) == 1 and "sdconv bench --calibrate" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert constants_in_force() == SHIPPED
    cost_constants.forget()
    with pytest.warns(SdconvWarning):
        cost_constants.keep(calibration)
    assert constants_in_force() == calibration.constants, "calibrating again mends it"


@pytest.mark.slow
def test_the_tests_read_no_users_cache() -> None:
    folder = Path(os.environ[cost_constants.ENVIRONMENT])
    assert not folder.exists() and cost_constants.constants_path().parent == folder
    code = "from sdconv.fast.cpu import cost_constants as c; print(c.constants_path())"
    environment = {k: v for k, v in os.environ.items() if k != cost_constants.ENVIRONMENT}
    environment |= {"XDG_CACHE_HOME": "/a/cache"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    if sys.platform == "linux":
        assert ran.stdout.strip() == "/a/cache/sdconv/cost-model.json", ran.stderr


def test_the_timer_runs_the_method_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdconv.fast.cpu import calibrate as module

    own, ran = module.run_plan, []
    monkeypatch.setattr(
        module, "run_plan", lambda plan, *a, **k: ran.append(plan.method) or own(plan, *a, **k)
    )
    timer = Timer(calls=1)
    every = ("winograd", "winograd_uncached", "direct")
    for method in every:
        assert timer(Case(method, (1, 64, 64, 16, 16), True)) > 0
    assert ran == [method for method in every for _ in range(2)]
    assert {case.shape for case in cases()} == set(SHAPES)


def disturbed(case: Case) -> float:
    """Seconds that have nothing to do with the case."""
    return 10.0 ** -(1 + 4 * zlib.crc32(repr(case).encode()) / 2**32)


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdconv.fast.cpu.calibrate.Timer", lambda: seconds)
    before = answer("bench", "--show")
    assert before["calibration"] is None and before["constants"] == before["shipped"]
    assert "the constants that ship" in run("bench", "--show").stdout
    after = answer("bench", "--calibrate")
    assert after["constants"]["transform"] == pytest.approx(SLOW.transform)
    assert after == answer("bench", "--show")
    assert after["file"] == str(folder / "cost-model.json") and after["others"] == []
    shown = run("bench", "--show").stdout
    assert "fitted on this machine on" in shown and "5000" in shown
    assert "calibrate again" not in run("bench", "--calibrate").stderr
    monkeypatch.setattr("sdconv.fast.cpu.calibrate.Timer", lambda: disturbed)
    assert "calibrate again while nothing else runs" in run("bench", "--calibrate").stderr
    monkeypatch.setattr("sdconv.fast.cpu.calibrate.Timer", lambda: seconds)
    answer("bench", "--calibrate")
    explained = run("bench", WEIGHTS / "tiny-vae.safetensors", "--size", "64", "--explain")
    assert "fitted on this machine on" in explained.stdout
    refused = run("bench", "tiny-vae", "--show")
    assert refused.exit_code == 2 and "not a network's" in refused.stderr
    nothing = run("bench")
    assert nothing.exit_code == 2 and "give the weights" in nothing.stderr


@pytest.mark.slow
def test_a_real_calibration_explains_its_times() -> None:
    """And takes less than a minute, on a machine with nothing else to do."""
    found = calibrate()
    assert found.error < 0.5
    assert all(value >= 0 for value in asdict(found.constants).values())
