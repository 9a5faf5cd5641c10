"""Killed, full, shared: the folder ends up byte for byte the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.photos import files_of, photos, spoil

from sdconv import dataset
from sdconv.dataset import Options
from sdconv.dataset.run import environment_rank
from sdconv.dataset.store import Store
from sdconv.errors import InputError, SdconvError

OPTIONS = {"size": "16", "shard_size": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 22 images, and some that cannot be read."""
    folder = photos(tmp_path_factory.mktemp("source") / "photos", 22)
    spoil(folder)
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    dataset.encode(source, vae, out, options=Options(**OPTIONS))
    return files_of(out)


def assert_same(out: Path, whole: dict[str, bytes]) -> None:
    found = files_of(out)
    assert sorted(found) == sorted(whole)
    assert [name for name in whole if found[name] != whole[name]] == []


def test_a_second_run_does_nothing(
    source: Path, vae: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    for encoded in (23, 0):
        summary = dataset.encode(source, vae, tmp_path, options=Options(**OPTIONS))
        assert summary.encoded == encoded
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("decoders", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_workers_write_the_same_bytes(
    decoders: int, source: Path, vae: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    options = Options(**OPTIONS, workers=2 + decoders, decoders=decoders)
    dataset.encode(source, vae, tmp_path, options=options)
    assert_same(tmp_path, whole)


def test_static_ranks_write_the_same_bytes(
    source: Path, vae: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    first = dataset.encode(source, vae, tmp_path, options=Options(**OPTIONS, rank=(0, 2)))
    assert not first.complete
    assert 0 < first.done < first.shards
    second = dataset.encode(source, vae, tmp_path, options=Options(**OPTIONS, rank=(1, 2)))
    assert second.complete
    assert_same(tmp_path, whole)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "3"}, (2, 3)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "8"}, (5, 8)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            (3, 4),
        ),
        (
            {
                "RANK": "1",
                "WORLD_SIZE": "2",
                "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_ARRAY_TASK_COUNT": "3",
            },
            (3, 6),
        ),
    ],
)
def test_ranks_of_the_environment(environment: dict[str, str], expected: tuple[int, int]) -> None:
    assert environment_rank(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "one"},
        {"SLURM_ARRAY_TASK_ID": "5"},
        {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3"},
    ],
)
def test_other_ranks_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(InputError, match="the environment's ranks cannot be used"):
        environment_rank(environment)


# --- what an end at any moment leaves behind


