"""The package as a whole: what importing it loads, which way imports run, what the files of the repository promise."""

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cvxlib"

#: folders of the package, lowest first; a module imports from its own folder and from floors below. "" is the face of the package
FLOORS = [
    {"ground", "verify"},
    {"geometry"},
    {"model"},
    {"operators"},
    {"program"},
    {"audit"},
    {"parallel"},
    {"solvers"},
    {"workflow"},
    {"testing"},
    {""},
    {"vision", "spatial", "energy"},
]


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Every module of a package by its name below it; a package's own is the folder's name, and the face's is empty."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def folder(module: str, package: Path = PACKAGE) -> str:
    """The folder that a module stands in; the face of the package for files at its root, but the checker, which stands alone."""
    first = module.split(".")[0]
    return first if (package / first).is_dir() or first == "verify" else ""


def floor(name: str) -> int:
    """The floor of a folder, by its number from the ground."""
    (number,) = [k for k, folders in enumerate(FLOORS) if name in folders]
    return number


def imports(source: str, known: Collection[str]) -> set[str]:
    """Modules of the package, of those known, that a source imports: at its top, within functions, or for type checking."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "cvxlib"}
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cvxlib":
            inside = {f"{node.module}.{a.name}" for a in node.names}
            below = {name for name in inside if name.removeprefix("cvxlib.") in known}
            found |= below if below == inside else below | {node.module}
    return {name.removeprefix("cvxlib").removeprefix(".") for name in found}


def arrows(package: Path = PACKAGE) -> dict[str, set[str]]:
    """What each module of a package imports of it."""
    known = modules(package)
    return {name: imports(path.read_text(), known) - {name} for name, path in known.items()}


def upward(package: Path = PACKAGE) -> list[str]:
    """Imports between folders that do not lead to a lower floor."""
    found = []
    for name, others in arrows(package).items():
        here = folder(name, package)
        for other in sorted(others):
            there = folder(other, package)
            if here != there and floor(there) >= floor(here):
                found.append(f"{name} -> {other}")
    return found


def circular(package: Path = PACKAGE) -> list[str]:
    """A circle of modules that import each other, or nothing."""
    try:
        TopologicalSorter(arrows(package)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_folder_has_a_floor_and_says_what_it_is():
    folders = {name: path for name, path in modules().items() if path.name == "__init__.py"}
    assert {name.split(".")[0] for name in folders} | {"verify"} == set().union(*FLOORS)
    assert not [name for name, path in folders.items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert {path.parent for path in modules().values()} == {path.parent for path in folders.values()}


def test_imports_only_go_down():
    assert upward() == []


def test_no_modules_import_each_other():
    assert circular() == []


def test_every_import_is_of_a_module_that_exists():
    """In this tree: another installed copy of the package must not lend a module that has gone."""
    assert not set().union(*arrows().values()) - set(modules())


def test_relative_imports_are_not_used():
    """The walk above reads absolute imports alone."""
    trees = [ast.parse(path.read_text()) for path in modules().values()]
    assert not [n.module for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]


def plant(root: Path, files: dict[str, str]) -> Path:
    """A small package with the files given, beside an empty face for each folder."""
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(source)
    return root


SOUND = {"model/heads.py": "import cvxlib.ground.checks", "ground/checks.py": "import math"}


def test_the_walk_finds_nothing_in_a_sound_tree(tmp_path):
    package = plant(tmp_path, SOUND)
    assert arrows(package)["model.heads"] == {"ground.checks"}
    assert upward(package) == [] and circular(package) == []


@pytest.mark.parametrize(
    "source",
    [
        "from cvxlib.model.heads import Head",
        "from cvxlib.model import heads",
        "import cvxlib.model.heads",
        "def f():\n    from cvxlib.model import heads as h",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from cvxlib.model.heads import Head",
    ],
)
def test_the_walk_finds_an_upward_import(tmp_path, source):
    package = plant(tmp_path, {"model/heads.py": "import math", "ground/checks.py": source})
    assert upward(package) == ["ground.checks -> model.heads"] and circular(package) == []


def test_the_walk_finds_an_import_of_the_face_and_of_a_neighbour(tmp_path):
    package = plant(tmp_path, {"ground/checks.py": "from cvxlib import solve", "vision/a.py": "import cvxlib.energy.b"})
    plant(tmp_path, {"energy/b.py": "import cvxlib"})
    assert upward(package) == ["ground.checks -> ", "vision.a -> energy.b"]


def test_the_walk_finds_a_circle(tmp_path):
    one = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from cvxlib.model.two import Two"
    package = plant(tmp_path, SOUND | {"model/one.py": one, "model/two.py": "from cvxlib.model import one"})
    assert upward(package) == []
    assert set(circular(package)) == {"model.one", "model.two"}


def test_import_is_light():
    code = "import sys, cvxlib; print([m for m in %r if m in sys.modules])"
    heavy = ["cvxpy", "timm", "torchvision", "sklearn", "matplotlib", "scipy", "pandas"]
    run = subprocess.run([sys.executable, "-c", code % heavy], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_only_figures_imports_matplotlib():
    users = {
        p.name for p in modules().values() if "import matplotlib" in p.read_text() or "from matplotlib" in p.read_text()
    }
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
