"""The U-Net against diffusers' and against the original implementation."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import unets
from helpers.differences import first_failure
from helpers.fake_cuda import (
    HALF_DTYPES,
    WithoutDriver,
    assert_on_cuda,
    fake_cuda,
    map_tensors,
    record_outputs,
    to_fake_cuda,
)
from helpers.numbers import error
from helpers.paths import DATA
from helpers.slow import first_of, marked_slow
from helpers.versions import fails_on_torch_2_6, needs_driver
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sdconv
from sdconv.analysis.parity.compare import ModuleDifference, compare
from sdconv.checkpoint.keys.unet import keys_of_original
from sdconv.config import UNet2DConditionConfig
from sdconv.models.unet import UNet2DConditionModel, UNet2DConditionOutput
from sdconv.models.unet_blocks import NoTransformer, TransformerSlot

SMALL = "one level"

Pair = tuple[UNet2DConditionModel, Any]


def pair(family: str, config: Callable[[str], Any] = unets.small) -> Pair:
    peer = unets.theirs(config(family))
    return unets.ours(peer), peer


def rows(ours: nn.Module, peer: nn.Module, *arguments: Any) -> tuple[ModuleDifference, ...]:
    return compare(ours, peer, {"forward": arguments})


# the others have the same kinds of modules
DIFFERENT = ["SD1", "SDXL", "KOALA 700M", "uneven layers", SMALL]


@pytest.mark.parametrize("family", marked_slow(unets.FAMILIES, but=DIFFERENT))
def test_every_module_is_equal_bit_for_bit(family: str) -> None:
    ours, peer = pair(family)
    assert list(ours.state_dict()) == list(peer.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in peer.named_parameters()]
    found = rows(ours, peer, *unets.inputs(peer.config))
    assert first_failure(found) is None
    compared = {row.name for row in found}
    for name, _ in peer.named_modules():
        if re.fullmatch(r"(down|up)_blocks\.\d+|.*(resnets|attentions|samplers)\.\d+", name):
            assert name in compared
    assert {"time_proj", "time_embedding", "conv_norm_out", "forward"} <= compared


@pytest.mark.parametrize("size", first_of([(5, 9), (1, 1), (13, 6)]))
@pytest.mark.parametrize("family", ["SD1", "KOALA 700M"])
def test_odd_sizes(family: str, size: tuple[int, int]) -> None:
    ours, peer = pair(family)
    found = rows(ours, peer, *unets.inputs(peer.config, size=size))
    assert first_failure(found) is None


def test_timestep_in_every_form() -> None:
    ours, peer = pair(SMALL)
    sample, _, prompt_embeds, *_ = unets.inputs(peer.config)
    with torch.no_grad():
        for timestep in (7, 0.25, torch.tensor(7), torch.tensor([3.5]), torch.tensor([1, 900])):
            expected = peer(sample, timestep, prompt_embeds).sample
            assert torch.equal(ours(sample, timestep, prompt_embeds).sample, expected)
            assert torch.equal(
                ours(sample, timestep, prompt_embeds, return_dict=False)[0], expected
            )


def residuals(config: Any, batch: int = 2, size: tuple[int, int] = (8, 12)) -> list[Tensor]:
    """A ControlNet's output: one tensor for each skip connection."""
    channels = config["block_out_channels"]
    shapes, (height, width) = [(channels[0], *size)], size
    for level, count in enumerate(channels):
        shapes += [(count, height, width)] * config["layers_per_block"]
        if level < len(channels) - 1:
            height, width = math.ceil(height / 2), math.ceil(width / 2)
            shapes.append((count, height, width))
    return [torch.randn(batch, *shape) for shape in shapes]


@pytest.mark.parametrize("family", first_of(["SD1", "SDXL", "tiny SD"]))
def test_controlnet_residuals(family: str) -> None:
    ours, peer = pair(family)
    torch.manual_seed(2)
    down = residuals(peer.config)
    found = rows(ours, peer, *unets.inputs(peer.config), down, torch.randn_like(down[-1]))
    assert first_failure(found) is None


