"""The documentation's code prints what is shown below it, its pictures are drawn from the weights
that ship, and the site builds and opens from the disk."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.paths import ROOT
from PIL import Image
from test_imports import FLOORS

from sdconv.report.explainer.page import explainer

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
SLOW = ("commands", "datasets", "features", "parity", "streaming")  # pages whose commands take long
LARGEST = 150_000  # bytes of an image


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    """The modules ``scripts.docs.snippets`` and ``scripts.docs.pictures``."""
    return {
        name: importlib.import_module(f"scripts.docs.{name}") for name in ("snippets", "pictures")
    }


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.stem in SLOW)) for page in PAGES],
    ids=lambda page: page.stem,
)
def test_code_prints_what_is_shown_below_it(page: Path, scripts: dict[str, ModuleType]) -> None:
    with torch.enable_grad():  # a page may turn it off: this restores it
        snippets = scripts["snippets"].run_page(page)
    assert {s.line: s.printed for s in snippets} == {s.line: s.shown for s in snippets}


@pytest.mark.parametrize(
    ("code", "shown", "same"),
    [
        ("print(6 * 7)", "```text\n42\n```\n", True),
        ("print(6 * 7)", "```text\n43\n```\n", False),
        ("print(6 * 7)", "", False),
        ("6 * 7", "", True),
    ],
)
def test_a_wrong_output_is_noticed(
    code: str, shown: str, same: bool, tmp_path: Path, scripts: dict[str, ModuleType]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n```python\n{code}\n```\n{shown}\nMore.\n")
    (snippet,) = scripts["snippets"].run_page(page)
    assert (snippet.printed == snippet.shown) is same
    page.write_text(scripts["snippets"].refreshed(page))
    (snippet,) = scripts["snippets"].run_page(page)
    assert snippet.printed == snippet.shown
    assert page.read_text().endswith("\nMore.\n")


def test_pictures_are_shown_and_small_and_drawn_from_the_weights_that_ship(
    scripts: dict[str, ModuleType],
) -> None:
    sizes = {path.name: path.stat().st_size for path in (DOCS / "pictures").glob("*.webp")}
    text = "".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"\(pictures/([^)]+)\)", text)) == set(sizes)
    assert {name for name, size in sizes.items() if size > LARGEST} == set()
    pictures = scripts["pictures"]
    assert pictures.SOURCES.read_text() == pictures.sources(), (
        "weights or photo have changed: run `python -m scripts.docs.pictures`"
    )


def test_the_screenshot_is_shown_and_small() -> None:
    (shown,) = (DOCS / "screens").iterdir()
    assert f"(screens/{shown.name})" in (DOCS / "features.md").read_text()
    assert shown.stat().st_size <= LARGEST


@pytest.mark.slow
@pytest.mark.browser
def test_the_script_takes_the_screenshot(tmp_path: Path) -> None:
    pytest.importorskip("playwright", reason="the browser is driven by playwright")
    command = [sys.executable, "-m", "scripts.docs.screenshot", "--out", tmp_path / "page.webp"]
    subprocess.run(command, check=True, cwd=ROOT)
    with Image.open(tmp_path / "page.webp") as made:
        with Image.open(DOCS / "screens" / "page.webp") as shown:
            assert made.size == shown.size
        assert sum(map(bool, made.convert("L").histogram())) > 200  # an empty page has few greys


@pytest.mark.slow
def test_the_script_draws_these_pictures(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.docs.pictures", "--out", tmp_path]
    subprocess.run(command, check=True, cwd=ROOT)
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in (DOCS / "pictures").iterdir()
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, built without a warning."""
    for package in ("mkdocs", "latex2mathml"):
        pytest.importorskip(package, reason="needs the docs extra: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("docs") / "site"
    ran = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.mark.slow
def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = {path.name: path.read_text() for path in site.glob("*.html")}
    assert {page.with_suffix(".html").name for page in PAGES} <= set(pages)
    loaded = r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(https?:)?//"
    assert [name for name, html in pages.items() if re.search(loaded, html)] == []


@pytest.mark.slow
def test_the_explainer_is_the_sites_first_page(site: Path) -> None:
    home = (site / "index.html").read_text().partition("<body")[2]
    assert 0 < home.find('href="explainer/index.html"') < home.find('href="convolutions.html"')
    assert (site / "explainer" / "index.html").read_text() == explainer()


@pytest.mark.slow
def test_equations_are_mathml(site: Path) -> None:
    for page in PAGES:
        equations = re.findall(r"^```math$", page.read_text(), re.MULTILINE)
        html = page.with_suffix(".html").name
        assert (site / html).read_text().count("<math ") == len(equations), page.name


@pytest.mark.slow
@pytest.mark.browser
def test_the_search_works_from_the_disk(site: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        # the sandbox cannot be set up by root
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_context(offline=True).new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "index.html").as_uri())
        page.click(".md-search__input")
        page.keyboard.type("winograd")
        page.wait_for_selector(".md-search-result__item", timeout=60_000)
        found = page.locator(".md-search-result__item a").evaluate_all(
            "all => all.map(a => a.href)"
        )
        browser.close()
    assert any("fast-backend.html" in address for address in found)
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_the_drawing_of_the_floors_is_the_scripts_and_shows_every_floor() -> None:
    architecture = importlib.import_module("scripts.docs.architecture")
    assert architecture.DRAWING.read_text("utf-8") == architecture.drawing(), (
        "run `python -m scripts.docs.architecture`"
    )
    enforced = [names for names in FLOORS if names not in (("__main__",), ("",))]
    assert [tuple(name for name, _ in floor) for floor in architecture.FLOORS] == enforced


FOLDERS = ("docs", "examples", "scripts", "sdconv", "tests", "weights")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`([\w.-]+/[\w./-]*|\w+\.py)`", text):
        if name.partition("/")[0] in FOLDERS:
            assert (ROOT / name).exists(), name
        elif page.stem == "architecture":  # whose paths are relative to the package
            assert (ROOT / "sdconv" / name).exists(), name
