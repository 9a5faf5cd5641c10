"""What a stage has found so far, in a file that is complete at any moment.

A stage's file ``DIR/<stage>.json`` holds one object:

- ``stage``, ``started`` (UTC), ``seconds``;
- ``status``: "running", "done", "failed" (it raised) or "cut" (it ran into its time limit);
- ``why`` and ``traceback``, if it failed or was cut;
- ``complaints``: what is wrong with what was measured, empty if all is as it should be;
- ``left_out``: rows that there was no time for;
- ``facts``: single figures; ``rows``: a table's rows, each with its ``key``.

Numbers that JSON lacks (NaN, infinity) are text. Each change is written at once, and so is
``DIR/report.md``.
"""

from __future__ import annotations

import datetime
import gc
import json
import math
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class DeviceLostError(RuntimeError):
    """The device refuses all further work in this process, as after an illegal memory access."""


class Record:
    """A stage's file: read if the stage was begun before, so that it goes on from there.

    Args:
        folder: where the files are.
        stage: the stage's name.
        seconds: how long it may take from now on.
    """

    def __init__(self, folder: Path, stage: str, seconds: float = math.inf) -> None:
        self.folder, self.stage = folder, stage
        self._begin = time.monotonic()
        self._deadline = self._begin + seconds
        self.content: dict[str, Any] = read(folder, stage) or {
            "stage": stage,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "status": "running",
            "complaints": [],
            "left_out": [],
            "facts": {},
            "rows": [],
        }
        self._before = self.content["seconds"]

    @property
    def left(self) -> float:
        """Seconds until the stage's limit."""
        return self._deadline - time.monotonic()

    def facts(self, **facts: Any) -> None:
        """Adds single figures."""
        self.content["facts"] |= plain(facts)
        self.save()

    def row(self, key: str, **values: Any) -> None:
        """Adds a row, or adds values to the row of that key."""
        row = next((row for row in self.content["rows"] if row["key"] == key), None)
        if row is None:
            row = {"key": key}
            self.content["rows"].append(row)
        row |= plain(values)
        self.save()

    def has(self, key: str) -> bool:
        """Whether there is such a row."""
        return any(row["key"] == key for row in self.content["rows"])

    def complain(self, about: str) -> None:
        """Notes that what was measured is not as it should be: the stage fails."""
        if about not in self.content["complaints"]:
            self.content["complaints"].append(about)
        self.save()

    def measure(
        self,
        key: str,
        measure: Callable[[], dict[str, Any]],
        *,
        least: float = 0.0,
        most: float = math.inf,
        must_work: bool = False,
        **what: Any,
    ) -> dict[str, Any] | None:
        """Adds the row that ``measure`` returns, or one that says why there is none.

        Args:
            key: the row's.
            measure: returns the row's values.
            least: seconds that it will take at least; with fewer left, the row is left out.
            most: seconds after which it is given up.
            must_work: complain if ``measure`` raises, unless because the stage's time is up.
            what: values of the row in any case.

        Returns:
            What ``measure`` returned; None if it was not run or raised.

        Raises:
            DeviceLostError: the device cannot be used any more in this process.
        """
        if self.has(key):
            return None
        if self.left < least:
            if key not in self.content["left_out"]:
                self.content["left_out"].append(key)
                self.save()
            return None
        limit = min(most, self.left)
        try:
            with time_limit(limit):
                values = measure()
        except Exception as error:
            self.row(key, **what, error=sentence(error), traceback=traceback.format_exc())
            if must_work and not (isinstance(error, TimeoutError) and limit < most):
                self.complain(f"{key}: {sentence(error)}")
        else:
            self.row(key, **what, **values)
            return values
        release_memory()  # outside the handler, in which the traceback's tensors are still alive
        return None

    def end(
        self,
        status: str,
        why: str | None = None,
        trace: str | None = None,
        seconds: float | None = None,
    ) -> None:
        """Writes how the stage ended, and after how many seconds, if that is known better."""
        self.content["status"] = status
        if seconds is not None:
            self._before, self._begin = seconds, time.monotonic()
        if why is not None:
            self.content["why"] = why
        if trace is not None:
            self.content["traceback"] = trace
        self.save()

    def save(self) -> None:
        """Writes the file and the report."""
        from scripts.gpu import report

        spent = self._before + time.monotonic() - self._begin
        self.content["seconds"] = round(spent, 1)
        text = json.dumps(self.content, indent=1, allow_nan=False) + "\n"
        write_whole(self.folder / f"{self.stage}.json", text)
        write_whole(self.folder / "report.md", report.markdown(self.folder))


def read(folder: Path, stage: str) -> dict[str, Any] | None:
    """A stage's file; None if there is none."""
    path = folder / f"{stage}.json"
    content: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return content or None


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that at any moment it is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".half")
    half.write_text(text, "utf-8")
    half.replace(path)


def plain(value: Any) -> Any:
    """The value in JSON's types."""
    match value:
        case bool() | int() | str() | None:
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case dict():
            return {str(name): plain(one) for name, one in value.items()}
        case list() | tuple():
            return [plain(one) for one in value]
    return str(value)


def sentence(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises a TimeoutError within the block after so much time, as soon as Python runs."""
    if not math.isfinite(seconds):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"given up after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def release_memory() -> None:
    """Returns what failed work has left on the device.

    Raises:
        DeviceLostError: the device does not answer any more.
    """
    import torch

    gc.collect()
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        raise DeviceLostError(sentence(error)) from error
