"""Old names of modules: they give the same objects as the new ones, say where these are, and replace nothing."""

import importlib
import subprocess
import sys

import pytest

import cvxlib
from cvxlib._moved import FOLDER, FUNCTIONS, MOVED

PLACES = [(old, new) for old, places in MOVED.items() for new in places]


def public(module):
    """Names that a module defines itself."""
    return [
        name
        for name, value in vars(module).items()
        if name[0] != "_" and getattr(value, "__module__", "") == module.__name__
    ]


@pytest.mark.parametrize(("old", "new"), PLACES, ids=[f"{old}-{new}" for old, new in PLACES])
def test_old_and_new_give_the_same_objects(old, new):
    module = importlib.import_module(new)
    names = public(module)
    assert names
    for name in names:
        with pytest.warns(DeprecationWarning, match=f"{old}.{name} has moved to {new}.{name}") as caught:
            found = getattr(importlib.import_module(old), name)
        assert found is getattr(module, name)
        assert {warning.filename for warning in caught} == {__file__}


def test_old_modules_are_attributes_of_the_package():
    """In a process of its own, where nothing has imported an old module."""
    names = [old.removeprefix("cvxlib.") for old in MOVED if old.count(".") == 1]
    code = f"import cvxlib; print(*[type(getattr(cvxlib, name)).__name__ for name in {names}])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    special = dict.fromkeys(FUNCTIONS, "function") | {FOLDER: "module"}
    assert run.stdout.split() == [special.get(f"cvxlib.{name}", "Moved") for name in names]


def test_every_form_of_import_works():
    with pytest.warns(DeprecationWarning):
        import cvxlib.arrangements as arrangements
        from cvxlib.norms import BlockConeNorm

        from cvxlib.operators.maps import DesignMap
        from cvxlib.solvers import reference

        assert arrangements.lifted_rows is cvxlib.model.stacked.lifted_rows
        assert cvxlib.arrangements.cover_count is cvxlib.geometry.arrangements.cover_count
        assert (
            reference.solve is cvxlib.solvers.reference.solve is importlib.import_module("cvxlib.audit.reference").solve
        )
    assert BlockConeNorm is cvxlib.geometry.norms.BlockConeNorm
    assert DesignMap is cvxlib.operators.maps.DesignMap


def test_functions_stay_functions():
    path, certify = cvxlib.path, cvxlib.certify
    with pytest.warns(DeprecationWarning):
        from cvxlib.certify import predict
        from cvxlib.path import Path
    for name in FUNCTIONS:
        importlib.import_module(name)
    assert cvxlib.path is path is cvxlib.workflow.regularisation.path
    assert cvxlib.certify is certify is cvxlib.audit.certificates.certify
    assert predict is cvxlib.audit.certificates.predict
    assert Path is cvxlib.workflow.regularisation.Path


def test_what_never_was_is_missing():
    for module in (cvxlib, cvxlib.operators, importlib.import_module("cvxlib.norms")):
        assert not hasattr(module, "nothing_of_the_kind")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("cvxlib.nothing_of_the_kind")


def test_the_package_itself_uses_no_old_name():
    code = "import cvxlib, cvxlib.testing, cvxlib.vision, cvxlib.spatial, cvxlib.energy, cvxlib.parallel, cvxlib.vision.transfer"
    code += "; from cvxlib.workflow import estimators, figures; from cvxlib.audit import reference; import sys"
    code += f"; print([name for name in {sorted(set(MOVED) - {*FUNCTIONS, FOLDER})} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
