"""An autoencoder refuses invalid inputs with an error: other types, dtypes and devices, and sizes
too small for the normalisation. Inputs that hooks or autocast make valid are accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import seeded
from helpers.numbers import randn
from helpers.versions import needs_driver
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sdconv
from sdconv.config import Config
from sdconv.integrations.peers import peer
from sdconv.models.base import Autoencoder

NARROW = seeded.kl((32, 32), 4, True, layers_per_block=1)
KINDS = {
    "kl": seeded.SMALL_KL,
    "without quant": seeded.kl((32, 64), 4, False, layers_per_block=1),
    "flux2": seeded.SMALL_FLUX2,
    "tiny": seeded.SMALL_TINY,
}
CALLS = [(kind, method) for kind in KINDS for method in ("encode", "decode")]


def valid_input(config: Config, method: str) -> Tensor:
    """An image for ``encode``, latents for ``decode``."""
    channels = config["in_channels"] if method == "encode" else config["latent_channels"]
    return randn(2, channels, 8, 12, seed=1)


def output_of(network: Autoencoder, method: str, x: Any) -> Tensor:
    with torch.no_grad():
        (result,) = getattr(network, method)(x, return_dict=False)
    return getattr(result, "parameters", result)


def error_lines(network: Autoencoder, method: str, x: Any) -> list[str]:
    with pytest.raises(sdconv.InputError) as caught:
        output_of(network, method, x)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{network.config.class_name}: ")
    return lines


@pytest.mark.parametrize(("kind", "method"), CALLS)
def test_invalid_inputs_are_refused(kind: str, method: str) -> None:
    network = seeded.network(KINDS[kind])
    x = valid_input(network.config, method)
    what = "images" if method == "encode" else "latents"
    for value, got in ((None, "None"), ([[0.0]], "builtins.list"), (1.0, "builtins.float")):
        first, expected, got_line = error_lines(network, method, value)
        assert first.endswith(f"{what} must be a tensor")
        assert expected.startswith(f"  expected: a torch.Tensor of shape (B, {x.shape[1]}, H, W)")
        assert got_line == f"  got: {got}"
    if method == "encode":  # an array's channels come last
        *_, got_line, hint = error_lines(network, method, x.numpy())
        assert got_line == f"  got: {tuple(x.shape)}"
        assert "np.moveaxis(array, -3, -1)" in hint
    for dtype in (torch.uint8, torch.int64, torch.bool, torch.complex64):
        first, expected, got_line, _ = error_lines(network, method, x.to(dtype))
        assert first.endswith(f"{what} must be floating-point")
        assert (expected, got_line) == ("  expected: torch.float32", f"  got: {dtype}")
    for dtype in (torch.float16, torch.float64):
        first, expected, got_line, hint = error_lines(network, method, x.to(dtype))
        assert first.endswith(f"{what} must have the dtype of the weights")
        assert (expected, got_line) == ("  expected: torch.float32", f"  got: {dtype}")
        assert ".to(network.dtype)" in hint
    first, expected, got_line, hint = error_lines(network, method, x.to("meta"))
    assert first.endswith(f"{what} must be on the device of the weights")
    assert (expected, got_line) == ("  expected: cpu", "  got: meta")
    assert ".to(network.device)" in hint
    _, expected, got_line = error_lines(network, method, x[:0])
    assert "with B at least 1" in expected and got_line == f"  got: {tuple(x[:0].shape)}"
    assert output_of(network, method, x).isfinite().all()


@pytest.mark.parametrize(("kind", "method"), CALLS)
def test_nothing_is_computed_before_the_error_lines(kind: str, method: str) -> None:
    network = seeded.network(KINDS[kind])
    ran: list[nn.Module] = []
    for module in network.modules():
        module.register_forward_hook(lambda module, *_: ran.append(module))
    error_lines(network, method, valid_input(network.config, method).long())
    assert ran == []


@pytest.mark.parametrize(("kind", "method"), CALLS)
def test_under_autocast_other_float_dtypes_are_accepted(kind: str, method: str) -> None:
    ours, (theirs, _) = (
        seeded.network(KINDS[kind]),
        peer(KINDS[kind], None, seeded.tensors(KINDS[kind]), "diffusers"),
    )
    x = valid_input(ours.config, method)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(output_of(ours, method, x.half()), output_of(theirs, method, x.half()))
        assert "the dtype of the weights" in error_lines(ours, method, x.double())[0]
        assert "floating-point" in error_lines(ours, method, x.long())[0]
    assert "the dtype of the weights" in error_lines(ours, method, x.half())[0]


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_and_decoder_may_differ_in_dtype_and_device(kind: str) -> None:
    network = seeded.network(KINDS[kind])
    network.encoder.to("meta")
    if "quant" not in kind and kind != "tiny":
        network.quant_conv.to("meta")
    network.decoder.double()
    if getattr(network, "post_quant_conv", None) is not None:
        network.post_quant_conv.double()
    assert output_of(network, "encode", valid_input(network.config, "encode").to("meta")).is_meta
    assert (
        output_of(network, "decode", valid_input(network.config, "decode").double()).dtype
        == torch.float64
    )


def test_hooks_may_convert_the_input() -> None:
    network = seeded.network(seeded.SMALL_KL)
    x = valid_input(seeded.SMALL_KL, "encode")
    expected = output_of(network, "encode", x)
    assert "the dtype of the weights" in error_lines(network, "encode", x.double())[0]
    network.encoder.conv_in.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    assert torch.equal(output_of(network, "encode", x.double()), expected)
    # a hook on the encoder does not affect the decoder
    assert (
        "the dtype of the weights"
        in error_lines(network, "decode", valid_input(seeded.SMALL_KL, "decode").double())[0]
    )


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_weights_offloaded_by_accelerate(kind: str) -> None:
    from accelerate import cpu_offload

    network = seeded.network(KINDS[kind])
    given = {method: valid_input(network.config, method) for method in ("encode", "decode")}
    expected = {method: output_of(network, method, x) for method, x in given.items()}
    cpu_offload(network, execution_device=torch.device("cpu"))
    assert network.device == torch.device("meta")
    for method, x in given.items():
        assert torch.equal(output_of(network, method, x), expected[method])


@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.parametrize("kind", ["without quant", "tiny"])
def test_compiled_and_exported_as_one_graph(kind: str, method: str) -> None:
    network = seeded.network(KINDS[kind])
    x = valid_input(network.config, method)
    expected = output_of(network, method, x)

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return output_of(self.network, method, x)

    compiled = torch.compile(Call(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)
    with torch.no_grad():
        exported = torch.export.export(Call(), (x,), strict=False)
        assert torch.equal(exported.module()(x), expected)
    torch.compiler.reset()


@needs_driver
@pytest.mark.parametrize(("kind", "method"), CALLS)
def test_fake_tensors(kind: str, method: str) -> None:
    with FakeTensorMode():
        network = seeded.BUILD[KINDS[kind].class_name](KINDS[kind]).eval()
        x = torch.empty(valid_input(KINDS[kind], method).shape)
        assert output_of(network, method, x).device == torch.device("cpu")
        for parameters in (module._parameters for module in network.modules()):
            for name, old in parameters.items():
                if old is not None:
                    new = torch.empty(old.shape, device="cuda", dtype=torch.float16)
                    parameters[name] = nn.Parameter(new, requires_grad=False)
        right = torch.empty(x.shape, device="cuda", dtype=torch.float16)
        assert output_of(network, method, right).device.type == "cuda"
        lines = error_lines(network, method, x.half())
        assert "the device of the weights" in lines[0] and lines[1] == "  expected: cuda:0"
        assert (
            "the dtype of the weights"
            in error_lines(network, method, torch.empty(x.shape, device="cuda"))[0]
        )


# --- sizes at which a group of the normalisation has one value


@pytest.mark.parametrize(
    "config", [seeded.SMALL_KL, NARROW, seeded.flux2((32, 32))], ids=["wide", "32", "flux2"]
)
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_sizes_too_small_for_the_normalisation(config: Config, method: str) -> None:
    """sdconv refuses exactly the sizes at which torch refuses diffusers' network."""
    ours = seeded.network(config)
    theirs, _ = peer(config, None, seeded.tensors(config), "diffusers")
    least = ours.downscale if method == "encode" else 1
    refused = []
    for batch in (1, 2):
        for rows in range(least, 2 * least + 1):
            for columns in range(least, 2 * least + 1):
                x = valid_input(config, method)[:batch, :, :rows, :columns]
                try:
                    expected = output_of(theirs, method, x)
                except ValueError:
                    refused.append((batch, rows, columns))
                    assert "too small for this network" in error_lines(ours, method, x)[0]
                else:
                    assert torch.equal(output_of(ours, method, x), expected)
    wide = config is seeded.SMALL_KL and method == "decode"
    assert refused[:1] == ([] if wide else [(1, least, least)])


def test_slicing_makes_the_normalised_groups_smaller() -> None:
    network = seeded.network(NARROW)
    x = valid_input(NARROW, "encode")[:, :, :2, :2]
    assert output_of(network, "encode", x).shape == (2, 8, 1, 1)
    network.enable_slicing()
    assert "too small" in error_lines(network, "encode", x)[0]
