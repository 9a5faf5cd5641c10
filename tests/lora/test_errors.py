"""A file that is not a LoRA, or a LoRA for another network, is an error that changes no weight."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded, unets
from helpers.loras import assert_equal, dotted, kohya, matrices, original_names, state
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor, nn

import sdconv
from sdconv.errors import CheckpointError, InputError, SdconvError, WeightsMismatchError

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
DOWN, UP, MID = (f"{LAYER}.lora_{part}.weight" for part in ("A", "B", "mid"))
GOOD = {DOWN: torch.ones(2, 24), UP: torch.ones(96, 2)}


def bad(**given: Tensor | None) -> dict[str, Tensor]:
    """``GOOD`` with other matrices (``down``, ``up``, ``mid``, ``alpha``) or keys; None drops."""
    names = {"down": DOWN, "up": UP, "mid": MID, "alpha": f"{LAYER}.alpha"}
    tensors = {**GOOD, **{names.get(key, key): tensor for key, tensor in given.items()}}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


ONE = torch.ones(())
SOME = torch.ones(2, 2)
BAD: Mapping[str, tuple[Any, type[SdconvError], str]] = {
    "unknown layer": (bad(**{"unet.conv_on.lora_A.weight": SOME}), WeightsMismatchError, "conv_on"),
    "stray key": (bad(**{"unet.conv_in.weight": SOME}), CheckpointError, r"unet\.conv_in\.w"),
    "no up": (bad(up=None), CheckpointError, "attn2.to_k lacks a matrix"),
    "only an alpha": (bad(up=None, down=None, alpha=ONE), CheckpointError, "only alpha"),
    "another prompt width": (
        bad(down=torch.ones(2, 2048)),
        WeightsMismatchError,
        "2048 wide, as in SDXL",
    ),
    "another width": (bad(up=torch.ones(95, 2)), WeightsMismatchError, r"\(95, 2\)"),
    "two ranks": (bad(up=torch.ones(96, 3)), WeightsMismatchError, r"\(96, 3\)"),
    "norm": (
        bad(**{f"unet.conv_norm_out.lora_{k}.weight": SOME for k in "AB"}),
        WeightsMismatchError,
        r"conv_norm_out\.weight: \(32,\)",
    ),
    "kernel": (bad(down=torch.ones(2, 24, 3, 3)), WeightsMismatchError, "24, 3, 3"),
    "no rank": (bad(down=torch.ones(0, 24), up=torch.ones(96, 0)), CheckpointError, "no rank"),
    "scalar matrix": (bad(down=ONE), CheckpointError, "no rank"),
    "scalar mid": (bad(mid=ONE), WeightsMismatchError, "do not fit"),
    "NaN": (bad(down=torch.full((2, 24), torch.nan)), CheckpointError, "not finite real"),
    "int8": (bad(down=torch.ones(2, 24, dtype=torch.int8)), CheckpointError, "is quantised"),
    "infinity": (bad(alpha=ONE * torch.inf), CheckpointError, "alpha of .* not finite real"),
    "two alphas": (bad(alpha=torch.ones(2)), CheckpointError, "not a single number"),
    "only text encoders": (
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": ONE},
        CheckpointError,
        "no LoRA for this",
    ),
    "LoHa": (
        bad(**{"lora_unet_conv_in.hada_w1_a": SOME}),
        CheckpointError,
        "(?s)LoHa of conv_in lacks a matrix.*only hada_w1_a",
    ),
    "trained norms": (
        bad(**{"lora_unet_conv_norm_out.w_norm": SOME}),
        WeightsMismatchError,
        r"conv_norm_out\.weight: w_norm \(2, 2\)",
    ),
    "DoRA alone": (
        bad(**{"lora_unet_conv_in.dora_scale": SOME}),
        CheckpointError,
        "(?s)conv_in lacks a matrix.*only dora_scale",
    ),
    "DoRA": (
        bad(**{f"{LAYER}.dora_scale": torch.ones(95, 1)}),
        WeightsMismatchError,
        r"dora_scale \(95, 1\)",
    ),
    "two magnitudes": (
        bad(**{f"{LAYER}.{k}": torch.ones(96, 1) for k in ("dora_scale", "lora_magnitude_vector")}),
        CheckpointError,
        "two magnitudes",
    ),
    "two updates": (
        bad(**{f"{LAYER}.diff": torch.ones(96, 24)}),
        CheckpointError,
        "two updates of its weight",
    ),
    "stray tensors": (
        {f"{LAYER}.diff": torch.ones(96, 24), f"{LAYER}.alpha": ONE, f"{LAYER}.scalar": ONE},
        CheckpointError,
        "has alpha and scalar, which mean nothing",
    ),
    "no bias": (
        bad(**{f"{LAYER}.diff_b": torch.ones(96)}),
        WeightsMismatchError,
        r"attn2\.to_k\.bias: which it lacks",
    ),
    "LoRA's bias alone": ({f"{LAYER}.lora_B.bias": torch.ones(96)}, CheckpointError, "no rank"),
    "an alpha of 0": (bad(alpha=ONE * 0), CheckpointError, "alpha of 0"),
    "OFT without a config": (
        {f"{LAYER}.oft_R.weight": torch.ones(6, 6)},
        CheckpointError,
        "cannot be read without its config",
    ),
    "(IA)3 of a square convolution": (
        {"unet.mid_block.resnets.0.conv1.ia3_l": torch.ones(1, 96, 1, 1)},
        CheckpointError,
        "layer's inputs or outputs",
    ),
    "an absent file": (Path("absent.safetensors"), CheckpointError, "does not exist"),
    "no path": (None, InputError, "not weights"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_changes_no_weight(case: str, network: Any) -> None:
    lora, kind, words = BAD[case]
    sdconv.merge_lora(network, GOOD).unmerge()  # control
    before = state(network)
    with pytest.raises(kind, match=words):
        sdconv.merge_lora(network, lora)
    assert_equal(network.state_dict(), before)
    with pytest.raises(InputError, match="no LoRA to unmerge"):
        sdconv.unmerge_lora(network)


PROMPT_WIDTHS = {"SD1": 768, "SD2": 1024, "SDXL": 2048}


@pytest.mark.parametrize(("own", "other"), [*itertools.permutations(PROMPT_WIDTHS, 2)])
def test_a_lora_of_another_family(own: str, other: str) -> None:
    network, foreign = (
        unets.theirs(unets.smallest(family) | {"cross_attention_dim": PROMPT_WIDTHS[family]})
        for family in (own, other)
    )
    before = state(network)
    tensors = kohya(matrices(foreign), original_names(foreign))
    with pytest.raises(WeightsMismatchError) as caught:
        sdconv.merge_lora(network, tensors)
    for words in (
        f"LoRA is for a network with prompt embeddings {PROMPT_WIDTHS[other]} wide, as in {other}",
        f"UNet2DConditionModel with prompt embeddings {PROMPT_WIDTHS[own]} wide, as in {own}",
    ):
        assert words in str(caught.value)
    assert_equal(network.state_dict(), before)


def test_a_lora_of_a_vae(network: Any) -> None:
    vae = seeded.network(seeded.kl((32, 64), 4, True, layers_per_block=1))
    before = state(network)
    with pytest.raises(WeightsMismatchError, match="layers that this network does not have"):
        sdconv.merge_lora(network, dotted(matrices(vae), "vae.{}.lora_[A|B].weight", False))
    assert_equal(network.state_dict(), before)


def test_truncated_and_corrupted_files(tmp_path: Path) -> None:
    layer = nn.Linear(4, 5)
    before, path = layer.weight.detach().clone(), tmp_path / "lora.safetensors"
    tensors = {"a.lora_A.weight": torch.ones(2, 4), "a.lora_B.weight": torch.ones(5, 2)}
    content = save(tensors | {"a.alpha": torch.tensor(1.0)})
    model = nn.ModuleDict({"a": layer})
    outcomes = set()

    @settings(max_examples=300)
    @given(
        keep=st.integers(0, len(content)),
        corrupted=st.dictionaries(
            st.integers(0, len(content) - 1), st.integers(0, 255), max_size=3
        ),
    )
    @example(keep=len(content), corrupted={})
    @example(keep=len(content) - 1, corrupted={})
    def merge(keep: int, corrupted: dict[int, int]) -> None:
        path.write_bytes(bytes(corrupted.get(i, byte) for i, byte in enumerate(content[:keep])))
        try:
            merged = sdconv.merge_lora(model, path)
        except SdconvError as error:
            outcomes.add(type(error))
        else:
            outcomes.add(None)
            assert torch.isfinite(layer.weight).all()
            merged.unmerge()
        assert torch.equal(layer.weight, before)

    merge()
    assert {None, CheckpointError} <= outcomes


def test_overflow_of_the_dtype() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}).half()
    before = state(model)
    ones = {f"{k}.lora_{part}.weight": torch.ones(4, 4) for k in "ab" for part in "AB"}
    tensors = {**ones, "b.lora_A.weight": torch.full((4, 4), 3e3)}
    with pytest.raises(InputError, match="float16 can hold"):
        sdconv.merge_lora(model, tensors, 6.0)
    assert_equal(model.state_dict(), before)
    sdconv.merge_lora(model, tensors, 5.0).unmerge()  # control
    assert_equal(model.state_dict(), before)


@pytest.mark.parametrize(
    "metadata",
    [
        "[]",
        "no JSON",
        '{"unet.lora_alpha": "much"}',
        '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 1}}',
        '{"unet.lora_alpha": 1, "unet.alpha_pattern": [1]}',
        '{"unet.use_dora": true}',
        '{"unet.lora_alpha": 1' + 400 * "0" + "}",
        100_000 * "[",
    ],
)
def test_invalid_metadata(metadata: str, network: Any, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(GOOD, path, metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(CheckpointError):
        sdconv.merge_lora(network, path)


def test_invalid_arguments(network: Any) -> None:
    for model, scale, words in (
        ("unet", 1.0, "not a network"),
        (network, float("nan"), "not a finite number"),
        (network, "1", "not a finite number"),
        (network, 10**400, "not a finite number"),
        (unets.on_meta(unets.smallest("SD1")), 1.0, "meta device"),
        (nn.Module(), 1.0, "layers that this network does not have"),
    ):
        with pytest.raises(SdconvError, match=words):
            sdconv.merge_lora(model, GOOD, scale)
    with pytest.raises(InputError, match="no LoRA to unmerge"):
        sdconv.unmerge_lora("unet")
    merged = sdconv.merge_lora(network, GOOD, True)  # any real number
    for other in ("merged", object()):
        with pytest.raises(InputError, match="no LoRA to unmerge"):
            sdconv.unmerge_lora(network, other)
    merged.unmerge()
