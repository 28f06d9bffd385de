"""What the files around the package promise each other: versions, commands, workflows, and what a report of a fault says."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import cvxlib
from cvxlib import versions
from cvxlib.vision.digits import digit_images

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
#: extras whose versions are elsewhere (the book's tool chain), and tools that only look at the source
PINNED_ELSEWHERE = {"book", "all"}
ONLY_LOOK = {"ruff", "mypy"}


def requirements(text: str) -> list[Requirement]:
    """The requirements of a constraints file."""
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]


def lower_bounds(wanted: list[Requirement]) -> dict[str, set[Version]]:
    """Every lower bound that a package is given, by the package's name."""
    found: dict[str, set[Version]] = {}
    for requirement in wanted:
        least = {Version(s.version) for s in requirement.specifier if s.operator in (">=", "==")}
        found.setdefault(canonicalize_name(requirement.name), set()).update(least)
    return found


def disagreements(project: str, environment: str, constraints: str) -> list[str]:
    """Where the lower bounds of pyproject.toml, environment.yml and the constraints file are not the same versions."""
    table = tomllib.loads(project)["project"]
    extras = table["optional-dependencies"]
    asked = table["dependencies"] + [line for name in extras if name != "all" for line in extras[name]]
    (pip,) = (entry["pip"] for entry in yaml.safe_load(environment)["dependencies"] if isinstance(entry, dict))
    ours = lower_bounds(list(map(Requirement, asked)))
    conda = lower_bounds([Requirement(line) for line in pip if not line.startswith("-")])
    lowest = lower_bounds(requirements(constraints))

    found = [f"{name}: {sorted(map(str, least))} in pyproject.toml" for name, least in ours.items() if len(least) != 1]
    found += [f"{name}: environment.yml differs" for name in ours | conda if ours.get(name) != conda.get(name)]
    tried = table["dependencies"] + [line for name in set(extras) - PINNED_ELSEWHERE for line in extras[name]]
    needed = {canonicalize_name(Requirement(line).name) for line in tried} - ONLY_LOOK
    found += [f"{name}: the constraints file lacks it" for name in needed - set(lowest)]
    found += [f"{name}: the constraints file differs" for name in lowest if ours.get(name) != lowest[name]]
    found += [f"{r.name}: not an exact version" for r in requirements(constraints) if str(r.specifier)[:2] != "=="]
    return found


PROJECT = (
    '[project]\ndependencies = ["one>=1.2"]\n[project.optional-dependencies]\nmore = ["two>=3,<4"]\nall = ["it[more]"]'
)
ENVIRONMENT = 'dependencies: [pip, {pip: ["--editable .", "one>=1.2", "two>=3,<4"]}]'
CONSTRAINTS = "# a word\none==1.2.0\ntwo==3"


def test_the_lower_bounds_are_the_versions_that_are_tried():
    files = ("pyproject.toml", "environment.yml", "constraints-lowest.txt")
    assert disagreements(*((ROOT / name).read_text(encoding="utf-8") for name in files)) == []


def test_agreeing_files_have_no_disagreements():
    assert disagreements(PROJECT, ENVIRONMENT, CONSTRAINTS) == []


@pytest.mark.parametrize(
    "project, environment, constraints, complaint",
    [
        (PROJECT.replace("1.2", "1.3"), ENVIRONMENT, CONSTRAINTS, "one: environment.yml differs"),
        (PROJECT.replace("1.2", "1.3"), ENVIRONMENT, CONSTRAINTS, "one: the constraints file differs"),
        (PROJECT, ENVIRONMENT.replace("two>=3", "two>=2"), CONSTRAINTS, "two: environment.yml differs"),
        (PROJECT, ENVIRONMENT, CONSTRAINTS.replace("1.2.0", "1.2.1"), "one: the constraints file differs"),
        (PROJECT, ENVIRONMENT, "one==1.2", "two: the constraints file lacks it"),
        (PROJECT, ENVIRONMENT, CONSTRAINTS.replace("two==3", "two>=3"), "two: not an exact version"),
        (PROJECT, ENVIRONMENT, CONSTRAINTS + "\nthree==1", "three: the constraints file differs"),
        (PROJECT.replace("one>=1.2", "one"), ENVIRONMENT, CONSTRAINTS, "one: [] in pyproject.toml"),
    ],
)
def test_a_disagreement_is_found(project, environment, constraints, complaint):
    assert complaint in disagreements(project, environment, constraints)


