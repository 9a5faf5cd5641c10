"""float16 and bfloat16 on a CPU: the fast backend stores them and, but for AMX, computes in
float32."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import seeded, unets
from helpers.fake_cuda import map_tensors
from helpers.slow import first_of
from helpers.versions import fails_on_torch_2_6
from torch import Tensor, nn

import sdconv
from sdconv.fast.cpu.kernels import methods_for
from sdconv.models.blocks import ResnetBlock2D, Upsample2D

LOW = [torch.float16, torch.bfloat16]


def rms_error(a: Tensor, b: Tensor) -> float:
    """The root mean square of ``a - b`` over that of ``b``."""
    a, b = a.double(), b.double()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def in_float64(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_blocks_are_as_near_to_float64_as_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 128, 33, 28).to(dtype)
    resnet = ResnetBlock2D(128, 128, temb_channels=None, groups=8, eps=1e-6)
    for module in (resnet, Upsample2D(128)):
        module.to(dtype).requires_grad_(False)
        exact = in_float64(module)(x.double())
        with sdconv.backend("fast"):
            out = module(x)
        assert out.dtype is dtype
        # the rounding of the result alone
        assert rms_error(out, exact) < torch.finfo(dtype).eps / 2
        # AMX's kernels after upsampling are rounded to bfloat16 when their taps are added
        rounded = module is not resnet and "amx" in methods_for(dtype)
        assert rms_error(out, exact) < (1.5 if rounded else 1.01) * rms_error(module(x), exact)


@fails_on_torch_2_6("in bfloat16 the fast backend is 1.15 times as far as the reference")
@pytest.mark.parametrize("dtype", first_of(LOW), ids=str)
def test_networks_are_no_further_from_float64_than_the_reference(dtype: torch.dtype) -> None:
    vae = seeded.network(seeded.kl((64, 128), 4, True, layers_per_block=1)).to(dtype)
    unet = unets.ours(unets.theirs(unets.smallest("SD1"))).to(dtype)
    fixed = [map_tensors(one, dtype, lambda t, own: t.to(own)) for one in unets.inputs(unet.config)]
    random = torch.Generator().manual_seed(1)
    for network, size in ((vae, (1, 4, 21, 18)), (unet, fixed[0].shape)):
        run = network.decode if network is vae else network
        others = () if network is vae else fixed[1:]
        wide = [map_tensors(one, torch.float64, lambda t, own: t.to(own)) for one in others]
        exact_run = in_float64(network).decode if network is vae else in_float64(network)
        errors = []
        for _ in range(4):  # averaged, since a single input's errors vary by a tenth
            x = torch.randn(size, generator=random).to(dtype)
            with torch.no_grad():
                exact = exact_run(x.double(), *wide).sample
                reference = run(x, *others).sample
                with sdconv.backend("fast"):
                    out = run(x, *others).sample
            assert out.dtype is network.dtype
            # with AMX, layers as small as the U-Net's are left to torch's kernels
            assert not torch.equal(out, reference) or "amx" in methods_for(dtype)
            errors.append((rms_error(out, exact), rms_error(reference, exact)))
        fast, reference = torch.tensor(errors).square().mean(0).sqrt().tolist()
        assert fast < 1.1 * reference


def test_arithmetic_in_half_would_be_noticed() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 128, 33, 28).bfloat16()
    resnet = ResnetBlock2D(128, 128, temb_channels=None, groups=8, eps=1e-6).bfloat16()
    with torch.no_grad():
        exact = in_float64(resnet)(x.double())
        # it rounds once more on the way than the fast backend does
        assert rms_error(resnet(x), exact) > torch.finfo(torch.bfloat16).eps / 4
        assert rms_error(exact.bfloat16(), exact) < torch.finfo(torch.bfloat16).eps / 4
