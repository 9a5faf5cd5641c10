"""Options of a capture: which calls, what is kept of each feature map, in how much memory."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from helpers import unets
from helpers.capturing import UNET, at, hooks_on, image, one, run, unet, vae
from torch import Tensor, nn

import sdconv


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        (None, (0, 1, 2, 3)),
        (2, (2,)),
        ([3, 0], (0, 3)),
        (slice(1, None), (1, 2, 3)),
        (slice(None, 3, 2), (0, 2)),
        (range(1, 3), (1, 2)),
        (np.arange(0, 4, 3), (0, 3)),
        (torch.tensor([1, 2]), (1, 2)),
        (np.int64(1), (1,)),
        (lambda call: call.timestep < 500, (2, 3)),
    ],
)
def test_steps(steps: Any, kept: tuple[int, ...]) -> None:
    with torch.no_grad(), sdconv.capture(unet(), "conv_in", steps=steps) as maps:
        for step in (999, 600, 300, 0):
            unet()(*at(step))
    assert maps.series("conv_in").calls == kept


@pytest.mark.parametrize(
    "steps",
    [-1, [], ["a"], 1.5, slice(-2, None), slice(0, 4, -1), "all", [True], torch.tensor([True])],
)
def test_invalid_steps_are_refused(steps: Any) -> None:
    with (
        pytest.raises(sdconv.InputError, match="steps"),
        sdconv.capture(vae(), "encoder", steps=steps),
    ):
        pass
    assert hooks_on(vae()) == 0


def test_channels_region_dtype_and_device() -> None:
    name = "decoder.up_blocks.0.resnets.0"
    whole = one(run(vae(), name), name)
    assert whole.shape == (2, 64, 8, 12)
    cut = one(run(vae(), name, channels=[5, 2], region=(0.5, 0, 1, 0.3)), name)
    assert torch.equal(cut, whole[:, [5, 2], 4:, :4])
    assert torch.equal(one(run(vae(), name, channels=slice(60, None)), name), whole[:, 60:])
    for numbers in (np.array([5, 2]), torch.tensor([5, 2])):
        assert torch.equal(one(run(vae(), name, channels=numbers), name), whole[:, [5, 2]])
    half = one(run(vae(), name, dtype=torch.float16, device="cpu"), name)
    assert torch.equal(half, whole.half())


def test_reductions() -> None:
    name = "decoder.up_blocks.0.resnets.0"
    x = one(run(vae(), name), name)
    assert torch.equal(one(run(vae(), name, reduce="mean"), name), x.mean((2, 3)))
    assert torch.equal(one(run(vae(), name, reduce="max"), name), x.amax((2, 3)))
    std = one(run(vae(), name, reduce="std"), name)
    torch.testing.assert_close(std, x.flatten(2).var(-1, correction=0).sqrt())
    pooled = one(run(vae(), name, reduce="channel_max"), name)
    assert torch.equal(pooled[:, 0], x.max(1).values)
    own = one(run(vae(), name, reduce=lambda y: y[:1] * 2), name)
    assert torch.equal(own, x[:1] * 2)


def test_principal_components() -> None:
    name = "decoder.up_blocks.0.resnets.0"
    x = one(run(vae(), name), name)
    found = one(run(vae(), name, reduce="pca:3"), name)
    assert found.shape == (2, 3, 8, 12)
    rows = x.movedim(1, -1).reshape(-1, 64)
    _, sizes, axes = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    flat = found.movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(flat.norm(dim=0), sizes[:3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        flat.abs(), ((rows - rows.mean(0)) @ axes[:3].mT).abs(), rtol=1e-2, atol=1e-2
    )
    # components beyond the number of channels are zero
    few = one(run(vae(), name, channels=[0, 1], reduce=sdconv.features.pca(3)), name)
    assert few.shape[1] == 3
    assert not few[:, 2].any()


def test_pooling_over_a_grid() -> None:
    names = ["decoder.up_blocks.0.resnets.0", "encoder.conv_in"]  # 8x12 and 16x24
    maps, pooled = run(vae(), names), run(vae(), names, reduce="pool:4")
    for name in names:
        x = one(maps, name)
        b, c, rows, columns = x.shape
        blocks = x.view(b, c, 4, rows // 4, 4, columns // 4)
        torch.testing.assert_close(one(pooled, name), blocks.mean((3, 5)))
    # no more rows than the feature map has
    assert one(run(vae(), names[0], reduce="pool:10"), names[0]).shape == (2, 64, 8, 10)
    small = one(run(vae(), names[0], reduce=sdconv.features.pool(1)), names[0])
    torch.testing.assert_close(small[..., 0, 0], one(maps, names[0]).mean((2, 3)))
    with (
        pytest.raises(sdconv.InputError, match="rows and columns"),
        torch.no_grad(),
        sdconv.capture(unet(), "*:temb", reduce="pool:4"),
    ):
        unet()(*at(5))


def test_vectors_are_reduced_too() -> None:
    with torch.no_grad(), sdconv.capture(unet(), ["time_embedding"], reduce="std") as maps:
        unet()(*at(5))
    assert not one(maps, "time_embedding").any()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("reduce", "median"),
        ("reduce", "pca:0"),
        ("reduce", "pool:0"),
        ("reduce", 3),
        ("channels", 3),
        ("channels", []),
        ("channels", [64]),
        ("channels", [-1]),
        ("channels", [0.5]),
        ("channels", [True, False]),
        ("channels", torch.ones(64, dtype=torch.bool)),
        ("region", (0, 0, 0, 1)),
        ("region", (0, 0, 2, 1)),
        ("region", 0.5),
        ("dtype", "float16"),
        ("device", "nowhere"),
        ("device", "cuda:99"),
        ("max_memory", -1),
        ("max_memory", 0.5),
        ("max_memory", "much"),
        ("patterns", []),
        ("patterns", 7),
        ("exclude", "nothing.*"),
        ("exclude", "decoder*"),
    ],
)
def test_invalid_options_are_refused(option: str, value: Any) -> None:
    options = {"patterns": "decoder.up_blocks.0.resnets.0", option: value}
    with pytest.raises(sdconv.InputError), torch.no_grad(), sdconv.capture(vae(), **options):
        vae()(image())
    assert hooks_on(vae()) == 0


def test_a_region_of_a_vector_is_refused() -> None:
    with (
        pytest.raises(sdconv.InputError, match="rows and columns"),
        torch.no_grad(),
        sdconv.capture(unet(), "*:temb", region=(0, 0, 1, 0.5)),
    ):
        unet()(*at(5))
    assert hooks_on(unet()) == 0


def test_a_reduction_must_return_a_tensor() -> None:
    with (
        pytest.raises(sdconv.SdconvError, match="must return a tensor"),
        torch.no_grad(),
        sdconv.capture(vae(), "encoder", reduce=lambda x: None),  # type: ignore[arg-type,return-value]
    ):
        vae()(image())
    assert hooks_on(vae()) == 0


def test_too_much_memory_is_refused_before_the_first_operation() -> None:
    maps = run(vae(), "*.resnets.*")
    needed = sum(one(maps, name).nbytes for name in maps)
    ran: list[int] = []
    handle = vae().encoder.conv_in.register_forward_hook(lambda *_: ran.append(1))
    try:
        with (
            pytest.raises(sdconv.SdconvError, match=f"{needed:,} bytes in all") as caught,
            torch.no_grad(),
            sdconv.capture(vae(), "*.resnets.*", max_memory=needed - 1),
        ):
            vae()(image())
        assert "store=" in str(caught.value)
        assert ran == []
        # exactly enough
        assert len(run(vae(), "*.resnets.*", max_memory=needed)) == len(maps)
        assert len(ran) == 2
    finally:
        handle.remove()


def test_max_memory_as_text() -> None:
    assert len(run(vae(), "encoder", max_memory="1 MiB")) == 1
    with (
        pytest.raises(sdconv.SdconvError, match="at most 1,024 bytes"),
        torch.no_grad(),
        sdconv.capture(vae(), "decoder.conv_in", max_memory="1 KiB"),
    ):
        vae()(image())


def test_memory_is_that_of_the_reduced_maps() -> None:
    sizes = {"reduce": "mean", "dtype": torch.float16, "channels": [0]}
    maps = run(vae(), "*.resnets.0", max_memory=100, **sizes)
    assert all(value.nbytes == 4 for value in maps.values() if isinstance(value, Tensor))


def test_the_limit_holds_without_a_dry_run() -> None:
    class AsksForValues(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else x + 1

    network = nn.Sequential(nn.Conv2d(3, 4, 1), AsksForValues())
    with (
        pytest.raises(sdconv.SdconvError, match="bytes so far"),
        torch.no_grad(),
        sdconv.capture(network, "*", max_memory=100) as maps,
    ):
        network(image())
    assert len(maps) == 0
    assert hooks_on(network) == 0


def test_offloaded_weights() -> None:
    accelerate = pytest.importorskip("accelerate", reason="offloading is accelerate's")
    network = unets.theirs(UNET)
    inputs = unets.inputs(network.config)
    with torch.no_grad(), sdconv.capture(network, "*.conv2") as plain:
        network(*inputs)
    accelerate.cpu_offload(network, execution_device="cpu")
    needed = sum(one(plain, name).nbytes for name in plain)
    with torch.no_grad(), sdconv.capture(network, "*.conv2", max_memory=needed) as maps:
        network(*inputs)
    assert all(torch.equal(one(maps, name), one(plain, name)) for name in plain)
    with (
        pytest.raises(sdconv.SdconvError, match=f"{needed:,} bytes in all"),
        torch.no_grad(),
        sdconv.capture(network, "*.conv2", max_memory=needed - 1),
    ):
        network(*inputs)


def test_values_that_become_infinite_are_said() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    nn.init.ones_(network[0].weight)
    for largest, infinite in ((65504.0, False), (70000.0, True), (float("inf"), False)):
        x = torch.tensor([[[[0.0, largest]]]])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            sdconv.run_until(network, "0", x)
            assert said == []
            with torch.no_grad(), sdconv.capture(network, "0", dtype=torch.float16) as maps:
                network(x)
        words = [str(one.message) for one in said]
        assert [one.startswith("0: values beyond 65504") for one in words] == [True] * infinite
        assert len(maps) == 1


@pytest.mark.gpu
def test_asynchronous_copies_from_the_gpu() -> None:
    network = unets.theirs(UNET).cuda()
    inputs = [x.cuda() if isinstance(x, Tensor) else x for x in unets.inputs(network.config)]
    names = ["*.resnets.0", "*:skip"]
    with torch.no_grad():
        with sdconv.capture(network, names) as there:
            network(*inputs)
        with sdconv.capture(network, names, device="cpu") as here:
            network(*inputs)
            early = [here[name].clone() for name in here]  # type: ignore[union-attr]
    for name, x in zip(there, early, strict=True):
        assert one(there, name).is_cuda
        assert torch.equal(one(there, name).cpu(), one(here, name))
        assert torch.equal(x, one(here, name))
