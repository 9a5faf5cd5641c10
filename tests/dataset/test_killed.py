"""Runs whose processes are killed at any moment: the folder ends up byte for byte the same."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.datasets import SMALL, assert_same
from helpers.paths import ROOT

from sdconv import dataset
from sdconv.dataset.store import Store
from sdconv.errors import SdconvError

# imports once, and then forks a run for each line that it reads: killing that is what is tested
FORKER = """
import os, sys
from sdconv import dataset
for line in sys.stdin:
    source, vae, out = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if not child:
        dataset.encode(source, vae, out, options=dataset.Options(size="16", shard_size=4))
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


class Forker:
    """A process that starts runs, which can be killed."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def run(
        self, source: Path, vae: Path, out: Path, shards: int | None = None, pause: float = 0
    ) -> None:
        """Starts a run. With ``shards``, kills it some seconds after so many are committed."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{source}\t{vae}\t{out}\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if shards is not None:
            with suppress(ProcessLookupError):
                while len(list(out.glob("latents-*.json"))) < shards:
                    time.sleep(0.001)
                    os.kill(child, 0)  # raises once it is gone
                time.sleep(pause)
                os.kill(child, signal.SIGKILL)
        assert self.process.stdout.readline() == "ended\n"


@pytest.fixture
def forker() -> Iterator[Forker]:
    found = Forker()
    yield found
    assert found.process.stdin
    found.process.stdin.close()
    found.process.wait()
    assert found.process.stdout
    found.process.stdout.close()


def kill_and_complete(
    forker: Forker, rounds: int, source: Path, vae: Path, whole: dict[str, bytes], folder: Path
) -> None:
    """Kills runs at five stages, one after the other in one folder, and lets a last one end."""
    moments = random.Random(5)
    for number in range(rounds):
        out, states = folder / str(number), []
        for shards in (0, 1, 2, 4, 5):
            forker.run(source, vae, out, shards, moments.uniform(0, 0.03))
            states.append(len(list(out.glob("latents-*.json"))))
            # what is committed is whole, whenever that was
            if (out / "dataset.json").exists():
                assert dataset.verify(out).problems == ()
        assert states == sorted(states)
        assert states[0] < 6, "the first was killed before its end"
        forker.run(source, vae, out)
        assert_same(out, whole)
        found = dataset.open_latents(out).keys
        assert len(found) == len(set(found)) == 22


@pytest.mark.slow
def test_killed_five_times(
    forker: Forker, source: Path, vae: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    kill_and_complete(forker, 1, source, vae, whole, tmp_path)


@pytest.mark.slow
def test_killed_fifty_times(
    forker: Forker, source: Path, vae: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    kill_and_complete(forker, 10, source, vae, whole, tmp_path)


# each batch takes a while: a worker is computing, within the write of a shard, when its parent is
# killed
WORKERS = """
import sys, time
from sdconv import dataset
from sdconv.dataset.encoder import Encoder
compute = Encoder.compute
def slow(*arguments):
    time.sleep(0.1)
    return compute(*arguments)
Encoder.compute = slow
if __name__ == "__main__":
    options = dataset.Options(size="16", shard_size=4, workers=2, decoders=1)
    print(dataset.encode(*sys.argv[1:], options=options).complete)
"""


def children_of(process: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children_of(int(child))]
    return found


def killed_run(
    command: list[str | Path], out: Path, shards: int, chosen: Callable[[int, list[int]], int]
) -> tuple[int, str, str]:
    """A run of which one process is killed when so many shards are committed, unless it ends first.

    Args:
        chosen: which one, of the process of the run and those that it has started.

    Returns:
        The run's exit status, and what it printed, also as errors.
    """
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as run:
        started: list[int] = []
        while run.poll() is None:
            with suppress(FileNotFoundError):  # one has just ended
                started = children_of(run.pid)
            if started and len(list(out.glob("latents-*.json"))) >= shards:
                with suppress(ProcessLookupError):
                    os.kill(chosen(run.pid, started), signal.SIGKILL)
                break
            time.sleep(0.001)
        try:
            # no process that a killed one has started outlives it, or this would wait for it
            printed, errors = run.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            for process in (run.pid, *started):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            raise
    return run.returncode, printed, errors


@pytest.mark.slow
@pytest.mark.parametrize("who", ["a worker", "all"])
def test_killed_with_workers(
    who: str, source: Path, vae: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    script = tmp_path / "run.py"
    script.write_text(WORKERS)
    moments, killed = random.Random(6), 0
    out = tmp_path / "out"

    def victim(run: int, started: list[int]) -> int:
        return run if who == "all" else moments.choice(started)

    for shards in (0, 1, 2, 3):
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, script, source, vae, out]
        status, printed, errors = killed_run(command, out, shards, victim)
        if who == "all":
            killed += status == -signal.SIGKILL
            assert "Process sdconv-dataset" not in errors, "Python's words for an error of a worker"
        elif printed != "True\n":
            # a worker is replaced; its decoder's end is an error that says so
            assert "was killed" in errors or "ended" in errors, errors
        dataset.encode(source, vae, out, options=SMALL)
        assert_same(out, whole)
    assert who != "all" or killed >= 3, "of four runs"


@pytest.mark.slow
def test_a_worker_that_is_killed_again_and_again(source: Path, vae: Path, tmp_path: Path) -> None:
    from sdconv.dataset.processes import run_processes
    from sdconv.dataset.shards import Job

    store = Store(tmp_path / "out", "latents")
    job = Job(
        folder=store.folder,
        name=store.name,
        layout="webdataset",
        root=source,
        work=Suicidal(),  # type: ignore[arg-type]
        draft=True,
        decoders=0,
        strict=False,
        settings=None,
    )
    shards = list(enumerate(dataset.plan(source, "16", shard_size=30).shards))
    with pytest.raises(
        SdconvError, match=r"shard 0: a worker process ended 3 times(.|\n)*signal 9"
    ):
        list(run_processes([job], shards))


class Suicidal:
    """Work that its process does not survive."""

    batch = 1

    def compute(self, images: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
