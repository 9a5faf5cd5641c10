"""LoRA merged and taken out: PEFT's numbers, every spelling, the same bits again afterwards."""

from __future__ import annotations

import copy
import gc
import json
import re
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import peft
import pipelines
import pytest
import seeded
import torch
import unets
from safetensors.torch import save_file
from torch import Tensor, nn

import sdconv
from sdconv.checkpoint.keys_unet import keys_of_canonical
from sdconv.checkpoint.save import original_tensors
from sdconv.errors import CheckpointError, InputError, SdconvError, WeightsMismatchError
from sdconv.lora.names import spellings

# a layer's matrices: down, up, alpha
Matrices = dict[str, tuple[Tensor, Tensor, float]]


def layers(model: nn.Module) -> dict[str, Tensor]:
    """Weights of linear layers and convolutions by their names."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def matrices(
    model: nn.Module, seed: int = 0, only: str = "", alpha: float | None = None
) -> Matrices:
    """A LoRA of every layer, of ranks 2 to 4 and alphas 1 and 2, as large as the weights."""
    random = torch.Generator().manual_seed(seed)
    made: Matrices = {}
    for number, (name, weight) in enumerate(layers(model).items()):
        if re.search(only, name):
            rank = 2 + number % 3
            down = torch.randn(rank, *weight.shape[1:], generator=random)
            up = torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2), generator=random)
            made[name] = (down / down[0].numel() ** 0.5, up, alpha or 1.0 + number % 2)
    return made


def kohya(made: Matrices, rename: Callable[[str], str] = str) -> dict[str, Tensor]:
    """With kohya's names."""
    tensors: dict[str, Tensor] = {}
    for name, (down, up, alpha) in made.items():
        layer = "lora_unet_" + rename(name).replace(".", "_")
        tensors[f"{layer}.lora_down.weight"] = down
        tensors[f"{layer}.lora_up.weight"] = up
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    return tensors


def dotted(made: Matrices, form: str, alphas: bool = True) -> dict[str, Tensor]:
    """With names of a form in which {} stands for the layer and [] for one of two words."""
    words = re.search(r"\[(\w+)\|(\w+)\]", form)
    assert words
    tensors: dict[str, Tensor] = {}
    for name, (down, up, alpha) in made.items():
        for word, matrix in zip(words.groups(), (down, up), strict=True):
            tensors[form.replace(words[0], word).replace("{}", name)] = matrix
        if alphas:
            tensors[f"unet.{name}.alpha"] = torch.tensor(alpha)
    return tensors


def of_original(model: nn.Module) -> Callable[[str], str]:
    """diffusers' name of a layer -> the original layout's."""
    keys = keys_of_canonical(model.state_dict().keys())
    return lambda name: str(keys.original(f"{name}.weight")).removesuffix(".weight")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest max|a-b| / max|b| of any tensor."""
    assert set(ours) == set(theirs)
    return max(float((ours[k] - v).abs().max() / v.abs().max()) for k, v in theirs.items())


def fused(kind: str, tensors: dict[str, Tensor], scale: float, **given: Any) -> dict[str, Tensor]:
    """The U-Net's weights after diffusers and PEFT have loaded a LoRA and fused it."""
    pipe = pipelines.pipeline(kind)
    pipe.load_lora_weights(dict(tensors), **given)
    pipe.fuse_lora(lora_scale=scale, components=["unet"])
    pipe.unload_lora_weights()
    return state(pipe.unet)


