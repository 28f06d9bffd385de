"""Parts of a program as JSON and tensors, by the qualified names of their classes, and back: only classes that are known are ever made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cvxlib.ground.checks import describe
from cvxlib.ground.identity import Part, fields, fingerprint, qualified

P = TypeVar("P", bound=Part)


class Unknown(Exception):
    """A name in a file that stands for nothing here: what was expected, what came."""


class Unwritable(Exception):
    """A part that JSON and tensors cannot hold; says why."""


def encode(name: str, part: Part, tensors: dict[str, Tensor]) -> dict[str, object]:
    """A part as JSON; its tensors join ``tensors`` under names that begin with ``name``.

    Raises:
        Unwritable: its fields are of another kind than numbers, strings, tensors, arrays, tuples, lists, dictionaries and parts, or its
            class does not make it anew from them.
    """
    mine: dict[str, Tensor] = {}
    code = _encode_part(name, part, mine)
    try:
        again = _decode(code, mine, {qualified(kind): kind for kind in _kinds(part)})
    except (Unknown, TypeError, ValueError, AttributeError) as error:
        raise Unwritable(f"one that its class does not make anew from its fields ({error})") from None
    if fingerprint(again) != fingerprint(part):
        raise Unwritable("one that differs when its class makes it anew from its fields")
    tensors |= mine
    return code


def decode(code: Mapping[str, object], tensors: Mapping[str, Tensor], known: Mapping[str, type], kind: type[P]) -> P:
    """The part that :func:`encode` wrote, if its class is known here and one of ``kind``.

    Raises:
        Unknown: it is not.
        KeyError, TypeError, ValueError, AttributeError: the code does not fit together.
    """
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    expected = f"{article} {kind.__name__.lower()} of this package, or one given in load(path, parts=[...])"
    name = str(code["class"])
    if name not in known or not issubclass(known[name], kind):
        raise Unknown(expected, name)
    part = _decode(code, tensors, known)
    if not isinstance(part, kind):  # its class makes something else
        raise Unknown(expected, name)
    return part


def _encode_part(name: str, part: Part, tensors: dict[str, Tensor]) -> dict[str, object]:
    rows = {f: _encode(f"{name}.{f}", x, tensors) for f, x in fields(part).items()}
    return {"class": qualified(type(part)), "fields": rows}


def _encode(name: str, value: object, tensors: dict[str, Tensor]) -> object:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if type(value) is float:
        return {"float": repr(value)}
    if isinstance(value, Part):
        return _encode_part(name, value, tensors)
    if isinstance(value, Tensor) and value.layout is torch.strided:
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        tensors[name] = torch.from_numpy(np.array(value))
        return {"array": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return {type(value).__name__: [_encode(f"{name}.{k}", x, tensors) for k, x in enumerate(value)]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _encode(f"{name}.{key}", x, tensors) for key, x in value.items()}}
    raise Unwritable(f"one whose {name} is {describe(value)}")


def _decode(code: object, tensors: Mapping[str, Tensor], known: Mapping[str, type]) -> object:
    if not isinstance(code, dict):
        return code
    if "class" in code:
        name = str(code["class"])
        if name not in known:
            raise Unknown("a class given in load(path, parts=[...])", name)
        made = {field: _decode(x, tensors, known) for field, x in code["fields"].items()}
        return known[name](**made)
    ((kind, value),) = code.items()
    match kind:
        case "float":
            return float(value)
        case "tensor":
            return tensors[value]
        case "array":
            return tensors[value].cpu().numpy()
        case "dtype" if isinstance(getattr(torch, value), torch.dtype):
            return getattr(torch, value)
        case "tuple":
            return tuple(_decode(x, tensors, known) for x in value)
        case "list":
            return [_decode(x, tensors, known) for x in value]
        case "dict":
            return {key: _decode(x, tensors, known) for key, x in value.items()}
    raise ValueError(f"a field of the unknown kind {kind!r}")


def _kinds(value: object) -> set[type]:
    """The classes of a part and of the parts in its fields."""
    if isinstance(value, Part):
        return {type(value)}.union(*(_kinds(x) for x in fields(value).values()))
    if isinstance(value, dict):
        value = list(value.values())
    return set().union(*map(_kinds, value)) if isinstance(value, (tuple, list)) else set()
