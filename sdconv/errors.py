"""What sdconv raises: one base class, few children, every message in the same shape."""

from __future__ import annotations


class SdconvError(Exception):
    """Something the caller can mend.

    The text always has the same parts, in this order, each on its own line and
    left out when it is unknown:

    - ``where: what`` — the file, component, tensor or argument, and what is wrong with it;
    - ``expected: ...`` — what would have been right;
    - ``got: ...`` — what came instead;
    - ``hint: ...`` — how to go on.

    Args:
        what: one sentence that says what is wrong.
        where: file, component, tensor or argument concerned.
        expected: what would have been right.
        got: what came.
        hint: what the caller can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        lines = [what if where is None else f"{where}: {what}"]
        parts = (("expected", expected), ("got", got), ("hint", hint))
        lines += [f"  {label}: {text}" for label, text in parts if text is not None]
        super().__init__("\n".join(lines))


class CheckpointError(SdconvError):
    """A file, folder or state dict that cannot be read as weights."""


class UnknownNetworkError(SdconvError):
    """Readable weights, but of no network that sdconv knows, or of several where one was asked
    for."""


class WeightsMismatchError(SdconvError):
    """Tensors that are missing, unexpected or of the wrong shape for the network they claim to
    be."""


class InputError(SdconvError):
    """An argument, image or latent that a network or a command cannot take."""


class SdconvWarning(UserWarning):
    """A choice that sdconv made for the caller, who may want another."""
