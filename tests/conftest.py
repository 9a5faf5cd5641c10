"""For every test: skips with instructions, threads, no user's cache, hypothesis' profiles."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    # torch reads it when it is imported: by the next conftest.py, and by commands that tests start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("ci" if os.environ.get("CI") else "local")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # a shell's background job: what tests start and interrupt would ignore it, too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # the constants that ship choose the methods, here and in the commands that tests start, not
    # those that a user has fitted: nothing is ever in this folder
    os.environ["SDCONV_CACHE"] = str(Path(tempfile.gettempdir()) / "no-cache-of-sdconv")


def _shared() -> Path | None:
    named = os.environ.get("SDCONV_SHARED")
    folder = Path(named).resolve() if named else None
    return folder if folder and folder.is_dir() else None


def _cuda() -> bool:
    import torch  # slow, so only if a test needs it

    return torch.cuda.is_available()


# marker -> whether its requirement is met, and how to meet it
NEEDS: dict[str, tuple[Callable[[], object], str]] = {
    "shared": (
        _shared,
        "needs the folder of shared fixtures: SDCONV_SHARED=/path/to/shared make test",
    ),
    "gpu": (_cuda, "needs a CUDA device; on a machine that has one: .venv/bin/pytest -m gpu"),
    "browser": (
        lambda: shutil.which("chromium") and importlib.util.find_spec("playwright"),
        "needs chromium and playwright: apt-get install chromium; pip install playwright",
    ),
}


def pytest_collection_finish() -> None:
    # what the imports have made stays to the end: never look through it again for garbage
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, (is_met, how) in NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not is_met():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=how))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begins no slow test after the time, in seconds since 1970, that SDCONV_TESTS_UNTIL says."""
    until = float(os.environ.get("SDCONV_TESTS_UNTIL", "inf"))
    if time.time() > until and item.get_closest_marker("slow"):
        pytest.skip("no time was left: .venv/bin/pytest -m slow")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder that SDCONV_SHARED names, for tests marked `shared`."""
    folder = _shared()
    assert folder, "a test that uses shared_dir must be marked shared"
    return folder
