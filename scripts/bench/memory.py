"""Peak memory of this process while something runs."""

from __future__ import annotations

import threading
from pathlib import Path


def anonymous() -> int:
    """Anonymous resident bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("needs Linux: it reads /proc/self/status")


class Peak:
    """The most anonymous resident memory within it, above that at its beginning: ``bytes``."""

    def __enter__(self) -> Peak:
        self._before = self._most = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._most = max(self._most, anonymous())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = self._most - self._before
