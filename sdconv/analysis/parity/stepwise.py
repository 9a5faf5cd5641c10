"""A network's forward pass, one module's output at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from torch import Tensor, nn

from sdconv.models.dummy_inputs import Inputs


@dataclass(frozen=True)
class Step:
    """What a module gave: its name, which of its calls it was (from 1), the output."""

    name: str
    call: int
    output: Tensor


def module_names(network: nn.Module) -> set[str]:
    """Names of all modules below the network; a module that stands in two places has both."""
    return {name for name, _ in network.named_modules(remove_duplicate=False) if name}


def steps(network: nn.Module, inputs: Inputs, names: Collection[str]) -> Generator[Step]:
    """Runs a network without gradients and pauses it after each module.

    Several networks can be walked side by side, so that no more than one output of each is held.
    The forward pass runs in a thread of its own, which works only while the caller waits for the
    next step; closing the iterator ends it.

    Args:
        network: in eval mode.
        inputs: the methods to call, in this order, each with its arguments.
        names: the modules to pause after. A module that stands in several places is called by its
            names in turn.

    Yields:
        A step after each call of such a module, and one under the method's name after each method.

    Raises:
        Whatever the network raises.
    """
    walk = _Walk(network, inputs)
    places: dict[nn.Module, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if name in names:
            places.setdefault(module, []).append(name)
    hooks = [
        module.register_forward_hook(walk.hook(own_names)) for module, own_names in places.items()
    ]
    walk.thread.start()
    try:
        while True:
            walk.turn.release()
            came = walk.handed.get()
            if came is None:
                return
            if isinstance(came, BaseException):
                raise came
            yield came
    finally:
        walk.left = True
        walk.turn.release()
        walk.thread.join()
        for hook in hooks:
            hook.remove()


class _Left(BaseException):
    """Ends a forward pass that nobody waits for any more."""


class _Walk:
    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        self.thread = threading.Thread(target=self._run, args=(network, inputs), daemon=True)
        self.turn = threading.Semaphore(0)
        self.handed: SimpleQueue[Step | BaseException | None] = SimpleQueue()
        self.left = False

    def _run(self, network: nn.Module, inputs: Inputs) -> None:
        last: BaseException | None = None
        try:
            self._wait()
            with torch.no_grad():
                for method, arguments in inputs.items():
                    (output,) = getattr(network, method)(*arguments, return_dict=False)
                    # an encoder gives a distribution: its moments
                    self._hand_over(Step(method, 1, getattr(output, "parameters", output)))
        except _Left:
            return
        except BaseException as error:
            last = error
        self.handed.put(last)

    def hook(self, names: list[str]) -> Callable[..., None]:
        calls = 0

        def pause(module: nn.Module, arguments: object, output: object) -> None:
            nonlocal calls
            if threading.current_thread() is not self.thread:
                return  # another walk over the same module
            name, call = names[calls % len(names)], calls // len(names) + 1
            calls += 1
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor):
                self._hand_over(Step(name, call, first))

        return pause

    def _hand_over(self, step: Step) -> None:
        self.handed.put(step)
        self._wait()

    def _wait(self) -> None:
        self.turn.acquire()
        if self.left:
            raise _Left
