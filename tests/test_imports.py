"""Imports point one way, only one module imports diffusers, and `import sdconv` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from helpers.paths import ROOT

PACKAGE = ROOT / "sdconv"

# The floors of docs/architecture.md, top first: a module imports from its own floor (never in a
# circle) or from one below. A name stands for the module and for all that is in a package.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("",),  # sdconv/__init__.py itself, whose public names come from everywhere below
    ("report",),
    ("dataset",),
    ("features",),
    ("analysis",),
    ("loading",),
    ("streaming",),
    ("fast", "integrations", "latents"),
    ("models", "lora", "images"),
    ("checkpoint",),
    ("convolution", "config", "backends", "devices", "sizes", "hub"),
    ("errors",),
)
FLOOR = {name: height for height, names in enumerate(reversed(FLOORS)) for name in names}
# knows nothing of its neighbours on the same floor
APART = ("fast", "integrations", "latents")
# The one import that may point up, inside a function: `enable_streaming`.
UPWARD = ("models.base", "streaming")
IMPORTS_DIFFUSERS = "integrations"


@dataclass(frozen=True)
class Arrow:
    """One import: who, whom (in full), on which line, and whether inside a function."""

    importer: str
    target: str
    line: int
    lazy: bool


def modules(folder: Path) -> dict[str, str]:
    """Dotted name below `sdconv` -> source; `""` is `sdconv/__init__.py`."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path.read_text("utf-8")
    return found


def arrows(sources: dict[str, str]) -> Iterator[Arrow]:
    """Every import in `sources`; `from package import module` points at the module."""
    packages = {name.rpartition(".")[0] for name in sources}
    for name, source in sources.items():
        package = name if name in packages else name.rpartition(".")[0]
        yield from _in_tree(ast.parse(source, f"sdconv/{name}"), name, package, sources, lazy=False)


def _in_tree(
    node: ast.AST, name: str, package: str, sources: dict[str, str], lazy: bool
) -> Iterator[Arrow]:
    for target in dict.fromkeys(_targets(node, package, sources)):
        yield Arrow(name, target, getattr(node, "lineno", 0), lazy)
    lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _in_tree(child, name, package, sources, lazy)


def _targets(node: ast.AST, package: str, sources: dict[str, str]) -> Iterator[str]:
    match node:
        case ast.Import():
            yield from (alias.name for alias in node.names)
        case ast.ImportFrom():
            base = node.module or ""
            if node.level:
                above = ["sdconv", *package.split(".")] if package else ["sdconv"]
                kept = above[: len(above) - node.level + 1]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            for alias in node.names:
                module = f"{base}.{alias.name}"
                yield module if module.removeprefix("sdconv.") in sources else base
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__")
            | ast.Attribute(attr="import_module" | "__import__"),
            args=[ast.Constant(value=str(target)), *_],
        ):
            yield target


def top_level(name: str) -> str:
    """The entry of FLOORS that the module ``name`` belongs to."""
    return name.partition(".")[0]


def complaints(sources: dict[str, str]) -> list[str]:
    """What is wrong with the imports in ``sources``, one line each."""
    found = []
    graph: dict[str, set[str]] = {}
    for arrow in arrows(sources):
        where = f"{arrow.importer or '__init__'}:{arrow.line}"
        if (
            arrow.target.split(".")[0] == "diffusers"
            and top_level(arrow.importer) != IMPORTS_DIFFUSERS
        ):
            found.append(f"{where} imports {arrow.target}: only {IMPORTS_DIFFUSERS} may")
        if arrow.target.split(".")[0] != "sdconv":
            continue
        target = arrow.target.removeprefix("sdconv").removeprefix(".")
        if arrow.lazy and (arrow.importer, target) == UPWARD:
            continue
        graph.setdefault(arrow.importer, set()).add(target)
        own, other = top_level(arrow.importer), top_level(target)
        strangers = [name for name in (own, other) if name not in FLOOR]
        if strangers:
            found.append(f"{where} imports {target}: {strangers[0]!r} is on no floor")
        elif FLOOR[other] > FLOOR[own]:
            found.append(f"{where} imports {target or '__init__'}, which is above it")
        elif own != other and own in APART and other in APART:
            found.append(f"{where} imports {target}, which is its neighbour")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("a circle: " + " -> ".join(error.args[1]))
    return found


def test_imports_point_one_way() -> None:
    assert complaints(modules(PACKAGE)) == []


