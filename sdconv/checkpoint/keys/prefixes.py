"""Names of tensors by their prefixes, without a look at every name for each prefix."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable
from itertools import count

from sdconv.checkpoint.io.files import short
from sdconv.errors import UnknownNetworkError

# far more than any checkpoint has
_MOST_NETWORKS = 32
_DEEPEST = 12


class Names:
    """Names in order, so that those under a prefix stand together."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = sorted(names)

    def under(self, prefix: str) -> list[str]:
        """What follows a prefix, which is empty or ends with a dot, in the names that begin with
        it."""
        if not prefix:
            return self._names
        # a slash is the character behind a dot
        first, end = (bisect_left(self._names, at) for at in (prefix, f"{prefix[:-1]}/"))
        return [name[len(prefix) :] for name in self._names[first:end]]

    def any_begins(self, start: str) -> bool:
        """Whether a name begins with ``start``."""
        first = bisect_left(self._names, start)
        return first < len(self._names) and self._names[first].startswith(start)


def modules_of(names: Iterable[str]) -> frozenset[str]:
    """Every module that tensors are of, the outer ones too: ``a`` and ``a.b`` of ``a.b.weight``."""
    # no network's modules stand deeper, and a hostile name could have dots without end
    parts = (name.split(".", _DEEPEST)[:-1] for name in names)
    return frozenset(".".join(own[:n]) for own in parts for n in range(1, len(own) + 1))


def how_many(template: str, modules: Collection[str]) -> int:
    """How many of the template's modules, numbered from 0 without a gap, are among ``modules``."""
    return next(n for n in count() if template.format(n) not in modules)


def prefixes(names: Collection[str], *anchors: str) -> set[str]:
    """What stands before an anchor, as far as that is nothing or ends with a dot."""
    found = {name[: -len(a)] for a in anchors for name in names if name.endswith(a)}
    return {prefix for prefix in found if not prefix or prefix.endswith(".")}


def few(what: str, found: Iterable[str], where: object) -> list[str]:
    """The prefixes in order, if they are so few that all that is under each can be looked at.

    Raises:
        UnknownNetworkError: they are more networks than any checkpoint has.
    """
    if len(ordered := sorted(found)) > _MOST_NETWORKS:
        raise UnknownNetworkError(
            f"several networks that could be the {what}",
            where=where,
            expected="one",
            got=f"{len(ordered)}, under {short(ordered[:4])} and so on",
            hint="pass a state dict that holds one of them",
        )
    return ordered