@pytest.mark.parametrize("family", ["LCM"])
@pytest.mark.parametrize("shape", first_of([(256,), (1, 256), (2, 256)]))
def test_guidance_of_one_image_is_for_all(family: str, shape: tuple[int, ...]) -> None:
    ours, peer = pair(family)
    arguments = list(unets.inputs(peer.config))
    arguments[4] = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(ours(*arguments).sample, peer(*arguments).sample)


@pytest.mark.parametrize("extra", [0, 1, 2], ids=["levels", "mid block", "light"])
@pytest.mark.parametrize("family", first_of(["SDXL", "SD1", "tiny SD"]))
def test_t2i_adapter_residuals(family: str, extra: int) -> None:
    ours, peer = pair(family)
    levels = len(peer.config.block_out_channels)
    torch.manual_seed(2)
    by_level: list[Tensor] = []
    for level, block in enumerate(peer.down_blocks):
        # added before the downsampling in blocks with transformers, after it in others
        after = not hasattr(block, "attentions") and level < levels - 1
        factor = 2 ** (level + after)
        shape = (math.ceil(8 / factor), math.ceil(12 / factor))
        by_level.append(torch.randn(2, peer.config.block_out_channels[level], *shape))
    if extra:  # a light adapter's last residual has half the size, and is ignored
        shape = tuple(side // extra for side in by_level[-1].shape[2:])
        by_level.append(torch.randn(2, peer.config.block_out_channels[-1], *shape))
    arguments = unets.inputs(peer.config)
    with torch.no_grad():
        given = {"down_intrablock_additional_residuals": tuple(by_level)}
        got = ours(*arguments, **given).sample
        given = {"down_intrablock_additional_residuals": list(by_level)}
        assert torch.equal(got, peer(*arguments, **given).sample)
        assert not torch.equal(got, ours(*arguments).sample)


def test_masks_reach_the_attention() -> None:
    ours, peer = pair(SMALL)
    sample, timestep, prompt_embeds, *_ = unets.inputs(peer.config)
    masks = {
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0]] * 2),
        "attention_mask": (torch.arange(8 * 12) % 3 > 0).int().repeat(2, 1),
    }
    with torch.no_grad():
        got = ours(sample, timestep, prompt_embeds, **masks).sample
        assert torch.equal(got, peer(sample, timestep, prompt_embeds, **masks).sample)
        assert not torch.equal(got, ours(sample, timestep, prompt_embeds).sample)


