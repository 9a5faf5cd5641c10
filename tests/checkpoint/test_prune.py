"""Running averages, losses and optimizer states: kept, left out, or put in the weights' place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import seeded, unets
from helpers.weight_files import convert, raw
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdconv
from sdconv.checkpoint.keys.unet import ema_name, keys_of_canonical
from sdconv.checkpoint.save import original_tensors
from sdconv.errors import InputError, UnknownNetworkError, WeightsMismatchError

KL = seeded.SMALL_KL
UNET, VAE = "model.diffusion_model.", "first_stage_model."
State = dict[str, Tensor]


def unet() -> State:
    """A small U-Net by the original's names."""
    shapes = {
        k: tuple(v.shape) for k, v in unets.on_meta(unets.smallest("SD1")).state_dict().items()
    }
    keys = keys_of_canonical(shapes)
    return {f"{UNET}{keys.original(k)}": v for k, v in seeded.weights(shapes).items()}


def vae(prefix: str = VAE) -> State:
    state = original_tensors(seeded.tensors(KL), KL)
    return {prefix + name: tensor.contiguous() for name, tensor in state.items()}


TRAINING = {
    f"{VAE}loss.discriminator.main.0.weight": torch.ones(2, 3),
    f"{VAE}loss.logvar": torch.zeros(()),
    f"{VAE}logvar": torch.zeros(()),
    "optimizer.state.0.exp_avg": torch.ones(4),
    "optimizer_states.0.step": torch.ones(()),
}
OTHERS = {
    "betas": torch.linspace(0, 1, 10),
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.ones(8),
    "loss_scale": torch.ones(2),
}
COUNTERS = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def averages(weights: State) -> State:
    return {ema_name(name): tensor.half() + 1 for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As training leaves it: weights, averages of the U-Net's, losses and optimizer states."""
    path = tmp_path_factory.mktemp("prune") / "training.safetensors"
    save_file(unet() | vae() | averages(unet()) | COUNTERS | TRAINING | OTHERS, path)
    return path


@pytest.mark.parametrize("layout", ["original", None])
def test_averages_in_the_place_of_weights(whole: Path, layout: str | None, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    result = convert(whole, out, layout, ema="only", family="sd1")
    assert result.averaged == ("unet",)
    assert result.pruned == {"model_ema": len(unet()) + 2}
    written = load_file(out)
    right = {name: tensor.half() + 1 for name, tensor in unet().items()} | vae() | TRAINING | OTHERS
    assert set(written) == set(right)
    assert all(torch.equal(written[k], v) and written[k].dtype == v.dtype for k, v in right.items())
    # the same network as load(ema=True) of the source
    loaded = sdconv.load(whole, "unet", ema=True, family="sd1").state_dict()
    again = sdconv.load(out, "unet", family="sd1").state_dict()
    assert all(torch.equal(again[k], v) for k, v in loaded.items())


@pytest.mark.parametrize("target", ["file", "folder", "component"])
def test_averages_in_diffusers_layout(whole: Path, target: str, tmp_path: Path) -> None:
    out = tmp_path / ("out" if target == "folder" else "out.safetensors")
    component = "unet" if target == "component" else None
    convert(whole, out, "diffusers", component, ema="only", prune=True, family="sd1")
    loaded = sdconv.load(whole, "unet", ema=True, family="sd1").state_dict()
    again = sdconv.load(out, "unet", family="sd1").state_dict()
    assert all(torch.equal(again[k], v) for k, v in loaded.items())
    # the control: the weights are others
    plain = sdconv.load(whole, "unet", family="sd1").state_dict()
    assert not any(torch.equal(again[k], v) for k, v in plain.items())


def test_dropping_and_pruning(whole: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "out.safetensors", raw(whole)
    convert(whole, out, "original", family="sd1")
    assert raw(out) == before  # nothing is dropped unasked
    convert(whole, out, "original", family="sd1", ema="keep")
    assert raw(out) == before
    convert(whole, out, "original", family="sd1", ema="drop")
    dropped = {name for name in before if name.startswith("model_ema.")}
    assert raw(out) == {k: v for k, v in before.items() if k not in dropped}
    result = convert(whole, out, "original", family="sd1", prune=True)
    assert raw(out) == {k: v for k, v in before.items() if k not in dropped | set(TRAINING)}
    assert sum(result.pruned.values()) == len(dropped) + len(TRAINING)
    assert set(load_file(out)) == {*unet(), *vae(), *OTHERS}


def test_dotted_averages_of_a_bare_network_make_its_folder(tmp_path: Path) -> None:
    path, out = tmp_path / "vae.safetensors", tmp_path / "out"
    dotted = {f"model_ema.{name}": tensor + 1 for name, tensor in vae("").items()}
    save_file(vae("") | dotted, path)
    convert(path, out, "diffusers", ema="only", family="sd1")
    assert (out / "config.json").exists()  # not out/vae/: the network is alone
    right = {name: tensor + 1 for name, tensor in seeded.tensors(KL).items()}
    again = sdconv.load(out).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in right.items())


def test_a_file_of_nothing_but_averages_keeps_them(tmp_path: Path) -> None:
    path, out = tmp_path / "ema.safetensors", tmp_path / "out.safetensors"
    state = {f"model_ema.{name}": tensor for name, tensor in vae("").items()}
    save_file(state, path)
    convert(path, out, "original", prune=True, family="sd1")
    assert set(load_file(out)) == set(state)


def test_what_cannot_be_done_is_refused(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(InputError, match="ema: unknown choice"):
        convert(whole, out, "original", ema="some")
    with pytest.raises(InputError, match="pruning leaves out the running averages"):
        convert(whole, out, "original", ema="keep", prune=True)
    plain = tmp_path / "plain.safetensors"
    save_file(vae(), plain)
    with pytest.raises(UnknownNetworkError, match="there are no running averages of the vae"):
        convert(plain, out, "original", ema="only", family="sd1")
    some = averages(unet())
    gone = next(iter(some))
    save_file(unet() | {k: v for k, v in some.items() if k != gone}, plain)
    with pytest.raises(WeightsMismatchError, match="1 missing of the"):
        convert(plain, out, "original", ema="only", family="sd1")
    save_file(unet() | some | {gone: torch.ones(3)}, plain)
    with pytest.raises(WeightsMismatchError, match="another shape than its weight"):
        convert(plain, out, "original", ema="only", family="sd1")
    assert not out.exists()


def test_networks_of_two_layouts_need_a_choice(tmp_path: Path) -> None:
    path, out = tmp_path / "mixed.safetensors", tmp_path / "out.safetensors"
    save_file(unet() | {f"vae.{k}": v for k, v in seeded.tensors(KL).items()}, path)
    with pytest.raises(InputError, match="different layouts"):
        convert(path, out, family="sd1")
