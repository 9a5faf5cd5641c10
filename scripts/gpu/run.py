"""Checks and measures sdconv on a GPU, most telling things first.

    python scripts/gpu/run.py --out out/gpu                        # 7 minutes on a GPU
    python scripts/gpu/run.py --out out/gpu --device cpu --small   # how it is tested

The stages run one after another, each in a process of its own with its own time limit. What a stage
finds is in ``DIR/<stage>.json`` and ``DIR/report.md`` at once, so that a run that is cut loses
little; a stage that fails says why, and the next one goes on. ``DIR/<stage>.log`` has what a stage
prints. A stage whose row makes the device unusable is begun again, and goes on after that row.

- ``environment``: the device, the software, and ceilings: bandwidth, rates of matrix products.
- ``parity``: every module against diffusers, and the fast backend against float64.
- ``tests``: the tests marked ``gpu``.
- ``speed``: time and memory, compared with diffusers, eager and compiled.
- ``profile``: where the time of one decode goes.
- ``streaming``: a decode of 4096x4096 in 8 GiB.

The exit status is 0 if every stage ran to its end and has no complaint.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

# run as a script: Python itself puts only this file's folder there
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.gpu import report
from scripts.gpu.options import STAGES, Options, limit
from scripts.gpu.record import DeviceLostError, Record, sentence

ROOT = Path(__file__).resolve().parents[2]
# a stage's exit status that asks for a new process, in which it goes on
AGAIN = 75
# seconds in which a stage ends itself at its limit, before it is ended
GRACE = 5.0
# For tests: "STAGE=raise,STAGE=hang,STAGE=die,STAGE=lose" makes stages fail in these ways.
FAULT = "SDCONV_GPU_FAULT"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    folder: Path = options.out.resolve()
    if options.stage:
        return inside(options, folder)
    return run(options, folder)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small networks, few sizes")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--minutes", type=float, default=7.0, help="for all stages together")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=3600.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error("--minutes: expected a positive number")
    if not options.stage and any((options.out / f"{name}.json").exists() for name in STAGES):
        parser.error(f"--out: {options.out} has an earlier run's results; name another folder")
    return options


# --- the process that starts the stages


def run(options: argparse.Namespace, folder: Path) -> int:
    """Runs the stages in order, and returns the exit status."""
    stages = [name for name in STAGES if name in options.stages]
    end = time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the stage
    for stage in stages:
        seconds = limit(stage, stages, end - time.monotonic())
        print(f"{stage}: up to {seconds:.0f} s", flush=True)
        run_stage(stage, options, folder, seconds)
        print(f"    {report.outcome(folder, stage)}", flush=True)
    print(f"\n{folder / 'report.md'}")
    return 0 if all(report.is_good(folder, stage) for stage in stages) else 1


def run_stage(stage: str, options: argparse.Namespace, folder: Path, seconds: float) -> None:
    """Runs one stage in its own process, or in several if it loses the device."""
    begin = time.monotonic()
    Record(folder, stage).save()
    rows = -1
    while True:
        left = max(begin + seconds - time.monotonic(), 0.1)
        status = wait(command(stage, options, folder, left), folder / f"{stage}.log", left + GRACE)
        spent = time.monotonic() - begin
        record = Record(folder, stage)
        if record.content["status"] != "running":
            return
        if spent >= seconds:
            return record.end("cut", f"stopped at its time limit of {seconds:.0f} s", None, spent)
        # an attempt that adds no row would be repeated for ever
        if status != AGAIN or len(record.content["rows"]) <= rows:
            why = "the device is lost" if status == AGAIN else in_words(status)
            return record.end("failed", f"its process ended: {why}", None, spent)
        rows = len(record.content["rows"])


def command(stage: str, options: argparse.Namespace, folder: Path, seconds: float) -> list[str]:
    own = [sys.executable, str(Path(__file__).resolve()), "--stage", stage, "--out", str(folder)]
    own += ["--device", options.device, "--seconds", f"{seconds:.1f}"]
    own += ["--small"] * options.small + ["--no-compile"] * options.no_compile
    return own


def wait(command: list[str], log: Path, seconds: float) -> int:
    """Runs a command, ends it and its processes after so much time, and returns its status."""
    with log.open("ab") as printed:
        process = subprocess.Popen(
            command, stdout=printed, stderr=printed, cwd=ROOT, start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session: nobody else's processes
        return process.wait()


def in_words(status: int) -> str:
    """An exit status."""
    if status >= 0:
        return f"exit status {status}"
    return f"signal {signal.Signals(-status).name}"


# --- a stage's own process


def inside(options: argparse.Namespace, folder: Path) -> int:
    """Runs one stage in this process, and returns the exit status."""
    faulthandler.enable()
    # ends at its limit by itself, also if whoever started it is gone, and the log says where it was
    faulthandler.dump_traceback_later(options.seconds, exit=True)
    # rows are begun and given up so that it is done a little before that
    record = Record(folder, options.stage, options.seconds - min(5.0, options.seconds / 10))
    given = Options(options.device, options.small, not options.no_compile)
    try:
        inject(options.stage, record)
        importlib.import_module(f"scripts.gpu.stages.{options.stage}").run(record, given)
    except DeviceLostError as error:
        print(f"the device is lost: {error}", flush=True)
        record.save()
        return AGAIN
    except Exception as error:
        traceback.print_exc()
        record.end("failed", sentence(error), traceback.format_exc())
        return 1
    record.end("done")
    return 0


def inject(stage: str, record: Record) -> None:
    """Fails as ``FAULT`` says."""
    faults = dict(one.split("=") for one in os.environ.get(FAULT, "").split(",") if one)
    match faults.get(stage):
        case "raise":
            raise RuntimeError("made to fail")
        case "hang":
            record.row("before the hang", figure=1)
            time.sleep(3600)
        case "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "lose" if not record.has("lost"):
            record.row("lost", error="the row that lost the device")
            raise DeviceLostError("made to fail")


if __name__ == "__main__":
    sys.exit(main())
