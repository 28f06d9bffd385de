"""The checks at the door of the energy functions: tokens with any leading axes, and matrices that fit them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cvxlib.ground.checks import FLOATS, require, wrong_type


def token_array(name: str, value: object) -> Tensor:
    """The value as a floating tensor (..., s, d)."""
    expected = "a float32 or float64 array of shape (..., s, d)"
    if isinstance(value, np.ndarray) and value.dtype in (np.float32, np.float64):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        raise wrong_type(name, expected, value)
    require(value.ndim >= 2 and value.numel() > 0, name, expected + " with at least one entry", value)
    return value


def matrix(name: str, value: object, Y: Tensor, *, square: bool = False) -> Tensor:
    """The value as a matrix (d, k) that multiplies tokens Y (..., s, d) from the right."""
    d = Y.shape[-1]
    expected = f"a {str(Y.dtype).removeprefix('torch.')} matrix ({d}, {d if square else 'k'}), one row per feature of the tokens"
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor) or value.dtype != Y.dtype:
        raise wrong_type(name, expected, value)
    require(value.ndim == 2 and value.shape[0] == d and value.numel() > 0, name, expected, value)
    require(not square or value.shape[1] == d, name, expected, value)
    return value
