"""Layers with merged weights equal LyCORIS' own modules, for each kind and type of layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import unets
from helpers.loras import assert_equal, original_names, state
from helpers.numbers import error, randn
from safetensors.torch import save_file
from torch import Tensor, nn

import sdconv

package = pytest.importorskip(
    "lycoris", reason="the peer: pip install lycoris-lora (torch 2.6 cannot import it)"
)
lycoris, create_lycoris = package.modules, package.create_lycoris

INPUTS = {
    "linear": (5, 24),
    "square": (5, 32),
    "no_bias": (5, 24),
    "conv": (2, 16, 7, 6),
    "point": (2, 16, 5, 5),
    "square_conv": (2, 32, 5, 5),
}
NORMS = {"group": (2, 16, 4, 4), "layer": (3, 24)}


def layers() -> nn.ModuleDict:
    torch.manual_seed(11)
    return nn.ModuleDict(
        {
            "linear": nn.Linear(24, 48),
            "square": nn.Linear(32, 32),
            "no_bias": nn.Linear(24, 16, bias=False),
            "conv": nn.Conv2d(16, 24, 3, stride=2, padding=1),
            "point": nn.Conv2d(16, 24, 1),
            "square_conv": nn.Conv2d(32, 32, 3, padding=1),
            "group": nn.GroupNorm(4, 16),
            "layer": nn.LayerNorm(24),
        }
    )


def trained(model: nn.ModuleDict, names: Any, of: type, **options: Any) -> dict[str, nn.Module]:
    """LyCORIS' modules with seeded tensors, which float16 can hold, in place of layers."""
    torch.manual_seed(12)
    found: dict[str, nn.Module] = {}
    for name in names:
        module = of(f"lycoris_{name}", model[name], bypass_mode=False, **options).eval()
        module.requires_grad_(False)
        for role, parameter in module.named_parameters():
            if role in ("dora_scale", "rescale"):
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elif role == "scalar":
                parameter.fill_(1.25)
            else:
                parameter.normal_(std=0.3)
            parameter.copy_(parameter.half())
        module.apply_to()
        found[name] = module
    return found


