"""What opening a network touches on disk and takes in memory. Linux only: it reads /proc."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from helpers.slow import first_of
from safetensors.torch import save_file

import sdconv
from sdconv.checkpoint.save import original_tensors
from sdconv.config import AutoencoderKLConfig, UNet2DConditionConfig
from sdconv.config.unet import CROSS_DOWN, CROSS_UP, DOWN, UP
from sdconv.loading import build

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="needs Linux: it reads /proc/self/smaps"
)

MB = 1 << 20


def vae(channels: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A float32 VAE as a whole checkpoint stores it."""
    config = AutoencoderKLConfig(
        **{
            **AutoencoderKLConfig.assumed,
            "block_out_channels": channels,
            "layers_per_block": 2,
            "sample_size": 512,
        }
    )
    torch.manual_seed(0)
    tensors = original_tensors(sdconv.AutoencoderKL(config).state_dict(), config)
    return {f"first_stage_model.{k}": v.contiguous() for k, v in tensors.items()}


def sdxl_unet(channels: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A float16 U-Net like SDXL's, its transformers shorter, as a whole checkpoint stores it."""
    own = {
        "sample_size": 128,
        "block_out_channels": channels,
        "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, UP),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": tuple(count // 64 for count in channels),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    config = UNet2DConditionConfig(**{**UNet2DConditionConfig.assumed, **own})
    with torch.device("meta"):
        on_meta = build(config).state_dict()
    tensors = original_tensors(on_meta, config)
    return {
        f"model.diffusion_model.{name}": torch.ones(tensor.shape, dtype=torch.float16)
        for name, tensor in tensors.items()
    }


def whole_checkpoint(path: Path, own: dict[str, torch.Tensor], other: int) -> int:
    """A file with a network's tensors and ``other`` bytes of another one before and after them.

    The other network's bytes are a hole in the file. Returns the network's bytes.
    """
    save_file(own, path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    for entry in header.values():
        entry["data_offsets"] = [offset + other for offset in entry["data_offsets"]]
    end = other + len(body)
    for name, start in (("a", 0), ("z", end)):
        header[f"cond_stage_model.{name}"] = {
            "dtype": "U8",
            "shape": [other],
            "data_offsets": [start, start + other],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(other, 1)
        file.write(body)
        file.truncate(file.tell() + other)
    return len(body)


CHILD = """
import re, sys, threading, time
import torch, sdconv, sdconv.loading
from pathlib import Path

path, dtype, component, family = sys.argv[1:]
dtype = getattr(torch, dtype, None)
config = sdconv.infer(sdconv.read_header(path).shapes, family=family)[component]
with torch.device("meta"):
    sdconv.loading.build(config)

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s+(\\d+)", text)[1]) * 1024

def mapped():
    text = Path("/proc/self/smaps").read_text()
    mappings = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", text)
    own = [m for m in mappings if path in m.split("\\n")[0]]
    return sum(int(re.search(r"Rss:\\s+(\\d+)", m)[1]) * 1024 for m in own)

peak, touched, done = 0, 0, False
def watch():
    global peak, touched
    while not done:
        peak = max(peak, anonymous())
        # the mapping goes when the last tensor that views it does
        touched = max(touched, mapped())
        time.sleep(0.0005)

before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
network = sdconv.load(path, dtype=dtype, component=component, family=family)
done = True
thread.join()
touched = max(touched, mapped())
parameters = list(network.parameters())
sizes = [p.numel() * p.element_size() for p in parameters]
print(max(peak, anonymous()) - before, touched, sum(sizes), max(sizes))
"""


def opened(
    path: Path, dtype: str, component: str = "vae", family: str = "sd1"
) -> tuple[int, int, int, int]:
    """Bytes: peak anonymous memory, the file's that were touched, weights, largest tensor."""
    command = [sys.executable, "-c", CHILD, str(path), dtype, component, family]
    # glibc returns large blocks to the system as they are freed, and keeps none for later
    frees = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MB)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=frees)
    peak, touched, weights, largest = map(int, done.stdout.split())
    return peak, touched, weights, largest


def seen(touched: int, again: Iterable[int], least: float) -> bool:
    """Whether at least ``least`` bytes were touched, in this run or in one of ``again``: on a busy
    machine the watching thread may not run."""
    return touched >= least or any(other >= least for other in again)


def fits(peak: int, again: Iterable[int], most: int) -> bool:
    """Whether at most ``most`` bytes were taken, in this run or in one of ``again``: the C library
    sometimes keeps what was freed."""
    return peak <= most or any(other <= most for other in again)


@pytest.mark.parametrize("dtype", first_of(["float16", "None", "float64"]))
def test_only_the_component_is_read(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    own = whole_checkpoint(path, vae((64, 128, 128)), other=512 * MB)
    peak, touched, weights, largest = opened(path, dtype)
    # the kernel maps the pages around each one that is used, 64 kB at most on either side
    assert touched <= own + 8 * MB
    most = (0 if dtype == "None" else weights) + largest + 60 * MB
    again = (opened(path, dtype)[0] for _ in range(4))
    assert fits(peak, again, most)
    if dtype != "None":
        again = (opened(path, dtype)[1] for _ in range(4))
        assert seen(touched, again, 0.5 * own), "the control: what is converted has been read"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["None", "float16", "float64"])
def test_full_size_peak_memory(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    own = whole_checkpoint(path, vae((128, 256, 512, 512)), other=2048 * MB)
    peak, touched, weights, largest = opened(path, dtype)
    assert touched <= own + 16 * MB
    most = (0 if dtype == "None" else weights) + largest + 60 * MB
    again = (opened(path, dtype)[0] for _ in range(4))
    assert fits(peak, again, most)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["None", "float32"])
def test_only_the_unet_is_read(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    own = whole_checkpoint(path, sdxl_unet((128, 256, 512)), other=512 * MB)
    peak, touched, weights, largest = opened(path, dtype, "unet", "sdxl")
    assert own > 150 * MB, "the control: it is more than the allowance"
    assert touched <= own + 16 * MB
    most = (0 if dtype == "None" else weights) + largest + 60 * MB
    again = (opened(path, dtype)[0] for _ in range(4))
    assert fits(peak, again, most)
    if dtype != "None":
        again = (opened(path, dtype, "unet", "sdxl")[1] for _ in range(4))
        assert seen(touched, again, 0.5 * own), "the control: what is converted has been read"
