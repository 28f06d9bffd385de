"""The package as a whole: what importing it loads, which way imports run, what the files of the repository promise."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cvxlib"

#: the floors, lowest first; a module may import from its own floor and below
FLOORS = [
    {"_checks", "_identity", "_encoding", "_files", "solution", "one_process"},
    {"contractions", "operators", "losses", "norms", "mixers", "activations", "arrangements", "cones"},
    {"lifting", "factored", "heads", "programs", "recovery", "certify", "baselines"},
    {"solvers"},
]


def floor(module: str) -> int:
    """The floor of ``cvxlib.<module>``; everything not named above is the world, the top floor."""
    first = module.split(".")[0]
    return next((k for k, floor in enumerate(FLOORS) if first in floor), len(FLOORS))


def imports(source: str) -> list[str]:
    """Modules of the package that a source file imports at run time, as names below ``cvxlib.``."""
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend(a.name.removeprefix("cvxlib.") for a in node.names if a.name.startswith("cvxlib."))
        if isinstance(node, ast.ImportFrom) and node.module == "cvxlib":
            found.extend(a.name for a in node.names)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cvxlib."):
            found.append(node.module.removeprefix("cvxlib."))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def modules() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_go_down(path):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    upward = [other for other in imports(path.read_text()) if floor(other) > floor(name)]
    assert not upward, f"{name} imports {upward}"


def test_the_import_walk_sees_upward_imports():
    assert imports("def f():\n    from cvxlib.programs import ConvexProgram") == ["programs"]
    assert floor("programs") > floor("losses")


def test_import_is_light():
    code = "import sys, cvxlib; print([m for m in %r if m in sys.modules])"
    heavy = ["cvxpy", "timm", "torchvision", "sklearn", "matplotlib", "scipy", "pandas"]
    run = subprocess.run([sys.executable, "-c", code % heavy], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_only_figures_imports_matplotlib():
    users = {p.name for p in modules() if "import matplotlib" in p.read_text() or "from matplotlib" in p.read_text()}
    assert users == {"figures.py"}


def test_environment_agrees_with_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    wanted = set(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        if extra != "all":
            wanted |= set(requirements)
    assert set(pip) == wanted | {"--editable ."}
    assert f"python{project['requires-python']}" in environment["dependencies"]


def test_every_extra_is_in_all():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    assert set(everything.removeprefix("cvxlib[").removesuffix("]").split(",")) == set(extras) - {"all"}


def test_public_names_are_documented_and_exist():
    import cvxlib

    for name in cvxlib.__all__:
        assert getattr(cvxlib, name).__doc__, name


def notebooks() -> list[Path]:
    return sorted((ROOT / "book").rglob("*.ipynb"))


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_notebooks_are_executed_and_clean(path):
    """A cell without stored output passes a notebook test vacuously, so notebooks are kept executed."""
    notebook = json.loads(path.read_text())
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    assert all(cell["execution_count"] for cell in cells)
    assert not [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error"]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


def test_every_page_is_in_the_table_of_contents():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = {toc["root"]} | {chapter["file"] for part in toc["parts"] for chapter in part["chapters"]}
    pages = {
        str(p.relative_to(ROOT).with_suffix(""))
        for p in (ROOT / "book").rglob("*")
        if p.suffix in {".md", ".ipynb"} and ".ipynb_checkpoints" not in p.parts
    }
    assert listed == pages


@pytest.mark.parametrize("path", sorted((ROOT / "book" / "experiments").glob("*.ipynb")), ids=lambda p: p.stem)
def test_experiments_write_beside_the_build_by_default(path):
    """Rerunning a notebook must not overwrite the results that are kept with the book."""
    cells = json.loads(path.read_text())["cells"]
    (parameters,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert f'"../../_build/experiments/{path.stem}.json"' in "".join(parameters["source"])
