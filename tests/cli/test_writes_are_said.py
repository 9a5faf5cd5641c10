"""Whatever a command writes that ``sdconv diff`` calls different from its source, it has said so.

Every command that writes weights, on hostile sources: it ends with an error, or what it writes is
equal to the source, or its notes, its warnings or its report say how it is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import seeded, unets
from helpers.commands import run
from safetensors.torch import save_file
from torch import Tensor

from sdconv.checkpoint.keys.unet import ema_name, keys_of_canonical
from sdconv.checkpoint.save import original_tensors

KL = seeded.SMALL_KL
FIRST, MAIN = "first_stage_model.", "model.diffusion_model."
NAME = "decoder.conv_in.weight"
E4M3 = torch.float8_e4m3fn
State = dict[str, Tensor]


@cache
def _vae(prefix: str) -> State:
    named = original_tensors(seeded.tensors(KL), KL)
    return {prefix + name: tensor.contiguous() for name, tensor in named.items()}


def vae(prefix: str = "") -> State:
    return dict(_vae(prefix))


@cache
def _unet() -> State:
    config = unets.smallest("no transformers") | {"block_out_channels": (32, 32)}
    shapes = {k: tuple(v.shape) for k, v in unets.on_meta(config).state_dict().items()}
    keys = keys_of_canonical(shapes)
    return {f"{MAIN}{keys.original(k)}": v for k, v in seeded.weights(shapes).items()}


def changed(value: float, prefix: str = "") -> State:
    """A VAE with one odd value."""
    state = vae(prefix)
    state[prefix + NAME] = state[prefix + NAME].clone()
    state[prefix + NAME].view(-1)[0] = value
    return state


def respelt(*words: tuple[str, str]) -> State:
    state = {}
    for name, tensor in vae(FIRST).items():
        for word, other in words:
            name = name.replace(f".attn_1.{word}.", f".attn_1.{other}.")
        state[name] = tensor
    return state


def scaled(rows: int | None = None) -> State:
    state = vae(FIRST)
    small = (state[FIRST + NAME] * 100).to(E4M3)
    scale = torch.tensor(0.01) if rows is None else torch.linspace(0.005, 0.02, rows)
    extra = {f"{FIRST}decoder.conv_in.weight_scale": scale}
    return state | extra | {FIRST + NAME: small}


def half(state: State) -> State:
    return {name: tensor.half() for name, tensor in state.items()}


SOURCES: dict[str, Callable[[], State]] = {
    "a VAE": vae,
    "a whole model": lambda: _unet() | vae(FIRST),
    "NaN": lambda: changed(float("nan"), FIRST),
    "infinity": lambda: changed(float("inf"), FIRST),
    "70000": lambda: changed(70000.0, FIRST),
    "1e-10": lambda: changed(1e-10),
    "negative zero": lambda: changed(-0.0),
    "half precision": lambda: half(_unet() | vae(FIRST)),
    "several dtypes": lambda: half(_unet()) | vae(FIRST),
    "float64": lambda: {k: v.double() for k, v in vae(FIRST).items()},
    "fp8 without scales": lambda: vae(FIRST) | {FIRST + NAME: vae()[NAME].to(E4M3)},
    "fp8 with a scale": scaled,
    "fp8 with a scale for each row": lambda: scaled(64),
    "fp8 with a scale that does not fit": lambda: scaled(63),
    "a scale without fp8": lambda: (
        vae(FIRST) | {f"{FIRST}decoder.conv_in.weight_scale": torch.ones(())}
    ),
    "the marker of scaled fp8": lambda: vae(FIRST) | {"scaled_fp8": torch.empty(0).to(E4M3)},
    "averages": lambda: _unet() | {ema_name(k): v + 1 for k, v in _unet().items()} | vae(FIRST),
    "averages of some": lambda: _unet() | {ema_name(f"{MAIN}out.2.bias"): torch.ones(4)},
    "dotted averages": lambda: vae() | {f"model_ema.{k}": v + 1 for k, v in vae().items()},
    "averages in half precision": lambda: (
        _unet() | {ema_name(k): (v + 1).half() for k, v in _unet().items()}
    ),
    "losses": lambda: vae(FIRST) | {f"{FIRST}loss.logvar": torch.ones(()), "loss.x": torch.ones(2)},
    "optimizer states": lambda: vae(FIRST) | {"optimizer.state.0.exp_avg": torch.ones(3)},
    "something under the prefix": lambda: vae(FIRST) | {f"{FIRST}adapter.weight": torch.ones(3)},
    "a U-Net's something": lambda: _unet() | {f"{MAIN}adapter.weight": torch.ones(3)},
    "two VAEs": lambda: vae(FIRST) | {k: v + 1 for k, v in vae("conditioner.embedders.3.").items()},
    "two that could be meant": lambda: vae(FIRST) | {k: v + 1 for k, v in vae("vae.").items()},
    "diffusers' attention": lambda: respelt(("q", "to_q"), ("k", "to_k"), ("v", "to_v")),
    "diffusers' old attention": lambda: respelt(("q", "query"), ("k", "key"), ("v", "value")),
    "linear attention": lambda: {
        k: v.flatten(1) if ".attn_1." in k and v.ndim == 4 else v for k, v in vae(FIRST).items()
    },
    "marks and counters": lambda: (
        vae()
        | {
            "v_pred": torch.empty(0),
            "iteration": torch.tensor(3),
            "edm_vpred.sigma_max": torch.ones(()),
        }
    ),
    "integers, booleans and complex numbers": lambda: (
        vae(FIRST)
        | {
            "a.position_ids": torch.arange(7)[None],
            "b.mask": torch.tensor([True, False]),
            "c.odd": torch.ones(2, dtype=torch.complex64),
            "d.nothing": torch.empty(0, 3),
        }
    ),
    "a weight of integers": lambda: vae(FIRST) | {FIRST + NAME: torch.ones(64, 4, 3, 3).int()},
    "statistics": lambda: (
        vae(FIRST) | {"edm_mean": torch.tensor([1.0, 2.0, 3.0, 4.0]), "edm_std": torch.ones(4) * 5}
    ),
    "another network": lambda: {"model.layers.0.weight": torch.ones(4, 4)},
    "a tensor too few": lambda: dict(list(vae(FIRST).items())[1:]),
    "another shape": lambda: vae(FIRST) | {FIRST + NAME: torch.ones(64, 5, 3, 3)},
}
COMMANDS = """
convert IN OUT.safetensors --layout original
convert IN OUT.safetensors --layout diffusers
convert IN OUT --layout diffusers
convert IN OUT.safetensors --layout original --component vae
convert IN OUT.safetensors --layout diffusers --component unet
convert IN OUT.safetensors --layout original --dtype float16
convert IN OUT.safetensors --layout original --dtype float16 --clamp
convert IN OUT.safetensors --dtype bfloat16
convert IN OUT.safetensors --layout diffusers --prune
convert IN OUT.safetensors --ema drop
convert IN OUT.safetensors --ema only
convert IN OUT.safetensors --ema only --prune --dtype float16
average IN IN --out OUT.safetensors
average IN IN --weight 0.3 --out OUT.safetensors
average IN OTHER --out OUT.safetensors
average IN OTHER --weight 0 --out OUT.safetensors
average IN OTHER --weight vae=0 --weight 0.5 --out OUT.safetensors
merge-lora IN LORA --out OUT.safetensors
merge-lora IN LORA --scale 0 --out OUT.safetensors
merge-lora IN LORA --scale 1e-9 --out OUT.safetensors
"""
# what a difference must be called, by what it is
REASONS = {
    "only in the source": r"left out|multiplied by their scales|was written",
    "only in the output": r"statistics|carried",
    "values": r"rounded to|clamped|running averages: |changed, by|modules changed",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    for number, make in enumerate(SOURCES.values()):
        state = make()
        save_file(state, folder / f"{number}.safetensors")
        other = {
            k: (v.float() * 1.01).to(v.dtype) if v.is_floating_point() and "scale" not in k else v
            for k, v in state.items()
        }
        save_file(other, folder / f"{number}-other.safetensors")
    random = torch.Generator().manual_seed(0)
    lora = {
        "lora_vae_decoder_conv_in.lora_up.weight": torch.randn(64, 2, 1, 1, generator=random),
        "lora_vae_decoder_conv_in.lora_down.weight": torch.randn(2, 4, 3, 3, generator=random),
    }
    save_file(lora, folder / "lora.safetensors")
    return folder


EVERY_TIME = ("losses",)
# nothing is written of them
REFUSED = ("a scale without fp8", "fp8 with a scale that does not fit")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in EVERY_TIME else [pytest.mark.slow])
        for name in SOURCES
    ],
)
def test_what_differs_is_said(name: str, folder: Path, tmp_path: Path) -> None:
    number = list(SOURCES).index(name)
    given = {
        "IN": folder / f"{number}.safetensors",
        "OTHER": folder / f"{number}-other.safetensors",
        "LORA": folder / "lora.safetensors",
    }
    written = 0
    for at, line in enumerate(COMMANDS.strip().splitlines()):
        outs = [word.replace("OUT", str(tmp_path / f"{at}")) for word in line.split()]
        words = [str(given.get(word, word)) for word in outs]
        family = ["--family", "sd1"] if words[0] == "convert" else []
        result = run(*words, *family)
        out = next(Path(w) for w in words if w.startswith(str(tmp_path)))
        if result.exit_code:
            assert result.exit_code == 2, (line, result.stderr)
            assert not out.exists(), line
            continue
        written += 1
        complaints = unsaid(given["IN"], out, result.stderr + result.stdout)
        assert not complaints, (line, complaints, result.stderr, result.stdout)
    assert (written == 0) == (name in REFUSED), written


def unsaid(source: Path, out: Path, said: str) -> list[str]:
    """The kinds of differences, by ``sdconv diff``, that a command's words do not mention."""
    vaes = {"vae": out / "vae", "unet": out / "unet"}
    outs = [one for one in vaes.values() if one.is_dir()] if out.is_dir() else [out]
    result = []
    for one in outs or [out]:
        answer = json.loads(run("diff", source, one, "--json").stdout)
        found = {
            "only in the source": answer["only_first"] and len(outs) < 2,
            "only in the output": [n for n in answer["only_second"] if not n.startswith("edm_")],
            "values": answer["whole"]["changed"] or answer["misshapen"],
        }
        result += [k for k, v in found.items() if v and not re.search(REASONS[k], said)]
    return result


def test_the_test_notices(folder: Path) -> None:
    """The control: differences of each kind without a word about them."""
    plain, other = folder / "0.safetensors", folder / "0-other.safetensors"
    whole = folder / f"{list(SOURCES).index('losses')}.safetensors"
    assert unsaid(plain, other, "out.safetensors") == ["values"]
    assert unsaid(plain, other, "vae: 3 tensors changed, by 0.01 at most") == []
    assert unsaid(whole, folder / "2.safetensors", "")[0] == "only in the source"
    assert unsaid(folder / "2.safetensors", whole, "")[0] == "only in the output"
    assert unsaid(plain, plain, "") == []
