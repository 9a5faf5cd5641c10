"""Pause a network's forward pass after each module."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from torch import Tensor, nn

from sdconv.models.dummy_inputs import Inputs


@dataclass(frozen=True)
class ModuleOutput:
    """A module's name, which of its calls this is (from 1), and its output."""

    name: str
    call: int
    output: Tensor


def module_names(network: nn.Module) -> set[str]:
    """The names of all modules below the network; a module that is registered twice has both."""
    return {name for name, _ in network.named_modules(remove_duplicate=False) if name}


def module_outputs(
    network: nn.Module, inputs: Inputs, names: Collection[str]
) -> Generator[ModuleOutput]:
    """Run a network without gradients and pause it after each module.

    Several networks can be run in lockstep, so that only one output of each is in memory. The
    forward pass runs in its own thread, which works only while the caller waits for the next
    output. Closing the generator ends it.

    Args:
        network: in eval mode.
        inputs: the methods to call, in this order, each with its arguments.
        names: the modules to pause after. The calls of a module with several names are counted to
            its names in turn.

    Yields:
        The output of each call of these modules, and of each method under the method's name.

    Raises:
        Exception: as the network does.
    """
    run = _PausedRun(network, inputs)
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if name in names:
            names_of.setdefault(module, []).append(name)
    hooks = [module.register_forward_hook(run.hook(own)) for module, own in names_of.items()]
    run.thread.start()
    try:
        while True:
            run.turn.release()
            result = run.results.get()
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        run.abandoned = True
        run.turn.release()
        run.thread.join()
        for hook in hooks:
            hook.remove()


class _Abandoned(BaseException):
    """Ends a forward pass whose outputs are not wanted any more."""


class _PausedRun:
    """A forward pass in a thread. It waits for its ``turn`` before each module's output, and puts
    outputs, an exception, or None at the end into ``results``."""

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        self.thread = threading.Thread(target=self._run, args=(network, inputs), daemon=True)
        self.turn = threading.Semaphore(0)
        self.results: SimpleQueue[ModuleOutput | BaseException | None] = SimpleQueue()
        self.abandoned = False

    def _run(self, network: nn.Module, inputs: Inputs) -> None:
        last: BaseException | None = None
        try:
            self._wait()
            with torch.no_grad():
                for method, arguments in inputs.items():
                    (output,) = getattr(network, method)(*arguments, return_dict=False)
                    # an encoder's posterior is compared by its moments
                    output = getattr(output, "parameters", output)
                    self._hand_over(ModuleOutput(method, 1, output))
        except _Abandoned:
            return
        except BaseException as error:
            last = error
        self.results.put(last)

    def hook(self, names: list[str]) -> Callable[..., None]:
        calls = 0

        def pause(module: nn.Module, arguments: object, output: object) -> None:
            nonlocal calls
            if threading.current_thread() is not self.thread:
                return  # another run of the same module
            name, call = names[calls % len(names)], calls // len(names) + 1
            calls += 1
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor):
                self._hand_over(ModuleOutput(name, call, first))

        return pause

    def _hand_over(self, output: ModuleOutput) -> None:
        self.results.put(output)
        self._wait()

    def _wait(self) -> None:
        self.turn.acquire()
        if self.abandoned:
            raise _Abandoned
