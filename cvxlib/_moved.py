"""Old names of modules: for one version they go on working, with a ``DeprecationWarning`` that names the new place."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: an old module, and where its names are now; the first that has a name gives it
MOVED = {
    "cvxlib.provenance": ("cvxlib.ground.provenance",),
    "cvxlib.one_process": ("cvxlib.ground.one_process",),
    "cvxlib.arrangements": ("cvxlib.geometry.arrangements", "cvxlib.model.stacked"),
    "cvxlib.cones": ("cvxlib.geometry.cones",),
    "cvxlib.norms": ("cvxlib.geometry.norms",),
    "cvxlib.mixers": ("cvxlib.model.mixers",),
    "cvxlib.contractions": ("cvxlib.model.contractions", "cvxlib.operators.hidden"),
    "cvxlib.activations": ("cvxlib.model.activations",),
    "cvxlib.losses": ("cvxlib.model.losses",),
    "cvxlib.heads": ("cvxlib.model.heads",),
    "cvxlib.conversion": ("cvxlib.model.conversion",),
    "cvxlib.baselines": ("cvxlib.model.baselines",),
    "cvxlib.lifting": ("cvxlib.operators.lifted",),
    "cvxlib.operators": ("cvxlib.operators.maps",),
    "cvxlib.factored": ("cvxlib.operators.factored",),
    "cvxlib.solvers.projections": ("cvxlib.operators.projections",),
    "cvxlib.programs": ("cvxlib.program.program",),
    "cvxlib.solution": ("cvxlib.program.certificate", "cvxlib.program.solution"),
    "cvxlib.recovery": ("cvxlib.program.recovery",),
    "cvxlib.certify": ("cvxlib.audit.certificates",),
    "cvxlib.screening": ("cvxlib.audit.screening",),
    "cvxlib.solvers.reference": ("cvxlib.audit.reference",),
    "cvxlib.parallel.programs": ("cvxlib.parallel.sharded",),
    "cvxlib.path": ("cvxlib.workflow.regularisation",),
    "cvxlib.estimators": ("cvxlib.workflow.estimators",),
    "cvxlib.storage": ("cvxlib.workflow.storage",),
    "cvxlib.figures": ("cvxlib.workflow.figures",),
}
#: old modules whose name is a function of the package, which an import must not put a module in the place of
FUNCTIONS = ("cvxlib.certify", "cvxlib.path")
#: an old module whose name is a folder now
FOLDER = "cvxlib.operators"


class Moved(ModuleType):
    """An old module: every public name is looked up in the new places, and a warning says where it was found."""

    def __getattr__(self, name: str) -> object:
        return _find(self.__name__, name)


def _find(old: str, name: str) -> object:
    if not name.startswith("_"):
        for new in MOVED[old]:
            module = importlib.import_module(new)
            if hasattr(module, name):
                # the frames are this function, __getattr__, and whoever asked
                warnings.warn(f"{old}.{name} has moved to {new}.{name}", DeprecationWarning, stacklevel=3)
                return getattr(module, name)
    raise AttributeError(f"module {old!r} has no attribute {name!r}")


class _Finder(MetaPathFinder, Loader):
    """Imports old modules; it is asked first, so that files that an older installation left behind are not found."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED and fullname != FOLDER else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is run: names are looked up when they are asked for."""


def install() -> None:
    """Make the old names importable; called once, when the package has been imported."""
    sys.meta_path.insert(0, _Finder())
    for old in FUNCTIONS:
        # importing a module that is there already leaves the package's attribute alone
        sys.modules[old] = Moved(old)
    vars(sys.modules[FOLDER])["__getattr__"] = lambda name: _find(FOLDER, name)
