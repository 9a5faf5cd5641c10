"""The blocks' implementation for CUDA, on the CPU and on a real GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers import seeded, unets
from helpers.fake_cuda import AUTOENCODERS, HALF_DTYPES, map_tensors
from helpers.numbers import error
from torch import Tensor, nn

import sdconv
from sdconv.backends import set_backend
from sdconv.fast import blocks
from sdconv.fast.cuda import blocks as cuda
from sdconv.fast.cuda import choices, group_norm
from sdconv.models.blocks import ResnetBlock2D, Upsample2D


def parts(in_channels: int = 12, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    resnet = ResnetBlock2D(in_channels, 8, temb_channels=5, groups=4, eps=1e-5)
    return nn.ModuleDict({"resnet": resnet, "upsample": Upsample2D(8)}).to(dtype)


def through(parts: Any, x: Tensor, temb: Tensor) -> Tensor:
    return parts["upsample"](parts["resnet"](x, temb))  # type: ignore[no-any-return]


def drawn(dtype: torch.dtype = torch.float32, channels: int = 12) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(2, channels, 7, 6, generator=random) + 2
    return x.to(dtype), torch.randn(2, 5, generator=random).to(dtype)


# --- on the CPU: the same operations, with torch's instead of Triton's kernel


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU are computed like those on CUDA."""
    monkeypatch.setitem(blocks.ARITHMETIC, "cpu", cuda)


# relative to the largest value, against float64
WITHIN = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("dtype", list(WITHIN), ids=str)
@pytest.mark.parametrize("channels", [12, 8])
def test_blocks(channels: int, dtype: torch.dtype) -> None:
    low, given = parts(channels, dtype), drawn(dtype, channels)
    with torch.no_grad():
        with sdconv.backend("fast"):
            out = through(low, *given)
        exact = through(low.double(), *(tensor.double() for tensor in given))
    assert out.dtype is dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert error(out, exact) < WITHIN[dtype]


@pytest.mark.usefixtures("as_on_cuda")
def test_networks() -> None:
    vae = seeded.network(AUTOENCODERS["sd1"])
    latents = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(2))
    unet = unets.ours(unets.theirs(unets.smallest("SDXL")))
    given = unets.inputs(unet.config, size=(8, 12))
    with torch.no_grad():
        for run in (lambda: vae.decode(latents).sample, lambda: unet(*given).sample):
            expected = run()
            with sdconv.backend("fast"):
                out = run()
            assert not torch.equal(out, expected)
            assert error(out, expected) < 1e-5


