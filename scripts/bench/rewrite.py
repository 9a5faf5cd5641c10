"""Time and memory of the commands that write a whole checkpoint again: convert, merge-lora,
average and extract-lora.

The checkpoint has the size of Stable Diffusion 1.5 (U-Net, VAE and text encoder, 2.1 GB in
float16) and seeded weights; the LoRA has rank 16 in all attention layers of U-Net and text encoder.
Each measurement is a process of its own. Memory is the peak of anonymous resident memory, which
excludes file-backed pages, above that before the call; it includes what a command imports, for
``convert`` diffusers' transformers.

    python -m scripts.bench.rewrite
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.bench.memory import Peak

COMMANDS = ("convert", "convert to float32", "merge-lora", "average", "extract-lora")
_RANK = 16
_TEXT = "cond_stage_model.transformer.text_model."


def shapes_of_sd15() -> dict[str, tuple[int, ...]]:
    """Every tensor of the original file by its name."""
    import torch

    from sdconv.checkpoint.save import original_tensors
    from sdconv.config import AutoencoderKLConfig, UNet2DConditionConfig
    from sdconv.loading import build

    unet = UNet2DConditionConfig.from_json(
        {
            **UNet2DConditionConfig.assumed,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        "SD1",
    )
    vae = AutoencoderKLConfig(
        **{
            **AutoencoderKLConfig.assumed,
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
        }
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, config in (("model.diffusion_model.", unet), ("first_stage_model.", vae)):
        with torch.device("meta"):
            on_meta = build(config).state_dict()
        for name, tensor in original_tensors(on_meta, config).items():
            shapes[prefix + name] = tuple(tensor.shape)
    shapes[f"{_TEXT}embeddings.token_embedding.weight"] = (49408, 768)
    shapes[f"{_TEXT}embeddings.position_embedding.weight"] = (77, 768)
    layers = {f"self_attn.{n}_proj": (768, 768) for n in ("q", "k", "v", "out")}
    layers |= {"mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
    for number in range(12):
        for layer, shape in layers.items():
            stem = f"{_TEXT}encoder.layers.{number}.{layer}"
            shapes |= {f"{stem}.weight": shape, f"{stem}.bias": shape[:1]}
    return shapes


def make(folder: Path) -> dict[str, Path]:
    """The checkpoint, another, and the LoRA, in seeded float16."""
    import torch
    from safetensors.torch import save_file

    shapes = shapes_of_sd15()
    files = {name: folder / f"{name}.safetensors" for name in ("a", "b", "lora", "tuned")}
    for seed, name in enumerate(("a", "b")):
        random = torch.Generator().manual_seed(seed)
        state = {
            key: (torch.randn(shape, generator=random) / 32).half() for key, shape in shapes.items()
        }
        save_file(state, files[name])
        del state
    lora = {}
    for key, shape in shapes.items():
        layer = key.removesuffix(".weight")
        if ("attn1." in key or "attn2." in key or "self_attn." in key) and key != layer:
            stem = layer.replace("model.diffusion_model.", "lora_unet_")
            stem = stem.replace("cond_stage_model.transformer.", "lora_te_").replace(".", "_")
            lora[f"{stem}.lora_down.weight"] = torch.randn(_RANK, shape[1], generator=random) / 32
            lora[f"{stem}.lora_up.weight"] = torch.randn(shape[0], _RANK, generator=random) / 32
    save_file({name: tensor.half() for name, tensor in lora.items()}, files["lora"])
    return files


def run(command: str, files: dict[str, Path], out: Path) -> None:
    """One command's work, in this process."""
    import torch

    from sdconv.checkpoint.average import average
    from sdconv.checkpoint.convert import convert
    from sdconv.loading import build
    from sdconv.lora.bake import bake_lora
    from sdconv.lora.extract import extract_lora

    if command == "convert":
        convert(files["a"], out, "diffusers", build=build, family="sd1")
    elif command == "convert to float32":
        convert(files["a"], out, "diffusers", build=build, family="sd1", dtype=torch.float32)
    elif command == "merge-lora":
        bake_lora(files["a"], files["lora"], out)
    elif command == "average":
        average([files["a"], files["b"]], out)
    else:
        extract_lora(files["a"], files["tuned"], out, _RANK)


def measure(command: str, folder: Path) -> dict[str, float]:
    """Runs a command in a process of its own."""
    line = [sys.executable, "-W", "ignore", "-m", "scripts.bench.rewrite", "--in", str(folder)]
    done = subprocess.run([*line, command], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("command", nargs="?", choices=COMMANDS, help="only this one")
    options = parser.parse_args()
    names = ("a", "b", "lora", "tuned")
    if options.folder:
        files = {name: options.folder / f"{name}.safetensors" for name in names}
        import sdconv.lora.extract  # imports what the commands need, before memory is counted

        assert sdconv
        out = options.folder / "out.safetensors"
        start = time.perf_counter()
        with Peak() as peak:
            run(options.command, files, out)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "peak": peak.bytes, "out": out.stat().st_size}))
        out.unlink()
        return
    print("| command | reads, MB | writes, MB | seconds | peak memory, MB |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        files = make(Path(temporary))
        run("merge-lora", files, files["tuned"])
        sizes = {name: path.stat().st_size for name, path in files.items()}
        read = {"merge-lora": ("a", "lora"), "average": ("a", "b"), "extract-lora": ("a", "tuned")}
        for command in [options.command] if options.command else COMMANDS:
            found = measure(command, Path(temporary))
            taken = sum(sizes[name] for name in read.get(command, ("a",)))
            print(
                f"| {command} | {taken / 1e6:.0f} | {found['out'] / 1e6:.0f} "
                f"| {found['seconds']:.1f} | {found['peak'] / 1e6:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
