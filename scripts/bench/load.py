"""Time and memory of loading a network, compared with diffusers on the same files.

Each measurement is a process of its own; the two sides take turns. Time is from the call until the
network is returned, with everything imported, and until each page of its weights has been read
once, since mapped files are read only then. Memory is the peak of anonymous resident memory, which
excludes file-backed pages, above that of a process that has imported the same and built the network
on the meta device.

The U-Net is SDXL's in float16; its files are sparse and read as zeros.

    python -m scripts.bench.load --component vae --rounds 5
    python -m scripts.bench.load --component unet --rounds 3
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

# Each side imports only what it needs and builds the network on the meta device, which imports the
# rest (diffusers' transformers for sdconv's U-Net), before the clock starts.
CHILD = r"""
import json, sys, threading, time
from pathlib import Path
import torch

side, name, source, folder, dtype = sys.argv[1:]
dtype = getattr(torch, dtype) if dtype != "None" else None
component = "vae" if name == "AutoencoderKL" else "unet"

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

if side == "sdconv":
    import sdconv
    from sdconv.loading import build, load
    config = getattr(sdconv, name.removesuffix("Model") + "Config").from_json(
        json.loads((Path(folder) / "config.json").read_text()), folder)
    with torch.device("meta"):
        build(config).state_dict()
    run = lambda: load(source, component=component, dtype=dtype)
else:
    import diffusers
    kind = getattr(diffusers, name)
    diffusers.logging.set_verbosity_error()
    with torch.device("meta"):
        kind.from_config(folder).state_dict()
    extra = {} if dtype is None else {"torch_dtype": dtype}
    if Path(source).is_dir():
        run = lambda: kind.from_pretrained(source, **extra)
    else:
        run = lambda: kind.from_single_file(
            source, config=folder, local_files_only=True, **extra)

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
before, modules = anonymous(), set(sys.modules)
thread = threading.Thread(target=watch); thread.start()
start = time.perf_counter()
network = run()
seconds = time.perf_counter() - start
done = True; thread.join()
peak = max(peak, anonymous())
sizes = [p.numel() * p.element_size() for p in network.parameters()]
touch = time.perf_counter()
for p in network.parameters():
    p.detach().flatten()[:: 4096 // p.element_size()].sum()
read = seconds + time.perf_counter() - touch
imported = len(set(sys.modules) - modules)
print(json.dumps({"seconds": seconds, "read": read, "peak": peak - before, "size": sum(sizes),
                  "imported": imported}))
"""


def made_vae(folder: Path) -> dict[str, Path]:
    """A full-size SD VAE with random weights, in the forms in which people have it."""
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
    # the rest of a whole checkpoint: 1.7 GB of a U-Net, which loading the VAE should not touch
    single["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] = (
        torch.zeros(320, 768)
    )
    single |= {
        f"model.diffusion_model.filler.{i}": torch.zeros(1 << 26, dtype=torch.float16)
        for i in range(13)
    }
    save_file(single, folder / "checkpoint.safetensors")
    return {"folder": folder / "vae", "checkpoint": folder / "checkpoint.safetensors"}


def made_unet(folder: Path) -> dict[str, Path]:
    """SDXL's U-Net, alone in a folder and in a file of 6.9 GB like the published checkpoint."""
    import torch

    from scripts.bench.configs import SDXL
    from sdconv.checkpoint.save import original_tensors
    from sdconv.loading import build

    with torch.device("meta"):
        on_meta = build(SDXL).state_dict()
    own = {name: tuple(tensor.shape) for name, tensor in on_meta.items()}
    (folder / "unet").mkdir()
    content = {**SDXL.to_json(), "_class_name": SDXL.class_name}
    (folder / "unet" / "config.json").write_text(json.dumps(content))
    write_sparse(folder / "unet" / "diffusion_pytorch_model.safetensors", own)
    # two text encoders and a VAE, which loading the U-Net should not touch
    shapes: dict[str, tuple[int, ...]] = {"first_stage_model.filler": (83653863,)}
    shapes |= {f"conditioner.filler.{i}": (1 << 26,) for i in range(12)}
    for name, tensor in original_tensors(on_meta, SDXL).items():
        shapes[f"model.diffusion_model.{name}"] = tuple(tensor.shape)
    write_sparse(folder / "checkpoint.safetensors", shapes)
    return {"folder": folder / "unet", "checkpoint": folder / "checkpoint.safetensors"}


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Writes a sparse safetensors file of float16 zeros, which takes no space on disk."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + 2 * math.prod(shapes[name])
        header[name] = {"dtype": "F16", "shape": shapes[name], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)


COMPONENTS = {
    "vae": ("AutoencoderKL", made_vae, ("None", "float16")),
    "unet": ("UNet2DConditionModel", made_unet, ("float16",)),
}


def measure(side: str, name: str, source: Path, folder: Path, dtype: str) -> dict[str, float]:
    """Loads once, in a process of its own."""
    own = [side, name, str(source), str(folder), dtype]
    command = [sys.executable, "-W", "ignore", "-c", CHILD, *own]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--component", choices=COMPONENTS, default="vae")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--dtype", action="append", help="instead of the component's own; may be repeated"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    name, made, dtypes = COMPONENTS[options.component]
    if not options.json:
        heads = ("loaded from", "dtype", "by", "seconds", "until all is read", "peak memory, MB")
        print("| " + " | ".join((*heads, "weights, MB")) + " |")
        print("|---|---|---|---|---|---|---|", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        sources = made(Path(temporary))
        cases = [(kind, dtype) for kind in sources for dtype in options.dtype or dtypes]
        for kind, dtype in cases:
            runs: dict[str, list[dict[str, float]]] = {"sdconv": [], "diffusers": []}
            for _ in range(options.rounds):
                for side, results in runs.items():
                    results.append(measure(side, name, sources[kind], sources["folder"], dtype))
            for side, results in runs.items():
                medians = {k: statistics.median(r[k] for r in results) for k in results[0]}
                row = {
                    "source": kind,
                    "dtype": "the file's" if dtype == "None" else dtype,
                    "side": side,
                    "seconds": medians["seconds"],
                    "read_seconds": medians["read"],
                    "peak_mb": medians["peak"] / 1e6,
                    "weights_mb": medians["size"] / 1e6,
                    # the timed call should import next to nothing
                    "modules_imported": medians["imported"],
                }
                rows.append(row)
                if not options.json:
                    print(
                        f"| {kind} | {row['dtype']} | {side} | {row['seconds']:.3f} "
                        f"| {row['read_seconds']:.3f} | {row['peak_mb']:.0f} "
                        f"| {row['weights_mb']:.0f} |",
                        flush=True,
                    )
    if options.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
