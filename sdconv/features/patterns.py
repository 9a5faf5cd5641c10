"""Names chosen by globs, in which ``*`` also crosses dots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from sdconv.errors import InputError

Patterns = str | Iterable[str]


def listed(patterns: Patterns) -> tuple[str, ...]:
    """One pattern or several, as a tuple.

    Raises:
        InputError: something else, or none at all.
    """
    one = isinstance(patterns, str) or not isinstance(patterns, Iterable)
    given: tuple[str, ...] = (patterns,) if one else tuple(patterns)  # type: ignore[assignment]
    if not given or not all(isinstance(pattern, str) for pattern in given):
        raise InputError(
            "this names no layers",
            where="patterns",
            expected="a name with * for any letters, or several",
            got=repr(patterns),
        )
    return given


def chosen(
    names: Sequence[str], patterns: Patterns, exclude: Patterns = ()
) -> Mapping[str, tuple[str, ...]]:
    """For each pattern the names that it matches, without the excluded ones, in their order.

    Args:
        names: all there are.
        patterns, exclude: globs of ``*``, ``?`` and ``[...]``, by ``fnmatch``'s rules.

    Raises:
        InputError: a pattern matches nothing; the nearest names are in the message.
    """
    left_out = {
        name for pattern in (listed(exclude) if exclude else ()) for name in matches(names, pattern)
    }
    found = {}
    for pattern in listed(patterns):
        kept = tuple(name for name in matches(names, pattern) if name not in left_out)
        if not kept:
            raise InputError("every layer that this matches is excluded", where=repr(pattern))
        found[pattern] = kept
    return found


def matches(names: Sequence[str], pattern: str) -> list[str]:
    """The names that a pattern matches.

    Raises:
        InputError: there are none.
    """
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        near = get_close_matches(pattern, names, n=3, cutoff=0.4)
        raise InputError(
            "no layer has such a name",
            where=repr(pattern),
            expected=f"a name such as {', '.join(near)}" if near else "the name of a layer",
            hint="list the names: sdconv.features(network)",
        )
    return found
