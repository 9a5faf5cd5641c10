"""What an autoencoder cannot take is refused in words: no tensors, other dtypes and devices, maps
too small for the normalisation; and what torch can do with hooks, autocast and graphs is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sdconv
from sdconv.config import Config
from sdconv.integrations.peers import peer
from sdconv.models.base import Autoencoder

KL = seeded.kl((32, 64), 4, True, layers_per_block=1)
NARROW = seeded.kl((32, 32), 4, True, layers_per_block=1)
KINDS = {
    "kl": KL,
    "without quant": seeded.kl((32, 64), 4, False, layers_per_block=1),
    "flux2": seeded.flux2((32, 64), layers_per_block=1),
    "tiny": seeded.tiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
}
CALLS = [(kind, method) for kind in KINDS for method in ("encode", "decode")]


def good(config: Config, method: str) -> Tensor:
    channels = config["in_channels"] if method == "encode" else config["latent_channels"]
    return torch.randn(2, channels, 8, 12, generator=torch.Generator().manual_seed(1))


def called(network: Autoencoder, method: str, x: Any) -> Tensor:
    with torch.no_grad():
        (result,) = getattr(network, method)(x, return_dict=False)
    return getattr(result, "parameters", result)


def refusal(network: Autoencoder, method: str, x: Any) -> list[str]:
    with pytest.raises(sdconv.InputError) as caught:
        called(network, method, x)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{network.config.class_name}: ")
    return lines


@pytest.mark.parametrize(("kind", "method"), CALLS)
def test_what_is_refused(kind: str, method: str) -> None:
    network = seeded.network(KINDS[kind])
    x = good(network.config, method)
    what = "images" if method == "encode" else "latents"
    for value, got in ((None, "None"), ([[0.0]], "builtins.list"), (1.0, "builtins.float")):
        first, expected, came = refusal(network, method, value)
        assert first.endswith(f"{what} must be a tensor")
        assert expected.startswith(f"  expected: a torch.Tensor of shape (B, {x.shape[1]}, H, W)")
        assert came == f"  got: {got}"
    *_, came, fix = refusal(network, method, x.numpy())
    assert (came, fix) == ("  got: numpy.ndarray", "  hint: torch.from_numpy(array)")
    for dtype in (torch.uint8, torch.int64, torch.bool, torch.complex64):
        first, expected, came, _ = refusal(network, method, x.to(dtype))
        assert first.endswith(f"{what} must be floating-point")
        assert (expected, came) == ("  expected: torch.float32", f"  got: {dtype}")
    for dtype in (torch.float16, torch.float64):
        first, expected, came, fix = refusal(network, method, x.to(dtype))
        assert first.endswith(f"{what} must have the dtype of the weights")
        assert (expected, came) == ("  expected: torch.float32", f"  got: {dtype}")
        assert ".to(network.dtype)" in fix
    first, expected, came, fix = refusal(network, method, x.to("meta"))
    assert first.endswith(f"{what} must be on the device of the weights")
    assert (expected, came) == ("  expected: cpu", "  got: meta")
    assert ".to(network.device)" in fix
    _, expected, came = refusal(network, method, x[:0])
    assert "with B at least 1" in expected and came == f"  got: {tuple(x[:0].shape)}"
    assert called(network, method, x).isfinite().all()


@pytest.mark.parametrize(("kind", "method"), CALLS)
def test_nothing_is_computed_before_the_refusal(kind: str, method: str) -> None:
    network = seeded.network(KINDS[kind])
    ran: list[nn.Module] = []
    for module in network.modules():
        module.register_forward_hook(lambda module, *_: ran.append(module))
    refusal(network, method, good(network.config, method).long())
    assert ran == []


@pytest.mark.parametrize(("kind", "method"), CALLS)
def test_under_autocast_other_floats_are_taken(kind: str, method: str) -> None:
    ours, (theirs, _) = (
        seeded.network(KINDS[kind]),
        peer(KINDS[kind], None, seeded.tensors(KINDS[kind]), "diffusers"),
    )
    x = good(ours.config, method)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(called(ours, method, x.half()), called(theirs, method, x.half()))
        assert "the dtype of the weights" in refusal(ours, method, x.double())[0]
        assert "floating-point" in refusal(ours, method, x.long())[0]
    assert "the dtype of the weights" in refusal(ours, method, x.half())[0]


@pytest.mark.parametrize("kind", KINDS)
def test_halves_may_be_kept_apart(kind: str) -> None:
    """Each half is asked for its own dtype and device."""
    network = seeded.network(KINDS[kind])
    network.encoder.to("meta")
    if "quant" not in kind and kind != "tiny":
        network.quant_conv.to("meta")
    network.decoder.double()
    if getattr(network, "post_quant_conv", None) is not None:
        network.post_quant_conv.double()
    assert called(network, "encode", good(network.config, "encode").to("meta")).is_meta
    assert called(network, "decode", good(network.config, "decode").double()).dtype == torch.float64


def test_hooks_may_bring_it_into_the_right_form() -> None:
    network = seeded.network(KL)
    x = good(KL, "encode")
    expected = called(network, "encode", x)
    assert "the dtype of the weights" in refusal(network, "encode", x.double())[0]
    network.encoder.conv_in.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    assert torch.equal(called(network, "encode", x.double()), expected)
    # those of the other half change nothing here
    assert "the dtype of the weights" in refusal(network, "decode", good(KL, "decode").double())[0]


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_weights_that_accelerate_keeps_elsewhere(kind: str) -> None:
    from accelerate import cpu_offload

    network = seeded.network(KINDS[kind])
    given = {method: good(network.config, method) for method in ("encode", "decode")}
    expected = {method: called(network, method, x) for method, x in given.items()}
    cpu_offload(network, execution_device=torch.device("cpu"))
    assert network.device == torch.device("meta")
    for method, x in given.items():
        assert torch.equal(called(network, method, x), expected[method])


@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.parametrize("kind", ["without quant", "tiny"])
def test_graphs_take_it_whole(kind: str, method: str) -> None:
    network = seeded.network(KINDS[kind])
    x = good(network.config, method)
    expected = called(network, method, x)

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return called(self.network, method, x)

    compiled = torch.compile(Call(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)
    with torch.no_grad():
        exported = torch.export.export(Call(), (x,), strict=False)
        assert torch.equal(exported.module()(x), expected)
    torch.compiler.reset()


@pytest.mark.parametrize(("kind", "method"), CALLS)
def test_fake_tensors(kind: str, method: str) -> None:
    with FakeTensorMode():
        network = seeded.BUILD[KINDS[kind].class_name](KINDS[kind]).eval()
        x = torch.empty(good(KINDS[kind], method).shape)
        assert called(network, method, x).device == torch.device("cpu")
        for parameters in (module._parameters for module in network.modules()):
            for name, old in parameters.items():
                if old is not None:
                    new = torch.empty(old.shape, device="cuda", dtype=torch.float16)
                    parameters[name] = nn.Parameter(new, requires_grad=False)
        right = torch.empty(x.shape, device="cuda", dtype=torch.float16)
        assert called(network, method, right).device.type == "cuda"
        lines = refusal(network, method, x.half())
        assert "the device of the weights" in lines[0] and lines[1] == "  expected: cuda:0"
        assert (
            "the dtype of the weights"
            in refusal(network, method, torch.empty(x.shape, device="cuda"))[0]
        )


# --- maps on which normalisation finds one value in a group


@pytest.mark.parametrize(
    "config", [KL, NARROW, seeded.flux2((32, 32))], ids=["wide", "32", "flux2"]
)
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_maps_too_small_for_the_normalisation(config: Config, method: str) -> None:
    """Refused where torch refuses them in diffusers' network, and nowhere else."""
    ours = seeded.network(config)
    theirs, _ = peer(config, None, seeded.tensors(config), "diffusers")
    least = ours.downscale if method == "encode" else 1
    refused = []
    for batch in (1, 2):
        for rows in range(least, 2 * least + 1):
            for columns in range(least, 2 * least + 1):
                x = good(config, method)[:batch, :, :rows, :columns]
                try:
                    expected = called(theirs, method, x)
                except ValueError:
                    refused.append((batch, rows, columns))
                    assert "too small for this network" in refusal(ours, method, x)[0]
                else:
                    assert torch.equal(called(ours, method, x), expected)
    wide = config is KL and method == "decode"
    assert refused[:1] == ([] if wide else [(1, least, least)])


def test_picture_by_picture_there_is_less_to_normalise() -> None:
    network = seeded.network(NARROW)
    x = good(NARROW, "encode")[:, :, :2, :2]
    assert called(network, "encode", x).shape == (2, 8, 1, 1)
    network.enable_slicing()
    assert "too small" in refusal(network, "encode", x)[0]
