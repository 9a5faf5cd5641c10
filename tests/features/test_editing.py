"""An edit replaces a feature map, and changes nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from helpers import capturing, pipelines, seeded, unets
from torch import Tensor, nn

import sdconv
from sdconv.features import Context

CONFIG = seeded.kl((32, 32), 4, True, layers_per_block=1)
UNET = unets.smallest("SD1")
NAME = "decoder.mid_block.resnets.0"


@cache
def vae() -> Any:
    return seeded.network(CONFIG)


def image() -> Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def plus(number: float) -> Any:
    return lambda x, context: x + number


def same(x: Tensor, context: Context) -> Tensor:
    return x


@torch.no_grad()
def edited(changes: Any, network: Any = None) -> Tensor:
    network = network or vae()
    with sdconv.edit(network, changes):
        result: Tensor = network(image()).sample
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    return result


def by_hand(module: nn.Module, change: Any, *, before: bool = False) -> Tensor:
    """The same through torch's own hooks."""
    if before:
        handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda _, __, y: change(y))
    with torch.no_grad():
        result: Tensor = vae()(image()).sample
    handle.remove()
    return result


def test_each_kind_of_hook_point() -> None:
    block = vae().get_submodule(NAME)
    add = lambda x: x + 1  # noqa: E731
    for name, module, before in (
        (NAME, block, False),
        (f"{NAME}:input", block, True),
        (f"{NAME}:silu1", block.conv1, True),
        (f"{NAME}:silu2", block.conv2, True),
        (f"{NAME}.norm1", block.norm1, False),
    ):
        assert torch.equal(edited({name: plus(1)}), by_hand(module, add, before=before)), name
    with torch.no_grad():
        plain = vae()(image()).sample
    assert not torch.equal(edited({NAME: plus(1)}), plain)
    assert torch.equal(edited({"*": same}), plain)
    assert torch.equal(edited({"*": lambda x, _: x.clone()}), plain)


def test_a_function_may_write_into_its_argument() -> None:
    def doubled(x: Tensor, context: Context) -> Tensor:
        return x.mul_(2)

    network = unets.theirs(UNET)
    inputs = unets.inputs(network.config)
    # the block's input is also used as a skip
    for name in ("down_blocks.1.resnets.0:input", "up_blocks.2.resnets.1:skip", "mid_block"):
        with torch.no_grad():
            with sdconv.edit(network, {name: doubled}):
                found = network(*inputs)[0]
            with sdconv.edit(network, {name: lambda x, _: x * 2}):
                expected = network(*inputs)[0]
            assert torch.equal(found, expected), name
            assert not torch.equal(found, network(*inputs)[0])


def test_a_tensor_that_a_function_keeps_is_not_changed() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x).mul_(3)  # type: ignore[no-any-return]

    network, kept = Writes().requires_grad_(False), torch.ones(1, 3, 2, 2)
    changes: Any = {"part": lambda x, _: kept, "p*": lambda x, _: x.add_(1)}
    with sdconv.edit(network, changes):
        assert (network(torch.zeros(1, 3, 2, 2)) == 6).all()
    assert (kept == 1).all()


def test_functions_run_in_the_order_of_the_mapping() -> None:
    x = edited({NAME: lambda x, _: (x + 1) * 2})
    assert torch.equal(edited({NAME: plus(1), "decoder.mid*resnets.0": lambda x, _: x * 2}), x)
    assert not torch.equal(edited({"decoder.mid*resnets.0": lambda x, _: x * 2, NAME: plus(1)}), x)
    with torch.no_grad():
        with sdconv.edit(vae(), {NAME: plus(1)}), sdconv.edit(vae(), {NAME: lambda x, _: x * 2}):
            nested = vae()(image()).sample
        # after the inner block, the outer edit alone
        with sdconv.edit(vae(), {NAME: plus(1)}):
            with sdconv.edit(vae(), {NAME: lambda x, _: x * 2}):
                vae()(image())
            alone = vae()(image()).sample
    assert torch.equal(nested, x)
    assert torch.equal(alone, edited({NAME: plus(1)}))


def test_a_capture_shows_the_edits_around_it_and_not_those_inside() -> None:
    with torch.no_grad():
        with sdconv.capture(vae(), NAME) as plain:
            vae()(image())
        with sdconv.edit(vae(), {NAME: plus(1)}), sdconv.capture(vae(), NAME) as within:
            vae()(image())
        with sdconv.capture(vae(), NAME) as around, sdconv.edit(vae(), {NAME: plus(1)}):
            vae()(image())
    one, two, three = (maps[NAME] for maps in (plain, within, around))
    assert isinstance(one, Tensor) and isinstance(two, Tensor) and isinstance(three, Tensor)
    assert torch.equal(two, one + 1)
    assert torch.equal(three, one)


def test_the_context_that_a_function_gets() -> None:
    network = unets.theirs(UNET)
    contexts: list[tuple[str, int, object]] = []

    def note(x: Tensor, context: Context) -> Tensor:
        contexts.append((context.name, context.step, context.timestep))
        return x

    sample, _, *rest = unets.inputs(network.config)
    with torch.no_grad(), sdconv.edit(network, {"conv_in": note, "conv_out": note}):
        for step in (801, 1):
            network(sample, torch.tensor(step), *rest)
    assert contexts == [(n, i, t) for i, t in ((0, 801), (1, 1)) for n in ("conv_in", "conv_out")]