def test_every_state_between_two_writes_is_completed(
    source: Path, vae: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    order = ["dataset.json", "plan.jsonl"]
    order += [f"latents-{n:06d}.{kind}" for n in range(6) for kind in ("tar", "json")]
    assert {*order, "quarantine.jsonl", ".lock"} == set(whole)
    host = os.uname().nodename
    for count in (0, 1, 2, 3, 6, 13):
        out = tmp_path / str(count)
        out.mkdir()
        for name in order[:count]:
            (out / name).write_bytes(whole[name])
        # half of the next file, of a process that is gone
        part = out / f".{order[count]}.{host}.{2**22 + 7}.part"
        part.write_bytes(whole[order[count]][:100])
        dataset.encode(source, vae, out, options=Options(**OPTIONS))
        assert_same(out, whole)


def test_a_damaged_shard_is_made_again(
    source: Path, vae: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for name, content in whole.items():
        out.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    assert dataset.verify(out).problems == ()
    flipped = bytearray(whole["latents-000001.tar"])
    flipped[2000] ^= 1
    (out / "latents-000001.tar").write_bytes(flipped)
    (out / "latents-000002.tar").write_bytes(b"short")
    found = dataset.verify(out, discard=True)
    assert [number for number, _ in found.problems] == [1, 2]
    assert dataset.encode(source, vae, out, options=Options(**OPTIONS)).made == 2
    assert_same(out, whole)


def copy_of(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def test_an_image_deleted_after_the_plan(
    source: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos_here = copy_of(source, tmp_path / "in")
    out = tmp_path / "out"
    from sdconv.dataset import run

    planned = run._planned

    def then_delete(*arguments: object) -> object:
        """Deletes and changes images between plan and work."""
        found = planned(*arguments)  # type: ignore[arg-type]
        (photos_here / "photo02.jpg").unlink()
        with (photos_here / "photo04.jpg").open("ab") as file:
            file.write(b"more")
        return found

    monkeypatch.setattr(run, "_planned", then_delete)
    summary = dataset.encode(photos_here, vae, out, options=Options(**OPTIONS))
    assert (summary.quarantined["missing"], summary.quarantined["changed"]) == (1, 1)
    monkeypatch.setattr(run, "_planned", planned)
    summary = dataset.encode(photos_here, vae, out, options=Options(**OPTIONS))
    assert summary.missing == ("photo02",)
    assert "changed" not in summary.quarantined
    assert "photo04" in dataset.open_latents(out).keys
    shutil.copy2(source / "photo02.jpg", photos_here)
    dataset.encode(photos_here, vae, out, options=Options(**OPTIONS))
    assert "photo02" in dataset.open_latents(out).keys
    assert dataset.verify(out).problems == ()


# a program that limits the size of files (as a full disk does, but with another number)
FULL = """
import errno, sys
from sdconv import dataset
from sdconv.dataset import store

class Full:
    def __init__(self, file): self.file = file
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, data): raise OSError(errno.ENOSPC, "No space left on device")

write = store.Store.write
def full(self, name, content):
    is_late = name == "latents-000002.tar"
    return write(self, name, (lambda file: content(Full(file))) if is_late else content)
store.Store.write = full
dataset.encode(*sys.argv[1:], options=dataset.Options(size="16", shard_size=4))
"""


def test_a_full_disk_leaves_what_is_committed(
    source: Path, vae: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """A write that fails as on a full disk, in a process of its own."""
    command = [sys.executable, "-c", FULL, source, vae, tmp_path / "out"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 1
    assert "latents-000002.tar: the disk is full" in ran.stderr
    assert "hint: make room and run it again" in ran.stderr
    assert not list((tmp_path / "out").glob(".*.part"))
    assert (dataset.status(tmp_path / "out").done, dataset.status(tmp_path / "out").shards) == (
        2,
        6,
    )
    assert dataset.verify(tmp_path / "out").problems == ()
    dataset.encode(source, vae, tmp_path / "out", options=Options(**OPTIONS))
    assert_same(tmp_path / "out", whole)


def test_a_file_in_the_place_of_a_folder(source: Path, vae: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SdconvError, match="cannot be written"):
        dataset.encode(source, vae, tmp_path / "file" / "out", options=Options(**OPTIONS))


def test_a_folder_without_permission_to_write(source: Path, vae: Path) -> None:
    """As another user where root runs the tests, whom nothing stops."""
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / "out"
        folder.chmod(0o755)
        shutil.copytree(source, folder / "in")
        shutil.copy(vae, folder / "vae.safetensors")
        dataset.encode(folder / "in", folder / "vae.safetensors", out, options=Options(**OPTIONS))
        before = files_of(out)
        shutil.copy(folder / "in" / "photo00.png", folder / "in" / "new.png")
        out.chmod(0o555)
        (out / ".lock").chmod(0o666)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(SdconvError, match="cannot be written"):
                dataset.encode(
                    folder / "in", folder / "vae.safetensors", out, options=Options(**OPTIONS)
                )
        finally:
            os.seteuid(user)
            out.chmod(0o755)
        assert files_of(out) == before
        assert dataset.verify(out).problems == ()


# --- killed

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
        dataset.encode(source, vae, out, options=Options(**OPTIONS))
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


def test_records_tell_what_made_them(whole: dict[str, bytes]) -> None:
    record = json.loads(whole["latents-000000.json"])
    made_by = record["made_by"]
    assert set(made_by) == {"sdconv", "torch", "device", "threads"}
    assert (made_by["device"], made_by["threads"]) == ("cpu", 1)
    assert [one["key"] for one in record["samples"]][:2] == ["cats/photo01", "cats/photo03"]
