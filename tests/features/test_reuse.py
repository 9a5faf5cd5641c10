"""Modules return their last outputs again without computing, and are restored afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import capturing, implementations, pipelines, unets
from torch import Tensor, nn

import sdconv
from sdconv.features import Call, reuse

DEEP = ["down_blocks.[123]", "mid_block", "up_blocks.[012]"]


@pytest.fixture(params=implementations.NAMES)
def network(request: pytest.FixtureRequest) -> Any:
    return implementations.unet(request.param, capturing.UNET)


def inputs(network: Any, step: float, seed: int = 1, **more: Any) -> tuple[Any, ...]:
    sample, _, *rest = unets.inputs(network.config, seed=seed, **more)
    return sample, step, *rest


@torch.no_grad()
def test_what_is_reused_and_what_is_not_computed(network: Any) -> None:
    first, second = inputs(network, 801), inputs(network, 401, seed=2)
    plain = [network(*given)[0] for given in (first, second)]
    with sdconv.capture(network, "*.resnets.0") as every:
        network(*first)
    with reuse(network, DEEP, steps=[1]), sdconv.capture(network, "*.resnets.0") as maps:
        found = [network(*given)[0] for given in (first, second)]
    assert implementations.untouched(network)
    assert torch.equal(found[0], plain[0])
    assert not torch.equal(found[1], plain[1])
    passed = {name: maps.series(name).calls for name in maps}
    assert set(passed) == set(every)
    shallow = {"down_blocks.0.resnets.0", "up_blocks.3.resnets.0"}
    assert {name for name, calls in passed.items() if calls == (0, 1)} == shallow
    # by hand: the last level gets its previous input
    with sdconv.capture(network, "up_blocks.2") as kept:
        network(*first)
    with sdconv.edit(network, {"up_blocks.2": lambda x, _: capturing.one(kept, "up_blocks.2")}):
        expected = network(*second)[0]
    assert torch.equal(found[1], expected)


@torch.no_grad()
def test_an_output_changed_in_place_later_is_reused_unchanged(network: Any) -> None:
    # diffusers multiplies the mid block's output in place
    network.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.4)
    given = inputs(network, 801)
    plain = network(*given)[0]
    with reuse(network, ["mid_block", "down_blocks.*"], steps=slice(1, None)):
        found = [network(*given)[0] for _ in range(3)]
    network.disable_freeu()
    assert all(torch.equal(each, plain) for each in found)


@torch.no_grad()
def test_an_adapter_adds_to_both_uses_of_a_reused_output() -> None:
    # in place, to a feature map that goes to the next level and is a skip too
    network = unets.theirs({**capturing.UNET, "down_block_types": ("DownBlock2D",) * 4})
    given = inputs(network, 801)
    widths = network.config.block_out_channels
    sizes = ((4, 6), (2, 3), (1, 2), (1, 2))
    extra = [torch.ones(2, width, *size) for width, size in zip(widths, sizes, strict=True)]

    def call() -> Tensor:
        result: Tensor = network(*given, down_intrablock_additional_residuals=[*extra])[0]
        return result

    plain = call()
    assert not torch.equal(plain, network(*given)[0])
    with reuse(network, "down_blocks.?", steps=[1]):
        assert torch.equal(call(), plain)
        assert torch.equal(call(), plain)


@torch.no_grad()
def test_another_size_or_dtype_is_computed(network: Any) -> None:
    small, large = inputs(network, 801), inputs(network, 801, size=(16, 8))
    one = inputs(network, 801, batch=1)
    with reuse(network, DEEP, steps=None):
        network(*small)
        for given in (large, one):
            found = network(*given)[0]
            assert torch.equal(found, _recomputed(network, given))


def _recomputed(network: Any, given: tuple[Any, ...]) -> Tensor:
    """The output of a new network with the same weights, which has no output to reuse."""
    twin = unets.theirs(capturing.UNET)
    if isinstance(network, sdconv.UNet2DConditionModel):
        twin = unets.ours(twin)
    result: Tensor = twin(*given)[0]
    return result


@torch.no_grad()
def test_captures_and_edits_act_on_a_reused_output() -> None:
    network = capturing.unet()
    with (
        reuse(network, "mid_block", steps=[1]),
        sdconv.capture(network, "mid_block") as before,
        sdconv.edit(network, {"mid_block": lambda x, context: x + context.step}),
        sdconv.capture(network, "mid_block") as after,
    ):
        for step in (801, 1):
            network(*capturing.at(step))
    one, two = before.series("mid_block").tensors
    assert torch.equal(one, two)
    assert torch.equal(after.series("mid_block")[1].tensor, one + 1)


@torch.no_grad()
def test_the_predicate_is_evaluated_once_per_call() -> None:
    pipe = pipelines.pipeline("text")
    asked: list[tuple[int, object]] = []

    def steps(call: Call) -> bool:
        asked.append((call.index, call.timestep))
        return False

    plain = pipelines.run(pipe, "text")
    with reuse(pipe, ["unet.down_blocks.*", "unet.up_blocks.*"], steps=steps):
        assert pipelines.run(pipe, "text") == plain
    assert asked == [(0, 501.0), (1, 1.0)]


@torch.no_grad()
def test_of_nested_modules_only_the_outermost_counts() -> None:
    network = capturing.unet()
    with reuse(network, ["mid_block.*", "mid_block"], steps=[1]):
        assert [name for name, module in network.named_modules() if "forward" in vars(module)] == [
            "mid_block"
        ]
        network(*capturing.at(1))


@torch.no_grad()
def test_gradients_flow_through_computed_outputs_only() -> None:
    network = unets.theirs(capturing.UNET)
    network.enable_gradient_checkpointing()
    network.train()
    with torch.enable_grad(), reuse(network, "mid_block.resnets.*", steps=[1]):
        network(*inputs(network, 801))[0].sum().backward()
        gradient = network.mid_block.resnets[0].conv1.weight.grad
        assert gradient is not None and gradient.any()
        gradient.zero_()
        network(*inputs(network, 401))[0].sum().backward()
        assert not gradient.any()
    assert implementations.untouched(network)


@torch.no_grad()
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1)])
def test_blocks_that_end_in_another_order(order: tuple[int, ...]) -> None:
    network = capturing.unet()
    late, early = (network(*capturing.at(step))[0] for step in (1, 801))
    blocks = [reuse(network, "*_blocks.*", steps=slice(1, None)) for _ in order]
    for block in blocks:
        block.__enter__()
    assert torch.equal(network(*capturing.at(1))[0], late)
    for left in order:
        assert not torch.equal(network(*capturing.at(801))[0], early)  # still reused
        blocks[left].__exit__(None, None, None)
    assert implementations.untouched(network)
    assert torch.equal(network(*capturing.at(801))[0], early)


@torch.no_grad()
def test_an_overridden_forward_is_restored() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    network = unets.theirs(capturing.UNET)
    add_hook_to_module(network.mid_block, ModelHook())
    own = vars(network.mid_block)["forward"]
    plain = network(*capturing.at(1))[0]
    with reuse(network, "mid_block", steps=[1]):
        for _ in range(2):
            assert torch.equal(network(*capturing.at(1))[0], plain)
    assert vars(network.mid_block)["forward"] is own
    remove_hook_from_module(network.mid_block)


@torch.no_grad()
def test_compiled_networks_run_uncompiled_inside() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    compiled = torch.compile(network, backend="eager")
    x = capturing.image()
    plain = compiled(x)
    with reuse(compiled, "0", steps=[1]):
        first, second = compiled(x), compiled(-x)
    assert torch.equal(first, network(x))
    assert torch.equal(second, first)
    torch.testing.assert_close(compiled(x), plain)
    assert not torch.equal(compiled(-x), plain)


@torch.no_grad()
def test_memory_is_forecast_inside_a_block() -> None:
    network = capturing.unet()
    with sdconv.capture(network, "mid_block.*") as maps:
        network(*capturing.at(1))
    needed = sum(capturing.one(maps, name).nbytes for name in maps)
    with reuse(network, ["mid_block.*", "up_blocks.0"], steps=[1]):
        with sdconv.capture(network, "mid_block.*", max_memory=needed):
            network(*capturing.at(1))
        with (
            pytest.raises(sdconv.SdconvError, match="in all"),
            sdconv.capture(network, "mid_block.*", max_memory=needed - 1),
        ):
            network(*capturing.at(1))


@pytest.mark.parametrize("patterns", ["midblock", "mid_block:input", ()])
def test_patterns_that_match_no_module(patterns: Any) -> None:
    with pytest.raises(sdconv.InputError), reuse(capturing.unet(), patterns, steps=[1]):
        pass
    assert implementations.untouched(capturing.unet())


def test_modules_that_are_never_called() -> None:
    network = capturing.vae()
    with (
        pytest.raises(sdconv.SdconvError, match=r"'encoder\.mid\*'.*called"),
        torch.no_grad(),
        reuse(network, "encoder.mid*", steps=[1]),
    ):
        network.decode(torch.zeros(1, 4, 4, 4))
    assert implementations.untouched(network)


def test_an_exception_in_the_network() -> None:
    network = capturing.unet()
    with pytest.raises(ZeroDivisionError), torch.no_grad(), reuse(network, "mid_block", steps=[1]):
        with sdconv.edit(network, {"mid_block.resnets.0": lambda x, _: x / (1 // 0)}):
            network(*capturing.at(1))
    assert implementations.untouched(network)
