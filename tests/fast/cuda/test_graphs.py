"""Recordings as CUDA graphs: on a CPU, with a stand-in that records torch's operations and runs
them again on the same memory; and on a GPU where there is one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import seeded
from helpers.fake_cuda import AUTOENCODERS
from helpers.numbers import error, randn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sdconv
from sdconv.errors import InputError
from sdconv.fast.cuda import graphs


class StandIn(TorchDispatchMode):
    """In the place of a CUDA graph: memory is what it is when recorded, operations run again."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.recorded.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.recorded:
            again = func(*args, **kwargs)
            for to, value in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(to, Tensor) and to.data_ptr() != value.data_ptr():
                    to.copy_(value)


class Stream:
    def wait_stream(self, other: Any) -> None: ...


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_is_cuda", lambda x: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Stream)


def assert_recorded(network: Any, x: Tensor) -> None:
    def run(x: Tensor) -> Tensor:
        with sdconv.backend("fast"):
            return network.decode(x).sample  # type: ignore[no-any-return]

    recorded = graphs.record(network, run, x)
    outputs = []
    for other in (x, x.flip(2), -x):
        with torch.no_grad():
            expected = run(other)
        outputs.append((recorded(other), expected))
    # the outputs do not share memory, and differ
    for out, expected in outputs:
        assert error(out, expected) < 1e-5
    assert error(outputs[0][0], outputs[1][0]) > 1e-3
    # a change in place is seen
    with torch.no_grad():
        network.decoder.conv_in.weight.mul_(0.5)
        assert error(recorded(x), run(x)) < 1e-5
    assert error(recorded(x), outputs[0][0]) > 1e-3


@pytest.mark.usefixtures("stand_in")
def test_recorded_and_replayed() -> None:
    assert_recorded(seeded.network(AUTOENCODERS["sd1"]), randn(1, 4, 5, 6))


@pytest.mark.usefixtures("stand_in")
def test_other_inputs_and_replaced_weights_are_refused() -> None:
    linear, x = nn.Linear(3, 3), randn(2, 3)
    recorded = graphs.record(linear, lambda x: linear(x), x)
    for wrong in (randn(1, 3), x.double()):
        with pytest.raises(InputError, match="fixed shapes"):
            recorded(wrong)
    with pytest.raises(InputError, match="fixed shapes"):
        recorded(x, x)
    linear.weight.data = linear.weight.data.clone()
    with pytest.raises(InputError, match="replaced since the recording"):
        recorded(x)


def test_a_cpu_is_refused() -> None:
    linear = nn.Linear(3, 3)
    with pytest.raises(InputError, match="only a run on CUDA"):
        graphs.record(linear, lambda x: linear(x), randn(2, 3))
    with pytest.raises(InputError, match="got: none"):
        graphs.record(linear, lambda: linear.bias)


@pytest.mark.gpu
def test_on_cuda() -> None:
    assert_recorded(seeded.network(AUTOENCODERS["sd1"]).cuda(), randn(1, 4, 5, 6).cuda())
