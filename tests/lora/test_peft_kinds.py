"""Merged weights equal those that PEFT merges from the same folder, for each kind."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.loras import assert_equal, largest_error, state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sdconv
from sdconv.errors import CheckpointError

NAMES = ["linear", "square", "conv", "point", "square_conv"]


def layers() -> nn.ModuleDict:
    torch.manual_seed(21)
    return nn.ModuleDict(
        {
            "linear": nn.Linear(24, 48),
            "square": nn.Linear(32, 32),
            "conv": nn.Conv2d(16, 24, 3, stride=2, padding=1),
            "point": nn.Conv2d(16, 24, 1),
            "square_conv": nn.Conv2d(32, 32, 3, padding=1),
        }
    )


COMMON: dict[str, Any] = {"target_modules": NAMES}
LORA = COMMON | {"init_lora_weights": False, "r": 4, "lora_alpha": 6}
HADA = COMMON | {"init_weights": False, "r": 3, "alpha": 2, "alpha_pattern": {"conv": 4}}
OFT = COMMON | {"init_weights": False, "oft_block_size": 4, "r": 0}
BOFT = COMMON | {"init_weights": False}
CASES: Mapping[str, Any] = {
    "biases": peft.LoraConfig(**LORA, lora_bias=True),
    "DoRA": peft.LoraConfig(**LORA, use_dora=True),
    "DoRA, rank-stabilised": peft.LoraConfig(**LORA, use_dora=True, use_rslora=True),
    "LoHa": peft.LoHaConfig(**HADA),
    "LoHa, Tucker": peft.LoHaConfig(**HADA, use_effective_conv2d=True),
    "LoKr": peft.LoKrConfig(**HADA, rank_pattern={"square": 1}),
    "LoKr, Tucker": peft.LoKrConfig(**HADA | {"r": 2}, use_effective_conv2d=True),
    "LoKr, both decomposed": peft.LoKrConfig(
        **HADA | {"r": 1}, decompose_both=True, decompose_factor=8
    ),
    "LoKr, whole matrices": peft.LoKrConfig(**HADA | {"r": 64}),
    "OFT": peft.OFTConfig(**OFT),
    "OFT, eight terms": peft.OFTConfig(**OFT, num_cayley_neumann_terms=8),
    "OFT, two terms": peft.OFTConfig(**OFT, num_cayley_neumann_terms=2),
    "OFT, exact": peft.OFTConfig(**OFT, use_cayley_neumann=False),
    "OFT, constrained": peft.OFTConfig(**OFT, coft=True, eps=0.3),
    "OFT, shared": peft.OFTConfig(**OFT, block_share=True),
    "BOFT": peft.BOFTConfig(**BOFT, boft_block_size=4, boft_n_butterfly_factor=1),
    "BOFT, two stages": peft.BOFTConfig(**BOFT, boft_block_size=4, boft_n_butterfly_factor=2),
    "BOFT, three stages": peft.BOFTConfig(**BOFT, boft_block_size=2, boft_n_butterfly_factor=3),
    "(IA)3": peft.IA3Config(
        **COMMON, feedforward_modules=["square_conv", "square"], init_ia3_weights=False
    ),
}


def adapter(config: Any, folder: Path) -> nn.Module:
    """Saves an adapter with seeded tensors, which float16 can hold, and gives PEFT's model."""
    torch.manual_seed(22)
    wrapped = peft.get_peft_model(layers(), copy.deepcopy(config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                if "magnitude" in name:
                    parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
                parameter.copy_(parameter.half())
    with warnings.catch_warnings():  # PEFT takes a bias for a matrix of an unsharded adapter
        warnings.filterwarnings("ignore", message=r".*invalid shape.*lora_B\.bias")
        wrapped.save_pretrained(folder)
    return wrapped


class BlockDiagonals:
    """What PEFT's CUDA extension computes, without which its BOFT has a single stage."""

    @staticmethod
    def forward(stages: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*blocks) for blocks in stages])]


@pytest.fixture(autouse=True)
def extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.tuners.boft.layer, "_FBD_CUDA", BlockDiagonals())


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case: str, tmp_path: Path) -> None:
    wrapped = adapter(CASES[case], tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    theirs = state(wrapped.merge_and_unload())
    base = layers()
    before = state(base)
    merged = sdconv.merge_lora(base, tmp_path)
    assert set(merged.layers) == set(NAMES)
    assert largest_error(base.state_dict(), theirs) < 2e-6
    assert largest_error(before, theirs) > 0.02
    merged.unmerge()

    # controls: every tensor counts, and so does the config
    for part in {name.partition(".")[2].partition(".")[2].partition(".")[2] for name in tensors}:
        torch.manual_seed(23)
        wrong = {k: v + torch.rand_like(v) if k.endswith(part) else v for k, v in tensors.items()}
        save_file(wrong, file)
        merged = sdconv.merge_lora(base, file)
        assert largest_error(base.state_dict(), theirs) > 1e-3, part
        merged.unmerge()
    save_file(tensors, file)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    other = {
        "alpha": 3,
        "lora_alpha": 3,
        "use_cayley_neumann": not config.get("use_cayley_neumann"),
        "feedforward_modules": [],
    }
    config |= {key: value for key, value in other.items() if key in config}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    sdconv.merge_lora(base, file)
    # BOFT's config has nothing that counts
    assert (largest_error(base.state_dict(), theirs) > 1e-3) == ("BOFT" not in case)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("OFT", {"num_cayley_neumann_terms": 10**12}),
        ("OFT", {"num_cayley_neumann_terms": "many"}),
        ("OFT, constrained", {"eps": [1]}),
        ("LoKr", {"r": 0, "rank_pattern": {"(": 1}}),
        ("LoKr, whole matrices", {"r": 0, "rank_pattern": None}),
        ("LoHa", {"alpha": "much", "alpha_pattern": None}),
        ("(IA)3", {"feedforward_modules": "("}),
        ("(IA)3", {"feedforward_modules": 3}),
        ("(IA)3", {"peft_type": "LOHA"}),
        ("LoHa", {"use_rslora": True, "alpha": 10**400}),
    ],
)
def test_configs_without_sense(case: str, options: dict[str, Any], tmp_path: Path) -> None:
    adapter(CASES[case], tmp_path)
    file = tmp_path / "adapter_config.json"
    base = layers()
    before = state(base)
    sdconv.merge_lora(base, tmp_path).unmerge()  # control
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    with pytest.raises(CheckpointError, match="config"):
        sdconv.merge_lora(base, tmp_path)
    assert_equal(base.state_dict(), before)


def test_the_config_says_on_which_side_a_convolutions_vector_is(tmp_path: Path) -> None:
    adapter(CASES["(IA)3"], tmp_path)
    base = layers()
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"square_conv may be of the layer's inputs"):
        sdconv.merge_lora(base, tmp_path / "adapter_model.safetensors")
