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

PACKAGE = Path(__file__).parents[1] / "sdconv"

# The way data flows. A module imports from its own line (never in a circle) or from one above; a
# package stands for all its modules that have no line of their own.
LAYERS = (
    ("errors",),
    ("config", "backends"),
    ("ops",),
    ("fast",),
    ("checkpoint.files",),
    ("checkpoint.header", "checkpoint.pickles", "checkpoint.folder", "checkpoint.source"),
    ("checkpoint.keys", "checkpoint.keys_unet", "checkpoint.keys_clip", "checkpoint.names"),
    # before infer, which reads the configs that it writes
    ("checkpoint.write", "checkpoint.stream"),
    ("checkpoint.find", "checkpoint.reading"),
    ("checkpoint.infer_vae", "checkpoint.infer_tiny", "checkpoint.infer_unet"),
    ("checkpoint.infer",),
    ("checkpoint.fit",),
    ("inputs", "stand_in", "network", "outputs", "blocks", "unet_blocks", "unet_inputs"),
    ("streaming",),
    ("vae", "tiny", "unet"),
    ("checkpoint.load", "checkpoint.save"),
    ("checkpoint.whole", "checkpoint.convert"),
    ("anatomy", "comparison", "inspection", "latents", "lora"),
    # read by the points' table and by their dry run
    ("parity.inputs", "parity.stepwise", "report.pieces"),
    ("features",),
    ("parity", "images", "report", "fetch", "explanation", "timings"),
    ("integrations",),
    ("",),  # sdconv/__init__.py itself, whose public names come from everywhere above
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Arrows that may point back, where the import stands inside a function.
LAZY_BACK = {
    ("parity", "integrations"),
    ("unet", "integrations"),
    ("stand_in", "checkpoint.load"),
    ("stand_in", "integrations"),
    ("features", "report"),  # maps.plot
}
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


def place(name: str) -> str:
    """The name in LAYERS that stands for `name`: itself, or the package it is in."""
    while name not in RANK and "." in name:
        name = name.rpartition(".")[0]
    return name


def complaints(sources: dict[str, str]) -> list[str]:
    """What is wrong with the imports in `sources`, one line each."""
    found = []
    graph: dict[str, set[str]] = {}
    for arrow in arrows(sources):
        where = f"{arrow.importer or '__init__'}:{arrow.line}"
        if arrow.target.split(".")[0] == "diffusers" and place(arrow.importer) != IMPORTS_DIFFUSERS:
            found.append(f"{where} imports {arrow.target}: only {IMPORTS_DIFFUSERS} may")
        if arrow.target.split(".")[0] != "sdconv":
            continue
        target = arrow.target.removeprefix("sdconv").removeprefix(".")
        if arrow.lazy and (place(arrow.importer), place(target)) in LAZY_BACK:
            continue
        graph.setdefault(arrow.importer, set()).add(target)
        strangers = [name for name in (arrow.importer, target) if place(name) not in RANK]
        if strangers:
            found.append(f"{where} imports {target}: {strangers[0]!r} has no place in LAYERS")
        elif RANK[place(target)] > RANK[place(arrow.importer)]:
            found.append(f"{where} imports {target or '__init__'}, which stands after it")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("a circle: " + " -> ".join(error.args[1]))
    return found


def test_imports_point_one_way() -> None:
    assert complaints(modules(PACKAGE)) == []


def test_every_module_has_a_place() -> None:
    # a package of several layers, like checkpoint, has none: it holds a docstring only
    homeless = {
        name: source for name, source in modules(PACKAGE).items() if place(name) not in RANK
    }
    statements = {name: len(ast.parse(source).body) for name, source in homeless.items()}
    assert [name for name, count in statements.items() if count > 1] == []


@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        ({"errors": "import sdconv.config"}, "errors:1 imports config, which stands after it"),
        ({"config": "from . import vae"}, "config:1 imports vae, which stands after it"),
        (
            {"ops.convolution": "def f():\n    from ..checkpoint.load import load"},
            "ops.convolution:2 imports checkpoint.load, which stands after it",
        ),
        (
            {"blocks": "from importlib import import_module\nimport_module('sdconv.cli')"},
            "blocks:2 imports cli, which stands after it",
        ),
        ({"vae": "from sdconv import load"}, "vae:1 imports __init__, which stands after it"),
        (
            {"parity": "from sdconv.integrations import diffusers"},
            "parity:1 imports integrations.diffusers, which stands after it",
        ),
        (
            {"parity": "def f():\n    import diffusers.models"},
            "parity:2 imports diffusers.models: only integrations may",
        ),
        ({"novel": "import sdconv.errors"}, "novel:1 imports errors: 'novel' has no place"),
        ({"tiny": "import sdconv.vae", "vae": "import sdconv.tiny"}, "a circle: "),
    ],
)
def test_a_planted_import_is_caught(planted: dict[str, str], complaint: str) -> None:
    names = ("", "ops", "checkpoint", "config", "vae", "tiny", "integrations.diffusers")
    found = complaints(dict.fromkeys(names, "") | planted)
    assert len(found) == 1
    assert found[0].startswith(complaint)


def test_imports_allowed_back_and_forth() -> None:
    lazily = "def f():\n    from sdconv.integrations import diffusers"
    sources = {"parity.check": lazily, "unet": lazily}
    own = "import diffusers\nfrom sdconv import unet\nfrom sdconv.parity import check"
    assert complaints(sources | {"integrations.diffusers": own}) == []


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
    registered = {"sdconv::moments", "sdconv::convolution", "sdconv::doubled_convolution"}
    assert operators_after("import sdconv.ops.library") == registered, "the control"