CASES: Mapping[str, tuple[str, Callable[[nn.Module, Matrices], dict[str, Tensor]]]] = {
    "kohya": ("text", lambda model, made: kohya(made)),
    "kohya, the original's names": ("xl", lambda model, made: kohya(made, of_original(model))),
    "PEFT": ("text", lambda model, made: dotted(made, "unet.{}.lora_[A|B].weight", False)),
    "diffusers": ("text", lambda model, made: dotted(made, "unet.{}.lora.[down|up].weight", False)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case: str) -> None:
    kind, spelt = CASES[case]
    network = unets.ours(pipelines.KINDS[kind].parts()["unet"])
    before = state(network)
    # one alpha for all: of several, diffusers loses those of the attentions in kohya's names
    tensors = spelt(network, matrices(network, alpha=1.5))
    theirs = fused(kind, tensors, 0.7)
    merged = sdconv.merge_lora(network, tensors, scale=0.7)
    assert set(merged.layers) == set(layers(network))
    assert merged.skipped == ()
    assert error(network.state_dict(), theirs) < 1e-6
    assert error(before, theirs) > 0.1
    if "kohya" in case:  # the control: another alpha is seen
        merged.unmerge()
        tensors |= {k: v + 0.01 for k, v in tensors.items() if k.endswith("alpha")}
        sdconv.merge_lora(network, tensors, scale=0.7)
        assert error(network.state_dict(), theirs) > 1e-4


@pytest.fixture(scope="module")
def peer() -> Any:
    return unets.theirs(unets.smallest("SD1"))


@pytest.fixture(scope="module")
def built(peer: Any) -> Any:
    return unets.ours(peer)


@pytest.fixture
def network(built: Any) -> Any:
    return copy.deepcopy(built)


FORMS = (
    "unet.{}.lora_[A|B].weight",
    "base_model.model.unet.{}.lora_[A|B].weight",
    "base_model.model.{}.lora_[A|B].default.weight",
    "unet.{}.lora.[down|up].weight",
    "unet.{}.lora_linear_layer.[down|up].weight",
    "{}.lora_[down|up].weight",
    "diffusion_model.{}.lora_[down|up].weight",
)


@pytest.mark.parametrize("form", FORMS)
def test_every_spelling(form: str, network: Any) -> None:
    made = matrices(network)
    sdconv.merge_lora(network, kohya(made))
    expected = state(network)
    sdconv.unmerge_lora(network)
    names = of_original(network) if form.startswith("diffusion_model") else str
    spelt = dotted({names(k): v for k, v in made.items()}, form)
    merged = sdconv.merge_lora(network, spelt)
    assert set(merged.layers) == set(layers(network))
    assert_equal(network.state_dict(), expected)


def test_attention_processors(network: Any) -> None:
    made = matrices(network, only=r"\.to_(q|k|v|out\.0)$")
    sdconv.merge_lora(network, kohya(made))
    expected = state(network)
    sdconv.unmerge_lora(network)
    old = {}
    for name, tensor in dotted(made, "unet.{}_lora.[down|up].weight").items():
        name = name.replace("to_out.0", "to_out").replace(".alpha", "_lora.alpha")
        old[re.sub(r"\.(to_\w+)\.", r".processor.\1.", name)] = tensor
    assert (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight"
        in old
    )
    sdconv.merge_lora(network, old)
    assert_equal(network.state_dict(), expected)


@pytest.mark.shared
@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl-base"])
def test_every_layer_of_the_full_networks_has_kohyas_names(family: str, shared_dir: Path) -> None:
    header = json.loads((shared_dir / "headers" / f"{family}-ldm.json").read_text())
    originals = {
        name.removeprefix("model.diffusion_model.").removesuffix(".weight")
        for name, (shape, _) in header.items()
        if name.startswith("model.diffusion_model.") and len(shape) > 1
    }
    config = sdconv.infer({name: shape for name, (shape, _) in header.items()})["unet"]
    with torch.device("meta"):
        network = diffusers.UNet2DConditionModel.from_config(config.to_json())
    own = layers(network)
    table = spellings([name for name, _ in network.named_modules()])
    assert {table[name.replace(".", "_")] for name in originals} == set(own)
    assert {table[name.replace(".", "_")] for name in own} == set(own)


def test_kernels_in_the_middle() -> None:
    # LoCon's third matrix: a 1x1 convolution, one with the kernel, and a 1x1 convolution again
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1))
    parts = [nn.Conv2d(6, 3, 1), nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 1)]
    x, scale, alpha = torch.randn(2, 6, 9, 7), 0.4, 1.5
    with torch.no_grad():
        for part in parts:
            part.bias.zero_()
        added = nn.Sequential(*parts)(x) * (scale * alpha / 3)
        before = model(x)
        names = ("lora_down.weight", "lora_mid.weight", "lora_up.weight")
        tensors = {f"lora_unet_0.{n}": p.weight.data for n, p in zip(names, parts, strict=True)}
        tensors["lora_unet_0.alpha"] = torch.tensor(alpha)
        sdconv.merge_lora(model, tensors, scale)
        assert torch.allclose(model(x), before + added, atol=1e-6)
        assert not torch.allclose(model(x), before, atol=1e-2)