def saved(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of their file, those in float16 that it can hold."""
    return {
        f"lycoris_{name}.{role}": half if torch.equal(half.to(tensor), tensor) else tensor
        for name, module in modules.items()
        for role, tensor in module.state_dict().items()
        for half in [tensor.half()]
    }


def changed(tensors: Mapping[str, Tensor], role: str) -> dict[str, Tensor]:
    torch.manual_seed(13)
    return {
        name: one + 0.2 * torch.rand_like(one.float()) if name.endswith(f".{role}") else one
        for name, one in tensors.items()
    }


def largest(model: nn.ModuleDict, expected: Mapping[str, Tensor]) -> float:
    return max(error(model[name](randn(*SHAPES[name])), out) for name, out in expected.items())


SHAPES = INPUTS | NORMS
# by kind: LyCORIS' module, its options, the scale, and what its file has without a use for it
CASES: Mapping[str, tuple[type, dict[str, Any], float, tuple[str, ...]]] = {
    "LoCon": (lycoris.LoConModule, {"lora_dim": 3, "alpha": 2}, 0.7, ()),
    "LoCon with mid": (lycoris.LoConModule, {"lora_dim": 3, "use_tucker": True}, 0.7, ()),
    "LoCon, rank-stabilised": (lycoris.LoConModule, {"lora_dim": 3, "rs_lora": True}, 0.7, ()),
    "LoCon with a scalar": (lycoris.LoConModule, {"use_scalar": True}, 0.7, ()),
    "DoRA": (lycoris.LoConModule, {"weight_decompose": True}, 1.0, ()),
    "DoRA of inputs": (
        lycoris.LoConModule,
        {"weight_decompose": True, "wd_on_out": False, "alpha": 3},
        1.0,
        (),
    ),
    "LoHa": (lycoris.LohaModule, {"lora_dim": 3, "alpha": 2}, 0.7, ()),
    "LoHa, Tucker": (lycoris.LohaModule, {"lora_dim": 3, "use_tucker": True}, 0.7, ()),
    "LoHa, rank-stabilised": (lycoris.LohaModule, {"lora_dim": 3, "rs_lora": True}, 0.7, ()),
    "LoHa with a scalar": (lycoris.LohaModule, {"use_scalar": True}, 0.7, ()),
    "LoHa with DoRA": (lycoris.LohaModule, {"weight_decompose": True}, 1.0, ()),
    "LoKr": (lycoris.LokrModule, {"lora_dim": 2, "alpha": 1}, 0.7, ()),
    "LoKr, both decomposed": (
        lycoris.LokrModule,
        {"lora_dim": 1, "alpha": 3, "decompose_both": True, "factor": 8},
        0.7,
        (),
    ),
    "LoKr, Tucker": (lycoris.LokrModule, {"lora_dim": 2, "use_tucker": True}, 0.7, ()),
    "LoKr, unbalanced": (
        lycoris.LokrModule,
        {"lora_dim": 1, "factor": 2, "unbalanced_factorization": True},
        0.7,
        (),
    ),
    "LoKr, whole matrices": (
        lycoris.LokrModule,
        {"full_matrix": True, "alpha": 7, "factor": 4},
        0.7,
        ("alpha",),
    ),
    "LoKr with DoRA": (
        lycoris.LokrModule,
        {"lora_dim": 2, "weight_decompose": True, "wd_on_out": False},
        1.0,
        (),
    ),
    "GLoRA": (lycoris.GLoRAModule, {"lora_dim": 3, "alpha": 2}, 0.7, ()),
    "(IA)3": (lycoris.IA3Module, {}, 0.7, ("on_input",)),
    "(IA)3 of inputs": (lycoris.IA3Module, {"train_on_input": True}, 0.7, ("on_input",)),
    "OFT": (lycoris.DiagOFTModule, {"lora_dim": 4}, 0.7, ("alpha",)),
    "OFT, constrained": (lycoris.DiagOFTModule, {"constraint": 0.01}, 0.7, ()),
    "OFT, rescaled": (lycoris.DiagOFTModule, {"rescaled": True}, 1.0, ("alpha",)),
    "BOFT": (lycoris.ButterflyOFTModule, {"lora_dim": 6}, 0.7, ("alpha",)),
    "BOFT, constrained": (lycoris.ButterflyOFTModule, {"lora_dim": 6, "constraint": 0.01}, 0.7, ()),
    "BOFT, rescaled": (
        lycoris.ButterflyOFTModule,
        {"lora_dim": 6, "rescaled": True},
        1.0,
        ("alpha",),
    ),
    "difference": (lycoris.FullModule, {}, 0.7, ()),
    "norm": (lycoris.NormModule, {}, 0.7, ()),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_lycoris(case: str) -> None:
    of, options, scale, unused = CASES[case]
    names = NORMS if of is lycoris.NormModule else INPUTS
    base = layers()
    modules = trained(copy.deepcopy(base), names, of, **options)
    tensors = saved(modules)
    expected = {}
    for name, module in modules.items():
        module.multiplier = scale
        expected[name] = module.forward(randn(*SHAPES[name]))

    before = state(base)
    assert largest(base, expected) > 0.03  # control: the kind changes every output
    merged = sdconv.merge_lora(base, tensors, scale)
    assert merged.layers == tuple(names) and merged.skipped == ()
    assert largest(base, expected) < 2e-6
    merged.unmerge()
    assert_equal(base.state_dict(), before)

    # controls: every tensor counts
    for role in {name.partition(".")[2] for name in tensors}.difference(unused):
        merged = sdconv.merge_lora(base, changed(tensors, role), scale)
        assert largest(base, expected) > 1e-3, role
        merged.unmerge()


@pytest.mark.parametrize("of", [lycoris.LohaModule, lycoris.LokrModule])
@torch.no_grad()
def test_lycoris_merges_alpha_twice(of: type) -> None:
    """Its merged weights have the square of alpha over the rank, its forward pass does not."""
    base = layers()
    module = trained(copy.deepcopy(base), ["linear"], of, lora_dim=2, alpha=1)["linear"]
    theirs, _ = module.get_merged_weight(1.0, base["linear"].weight.shape)
    before = base["linear"].weight.detach().clone()
    sdconv.merge_lora(base, saved({"linear": module}))
    assert error((theirs - before) * 2, base["linear"].weight - before) < 1e-5


@pytest.mark.parametrize("algorithm", ["loha", "lokr", "diag-oft"])
@torch.no_grad()
def test_a_whole_unet_and_its_norms_in_either_layout(
    algorithm: str, peer: Any, network: Any, tmp_path: Path
) -> None:
    model = copy.deepcopy(peer)
    theirs = create_lycoris(
        model, algo=algorithm, linear_dim=2, conv_dim=2, linear_alpha=1, train_norm=True
    )
    torch.manual_seed(14)
    for parameter in theirs.parameters():
        parameter.requires_grad_(False)
    for lora in theirs.loras:
        for parameter in lora.parameters():
            parameter.normal_(std=0.3)
    theirs.apply_to()
    tensors = {name: tensor.detach().clone() for name, tensor in theirs.state_dict().items()}
    inputs = unets.inputs(network.config)
    expected = model(*inputs).sample
    assert error(network(*inputs).sample, expected) > 0.1

    rename = original_names(network)
    layers = {name.replace(".", "_"): name for name, _ in network.named_modules()}
    originals = {
        f"lora_unet_{rename(layers[layer]).replace('.', '_')}.{role}": tensor
        for name, tensor in tensors.items()
        for layer, _, role in [name.removeprefix("lycoris_").partition(".")]
    }
    assert any("input_blocks" in name and "w_norm" in name for name in originals)
    for number, file in enumerate((tensors, originals)):
        path = tmp_path / f"{number}.safetensors"
        save_file(file | {"lora_te1_text_model_x.hada_w1_a": torch.ones(2, 2)}, path)
        merged = sdconv.merge_lora(network, path)
        assert merged.skipped == ("lora_te1_text_model_x.hada_w1_a",)
        assert len(merged.layers) == len(theirs.loras)
        assert error(network(*inputs).sample, expected) < 1e-4
        merged.unmerge()
