"""Groups tensors' names by prefix and by module, without scanning all names for each prefix."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable
from itertools import count

from sdconv.checkpoint.io.files import short
from sdconv.errors import UnknownNetworkError

# limits for hostile names, far above what any checkpoint has
_MOST_NETWORKS = 32
DEEPEST = 12


class SortedNames:
    """Sorted names, so that those with the same prefix are adjacent and found by bisection."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = sorted(names)

    def under(self, prefix: str) -> list[str]:
        """The names that begin with ``prefix``, without it; it is empty or ends with a dot."""
        if not prefix:
            return self._names
        # the slash is the character after the dot
        first, end = (bisect_left(self._names, at) for at in (prefix, f"{prefix[:-1]}/"))
        return [name[len(prefix) :] for name in self._names[first:end]]

    def any_begins(self, start: str) -> bool:
        """Whether a name begins with ``start``."""
        first = bisect_left(self._names, start)
        return first < len(self._names) and self._names[first].startswith(start)


def modules_of(names: Iterable[str]) -> frozenset[str]:
    """The modules that hold these tensors: ``a`` and ``a.b`` for ``a.b.weight``."""
    parts = (name.split(".", DEEPEST)[:-1] for name in names)
    return frozenset(".".join(own[:n]) for own in parts for n in range(1, len(own) + 1))


def how_many(template: str, modules: Collection[str]) -> int:
    """The number of modules that fit the template, counted from 0 up to the first gap."""
    return next(n for n in count() if template.format(n) not in modules)


def prefixes(names: Collection[str], *anchors: str) -> set[str]:
    """The prefixes of the names that end with an anchor: empty, or ending with a dot."""
    found = {name[: -len(a)] for a in anchors for name in names if name.endswith(a)}
    return {prefix for prefix in found if not prefix or prefix.endswith(".")}


def sorted_prefixes(what: str, found: Iterable[str], where: object) -> list[str]:
    """The prefixes under which a kind of network was found, sorted.

    Raises:
        UnknownNetworkError: there are more of them than any checkpoint has networks.
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