def test_the_time_projection_is_edited() -> None:
    network = unets.theirs(UNET)
    inputs = unets.inputs(network.config)
    seen: list[tuple[int, ...]] = []

    def zero(x: Tensor, context: Context) -> Tensor:
        seen.append(tuple(x.shape))
        return torch.zeros_like(x)

    sample, _, *rest = inputs
    with torch.no_grad(), sdconv.edit(network, {"*:temb": zero}):
        early, late = (network(sample, step, *rest)[0] for step in (999, 1))
    assert torch.equal(early, late)  # nothing else depends on the timestep
    assert {len(shape) for shape in seen} == {2}


def test_the_structure_of_an_output_is_kept() -> None:
    @dataclass(frozen=True)
    class Out:
        first: None
        map: Tensor
        more: tuple[Tensor, ...]

    class Returns(nn.Module):
        def __init__(self, made: Any) -> None:
            super().__init__()
            self.made = made

        def forward(self, **given: Any) -> Any:
            return self.made(given["x"])

    kept = torch.ones(2)
    shapes: list[tuple[Any, Any]] = [
        (lambda x: (x, kept), lambda out: out[0]),
        (lambda x: [None, x, kept], lambda out: out[1]),
        (lambda x: {"a": 1, "b": (x, kept)}, lambda out: out["b"][0]),
        (lambda x: Out(None, x, (kept,)), lambda out: out.map),
    ]
    for made, first in shapes:
        network = nn.Sequential()
        network.add_module("part", Returns(made))
        x = torch.zeros(2)
        with sdconv.edit(network, {"part": plus(1), "part:input": plus(5)}):
            out = network.part(x=x)
        assert type(out) is type(made(x))
        assert first(out).tolist() == [6, 6]
        assert x.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, _: x[:, :1], r"got: \(1, 1, 4, 4\)"),
        (lambda x, _: x.double(), r"got: .*float64"),
        (lambda x, _: x.to("meta"), r"got: .*meta"),
        (lambda x, _: None, "got: NoneType"),
    ],
)
def test_an_edit_that_returns_no_such_feature_map(change: Any, words: str) -> None:
    with pytest.raises(sdconv.SdconvError, match=f"{NAME}(.|\n)*{words}"):
        edited({NAME: change})
    assert not any(module._forward_hooks for module in vae().modules())


def test_an_edit_that_returns_no_such_feature_map_in_a_pipeline() -> None:
    pipe = pipelines.pipeline("text")
    with (
        pytest.raises(sdconv.SdconvError, match=r"unet\.mid_block: (.|\n)*float64"),
        sdconv.edit(pipe, {"unet.mid_block": lambda x, _: x.double(), "vae.*": same}),
    ):
        pipelines.run(pipe, "text")
    assert not capturing.hooks_on(pipe.unet) + capturing.hooks_on(pipe.vae)


def test_an_edit_that_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        edited({NAME: lambda x, _: x / (1 // 0)})
    assert not any(module._forward_hooks for module in vae().modules())


@pytest.mark.parametrize("changes", [{}, {"encoder": 3}, "encoder", {"decodr": same}])
def test_invalid_edits(changes: Any) -> None:
    with pytest.raises(sdconv.InputError), sdconv.edit(vae(), changes):
        pass


def test_an_edit_that_is_never_reached() -> None:
    with (
        pytest.raises(sdconv.SdconvError, match=r"'encoder\.mid\*'.*reached"),
        torch.no_grad(),
        sdconv.edit(vae(), {"encoder.mid*": same}),
    ):
        vae().decode(torch.zeros(1, 4, 4, 4))


def test_the_normalisation_of_an_attention_is_tokens() -> None:
    name = "decoder.mid_block.attentions.0.group_norm"
    module = vae().get_submodule(name)
    outputs: list[Tensor] = []
    by_hand(module, lambda y: outputs.append(y))
    (whole,) = outputs
    assert whole.shape[1:] == (32, 16)  # channels first, in the network
    for reduce, expected in (
        (None, whole.mT),
        ("mean", whole.mean(2)),
        ("channel_max", whole.amax(1)[..., None]),
    ):
        with torch.no_grad(), sdconv.capture(vae(), name, reduce=reduce) as maps:
            vae()(image())
        assert torch.equal(maps[name], expected)
    with torch.no_grad(), sdconv.capture(vae(), name, channels=[5, 2]) as maps:
        vae()(image())
    assert torch.equal(maps[name], whole.mT[..., [5, 2]])

    def without_a_channel(x: Tensor, context: Context) -> Tensor:
        return torch.cat([x[..., :-1], torch.zeros_like(x[..., -1:])], -1)

    expected = by_hand(module, lambda y: torch.cat([y[:, :-1], torch.zeros_like(y[:, -1:])], 1))
    assert torch.equal(edited({name: without_a_channel}), expected)
    assert not torch.equal(edited({name: same}), expected)