@pytest.mark.parametrize(
    ("kernel", "given", "up"),
    [
        (3, {"padding": 1, "stride": 2}, (8, 3, 1, 1)),
        (3, {"padding": 1}, (8, 3)),
        (1, {}, (8, 3, 1, 1)),
    ],
)
def test_convolutions_one_after_another(
    kernel: int, given: dict[str, int], up: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    layer, down = (nn.Conv2d(6, channels, kernel, **given) for channels in (8, 3))
    model, x, after = nn.ModuleDict({"a": layer}), torch.randn(2, 6, 9, 7), torch.randn(8, 3)
    with torch.no_grad():
        before = layer(x)
        low = nn.functional.conv2d(x, down.weight, **given)
        added = nn.functional.conv2d(low, after[..., None, None])
        tensors = {"a.lora_A.weight": down.weight.data, "a.lora_B.weight": after.view(up)}
        sdconv.merge_lora(model, tensors)
        assert torch.allclose(layer(x), before + added, atol=1e-5)


def test_a_linear_layers_matrices_on_a_1x1_convolution_and_the_other_way() -> None:
    torch.manual_seed(2)
    a, b = torch.randn(3, 6), torch.randn(8, 3)
    for layer, extra in ((nn.Conv2d(6, 8, 1), ()), (nn.Linear(6, 8), (1, 1))):
        model = nn.ModuleDict({"a": layer})
        before = layer.weight.detach().clone()
        tensors = {"a.lora_A.weight": a.view(3, 6, *extra), "a.lora_B.weight": b.view(8, 3, *extra)}
        sdconv.merge_lora(model, tensors)
        assert torch.allclose(layer.weight.flatten(1), before.flatten(1) + b @ a, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_added_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    model = nn.ModuleDict({"a": nn.Linear(64, 48)}).to(dtype)
    down, up = torch.randn(4, 64).half(), torch.randn(48, 4).half()
    before = model["a"].weight.detach().clone()
    sdconv.merge_lora(model, {"a.lora_A.weight": down, "a.lora_B.weight": up}, 1 / 3)
    wide = before.double() + (up.double() @ down.double()) / 3
    off = (model["a"].weight.double() - wide).abs().max() / wide.abs().max()
    # half a unit in the last place, and what the arithmetic adds to it
    assert off < torch.finfo(dtype).eps / 2 + (2e-15 if dtype == torch.float64 else 3e-7)
    assert model["a"].weight.dtype == dtype


def test_several_come_out_in_any_order(network: Any) -> None:
    network.half()
    before = state(network)
    first = kohya(matrices(network, 1))
    second = kohya(matrices(network, 2, only="down_blocks"))
    sdconv.merge_lora(network, second, 0.5)
    only_second = state(network)
    sdconv.unmerge_lora(network)
    assert_equal(network.state_dict(), before)

    one = sdconv.merge_lora(network, first)
    two = sdconv.merge_lora(network, second, 0.5)
    both = state(network)
    one.unmerge()
    assert_equal(network.state_dict(), only_second)
    three = sdconv.merge_lora(network, first)
    assert error(network.state_dict(), both) < 1e-3
    sdconv.unmerge_lora(network, two)
    three.unmerge()
    assert_equal(network.state_dict(), before)
    for again in (one.unmerge, lambda: sdconv.unmerge_lora(network)):
        with pytest.raises(InputError, match="no LoRA to take out"):
            again()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_mapped_from_a_file(dtype: torch.dtype, network: Any, tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    sdconv.save(network.to(dtype), path)
    content = path.read_bytes()
    mapped = sdconv.load(path)
    places = {name: weight.data_ptr() for name, weight in layers(mapped).items()}
    merged = sdconv.merge_lora(mapped, kohya(matrices(mapped)))
    assert all(weight.data_ptr() != places[name] for name, weight in layers(mapped).items())
    assert path.read_bytes() == content
    merged.unmerge()
    assert {name: weight.data_ptr() for name, weight in layers(mapped).items()} == places
    assert_equal(mapped.state_dict(), network.state_dict())


def test_a_network_that_changes_dtype_meanwhile(network: Any) -> None:
    expected = {name: tensor.half() for name, tensor in state(network).items()}
    merged = sdconv.merge_lora(network, kohya(matrices(network)))
    network.half()
    merged.unmerge()
    assert_equal(network.state_dict(), expected)


def test_parameters_stay_the_same_objects(network: Any) -> None:
    before = list(network.parameters())
    merged = sdconv.merge_lora(network, kohya(matrices(network)))
    assert all(a is b for a, b in zip(before, network.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in before)
    network(*unets.inputs(network.config)).sample.sum().backward()
    assert all(weight.grad is not None for weight in layers(network).values())
    merged.unmerge()


def test_the_network_can_be_let_go() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    sdconv.merge_lora(
        model, {"a.lora_A.weight": torch.ones(1, 4), "a.lora_B.weight": torch.ones(4, 1)}
    )
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_on_diffusers_network_wrapped_by_peft_and_patched() -> None:
    pipe = pipelines.pipeline("text")
    before = state(pipe.unet)
    tensors = kohya(matrices(pipe.unet, alpha=1.0))
    expected = fused("text", tensors, 1.0)
    sdconv.apply_patch(pipe)
    other = matrices(pipe.unet, 7, only="attn|conv1", alpha=1.0)
    pipe.load_lora_weights(kohya(other), adapter_name="other")
    merged = sdconv.merge_lora(pipe.unet, tensors)
    pipe.unload_lora_weights()
    sdconv.remove_patch(pipe)
    assert error(pipe.unet.state_dict(), expected) < 1e-6
    merged.unmerge()
    assert_equal(pipe.unet.state_dict(), before)


def test_on_a_compiled_network() -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(4, 5))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(2, 4)
    down, up = torch.randn(2, 4), torch.randn(5, 2)
    with torch.no_grad():
        before = compiled(x)
        merged = sdconv.merge_lora(compiled, {"0.lora_A.weight": down, "0.lora_B.weight": up})
        assert torch.allclose(compiled(x), before + x @ down.T @ up.T, atol=1e-5)
        merged.unmerge()
        assert torch.equal(compiled(x), before)


def test_a_vae_in_either_layout(tmp_path: Path) -> None:
    config = seeded.kl((32, 64), 4, True, layers_per_block=1)
    vae = seeded.network(config)
    before = state(vae)
    made = matrices(vae)
    blank = {f"{name}.weight": weight for name, weight in layers(vae).items()}
    renamed = dict(zip(made, original_tensors(blank, config), strict=True))
    sdconv.merge_lora(vae, dotted(made, "vae.{}.lora_[A|B].weight", False))
    expected = state(vae)
    assert error(expected, before) > 0.1
    sdconv.unmerge_lora(vae)
    spelt = {
        f"lora_vae_{renamed[name].removesuffix('.weight').replace('.', '_')}.{part}": matrix
        for name, matrices_ in made.items()
        for part, matrix in zip(("lora_down.weight", "lora_up.weight"), matrices_[:2], strict=True)
    }
    assert "lora_vae_decoder_mid_attn_1_q.lora_down.weight" in spelt
    save_file(spelt, tmp_path / "lora.safetensors")
    merged = sdconv.merge_lora(vae, tmp_path / "lora.safetensors")
    assert_equal(vae.state_dict(), expected)
    merged.unmerge()
    assert_equal(vae.state_dict(), before)


TEXT_KEYS = (
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight",
    "base_model.model.text_encoder.encoder.layers.0.mlp.fc1.lora_B.weight",
)


def test_text_encoders_are_named_as_skipped(network: Any) -> None:
    made = kohya(matrices(network, only="mid_block"))
    merged = sdconv.merge_lora(network, made | dict.fromkeys(TEXT_KEYS, torch.ones(2, 2)))
    assert merged.skipped == TEXT_KEYS
    assert len(merged.layers) == len(made) / 3


def test_a_layer_named_twice(network: Any) -> None:
    # some files hold a layer by the names of both layouts
    made = matrices(network, only="mid_block")
    tensors = kohya(made) | kohya(made, of_original(network))
    merged = sdconv.merge_lora(network, tensors)
    assert len(merged.layers) == len(made)
    assert len(merged.skipped) == 3 * len(made)
    expected = state(network)
    merged.unmerge()
    sdconv.merge_lora(network, kohya(made))
    assert_equal(network.state_dict(), expected)
    repeated = next(k for k in reversed(tensors) if k.endswith("up.weight"))
    tensors[repeated] = tensors[repeated] + 1
    with pytest.raises(CheckpointError, match=re.escape(repeated)):
        sdconv.merge_lora(network, tensors)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_pefts_own_folder(rank_stabilised: bool, peer: Any, network: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={"conv1": 2},
        alpha_pattern={r"down_blocks.*to_k": 3},
        use_rslora=rank_stabilised,
        target_modules=["to_k", "to_q", "conv1", "proj_in"],
        init_lora_weights=False,
    )
    model = unets.theirs({k: v for k, v in peer.config.items() if not k.startswith("_")})
    torch.manual_seed(4)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path)
    theirs = wrapped.merge_and_unload().state_dict()
    sdconv.merge_lora(network, tmp_path)
    assert error(network.state_dict(), theirs) < 1e-6
    # the control: without the config, alpha is the rank
    sdconv.unmerge_lora(network)
    sdconv.merge_lora(network, tmp_path / "adapter_model.safetensors")
    assert error(network.state_dict(), theirs) > 1e-2


def test_alphas_in_the_metadata_that_diffusers_writes(network: Any, tmp_path: Path) -> None:
    pipe = pipelines.pipeline("text")
    config = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=["to_q", "conv2"], init_lora_weights=False
    )
    torch.manual_seed(5)
    pipe.unet.add_adapter(config)
    own = peft.get_peft_model_state_dict(pipe.unet)
    facts = pipe.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, unet_lora_layers=own, unet_lora_adapter_metadata=facts)
    fresh = pipelines.pipeline("text")
    network = unets.ours(fresh.unet)
    fresh.load_lora_weights(tmp_path)
    fresh.fuse_lora(components=["unet"])
    fresh.unload_lora_weights()
    sdconv.merge_lora(network, tmp_path / "pytorch_lora_weights.safetensors")
    assert error(network.state_dict(), fresh.unet.state_dict()) < 1e-6


LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
DOWN, UP, MID = (f"{LAYER}.lora_{part}.weight" for part in ("A", "B", "mid"))
GOOD = {DOWN: torch.ones(2, 24), UP: torch.ones(96, 2)}


def bad(**given: Tensor | None) -> dict[str, Tensor]:
    """What fits, with other matrices (``down``, ``up``, ``mid``, ``alpha``) or keys."""
    names = {"down": DOWN, "up": UP, "mid": MID, "alpha": f"{LAYER}.alpha"}
    tensors = {**GOOD, **{names.get(key, key): tensor for key, tensor in given.items()}}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


ONE = torch.ones(())
SOME = torch.ones(2, 2)
BAD: Mapping[str, tuple[Any, type[SdconvError], str]] = {
    "no layer": (bad(**{"unet.conv_on.lora_A.weight": SOME}), WeightsMismatchError, "conv_on"),
    "a stray key": (bad(**{"unet.conv_in.weight": SOME}), CheckpointError, r"unet\.conv_in\.w"),
    "no up": (bad(up=None), CheckpointError, "attn2.to_k is not whole"),
    "an alpha alone": (bad(up=None, down=None, alpha=ONE), CheckpointError, "only alpha"),
    "another text": (bad(down=torch.ones(2, 2048)), WeightsMismatchError, "2048 wide, as in SDXL"),
    "another width": (bad(up=torch.ones(95, 2)), WeightsMismatchError, r"\(95, 2\)"),
    "two ranks": (bad(up=torch.ones(96, 3)), WeightsMismatchError, r"\(96, 3\)"),
    "a norm": (
        bad(**{f"unet.conv_norm_out.lora_{k}.weight": SOME for k in "AB"}),
        WeightsMismatchError,
        r"conv_norm_out: \(32,\)",
    ),
    "a kernel": (bad(down=torch.ones(2, 24, 3, 3)), WeightsMismatchError, "24, 3, 3"),
    "no rank": (bad(down=torch.ones(0, 24), up=torch.ones(96, 0)), CheckpointError, "no rank"),
    "no axes": (bad(down=ONE), CheckpointError, "no rank"),
    "a middle without axes": (bad(mid=ONE), WeightsMismatchError, "do not fit"),
    "NaN": (bad(down=torch.full((2, 24), torch.nan)), CheckpointError, "not made of finite"),
    "infinity": (bad(alpha=ONE * torch.inf), CheckpointError, "alpha of .* not made of finite"),
    "two alphas": (bad(alpha=torch.ones(2)), CheckpointError, "no number"),
    "only text encoders": ({TEXT_KEYS[0]: SOME}, CheckpointError, "no LoRA for this"),
    "LoHa": (bad(**{"lora_unet_conv_in.hada_w1_a": SOME}), CheckpointError, "LoHa"),
    "DoRA": (bad(**{"lora_unet_conv_in.dora_scale": SOME}), CheckpointError, "DoRA"),
    "an absent file": (Path("absent.safetensors"), CheckpointError, "does not exist"),
    "no path": (None, InputError, "no weights"),
}


