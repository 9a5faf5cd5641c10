"""No hook stays behind, however a block is left and however the network is run."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import seeded, unets
from helpers.versions import fails_on_torch_2_6
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sdconv
from sdconv.features import Maps

NAME = "decoder.mid_block.resnets.0"
CONFIG = seeded.kl((32, 32), 4, True, layers_per_block=1, mid_block_add_attention=False)


@pytest.fixture
def network() -> Iterator[Any]:
    """A VAE that must have no hooks after the test."""
    network = seeded.network(CONFIG)
    network.load_state_dict({k: v.clone() for k, v in network.state_dict().items()}, assign=True)
    yield network
    for module in network.modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            assert not vars(module)[kind]
            assert not vars(module)[f"{kind}_with_kwargs"]


def image() -> Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def one(maps: Maps, name: str = NAME) -> Tensor:
    value = maps[name]
    assert isinstance(value, Tensor)
    return value


def test_an_exception_in_the_block(network: Any) -> None:
    with pytest.raises(ZeroDivisionError), sdconv.capture(network, "*") as maps:
        network(image())
        raise ZeroDivisionError
    assert one(maps).shape == (1, 32, 4, 4)


def test_an_exception_in_the_network(network: Any) -> None:
    with pytest.raises(sdconv.InputError, match="wrong shape"), sdconv.capture(network, "*"):
        network(torch.zeros(1, 4, 8, 8))

    def fails(*_: object) -> None:
        raise ZeroDivisionError

    handle = network.decoder.register_forward_pre_hook(fails)
    with pytest.raises(ZeroDivisionError), sdconv.capture(network, "*") as maps:
        network(image())
    handle.remove()
    assert "encoder" in maps
    assert "decoder" not in maps


def test_a_generator_that_is_closed_or_garbage_collected(network: Any) -> None:
    def features() -> Iterator[Maps]:
        with sdconv.capture(network, NAME) as maps, sdconv.edit(network, {NAME: lambda x, _: x}):
            network(image())
            yield maps

    closed = features()
    maps = next(closed)
    closed.close()
    assert one(maps).shape == (1, 32, 4, 4)
    forgotten = features()
    next(forgotten)
    del forgotten


def test_generators_that_end_in_another_order(network: Any) -> None:
    def features() -> Iterator[Maps]:
        with sdconv.capture(network, NAME) as maps:
            yield maps
            yield maps

    first, second = features(), features()
    maps = [next(first), next(second)]
    network(image())
    first.close()
    network(image())
    second.close()
    assert [len(each.series(NAME)) for each in maps] == [1, 2]


def test_nested_captures(network: Any) -> None:
    with sdconv.capture(network, "decoder.*") as outer:
        with sdconv.capture(network, [NAME, "encoder"]) as inner:
            network(image())
        network(image())
    assert len(inner.series(NAME)) == 1
    assert torch.equal(one(inner), outer.series(NAME)[0].tensor)
    assert len(outer.series(NAME)) == 2
    assert "encoder" not in outer


def test_stopping_the_inner_of_two_leaves_the_outer_open(network: Any) -> None:
    with sdconv.capture(network, "decoder.conv_in") as outer:
        with sdconv.capture(network, "encoder.conv_in", stop_early=True):
            network(image())
        network(image())
    assert len(outer.series("decoder.conv_in")) == 1


def test_stopping_the_outer_of_two_leaves_both(network: Any) -> None:
    with sdconv.capture(network, "encoder.conv_in", stop_early=True) as outer:
        with sdconv.capture(network, "encoder.conv_out"):
            network(image())
        raise AssertionError("the outer capture did not stop")
    assert list(outer) == ["encoder.conv_in"]


def test_a_capture_includes_calls_from_any_thread(network: Any) -> None:
    failed: list[BaseException] = []

    def call() -> None:
        try:
            with torch.no_grad():
                network(image())
        except BaseException as error:
            failed.append(error)

    with sdconv.capture(network, NAME) as maps:
        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    series = maps.series(NAME)
    assert sorted(series.calls) == [0, 1, 2, 3]
    assert all(torch.equal(entry.tensor, series[0].tensor) for entry in series)
    # and no other thread is stopped in the middle
    with sdconv.capture(network, NAME, stop_early=True) as maps:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert len(maps.series(NAME)) == 1
    assert failed == []


def test_each_threads_maps_belong_to_its_own_calls() -> None:
    network = unets.theirs(unets.smallest("SD1"))
    sample, _, *rest = unets.inputs(network.config)
    steps = (10.0, 400.0, 900.0)
    contexts: list[tuple[float, bool]] = []

    def note(x: Tensor, context: Any) -> Tensor:
        contexts.append((context.timestep, torch.equal(x, expected[context.timestep])))
        return x

    def call(step: float) -> None:
        with torch.no_grad():
            for _ in range(3):
                network(sample, step, *rest)

    expected = {}
    for step in steps:
        with torch.no_grad(), sdconv.capture(network, "mid_block") as maps:
            network(sample, step, *rest)
        expected[step] = one(maps, "mid_block")
    assert not torch.equal(expected[10.0], expected[400.0])
    with sdconv.edit(network, {"mid_block": note}), sdconv.capture(network, "mid_block") as maps:
        threads = [threading.Thread(target=call, args=(step,)) for step in steps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    series = maps.series("mid_block")
    assert sorted(series.calls) == list(range(9))
    for entry in series:
        assert torch.equal(entry.tensor, expected[entry.timestep])  # type: ignore[index]
    assert len(contexts) == 9 and all(same for _, same in contexts)


def test_captures_in_several_threads(network: Any) -> None:
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        own = seeded.network(CONFIG)
        with torch.no_grad(), sdconv.capture(own, NAME) as maps:
            own(image() + number)
        found[number] = one(maps)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, value in found.items():
        with torch.no_grad(), sdconv.capture(network, NAME) as maps:
            network(image() + number)
        assert torch.equal(one(maps), value)


def test_a_network_can_be_copied_inside(network: Any) -> None:
    with sdconv.capture(network, NAME), sdconv.edit(network, {NAME: lambda x, _: x}):
        copied = copy.deepcopy(network)
        network(image())
    with torch.no_grad():
        assert torch.equal(copied(image()).sample, network(image()).sample)


def test_a_network_can_be_garbage_collected() -> None:
    network = seeded.network(CONFIG)
    with sdconv.capture(network, NAME) as maps:
        network(image())
    gone = weakref.ref(network.decoder)
    del network
    assert gone() is None
    assert one(maps).shape == (1, 32, 4, 4)


def test_inference_mode_gives_tensors_that_can_be_trained_on(network: Any) -> None:
    with torch.inference_mode(), sdconv.capture(network, NAME) as maps:
        network(image())
    x = one(maps)
    assert not x.is_inference()
    weight = torch.ones(1, requires_grad=True)
    (x * weight).sum().backward()
    assert weight.grad is not None


def test_maps_have_no_gradient(network: Any) -> None:
    with sdconv.capture(network, NAME) as maps:
        loss = network(image()).sample.sum()
    loss.backward()
    assert not one(maps).requires_grad
    assert network.encoder.conv_in.weight.grad is not None


def test_autocast(network: Any) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = network(image()).sample
        with sdconv.capture(network, [NAME, f"{NAME}.conv1"], max_memory=10**6) as maps:
            assert torch.equal(network(image()).sample, plain)
        with sdconv.capture(network, NAME, reduce="pca:2") as reduced:
            network(image())
    assert one(maps, f"{NAME}.conv1").dtype == torch.bfloat16
    # a reduction is not part of the network, and ignores autocast
    with sdconv.capture(network, NAME, reduce="pca:2") as outside, torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            network(image())
    assert torch.equal(one(reduced), one(outside))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_by_checkpointing_is_not_captured(reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(3, 3)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.count, x, use_reentrant=reentrant)
            return out

        def count(self, x: Tensor) -> Tensor:
            self.calls += 1
            # its gradient needs the output of the part, so the part is recomputed
            return torch.sin(self.part(x))

    network = Net()
    naive: list[int] = []
    handle = network.part.register_forward_hook(lambda *_: naive.append(1))
    x = torch.ones(1, 3, requires_grad=True)
    steps: list[int] = []

    def twice(value: Tensor, context: Any) -> Tensor:
        steps.append(context.step)
        return value * 2

    with sdconv.edit(network, {"part": twice}), sdconv.capture(network, "part") as maps:
        for _ in range(2):
            network(x).sum().backward()
    handle.remove()
    assert len(naive) == network.calls == 4  # each once more for the gradient
    assert maps.series("part").calls == (0, 1)
    # the edit is applied again, or the gradient would be of another function
    assert steps == [0, 0, 1, 1]
    (expected,) = torch.autograd.grad(2 * torch.sin(2 * network.part(x)).sum(), x)
    assert x.grad is not None
    assert torch.allclose(x.grad, expected)


def test_checkpointing_in_diffusers_and_in_sdconv() -> None:
    theirs = unets.theirs(unets.smallest("no transformers"))
    for network in (theirs, unets.ours(theirs)):
        network.train()
        network.enable_gradient_checkpointing()
        with sdconv.capture(network, "*.conv2") as maps:
            network(*unets.inputs(theirs.config))[0].sum().backward()
        assert all(len(maps.series(name)) == 1 for name in maps)
        assert len(maps) == 7


def test_compiled_networks_run_uncompiled_inside() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    compiled = torch.compile(network, backend="eager")
    with torch.no_grad():
        plain = compiled(image())
        ran: list[int] = []
        handle = network[0].register_forward_hook(lambda *_: ran.append(1))
        compiled(image())
        assert ran == []  # compiled code does not call hooks that were added later
        handle.remove()
        for target in (compiled, network):
            with sdconv.capture(target, "0") as maps:
                torch.testing.assert_close(compiled(image()), plain)
            assert torch.equal(one(maps, "0"), network[0](image()))
        with sdconv.edit(compiled, {"0": lambda x, _: x * 0}):
            assert not compiled(image()).any()
        # and compiled again after it
        handle = network[0].register_forward_hook(lambda *_: ran.append(1))
        compiled(image())
        assert ran == []
        handle.remove()


@fails_on_torch_2_6("an error for the whole graph is without the reason")
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_block_inside_compiled_code_is_refused_with_a_hint(fullgraph: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())

    def captured(x: Tensor) -> Tensor:
        with sdconv.capture(network, "0") as maps:
            network(x)
        return one(maps, "0")

    def edited(x: Tensor) -> Tensor:
        with sdconv.edit(network, {"0": lambda y, _: y}):
            return network[0](x)  # type: ignore[no-any-return]

    from torch._dynamo.exc import Unsupported

    torch._dynamo.reset()  # dynamo reports a skipped function only once
    for inside in (captured, edited):
        compiled = torch.compile(inside, backend="eager", fullgraph=fullgraph)
        with (
            torch.no_grad(),
            # with fullgraph the error is torch's own
            pytest.raises(Unsupported if fullgraph else sdconv.SdconvError, match="around the"),
        ):
            compiled(image())
        assert not network[0]._forward_hooks
        with torch.no_grad():  # and uncompiled it works
            assert torch.equal(inside(image()), network[0](image()))


def test_networks_that_are_compiled_inside_the_block() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with torch.no_grad():
        with sdconv.capture(network, "0") as maps:
            compiled = torch.compile(network, backend="eager")
            compiled(image())
        assert torch.equal(one(maps, "0"), network[0](image()))
        compiled(image())
    assert len(maps.series("0")) == 1


def test_compiled_in_place() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    network.compile(backend="eager")
    with torch.no_grad():
        network(image())
        with sdconv.capture(network, "0") as maps:
            network(image())
        assert torch.equal(one(maps, "0"), network[0](image()))
