"""Time of ``import sdconv`` and of its first attribute, compared with ``import torch``.

Medians over fresh processes, which take turns.

    python -m scripts.bench.import_time --rounds 9
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

CASES = {
    "import torch": "import torch",
    "import torch, sdconv": "import torch, sdconv",
    "import torch, sdconv; sdconv.load": "import torch, sdconv; sdconv.load",
    "import sdconv": "import sdconv",
    "import torch, diffusers.AutoencoderKL": "import torch; from diffusers import AutoencoderKL",
}
TIMED = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case, code in CASES.items():
            done = subprocess.run(
                [sys.executable, "-c", TIMED.format(code)],
                check=True,
                capture_output=True,
                text=True,
            )
            seconds[case].append(float(done.stdout))
    base = statistics.median(seconds["import torch"])
    print("| process | seconds | over `import torch` |")
    print("|---|---|---|")
    for case, values in seconds.items():
        median = statistics.median(values)
        print(f"| `{case}` | {median:.3f} | {median - base:+.3f} |")


if __name__ == "__main__":
    main()
