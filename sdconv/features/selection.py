"""What a caller selects: hook points by glob patterns, calls by number, channels by index."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from operator import index
from typing import Any

from sdconv.errors import InputError
from sdconv.features.attention import PROBABILITIES
from sdconv.features.calls import Call

Patterns = str | Iterable[str]
Steps = int | Iterable[int] | slice | Callable[[Call], bool] | None


def match_points(
    names: Sequence[str], patterns: Patterns, exclude: Patterns = ()
) -> Mapping[str, tuple[str, ...]]:
    """As ``match_patterns``, but attention probabilities are matched only by a pattern that ends in
    ``:probs``: they grow with the square of the number of positions, and ``*`` does not mean them.
    """
    plain = [name for name in names if not name.endswith(PROBABILITIES)]
    excluded = _excluded(names, exclude)
    return {
        pattern: _kept(names if pattern.endswith(PROBABILITIES) else plain, pattern, excluded)
        for pattern in _listed(patterns)
    }


def match_patterns(
    names: Sequence[str], patterns: Patterns, exclude: Patterns = ()
) -> Mapping[str, tuple[str, ...]]:
    """The names that each pattern matches, without the excluded ones, in the order of ``names``.

    Args:
        names: all names there are.
        patterns, exclude: globs of ``*``, ``?`` and ``[...]`` by the rules of ``fnmatch``; ``*``
            also matches dots.

    Raises:
        InputError: a pattern matches nothing; the message names the closest names.
    """
    excluded = _excluded(names, exclude)
    return {pattern: _kept(names, pattern, excluded) for pattern in _listed(patterns)}


def _excluded(names: Sequence[str], exclude: Patterns) -> set[str]:
    patterns = _listed(exclude) if exclude else ()
    return {name for pattern in patterns for name in _match(names, pattern)}


def _kept(names: Sequence[str], pattern: str, excluded: Container[str]) -> tuple[str, ...]:
    kept = tuple(name for name in _match(names, pattern) if name not in excluded)
    if not kept:
        raise InputError("every layer that this matches is excluded", where=repr(pattern))
    return kept


def _listed(patterns: Patterns) -> tuple[str, ...]:
    """One pattern or several, as a tuple.

    Raises:
        InputError: not strings, or none at all.
    """
    given: tuple[Any, ...] = (
        tuple(patterns)
        if isinstance(patterns, Iterable) and not isinstance(patterns, str)
        else (patterns,)
    )
    if not given or not all(isinstance(pattern, str) for pattern in given):
        raise InputError(
            "not the names of layers",
            where="patterns",
            expected="a name, with * for any letters, or several",
            got=repr(patterns),
        )
    return given


def _match(names: Sequence[str], pattern: str) -> list[str]:
    """The names that a pattern matches.

    Raises:
        InputError: there are none.
    """
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        near = get_close_matches(pattern, names, n=3, cutoff=0.4)
        raise InputError(
            "no layer has this name",
            where=repr(pattern),
            expected=f"a name such as {', '.join(near)}" if near else "the name of a layer",
            hint="list the names: sdconv.features(network)",
        )
    return found


def select_calls(steps: Steps) -> tuple[Callable[[Call], bool], int | None]:
    """A predicate for the calls in ``steps``, and the number of the last such call if it is known.

    Args:
        steps: numbers of calls from 0, a slice of them, a predicate of the call, or None for all.

    Raises:
        InputError: ``steps`` is none of these.
    """
    if steps is None:
        return lambda call: True, None
    if callable(steps):
        return lambda call: bool(steps(call)), None
    if isinstance(steps, slice):
        bounds = (steps.start or 0, sys.maxsize if steps.stop is None else steps.stop, steps.step)
        first, stop, step = (_integer(1 if one is None else one) for one in bounds)
        if first is not None and stop is not None and step and min(first, stop, step) >= 0:
            numbers = range(first, stop, step)
            return _among(numbers), numbers[-1] if numbers and stop < sys.maxsize else None
    else:
        one = _integer(steps)
        wanted = integers(steps) if one is None else [one]
        if wanted and min(wanted) >= 0:
            return _among(set(wanted)), max(wanted)
    raise InputError(
        "not a choice of calls",
        where="steps",
        expected="numbers from 0, a slice of them, or a function of the call",
        got=steps,
    )


def _among(numbers: Container[int]) -> Callable[[Call], bool]:
    return lambda call: call.index in numbers


def integers(values: Any) -> list[int] | None:
    """Integers of Python, numpy or torch as a list of ``int``; None if anything else is given."""
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        return None
    found = []
    for value in values:
        if (number := _integer(value)) is None:
            return None
        found.append(number)
    return found


def _integer(value: Any) -> int | None:
    """An integer of Python, numpy or torch as an ``int``; None for anything else, bools
    included."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return index(value)
    except (TypeError, ValueError):
        return None
