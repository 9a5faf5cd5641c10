"""JavaScript modules joined into one script: each becomes a function that returns its exports.

Only the forms that the page uses: ``import { a, b as c } from "./file.js";`` at the beginning of
lines, and ``export`` in front of a function, a class or a constant. Anything else is an error.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping

from sdconv.errors import SdconvError

_IMPORT = re.compile(r'^import \{([^}]*)\} from "(\.[^"]+)";$', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function\*?|class|const|let) (\w+))", re.MULTILINE)
_OTHER = re.compile(r'^(?:import\b.*["\x27]|export\b).*$', re.MULTILINE)


def bundle(entry: str, sources: Mapping[str, str]) -> str:
    """One script of ``entry`` and the modules that it imports, each before those that import it.

    Args:
        entry: a path among ``sources``, such as ``main.js``.
        sources: path -> text, with ``/`` between folders.

    Raises:
        SdconvError: a missing module, a circle, or a form of import or export that is not joined.
    """
    joined: dict[str, str] = {}

    def add(path: str, above: tuple[str, ...]) -> None:
        if path in joined:
            return
        where = f"{above[-1]} imports {path}" if above else path
        if path in above:
            raise SdconvError("modules import each other in a circle", where=where)
        if path not in sources:
            raise SdconvError("no such module", where=where)
        text = sources[path]
        folder = posixpath.dirname(path)
        for match in _IMPORT.finditer(text):
            add(posixpath.normpath(posixpath.join(folder, match[2])), (*above, path))
        exported, body = _without_modules(path, text)
        if above:  # the entry stays outside of a function, where it may wait
            body = f"{body}\nreturn {{ {', '.join(exported)} }};"
            body = f"const {_variable(path)} = (() => {{\n{body}\n}})();"
        joined[path] = f"// --- {path}\n{body}"

    add(entry, ())
    return "\n".join(joined.values())


def _without_modules(path: str, text: str) -> tuple[list[str], str]:
    """The names that a module exports, and its text in which imports are variables."""
    folder = posixpath.dirname(path)

    def taken(match: re.Match[str]) -> str:
        names = re.sub(r"(\w+) as (\w+)", r"\1: \2", match[1])
        other = posixpath.normpath(posixpath.join(folder, match[2]))
        return f"const {{{names}}} = {_variable(other)};"

    exported = [match[1] for match in _EXPORT.finditer(text)]
    body = _EXPORT.sub("", _IMPORT.sub(taken, text))
    if other := _OTHER.search(body):
        raise SdconvError(
            "an import or export that cannot be joined",
            where=path,
            expected='import { a, b as c } from "./file.js"; or export before a declaration',
            got=other[0],
        )
    return exported, body


def _variable(path: str) -> str:
    return "module_" + re.sub(r"\W", "_", path.removesuffix(".js"))