@pytest.mark.parametrize("case", BAD)
def test_nothing_is_merged_of_a_bad_file(case: str, network: Any) -> None:
    lora, kind, words = BAD[case]
    whole = sdconv.merge_lora(network, GOOD)  # the control: this much fits
    whole.unmerge()
    before = state(network)
    with pytest.raises(kind, match=words):
        sdconv.merge_lora(network, lora)
    assert_equal(network.state_dict(), before)
    with pytest.raises(InputError, match="no LoRA to take out"):
        sdconv.unmerge_lora(network)


def test_a_lora_of_another_family(network: Any) -> None:
    xl = unets.theirs(unets.smallest("SDXL") | {"cross_attention_dim": 2048})
    before = state(network)
    tensors = kohya(matrices(xl), of_original(xl))
    with pytest.raises(WeightsMismatchError, match="layers that this network has not") as caught:
        sdconv.merge_lora(network, tensors)
    assert "is for one that reads text 2048 wide, as in SDXL" in str(caught.value)
    assert "that reads text 24 wide" in str(caught.value)
    assert_equal(network.state_dict(), before)


@pytest.mark.parametrize(
    "said",
    [
        "[]",
        "no JSON",
        '{"unet.lora_alpha": "much"}',
        '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 1}}',
        '{"unet.lora_alpha": 1, "unet.alpha_pattern": [1]}',
        '{"unet.use_dora": true}',
    ],
)
def test_damaged_metadata(said: str, network: Any, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(GOOD, path, metadata={"lora_adapter_metadata": said})
    with pytest.raises(CheckpointError):
        sdconv.merge_lora(network, path)


def test_arguments_of_no_use(network: Any) -> None:
    for model, scale, words in (
        ("unet", 1.0, "not a network"),
        (network, float("nan"), "not a scale"),
        (network, "1", "not a scale"),
        (unets.blank(unets.smallest("SD1")), 1.0, "meta device"),
        (nn.Module(), 1.0, "layers that this network has not"),
    ):
        with pytest.raises(SdconvError, match=words):
            sdconv.merge_lora(model, GOOD, scale)
    with pytest.raises(InputError, match="no LoRA to take out"):
        sdconv.unmerge_lora("unet")
