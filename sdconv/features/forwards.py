"""Replacements for a module's ``forward``, which can be nested and removed in any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from sdconv.models.meta_copy import NotCopied


class ReplacedForward(NotCopied):
    """Base class of a module's ``forward`` while a block lasts; a subclass has ``run``.

    Args:
        module: its ``forward`` is replaced at once.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # offloading puts a forward of its own into the instance
        self.own: Callable[..., Any] | None = vars(module).get("forward")
        self._removed = False
        vars(module)["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs) if self._removed else self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes while the replacement is in place."""
        raise NotImplementedError

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What it computes without the replacement."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        # looked up at each call: apply_patch changes a module's class
        return type(self.module).forward(self.module, *args, **kwargs)

    def remove(self) -> None:
        """Restore the module's ``forward``, unless somebody else has replaced it since."""
        self._removed = True
        above = vars(self.module).get("forward")
        if above is self:
            del vars(self.module)["forward"]
            if self.own is not None:
                vars(self.module)["forward"] = self.own
        # blocks may end in any order; behind another replacement, this one only passes calls on
        while isinstance(above, ReplacedForward) and above.own is not self:
            above = above.own
        if isinstance(above, ReplacedForward):
            above.own = self.own
