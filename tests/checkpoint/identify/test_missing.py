"""A network without one of its tensors is that network still, and the error names the tensor."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import seeded, unets
from helpers.slow import marked_slow

import sdconv
from sdconv.checkpoint.identify.fit import fit
from sdconv.checkpoint.identify.infer import Identified, identify
from sdconv.checkpoint.save import original_tensors
from sdconv.models.base import Network

Shapes = dict[str, tuple[int, ...]]


def networks() -> dict[str, Network]:
    with torch.device("meta"):
        autoencoders = {
            "VAE": sdconv.AutoencoderKL(seeded.kl((32, 64), 4, True)),
            "FLUX.2": sdconv.AutoencoderKLFlux2(seeded.flux2((32, 64))),
            "tiny": sdconv.AutoencoderTiny(seeded.tiny()),
            "TAEF2": sdconv.AutoencoderTiny(seeded.POOLED),
        }
    # but for LCM, whose one tensor more leaves a whole SD1 behind
    families = ("SD1", "SDXL", "SSD-1B", "x4 upscaler", "SD2 unCLIP", "small SD")
    return autoencoders | {family: unets.on_meta(unets.small(family)) for family in families}


NETWORKS = networks()


def shapes_in(network: Network, layout: str, prefix: str) -> Shapes:
    """Shapes as a file has them."""
    tensors = network.state_dict()
    if layout == "original":
        tensors = original_tensors(tensors, network.config)
    counted = (name for name in tensors if not name.endswith("num_batches_tracked"))
    return {prefix + name: tuple(tensors[name].shape) for name in counted}


def identified(named: Shapes) -> Identified:
    (one,) = identify(named, where="the file")
    return one


def one_of_each_kind(named: Shapes) -> dict[str, str]:
    """By their names without numbers, the first tensor and the last of each kind."""
    kinds = {re.sub("[0-9]+", "#", name): name for name in reversed(named)}
    return kinds | {f"last {re.sub('[0-9]+', '#', name)}": name for name in named}


@pytest.mark.parametrize(
    ("layout", "prefix"),
    [
        ("original", "model.x."),
        pytest.param("original", "", marks=pytest.mark.slow),
        pytest.param("diffusers", "", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "kind",
    marked_slow(NETWORKS, but=NETWORKS.keys() - {"SDXL", "SSD-1B", "x4 upscaler", "small SD"}),
)
def test_a_missing_tensor_is_named(kind: str, layout: str, prefix: str) -> None:
    network = NETWORKS[kind]
    named = shapes_in(network, layout, prefix)
    whole = identified(named)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    fit(whole, named, lambda name: "F32", wanted).check(whole, "the file")  # the control
    for gone in set(one_of_each_kind(named).values()):
        left = {name: shape for name, shape in named.items() if name != gone}
        with pytest.raises(sdconv.WeightsMismatchError, match="the file: ") as caught:
            one = identified(left)
            assert one.config == whole.config  # so that what is wanted is the same
            fit(one, left, lambda name: "F32", wanted).check(one, "the file")
        name = re.escape(gone.removeprefix(prefix))
        assert re.search(rf"(?<!\w){name}(?![\w.])", str(caught.value)), gone


def test_what_the_file_calls_a_missing_tensor() -> None:
    named = shapes_in(NETWORKS["VAE"], "original", "first_stage_model.")
    del named["first_stage_model.decoder.up.0.block.1.conv2.bias"]
    state = {name: torch.empty(shape, device="meta") for name, shape in named.items()}
    with pytest.raises(sdconv.WeightsMismatchError, match=r"vae: 1 missing\n") as caught:
        sdconv.load(state, family="sd1")
    assert (
        "expected: first_stage_model.decoder.up.0.block.1.conv2.bias "
        "(decoder.up_blocks.1.resnets.1.conv2.bias)\n"
    ) in str(caught.value)
