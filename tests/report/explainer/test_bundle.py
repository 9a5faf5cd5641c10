"""JavaScript modules are joined in order, and what cannot be joined is refused."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from sdconv.errors import SdconvError
from sdconv.report.explainer.bundle import bundle

MODULES = {
    "main.js": 'import { twice as double } from "./core/two.js";\nconsole.log(double(21));\n',
    "core/two.js": 'import { TWO } from "../three.js";\nexport const twice = (x) => TWO * x;\n',
    "three.js": "const hidden = 1;\nexport const TWO = hidden + 1;\n",
}


def test_a_module_comes_after_those_it_imports() -> None:
    joined = bundle("main.js", MODULES)
    order = [joined.index(f"// --- {name}") for name in ("three.js", "core/two.js", "main.js")]
    assert order == sorted(order)
    assert "import" not in joined and "export" not in joined


@pytest.mark.skipif(not shutil.which("node"), reason="needs node: apt-get install nodejs")
def test_the_joined_script_computes_what_the_modules_do() -> None:
    ran = subprocess.run(
        ["node", "-e", bundle("main.js", MODULES)], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "42\n"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"three.js": 'import { twice } from "./core/two.js";\n'}, "in a circle"),
        ({"core/two.js": 'import { x } from "./nowhere.js";\n'}, "no such module"),
        ({"three.js": "export default 2;\n"}, "cannot be joined\n  expected"),
        ({"three.js": 'import * as all from "./x.js";\n'}, "cannot be joined"),
    ],
)
def test_what_cannot_be_joined_is_refused(changed: dict[str, str], words: str) -> None:
    with pytest.raises(SdconvError) as error:
        bundle("main.js", {**MODULES, **changed})
    assert words in str(error.value) or words.split("\n")[0] in str(error.value)


def test_words_in_a_text_are_not_imports() -> None:
    text = "export const SETUP = `import torch\nimport sdconv`;\n"
    assert "import torch" in bundle("main.js", {"main.js": text})
