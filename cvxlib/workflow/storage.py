r"""Saving and loading: one safetensors file with a small JSON header, and never any code.

The tensors are the weights (and, for a solution, the tokens, targets and dual point that its certificate is about); the header
names the mixer, the activation and the loss with their sizes. A file is written under a temporary name and then renamed.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cvxlib.ground.checks import FLOATS, instance, require, wrong_value
from cvxlib.ground.one_process import require_alone
from cvxlib.ground.provenance import VERSION
from cvxlib.ground.tensor_files import KEY, write_tensors
from cvxlib.model.activations import Activation, GatedReLU, Linear, ReLU
from cvxlib.model.heads import Head
from cvxlib.model.losses import Loss
from cvxlib.model.mixers import Mixer
from cvxlib.program.certificate import Certificate, Factors, Status
from cvxlib.program.program import ConvexProgram
from cvxlib.program.solution import Solution

#: the form of the files, raised when a file can no longer be read by what came before
FORMAT = 1
_WRITTEN_BY_US = "a whole file written by cvxlib.save"


def save(path: str | os.PathLike, value: Head | Solution) -> None:
    r"""Write a head or a solution to a file.

    A solution is written whole, with tokens and targets, so that whoever loads it can audit it:
    ``cvxlib.certify(solution.program, solution.head())``. Where the data are large or private, save ``solution.head()`` alone.

    Args:
        path: the file, by custom ``*.safetensors``; an existing one is replaced at once or not at all.
        value: a :class:`cvxlib.Head` or :class:`cvxlib.Solution`, on any device.

    Raises:
        TypeError: it is neither.
        ValueError: its mixer, activation or loss is of a kind that cannot be written as sizes and tensors.
        OSError: the file cannot be written.
    """
    instance("value", value, (Head, Solution), "a cvxlib.Head or a cvxlib.Solution")
    header, tensors = _head(value) if isinstance(value, Head) else _solution(value)
    header = {"format": FORMAT, "version": VERSION, **header}
    write_tensors(Path(path), tensors, header)


def load(
    path: str | os.PathLike, *, mixers: Iterable[type[Mixer]] = (), device: torch.device | str = "cpu"
) -> Head | Solution:
    r"""Read what :func:`save` wrote; nothing in the file is ever executed.

    Args:
        path: the file.
        mixers: classes of mixers of your own that the file may name.
        device: where the tensors go.

    Returns:
        The head or the solution, as it was saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, foreign, from a newer version, or names a mixer that is not known here.
    """
    path = Path(path)
    known = _classes(Mixer)
    for kind in mixers:
        require(inspect.isclass(kind) and issubclass(kind, Mixer), "mixers", "classes of mixers", kind)
        known[kind.__name__] = kind
    header, tensors = _read(path, device)
    try:
        build = {"head": _build_head, "solution": _build_solution}[header["kind"]]
        return build(header, tensors, known)
    except _Unknown as error:
        raise wrong_value(str(path), *error.args) from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise wrong_value(
            str(path), _WRITTEN_BY_US, f"one that does not fit together ({type(error).__name__}: {error})"
        ) from None


class _Unknown(Exception):
    """A name in a file that stands for nothing here: what was expected, what came."""


# writing


def _head(head: Head) -> tuple[dict, dict[str, Tensor]]:
    activation, tensors = _activation(head.activation)
    header = {"kind": "head", "mixer": _sizes(head.mixer), "activation": activation, "pool": head.pool}
    return header, tensors | {"u": head.u, "v": head.v, "gate": head.gate, "block": head.block}


def _solution(solution: Solution) -> tuple[dict, dict[str, Tensor]]:
    program, certificate = solution.program, solution.certificate
    require_alone("value", program.reduce)  # of others, solution.head() can be saved
    _require_own("loss", program.loss, _classes(Loss))
    activation, tensors = _activation(program.activation)
    header = {
        "kind": "solution",
        "mixer": _sizes(program.mixer),
        "activation": activation,
        "loss": type(program.loss).__name__,
        "beta": program.beta,
        "pool": program.pool,
        "primal": certificate.primal,
        "dual": _number(certificate.dual),
        "dtype": str(certificate.dtype).removeprefix("torch."),
        "status": solution.status.name,
        "solver": solution.solver,
        "evaluations": solution.evaluations,
    }
    factors = solution.factors
    tensors |= {"tokens": program.tokens, "targets": program.targets, "history": solution.history}
    tensors |= {"u": factors.u, "v": factors.v, "block": factors.block}
    if certificate.dual_point is not None:
        tensors["dual_point"] = certificate.dual_point
    if not isinstance(program.activation, ReLU):
        # which gate each lifted block belongs to: gates are merged anew from the tokens when the program is rebuilt
        tensors |= {"operator.gate": program.operator.gate, "operator.block": program.operator.block}
    return header, tensors


def _sizes(mixer: Mixer) -> dict:
    """The name of a mixer and its sizes."""
    if not dataclasses.is_dataclass(mixer):
        raise wrong_value("value", "a mixer that is a dataclass of whole numbers", mixer)
    return {
        "name": type(mixer).__name__,
        **{field.name: int(getattr(mixer, field.name)) for field in dataclasses.fields(mixer)},
    }


def _activation(activation: Activation) -> tuple[dict, dict[str, Tensor]]:
    """The name of an activation and its settings, and its tensors."""
    match activation:
        case Linear():
            return {"name": "Linear"}, {}
        case GatedReLU():
            return {"name": "GatedReLU"}, {"directions": activation.directions}
        case ReLU():
            return {"name": "ReLU", "limit": activation.limit}, {}
    raise wrong_value("value", "an activation of this package", activation)


def _number(value: float) -> float | None:
    """JSON has no infinity: a bound that says nothing is written as null."""
    return value if math.isfinite(value) else None


# reading


def _read(path: Path, device: torch.device | str) -> tuple[dict, dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected {_WRITTEN_BY_US}; there is no such file")
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise wrong_value(str(path), _WRITTEN_BY_US, f"a truncated or foreign one ({error})") from None
    if KEY not in metadata:
        raise wrong_value(str(path), _WRITTEN_BY_US, "a safetensors file of another origin")
    try:
        header = json.loads(metadata[KEY])
    except (json.JSONDecodeError, RecursionError) as error:
        raise wrong_value(str(path), _WRITTEN_BY_US, f"one with a damaged header ({error})") from None
    if not isinstance(header, dict) or not isinstance(header.get("format"), int):
        raise wrong_value(str(path), _WRITTEN_BY_US, "one whose header does not say its format")
    if header["format"] > FORMAT:
        version = header.get("version")
        raise wrong_value(
            str(path), f"format {FORMAT} or older", f"format {header['format']}, by cvxlib {version}: upgrade"
        )
    return header, tensors


def _build_head(header: dict, tensors: Mapping[str, Tensor], known: Mapping[str, type]) -> Head:
    return Head(
        _build_mixer(header["mixer"], known),
        _build_activation(header["activation"], tensors),
        *(tensors[name] for name in ("u", "v", "gate", "block")),
        pool=header["pool"],
    )


def _build_solution(header: dict, tensors: Mapping[str, Tensor], known: Mapping[str, type]) -> Solution:
    loss = _classes(Loss).get(header["loss"])
    if loss is None:
        raise _Unknown("a loss of this package", header["loss"])
    activation = _build_activation(header["activation"], tensors)
    program = ConvexProgram(
        _build_mixer(header["mixer"], known),
        activation,
        loss(),
        tensors["tokens"],
        tensors["targets"],
        header["beta"],
        header["pool"],
    )
    block = tensors["block"]
    if not isinstance(activation, ReLU):
        block = _same_gates(program, tensors["operator.gate"], tensors["operator.block"])[block]
    (dtype,) = (kind for kind in FLOATS if str(kind) == f"torch.{header['dtype']}")
    dual = -math.inf if header["dual"] is None else float(header["dual"])
    solution = Solution(
        program=program,
        factors=Factors(tensors["u"], tensors["v"], block),
        certificate=Certificate(float(header["primal"]), dual, tensors.get("dual_point"), dtype),
        status=Status[header["status"]],
        solver=str(header["solver"]),
        evaluations=int(header["evaluations"]),
        history=tensors["history"].cpu(),
    )
    solution.head()  # the factors must fit the mixer
    return solution


def _same_gates(program: ConvexProgram, gate: Tensor, block: Tensor) -> Tensor:
    """(K,) where the lifted blocks of the file are among the rebuilt program's."""
    here = list(zip(program.operator.gate.tolist(), program.operator.block.tolist(), strict=True))
    return torch.tensor(
        [here.index(pair) for pair in zip(gate.tolist(), block.tolist(), strict=True)],
        dtype=torch.long,
        device=gate.device,
    )


def _build_mixer(sizes: Mapping[str, object], known: Mapping[str, type]) -> Mixer:
    sizes = dict(sizes)
    name = sizes.pop("name")
    if name not in known:
        raise _Unknown("a mixer of this package, or one given in load(path, mixers=[...])", str(name))
    return known[name](**sizes)


def _build_activation(settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Activation:
    match settings["name"]:
        case "Linear":
            return Linear()
        case "GatedReLU":
            return GatedReLU(tensors["directions"])
        case "ReLU":
            return ReLU(settings["limit"])
    raise _Unknown("an activation of this package", str(settings["name"]))


def _classes(base: type) -> dict[str, type]:
    """The concrete classes that the module of an abstract class defines, by name."""
    return {
        name: kind
        for name, kind in vars(sys.modules[base.__module__]).items()
        if inspect.isclass(kind) and issubclass(kind, base) and not inspect.isabstract(kind)
    }


def _require_own(name: str, value: object, known: Mapping[str, type]) -> None:
    if known.get(type(value).__name__) is not type(value):
        raise wrong_value("value", f"a {name} of this package", value)
