"""What makes two parts the same: one fingerprint of class, fields and tensors, behind equality, hash, files and the audit."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import types
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cvxlib.ground.checks import describe

#: rows that are hashed at a time: a memory map is read part by part
ROWS = 1024
#: values that their own representation tells apart
_SIMPLE = (type(None), bool, int, float, complex, str, bytes)


class Part:
    """A part of a program (mixer, activation, loss): a frozen value, equal to another of the same class with equal fields.

    Fields are those of a dataclass, or the attributes of an ordinary object, without what :func:`functools.cached_property` keeps.
    """

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        # a dataclass would compare tuples of its fields, in which a tensor has no truth value
        for name in ("__eq__", "__hash__"):
            if name not in vars(cls):
                setattr(cls, name, vars(Part)[name])

    def __post_init__(self) -> None:
        """Tensors and arrays become the part's own: who gave them may change theirs."""
        for name, value in fields(self).items():
            if isinstance(value, (Tensor, np.ndarray)):
                object.__setattr__(self, name, own(value))

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return self is other or fingerprint(self) == fingerprint(other)

    def __hash__(self) -> int:
        return hash(fingerprint(self))

    def __repr__(self) -> str:
        words = (
            f"{name}={describe(value) if isinstance(value, (Tensor, np.ndarray)) else repr(value)}"
            for name, value in fields(self).items()
        )
        return f"{type(self).__qualname__}({', '.join(words)})"


def own(value: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """A copy that shares no memory with the value."""
    return value.detach().clone() if isinstance(value, Tensor) else np.array(value)


def qualified(kind: type | Callable[..., object]) -> str:
    """The name that tells a class from every other: module and qualified name, and for those of this package the latter alone.

    Where in the package a class lives may change without making it another.
    """
    package = kind.__module__.split(".")[0]
    return f"{package if package == 'cvxlib' else kind.__module__}.{kind.__qualname__}"


def fields(value: object) -> dict[str, object]:
    """The fields of an object: a dataclass's, then whatever attributes it holds beside cached properties."""
    names = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    for kind in reversed(type(value).__mro__):
        slots = vars(kind).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    names += getattr(value, "__dict__", {})
    kept = [
        name
        for name in dict.fromkeys(names)
        if name not in ("__dict__", "__weakref__")
        and not isinstance(getattr(type(value), name, None), functools.cached_property)
    ]
    return {name: getattr(value, name) for name in kept if hasattr(value, name)}


def fingerprint(*values: object) -> str:
    """A digest that two lists of values share only if they are the same, on any device.

    Classes enter by qualified name, objects by their fields (without those that a dataclass declares ``compare=False``), tensors and
    arrays by dtype, shape and entries, functions by what they do.

    Raises:
        TypeError: something that shows no value: no fields, and no way to be pickled.
    """
    return _digest(values, ()).hex()


def _digest(value: object, above: tuple[int, ...]) -> bytes:
    """The digest of one value; ``above`` are the containers that it lies in, so that one that holds itself has a digest too."""
    state = hashlib.blake2b(digest_size=16)
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in _SIMPLE:
        state.update(repr((type(value).__name__, value)).encode())
    elif isinstance(value, Tensor):
        feed(state, value)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        state.update(repr(("array", value.dtype.str, value.shape)).encode())
        state.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    elif isinstance(value, enum.Enum):
        state.update(repr((qualified(type(value)), value.name)).encode())
    elif isinstance(value, type):
        state.update(repr(("class", qualified(value))).encode())
    elif isinstance(value, (torch.dtype, torch.device, types.ModuleType)):
        state.update(str(value).encode())
    elif id(value) in above:
        state.update(repr(("above", len(above) - above.index(id(value)))).encode())
    else:
        name, parts = _parts(value)
        above = (*above, id(value))
        digests = [_digest(part, above) for part in parts]
        state.update(repr((name, len(digests))).encode())
        for part in sorted(digests) if isinstance(value, (dict, set, frozenset)) else digests:
            state.update(part)
    return state.digest()


def _parts(value: object) -> tuple[str, list[object]]:
    """The name of what is made of parts, and the parts."""
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return "function", [qualified(value), value.__code__, value.__defaults__, value.__kwdefaults__, cells]
    if isinstance(value, types.CodeType):
        return "code", [value.co_code, value.co_consts, value.co_names]
    name = qualified(type(value))
    if isinstance(value, dict):
        return name, list(value.items())
    if isinstance(value, (tuple, list, set, frozenset)):
        return name, list(value)
    if isinstance(value, np.ndarray):
        return name, [value.shape, value.tolist()]
    if isinstance(value, (types.BuiltinFunctionType, types.MethodType)):
        return name, [value.__qualname__, getattr(value, "__self__", None)]
    left_out = {f.name for f in dataclasses.fields(value) if not f.compare} if dataclasses.is_dataclass(value) else ()
    held = {name: field for name, field in fields(value).items() if name not in left_out}
    if held or isinstance(value, Part):
        return name, list(held.items())
    try:
        reduced = value.__reduce_ex__(4)
    except TypeError:
        raise TypeError(f"fingerprint: expected values with fields; got {describe(value)}") from None
    return name, [reduced] if isinstance(reduced, str) else list(reduced[1:])


def feed(state: hashlib.blake2b, tensor: Tensor) -> None:
    """Hash a tensor's dtype, shape and entries, in parts of bounded memory."""
    state.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
    tensor = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    for part in tensor.split(ROWS) if tensor.ndim else (tensor,):
        flat = part.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        state.update(flat.view(torch.uint8).numpy().data)
