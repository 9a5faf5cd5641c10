"""The errors that sdconv raises: one base class, and the same parts in every message."""

from __future__ import annotations


class SdconvError(Exception):
    """An error that the caller can fix.

    The text always has these parts, in this order and each on its own line; a part that is unknown
    is left out:

    - ``where: what``: the file, component, tensor or argument, and what is wrong with it;
    - ``expected: ...``: what would have been right;
    - ``got: ...``: what came instead;
    - ``hint: ...``: what to do about it.

    A subclass also derives from Python's own error if there is one for the case: ``InputError`` is
    a ``ValueError``, and ``MissingFileError`` a ``FileNotFoundError``.

    Args:
        what: one sentence that says what is wrong.
        where: the file, component, tensor or argument concerned.
        expected: what would have been right.
        got: what came instead.
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


class MissingFileError(CheckpointError, FileNotFoundError):
    """A file or folder that does not exist."""


class UnknownNetworkError(SdconvError):
    """Readable weights, but not of a network that sdconv knows, or of several if one was asked
    for."""


class WeightsMismatchError(SdconvError):
    """Tensors that are missing, unexpected or of the wrong shape for the network that they claim to
    be."""


class InputError(SdconvError, ValueError):
    """An argument, image or latent that a network or a command cannot take."""


class SdconvWarning(UserWarning):
    """A choice that sdconv made for the caller, who may want another."""