@pytest.mark.usefixtures("as_on_cuda")
def test_statistics_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder takes the statistics of each feature map as it is written; of those that are never
    written, it takes them apart."""
    vae = seeded.network(AUTOENCODERS["sd1"])
    latents = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(2))
    right, known = group_norm.group_norm, []

    def record(*args: Any) -> Tensor:
        known.append(args[3] is not None)
        return right(*args)

    def decode() -> Tensor:
        known.clear()
        with torch.no_grad(), sdconv.backend("fast"):
            return vae.decode(latents).sample  # type: ignore[no-any-return]

    monkeypatch.setattr(group_norm, "group_norm", record)
    expected = decode()
    resnets = sum(isinstance(module, ResnetBlock2D) for module in vae.decoder.modules())
    # the first norms, that of attention, and the last one; the ResNet blocks' second norms
    assert Counter(known) == {True: resnets + 2, False: resnets}

    # a block with a hook is called: it takes its own statistics, and passes none on
    seen: list[Tensor] = []
    block = vae.decoder.up_blocks[0].resnets[1]
    handle = block.register_forward_hook(lambda _, args, out: seen.append(out))
    hooked = decode()
    handle.remove()
    assert len(seen) == 1 and error(hooked, expected) < 1e-5
    assert Counter(known) == {True: resnets, False: resnets + 2}

    # a block whose own backend is the reference runs on it
    set_backend(vae, "fast")
    set_backend(block, "reference")
    known.clear()
    with torch.no_grad():
        mixed = vae.decode(latents).sample
    assert error(mixed, expected) < 1e-5
    assert Counter(known) == {True: resnets, False: resnets}
    set_backend(vae, "reference")

    # the fault: the statistics of another feature map
    finish = cuda._finish
    monkeypatch.setattr(
        cuda,
        "_finish",
        lambda x, bias, groups, **more: (
            finish(x, bias, groups, **more)[0],
            finish(x.clone(), None, groups)[1],
        ),
    )
    assert error(decode(), expected) > 1e-3


@pytest.mark.usefixtures("as_on_cuda")
def test_hooks_that_edit_a_feature_map_are_respected() -> None:
    vae = seeded.network(AUTOENCODERS["sd1"])
    latents = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(2))
    for name in ("conv_in", "mid_block", "mid_block.attentions.0", "up_blocks.1.upsamplers.0"):
        module = vae.decoder.get_submodule(name)
        handle = module.register_forward_hook(lambda _, args, out: out.mul_(1.5).add_(1.0))
        with torch.no_grad():
            expected = vae.decode(latents).sample
            with sdconv.backend("fast"):
                out = vae.decode(latents).sample
        handle.remove()
        assert error(out, expected) < 1e-5
        with torch.no_grad():
            assert error(vae.decode(latents).sample, expected) > 1e-3


@pytest.mark.usefixtures("as_on_cuda")
def test_every_choice_computes_the_same() -> None:
    module, given = parts(), drawn()
    with torch.no_grad():
        expected = through(module, *given)
        for operation in ("bias", "upsample"):
            for variant in choices.VARIANTS[operation]:
                with sdconv.backend("fast"), choices.using({operation: variant}):
                    assert error(through(module, *given), expected) < 2e-6


@pytest.mark.usefixtures("as_on_cuda")
def test_gradients_and_gradients_of_gradients() -> None:
    module = parts()
    x, temb = (tensor.requires_grad_() for tensor in drawn())
    inputs = [x, temb, *module.parameters()]

    def both(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
        loss = through(module, *inputs[:2]).square().sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(one.square().sum() for one in first), inputs)
        return [*first, *second]

    with sdconv.backend("fast"):
        found = both(module, inputs)
    double = module.double()
    exact = both(
        double, [*(t.detach().double().requires_grad_() for t in inputs[:2]), *double.parameters()]
    )
    for one, other in zip(found, exact, strict=True):
        assert error(one, other) < 2e-5


@pytest.mark.usefixtures("as_on_cuda")
def test_compiled_and_exported() -> None:
    module = parts().requires_grad_(False)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = module

        def forward(self, x: Tensor, temb: Tensor) -> Tensor:
            return through(self.parts, x, temb)

    given = drawn()
    expected = through(module, *given)
    with sdconv.backend("fast"):
        compiled = torch.compile(Whole(), fullgraph=True, backend="aot_eager")
        assert error(compiled(*given), expected) < 2e-6
        program = torch.export.export(Whole(), given)
    del compiled
    torch._dynamo.reset()
    ran = Counter(str(node.target) for node in program.graph.nodes)
    # the two norms; residual and bias; bias of the upsampling's convolution
    assert ran["sdconv.group_norm_nhwc.default"] == 2
    assert ran["sdconv.epilogue.default"] == 2
    assert error(program.module()(*given), expected) < 2e-6


@pytest.mark.slow
@pytest.mark.usefixtures("as_on_cuda")
def test_a_compiled_decoder_is_one_graph() -> None:
    vae = seeded.network(AUTOENCODERS["sd1"])
    sizes = [(5, 6), (6, 4)]
    compiled = torch.compile(vae.decoder, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for size in sizes:
            z = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(2))
            expected = vae.decoder(z)
            with sdconv.backend("fast"):
                assert error(compiled(z), expected) < 1e-5
    torch._dynamo.reset()


# --- on a real GPU

# moves a tensor to a network's device and to a dtype
Move = Callable[[Tensor, torch.dtype], Tensor]


def assert_close_to_the_reference(
    network: nn.Module, dtype: torch.dtype, run: Callable[[Any, Move], Tensor]
) -> None:
    """Runs a network on CUDA on both backends: the error of fast against float64 is at most three
    times that of the reference in the same dtype."""
    wide = deepcopy(network).double()
    with torch.no_grad():
        exact = run(wide, lambda tensor, own: tensor.to(own).double() if own is dtype else tensor)
        network.cuda()
        reference = run(network, lambda tensor, own: tensor.to("cuda", own))
        with sdconv.backend("fast"):
            out = run(network, lambda tensor, own: tensor.to("cuda", own))
    assert (out.device.type, out.dtype) == ("cuda", dtype)
    assert not torch.equal(out, reference)
    allowed = 3 * max(error(reference.cpu(), exact), torch.finfo(dtype).eps)
    assert error(out.cpu(), exact) <= allowed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("kind", ["sd1", "sd3", "flux2"])
def test_autoencoders_on_cuda(kind: str, dtype: torch.dtype) -> None:
    network = seeded.network(AUTOENCODERS[kind]).to(dtype)
    random = torch.Generator().manual_seed(3)
    latents = torch.randn(2, network.config["latent_channels"], 9, 13, generator=random).to(dtype)
    assert_close_to_the_reference(
        network, dtype, lambda network, to: network.decode(to(latents, dtype)).sample
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("family", ["SD1", "SD2", "SDXL"])
def test_unets_on_cuda(family: str, dtype: torch.dtype) -> None:
    network = unets.ours(unets.theirs(unets.smallest(family))).to(dtype)
    given = unets.inputs(network.config, size=(16, 24))

    def run(network: Any, to: Move) -> Tensor:
        return network(*(map_tensors(one, dtype, to) for one in given)).sample  # type: ignore[no-any-return]

    assert_close_to_the_reference(network, dtype, run)