@pytest.mark.parametrize("family", first_of(["KOALA 700M", "SD1", "SDXL", "x4 upscaler"]))
def test_freeu(family: str) -> None:
    ours, peer = pair(family)
    arguments = unets.inputs(peer.config)
    with torch.no_grad():
        plain = ours(*arguments).sample
        for network in (ours, peer):
            network.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        changed = ours(*arguments).sample
        assert torch.equal(changed, peer(*arguments).sample)
        assert not torch.equal(changed, plain)
        ours.disable_freeu()
        assert torch.equal(ours(*arguments).sample, plain)


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [
        ("uneven layers", True),
        ("SD1", False),
        pytest.param("SDXL", False, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_equal(family: str, checkpointing: bool) -> None:
    gradients = []
    for network in pair(family):
        if checkpointing and isinstance(network, UNet2DConditionModel):
            network.enable_gradient_checkpointing()
            assert network.is_gradient_checkpointing
        sample, timestep, prompt_embeds, labels, guidance, *_, added = unets.inputs(network.config)
        sample.requires_grad_(True)
        prompt_embeds.requires_grad_(True)
        out = network(
            sample, timestep, prompt_embeds, labels, guidance, added_cond_kwargs=added
        ).sample
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        given = {"sample": sample.grad, "prompt_embeds": prompt_embeds.grad}
        gradients.append(given | {n: p.grad for n, p in network.named_parameters()})
    mine, reference = gradients
    assert mine.keys() == reference.keys()
    assert [n for n in mine if not torch.equal(mine[n], reference[n])] == []


def oracle() -> tuple[UNet2DConditionModel, dict[str, Tensor], dict[str, str]]:
    """The small SD1-style U-Net that the original implementation was run with, with weights of a
    seed; that run's inputs and outputs; and for each numbered block of the original the module that
    has its output."""
    header = json.loads((DATA / "open-unet-sd1.json").read_text())
    random = torch.Generator().manual_seed(21)
    state = {}
    for name in sorted(header):
        noise = torch.randn(header[name], generator=random)
        if noise.ndim > 1:
            noise = noise / math.sqrt(math.prod(noise.shape[1:]))
        else:
            noise = 0.1 * noise + name.endswith("weight")
        state[f"model.diffusion_model.{name}"] = noise.half()
    keys = keys_of_original(header)
    last: dict[str, tuple[int, str]] = {}
    for name in header:
        if match := re.match(r"((?:in|out)put_blocks\.\d+|middle_block)\.(\d)", name):
            module = re.match(r"mid_block|conv_in|\w+\.\d+\.\w+\.\d+", keys.canonical(name) or "")
            assert module
            last[match[1]] = max(last.get(match[1], (-1, "")), (int(match[2]), module[0]))
    network = sdconv.load(state, dtype=torch.float32, family="sd1")
    assert isinstance(network, UNet2DConditionModel)
    features = {f"feature.{block}": module for block, (_, module) in last.items()}
    return network, load_file(DATA / "open-unet-sd1-io.safetensors"), features


def test_equals_the_original_implementation() -> None:
    network, io, features = oracle()
    got: dict[str, Tensor] = {}

    def keep(feature: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            got[feature] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    for feature, module in features.items():
        network.get_submodule(module).register_forward_hook(keep(feature))
    with torch.no_grad():
        got["out"] = network(io["sample"], io["timestep"], io["context"]).sample
    expected = {k: v for k, v in io.items() if k not in ("sample", "timestep", "context")}
    assert got.keys() == expected.keys()
    assert max(error(got[name], expected[name]) for name in expected) < 5e-5


@pytest.mark.shared
def test_the_seed_gives_the_weights_of_the_original(shared_dir: Path) -> None:
    network, io, _ = oracle()
    file = shared_dir / "oracle" / "open-unet-sd1-ldm.safetensors"
    stored = sdconv.load(file, dtype=torch.float32, family="sd1").state_dict()
    state = network.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in state)
    kept = load_file(shared_dir / "oracle" / "open-unet-sd1-io.safetensors")
    assert all(torch.equal(io[name], kept[name]) for name in kept)


def swap_skips(network: UNet2DConditionModel) -> None:
    block = network.up_blocks[0]
    original = block.forward
    block.forward = lambda x, temb, skips, *rest: original(x, temb, skips[::-1], *rest)  # type: ignore[method-assign]


def drop_time_projection(network: UNet2DConditionModel) -> None:
    network.mid_block.resnets[0].time_emb_proj = None  # type: ignore[union-attr]


def sines_first(network: UNet2DConditionModel) -> None:
    original = network.time_proj
    network.time_proj = nn.Module()  # type: ignore[assignment]
    network.time_proj.forward = lambda steps: original(steps).roll(original.width // 2, dims=1)  # type: ignore[method-assign]


def other_eps(network: UNet2DConditionModel) -> None:
    network.down_blocks[1].resnets[0].norm1.eps = 1e-6  # type: ignore[union-attr,index]


@pytest.mark.parametrize(
    ("fault", "first"),
    [
        (swap_skips, "up_blocks.0.resnets.0.norm1"),
        (drop_time_projection, "mid_block.resnets.0.norm2"),
        (sines_first, "time_proj"),
        (other_eps, "down_blocks.1.resnets.0.norm1"),
    ],
)
def test_a_fault_shows_at_its_module(
    fault: Callable[[UNet2DConditionModel], None], first: str
) -> None:
    ours, peer = pair("SD1", unets.smallest)
    arguments = unets.inputs(peer.config)
    assert first_failure(rows(ours, peer, *arguments)) is None
    fault(ours)
    assert first_failure(rows(ours, peer, *arguments)) == first
    with torch.no_grad():
        assert not torch.equal(ours(*arguments).sample, peer(*arguments).sample)


def test_another_number_of_heads_shows_in_the_attention() -> None:
    config = unets.smallest("SD1")
    peer = unets.theirs(config)
    wrong = unets.ours(unets.theirs({**config, "attention_head_dim": 4}))
    first = first_failure(rows(wrong, peer, *unets.inputs(peer.config)))
    # the projections are equal, the attention is not
    assert first == "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"


@pytest.mark.parametrize("fault", [swap_skips, drop_time_projection, sines_first])
def test_a_fault_shows_against_the_original(fault: Callable[[UNet2DConditionModel], None]) -> None:
    network, io, _ = oracle()
    fault(network)
    with torch.no_grad():
        out = network(io["sample"], io["timestep"], io["context"]).sample
    assert error(out, io["out"]) > 5e-5


@needs_driver
@pytest.mark.parametrize("family", first_of(unets.FAMILIES))
def test_dry_run_on_fake_cuda(family: str) -> None:
    network = unets.on_meta(unets.smallest(family))
    for dtype in HALF_DTYPES:
        outputs = record_outputs(network)
        with FakeTensorMode(), WithoutDriver(), torch.no_grad():
            to_fake_cuda(network, dtype)
            given = unets.inputs(network.config, size=(9, 12))
            sample, _, *rest = (map_tensors(one, dtype, fake_cuda) for one in given)
            out = network(sample, 981, *rest).sample
        assert out.shape == (2, network.config.out_channels, 9, 12)
        sinusoids = {name: outputs.pop(name) for name in [*outputs] if name.endswith("time_proj")}
        assert_on_cuda({**outputs, "forward": [out]}, dtype)
        # sines and cosines are computed in float32
        assert_on_cuda(sinusoids, torch.float32)
        called = {
            name
            for name, module in network.named_modules()
            if name and not isinstance(module, nn.ModuleList)
        }
        assert set(outputs) | set(sinusoids) == called


def test_dry_run_notices_weights_on_fake_cuda_and_prompt_embeddings_on_the_cpu() -> None:
    ours, peer = pair(SMALL)
    sample, _, prompt_embeds, *_ = unets.inputs(peer.config)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        to_fake_cuda(ours, torch.float16)
        with pytest.raises(Exception, match="device"):
            ours(fake_cuda(sample, torch.float16), 981, prompt_embeds.half())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", unets.FAMILIES)
def test_parity_on_cuda(family: str, dtype: torch.dtype) -> None:
    ours, peer = (network.to("cuda", dtype) for network in pair(family))
    given = unets.inputs(peer.config)
    arguments = [
        map_tensors(one, dtype, lambda tensor, kind: tensor.to("cuda", kind)) for one in given
    ]
    with torch.no_grad():
        got, expected = (network(*arguments).sample for network in (ours, peer))
    # the same kernels on the same data: at most one rounding apart
    assert error(got, expected) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("family", first_of(["SD2 unCLIP", "LCM", "SSD-1B", "x4 upscaler"]))
def test_save_and_load(family: str, layout: str, tmp_path: Path) -> None:
    ours, _ = pair(family)
    (file,) = sdconv.save(ours, tmp_path / "unet.safetensors", layout=layout)
    again = sdconv.load(file)
    assert again.config == ours.config
    state = again.state_dict()
    assert list(state) == list(ours.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


def test_folders_written_by_diffusers_and_for_diffusers(tmp_path: Path) -> None:
    ours, peer = pair("SSD-1B")
    peer.save_pretrained(tmp_path / "theirs")
    loaded = sdconv.load(tmp_path / "theirs")
    assert loaded.config == ours.config
    loaded.save_pretrained(tmp_path / "ours")
    again = type(peer).from_pretrained(tmp_path / "ours")
    arguments = unets.inputs(peer.config)
    with torch.no_grad():
        expected = peer(*arguments).sample
        assert torch.equal(loaded(*arguments).sample, expected)
        assert torch.equal(again(*arguments).sample, expected)


def config_of(family: str) -> UNet2DConditionConfig:
    return unets.on_meta(unets.small(family)).config


def test_without_transformers() -> None:
    network = UNet2DConditionModel(config_of("SD1"), transformers=None).eval()
    assert not [name for name in network.state_dict() if "attentions" in name]
    # needs no prompt embeddings
    with torch.no_grad():
        assert network(torch.zeros(1, 4, 8, 8), 5, None).sample.shape == (1, 4, 8, 8)


def test_custom_modules_in_the_slots() -> None:
    slots: list[TransformerSlot] = []

    class Mean(nn.Module):
        def __init__(self, slot: TransformerSlot) -> None:
            super().__init__()
            self.read = nn.Linear(slot.cross_attention_dim, slot.channels)

        def forward(
            self, x: Tensor, *, encoder_hidden_states: Tensor, return_dict: bool
        ) -> tuple[Tensor]:
            assert not return_dict
            return (x + self.read(encoder_hidden_states.mean(1))[:, :, None, None],)

    def make(slot: TransformerSlot) -> nn.Module | None:
        slots.append(slot)
        return Mean(slot) if slot.name.startswith("mid_block") else None

    network = UNet2DConditionModel(config_of("SDXL"), transformers=make)
    peer = unets.theirs(unets.small("SDXL"))
    by_name = {slot.name: slot for slot in slots}
    assert set(by_name) == {
        name for name, _ in peer.named_modules() if re.fullmatch(r".*attentions\.\d+", name)
    }
    for name, slot in by_name.items():
        module = peer.get_submodule(name)
        assert (slot.channels, slot.heads, slot.depth) == (
            module.in_channels,
            module.num_attention_heads,
            len(module.transformer_blocks),
        )
    assert isinstance(network.get_submodule("down_blocks.1.attentions.0"), NoTransformer)
    arguments = unets.inputs(peer.config)
    with torch.no_grad():
        network.eval()
        before = network(*arguments).sample
        assert not torch.equal(before, network(*arguments[:2], -arguments[2], *arguments[3:])[0])


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    ours, peer = pair(SMALL, unets.smallest)
    arguments = unets.inputs(peer.config)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(*arguments).sample, peer(*arguments).sample)


@pytest.mark.slow
def test_one_graph_serves_any_size() -> None:
    config = unets.smallest("no transformers")
    peer = unets.theirs(config)
    compiled = torch.compile(unets.ours(peer), fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for batch, size in ((2, (8, 12)), (3, (16, 10))):
            arguments = unets.inputs(peer.config, batch, size)
            assert torch.equal(compiled(*arguments).sample, peer(*arguments).sample)


@fails_on_torch_2_6("cannot export a type's union, nor a zip of different lengths")
def test_exported_with_its_output_class(tmp_path: Path) -> None:
    peer = unets.theirs(unets.smallest("no transformers"))
    arguments = unets.inputs(peer.config)
    with torch.no_grad():
        program = torch.export.export(unets.ours(peer), arguments)
        torch.export.save(program, tmp_path / "unet.pt2")
        got = torch.export.load(tmp_path / "unet.pt2").module()(*arguments)
        assert isinstance(got, UNet2DConditionOutput)
        assert torch.equal(got.sample, peer(*arguments).sample)
        assert not torch.equal(got.sample, peer(-arguments[0], *arguments[1:]).sample)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["SDXL", "x4 upscaler"])
def test_exports(family: str) -> None:
    ours, peer = pair(family)
    arguments = unets.inputs(peer.config)
    with torch.no_grad():
        exported = torch.export.export(ours, arguments, {"return_dict": False}, strict=False)
        (got,) = exported.module()(*arguments, return_dict=False)
        assert torch.equal(got, peer(*arguments).sample)