def test_every_module_is_on_a_floor() -> None:
    assert {top_level(name) for name in modules(PACKAGE)} == set(FLOOR)


@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        ({"errors": "import sdconv.config"}, "errors:1 imports config, which is above it"),
        ({"config": "from . import models"}, "config:1 imports models, which is above it"),
        (
            {"convolution.reference": "def f():\n    from ..checkpoint.open import open"},
            "convolution.reference:2 imports checkpoint.open, which is above it",
        ),
        (
            {"models.blocks": "from importlib import import_module\nimport_module('sdconv.cli')"},
            "models.blocks:2 imports cli, which is above it",
        ),
        (
            {"models.vae": "from sdconv import load"},
            "models.vae:1 imports __init__, which is above",
        ),
        (
            {"models.base": "from sdconv import streaming"},
            "models.base:1 imports streaming, which is above it",
        ),
        (
            {"models.tiny": "def f():\n    from sdconv import streaming"},
            "models.tiny:2 imports streaming, which is above it",
        ),
        (
            {"fast.blocks": "def f():\n    import sdconv.integrations.diffusers"},
            "fast.blocks:2 imports integrations.diffusers, which is its neighbour",
        ),
        (
            {"analysis.parity": "def f():\n    import diffusers.models"},
            "analysis.parity:2 imports diffusers.models: only integrations may",
        ),
        ({"novel": "import sdconv.errors"}, "novel:1 imports errors: 'novel' is on no floor"),
        (
            {"models.tiny": "import sdconv.models.vae", "models.vae": "import sdconv.models.tiny"},
            "a circle: ",
        ),
        (
            {
                "checkpoint.open": "def f():\n    import sdconv.checkpoint.save",
                "checkpoint.save": "import sdconv.checkpoint.open",
            },
            "a circle: ",
        ),
    ],
)
def test_a_planted_import_is_caught(planted: dict[str, str], complaint: str) -> None:
    names = ("", "cli", "streaming", "models", "models.base", "models.vae", "models.tiny")
    names += ("checkpoint", "checkpoint.open", "config", "integrations.diffusers", "fast")
    found = complaints(dict.fromkeys(names, "") | planted)
    assert len(found) == 1
    assert found[0].startswith(complaint)


def test_what_may_be_imported() -> None:
    sources = {
        "models.base": "def f():\n    from sdconv import streaming",
        "models.vae": "",
        "integrations.diffusers": "import diffusers\nfrom sdconv.models import unet",
        "analysis.parity": "def f():\n    from sdconv.integrations import diffusers",
        "streaming": "from sdconv.models import vae",
        "models.unet": "",
    }
    assert complaints(sources) == []


SLOW_TO_IMPORT = (
    "torch diffusers transformers matplotlib numpy einops safetensors"
    " rich typer huggingface_hub PIL numba triton"
).split()


def printed_by(code: str) -> set[str]:
    """The words that `code` prints in a fresh Python."""
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


def loaded_by(code: str) -> set[str]:
    """Names of SLOW_TO_IMPORT that are in `sys.modules` after `code` ran."""
    code += f"\nimport sys; print(*[n for n in {SLOW_TO_IMPORT} if n in sys.modules])"
    return printed_by(code)


def operators_after(code: str) -> set[str]:
    """Operators of ours that torch knows after `code` ran."""
    code += "\nimport torch; print(*torch._C._dispatch_get_all_op_names())"
    return {name for name in printed_by(code) if name.startswith("sdconv::")}


def test_import_sdconv_is_light() -> None:
    assert loaded_by("import sdconv; dir(sdconv); sdconv.__version__") == set()


def test_public_names_bring_torch_but_not_the_reference() -> None:
    loaded = loaded_by("import sdconv\nfor name in sdconv.__all__: getattr(sdconv, name)")
    assert "torch" in loaded
    assert not loaded & {"diffusers", "transformers", "matplotlib"}


def test_a_heavy_import_is_noticed() -> None:
    assert {"PIL", "rich"} <= loaded_by("import sdconv, rich, PIL")


def test_import_sdconv_registers_no_operator() -> None:
    assert operators_after("import torch, sdconv; dir(sdconv)") == set()
    names = ("group_stats", "conv3x3", "upsample_conv", "group_norm_nhwc", "epilogue")
    registered = {f"sdconv::{name}" for name in names}
    assert operators_after("import sdconv.fast") == registered, "the control"