def test_the_book_is_pinned_and_what_computes_is_not():
    pins = requirements((ROOT / "constraints-book.txt").read_text(encoding="utf-8"))
    names = {canonicalize_name(pin.name): pin.specifier for pin in pins}
    assert all(str(specifier).startswith("==") for specifier in names.values())
    assert not {"torch", "torchvision", "numpy", "scipy", "matplotlib", "timm"} & set(names)
    book = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["book"]
    for requirement in map(Requirement, book):
        pinned = names.get(canonicalize_name(requirement.name))
        if pinned is not None:
            assert requirement.specifier.contains(str(pinned)[2:]), requirement
    assert {"jupyter-book", "sphinx", "myst-nb", "myst-parser", "sphinx-book-theme"} <= set(names)


def targets() -> set[str]:
    """The commands that ``make`` knows."""
    return set(re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split())


def jobs() -> list[tuple[str, dict]]:
    return [
        (f"{path.name}: {name}", job)
        for path in WORKFLOWS
        for name, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items()
    ]


@pytest.mark.parametrize(
    "path", ["README.md", "CONTRIBUTING.md", ".ci/run", *[p.relative_to(ROOT).as_posix() for p in WORKFLOWS]]
)
def test_every_make_command_named_exists(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`|run: |&& )make ([a-z-]+)", text, re.MULTILINE))
    assert named <= targets()


def test_workflows_test_the_versions_that_are_promised():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = {
        c.rsplit(" ", 1)[1] for c in project["classifiers"] if c.startswith("Programming Language :: Python :: 3.")
    }
    used = set()
    for name, job in jobs():
        matrix = job.get("strategy", {}).get("matrix", {})
        entries = [*matrix.get("include", []), *({"python": p} for p in matrix.get("python", []))]
        used |= {str(entry["python"]) for entry in entries if "python" in entry}
        for step in job["steps"]:
            version = str(step.get("with", {}).get("python-version", ""))
            used |= {version} if re.fullmatch(r"3\.\d+", version) else set()
            assert "uses" in step or "run" in step, name
    assert used <= promised
    assert {min(promised, key=Version), max(promised, key=Version)} <= used
    assert f">={min(promised, key=Version)}" == project["requires-python"]


def test_workflows_run_on_all_three_systems_and_every_week():
    text = "\n".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    assert all(system in text for system in ("ubuntu-latest", "macos-latest", "windows-latest", "schedule:"))


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml"], ids=lambda p: p.name
)
def test_configuration_is_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_reports_of_faults_ask_for_the_versions():
    (form,) = (ROOT / ".github" / "ISSUE_TEMPLATE").glob("fault.yml")
    assert "cvxlib.show_versions()" in form.read_text()


def test_the_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert cvxlib.__version__ == project["version"]
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == project["version"]
    assert f"## [{project['version']}]" in changes and "## [Unreleased]" in changes


def test_versions_are_shown(capsys):
    assert cvxlib.show_versions() is None
    shown = capsys.readouterr().out
    assert f"cvxlib: {cvxlib.__version__}" in shown and "numpy: " + np.__version__ in shown
    assert all(f"{title}:\n" in shown for title in ("versions", "system", "devices", "threads", "linear algebra"))


def test_what_is_not_installed_is_said(capsys, monkeypatch):
    monkeypatch.setattr(versions, "OPTIONAL", ("no-such-package-at-all",))
    cvxlib.show_versions()
    assert "no-such-package-at-all: not installed" in capsys.readouterr().out


def test_versions_are_shown_in_a_shell():
    run = subprocess.run([sys.executable, "-W", "error", "-m", "cvxlib.versions"], capture_output=True, text=True)
    assert run.returncode == 0 and "torch: " in run.stdout, run.stderr


def test_the_digits_that_ship_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    images, labels = digit_images()
    theirs = load_digits()
    assert images.dtype == theirs.images.dtype and np.array_equal(images, theirs.images)
    assert labels.dtype == theirs.target.dtype and np.array_equal(labels, theirs.target)


def test_the_digits_cannot_be_spoilt_for_the_next_caller():
    images, _ = digit_images()
    images[:] = -1
    assert digit_images()[0].min() == 0
