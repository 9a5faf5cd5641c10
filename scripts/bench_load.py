"""How long a VAE takes to open and how much memory that takes, beside diffusers on the same files.

Each measurement is a process of its own; the two sides take turns. Time is from the call to the
network, with everything imported. Memory is the peak of anonymous resident memory (file-backed
pages apart) above a process that has imported the same and built the network on the meta device.

    python scripts/bench_load.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = r"""
import json, sys, threading, time
from pathlib import Path
import torch

side, source, folder, dtype = sys.argv[1:]
dtype = getattr(torch, dtype) if dtype != "None" else None

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

if side == "sdconv":
    import sdconv, sdconv.checkpoint.load
    from sdconv.config import AutoencoderKLConfig
    content = json.loads((Path(folder) / "config.json").read_text())
    config = AutoencoderKLConfig.from_json(content, folder)
    with torch.device("meta"):
        sdconv.AutoencoderKL(config)
    run = lambda: sdconv.load(source, component="vae", dtype=dtype)
else:
    import diffusers
    from diffusers import AutoencoderKL
    diffusers.logging.set_verbosity_error()
    with torch.device("meta"):
        AutoencoderKL.from_config(folder)
    extra = {} if dtype is None else {"torch_dtype": dtype}
    if Path(source).is_dir():
        run = lambda: AutoencoderKL.from_pretrained(source, **extra)
    else:
        run = lambda: AutoencoderKL.from_single_file(
            source, config=folder, local_files_only=True, **extra)

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
before = anonymous()
thread = threading.Thread(target=watch); thread.start()
start = time.perf_counter()
network = run()
seconds = time.perf_counter() - start
done = True; thread.join()
peak = max(peak, anonymous())
size = sum(p.numel() * p.element_size() for p in network.parameters())
largest = max(p.numel() * p.element_size() for p in network.parameters())
print(json.dumps({"seconds": seconds, "peak": peak - before, "size": size, "largest": largest}))
"""


def make(folder: Path) -> dict[str, Path]:
    """A full-size SD VAE with seeded random weights, as people have it."""
    import torch
    from safetensors.torch import save_file

    import sdconv
    from sdconv.checkpoint.save import original_tensors
    from sdconv.config import AutoencoderKLConfig

    torch.manual_seed(0)
    config = AutoencoderKLConfig(
        **{
            **AutoencoderKLConfig.assumed,
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "sample_size": 512,
        }
    )
    network = sdconv.AutoencoderKL(config)
    sdconv.save(network, folder / "vae")
    tensors = original_tensors(network.state_dict(), config)
    single = {f"first_stage_model.{k}": v.contiguous() for k, v in tensors.items()}
    # what a whole checkpoint has beside: 1.7 GB of a U-Net, which no load of the VAE should touch
    single["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] = (
        torch.zeros(320, 768)
    )
    single |= {
        f"model.diffusion_model.filler.{i}": torch.zeros(1 << 26, dtype=torch.float16)
        for i in range(13)
    }
    save_file(single, folder / "checkpoint.safetensors")
    return {"folder": folder / "vae", "checkpoint": folder / "checkpoint.safetensors"}


def measure(side: str, source: Path, folder: Path, dtype: str) -> dict[str, float]:
    """One process, one opening."""
    command = [sys.executable, "-W", "ignore", "-c", CHILD, side, str(source), str(folder), dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cases = [
        ("folder", "None"),
        ("folder", "float16"),
        ("checkpoint", "None"),
        ("checkpoint", "float16"),
    ]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        sources = make(Path(name))
        for kind, dtype in cases:
            runs: dict[str, list[dict[str, float]]] = {"sdconv": [], "diffusers": []}
            for _ in range(options.rounds):
                for side in runs:
                    runs[side].append(measure(side, sources[kind], sources["folder"], dtype))
            for side, results in runs.items():
                rows.append(
                    {
                        "source": kind,
                        "dtype": "the file's" if dtype == "None" else dtype,
                        "side": side,
                        "seconds": statistics.median(r["seconds"] for r in results),
                        "peak_mb": statistics.median(r["peak"] for r in results) / 1e6,
                        "weights_mb": results[0]["size"] / 1e6,
                        "largest_mb": results[0]["largest"] / 1e6,
                    }
                )
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print("| opened from | dtype | by | seconds | peak memory, MB | weights, MB |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['source']} | {row['dtype']} | {row['side']} | {row['seconds']:.3f} "
            f"| {row['peak_mb']:.0f} | {row['weights_mb']:.0f} |"
        )


if __name__ == "__main__":
    main()
