r"""Saving and loading: one safetensors file with a small JSON header, and never any code.

The tensors are the weights (and, for a solution, the tokens, targets and dual point that its certificate is about); the header
names the classes of mixer, activation and loss, module and all, with their fields. A file is written under a temporary name and then
renamed, and a checksum over header and tensors tells whether it has changed since.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cvxlib.audit.certificates import certify
from cvxlib.ground.checks import FLOATS, instance, require, wrong_value
from cvxlib.ground.encoding import Unknown, Unwritable, decode, encode
from cvxlib.ground.identity import Part, qualified
from cvxlib.ground.one_process import require_alone
from cvxlib.ground.provenance import VERSION
from cvxlib.ground.tensor_files import Damaged, read_tensors, write_tensors
from cvxlib.model.activations import Activation, ReLU
from cvxlib.model.heads import Head
from cvxlib.model.losses import Loss
from cvxlib.model.mixers import Mixer
from cvxlib.program.certificate import Assurance, Certificate, Factors, Status
from cvxlib.program.program import ConvexProgram
from cvxlib.program.solution import Solution

#: the form of the files, raised when a file can no longer be read by what came before; files of form 1 have no checksum, and name
#: classes of this package without their module
FORMAT = 2
#: relative difference between a bound in a file and the same bound computed anew that rounding, on any machine, stays within
ROUNDING = 1e-6
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
        ValueError: its mixer, activation or loss is of a kind that its class does not make anew from numbers, strings and tensors; or
            ``path`` is a folder or a device.
        OSError: the file cannot be written.
    """
    instance("value", value, (Head, Solution), "a cvxlib.Head or a cvxlib.Solution")
    header, tensors = _head(value) if isinstance(value, Head) else _solution(value)
    write_tensors(path, tensors, {"format": FORMAT, "version": VERSION, **header})


def load(
    path: str | os.PathLike,
    *,
    parts: Iterable[type[Part]] = (),
    mixers: Iterable[type[Mixer]] = (),
    device: torch.device | str = "cpu",
) -> Head | Solution:
    r"""Read what :func:`save` wrote; nothing in the file is ever executed.

    A solution's bounds are not taken from the file: the network is audited anew, with the dual point that is stored.

    Args:
        path: the file.
        parts: classes of mixers, activations and losses of your own that the file may name, with module and qualified name.
        mixers: likewise, for mixers.
        device: where the tensors go.

    Returns:
        The head or the solution, as it was saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, changed, foreign, from a newer version, names a class that is not known here, or holds bounds that
            its network and its dual point do not give.
    """
    path = Path(path)
    known = {qualified(kind): kind for base in (Mixer, Activation, Loss) for kind in _classes(base)}
    for name, kind in itertools.chain(zip(itertools.repeat("parts"), parts), zip(itertools.repeat("mixers"), mixers)):
        sound = inspect.isclass(kind) and issubclass(kind, Mixer if name == "mixers" else Part)
        require(sound, name, "classes of " + ("mixers" if name == "mixers" else "mixers, activations and losses"), kind)
        known[qualified(kind)] = kind
    header, tensors = _read(path, device)
    try:
        build = {"head": _build_head, "solution": _build_solution}[header["kind"]]
        return build(_from_format_1(header) if header["format"] == 1 else header, tensors, known)
    except Unknown as error:
        raise wrong_value(str(path), *error.args) from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        raise wrong_value(
            str(path), _WRITTEN_BY_US, f"one that does not fit together ({type(error).__name__}: {error})"
        ) from None


# writing


def _parts(**parts: Part) -> tuple[dict, dict[str, Tensor]]:
    """Mixer, activation and loss as a header and tensors."""
    header, tensors = {}, {}
    for name, part in parts.items():
        try:
            header[name] = encode(name, part, tensors)
        except Unwritable as error:
            raise wrong_value("value", f"a {name} of numbers, strings and tensors", str(error)) from None
    return header, tensors


def _head(head: Head) -> tuple[dict, dict[str, Tensor]]:
    header, tensors = _parts(mixer=head.mixer, activation=head.activation)
    header |= {"kind": "head", "pool": head.pool}
    return header, tensors | {"u": head.u, "v": head.v, "gate": head.gate, "block": head.block}


def _solution(solution: Solution) -> tuple[dict, dict[str, Tensor]]:
    program = solution.program
    require_alone("value", program.reduce)  # of others, solution.head() can be saved
    header, tensors = _parts(mixer=program.mixer, activation=program.activation, loss=program.loss)
    header |= {"kind": "solution", "beta": program.beta, "pool": program.pool}
    result, arrays = result_as_tensors(solution)
    tensors |= {"tokens": program.tokens, "targets": program.targets} | arrays
    if not isinstance(program.activation, ReLU):
        # which gate each lifted block belongs to: gates are merged anew from the tokens when the program is rebuilt
        tensors |= {"operator.gate": program.operator.gate, "operator.block": program.operator.block}
    return header | result, tensors


def result_as_tensors(solution: Solution) -> tuple[dict, dict[str, Tensor]]:
    """What a solve found, without its program, as a header and tensors."""
    certificate, factors = solution.certificate, solution.factors
    header = {
        "primal": certificate.primal,
        # JSON has no infinity: a bound that says nothing is written as null
        "dual": certificate.dual if math.isfinite(certificate.dual) else None,
        "dtype": str(certificate.dtype).removeprefix("torch."),
        "assurance": certificate.assurance.name,
        "status": solution.status.name,
        "solver": solution.solver,
        "evaluations": solution.evaluations,
    }
    tensors = {"u": factors.u, "v": factors.v, "block": factors.block, "history": solution.history}
    if certificate.dual_point is not None:
        tensors["dual_point"] = certificate.dual_point
    return header, tensors


# reading


def certificate_from_tensors(header: Mapping, tensors: Mapping[str, Tensor]) -> Certificate:
    """The certificate that :func:`result_as_tensors` wrote, as it was written."""
    (dtype,) = (kind for kind in FLOATS if str(kind) == f"torch.{header['dtype']}")
    assurance = Assurance[header.get("assurance", Assurance.ROUNDING.name)]
    return Certificate(float(header["primal"]), _dual(header), tensors.get("dual_point"), dtype, assurance)


def _dual(header: Mapping) -> float:
    return -math.inf if header["dual"] is None else float(header["dual"])


def result_from_tensors(
    program: ConvexProgram, header: Mapping, tensors: Mapping[str, Tensor], certificate: Certificate
) -> Solution:
    """The solution of a program that :func:`result_as_tensors` wrote, with its certificate.

    Raises:
        KeyError, TypeError, ValueError: the two do not fit together.
    """
    return Solution(
        program=program,
        factors=Factors(tensors["u"], tensors["v"], tensors["block"]),
        certificate=certificate,
        status=Status[header["status"]],
        solver=str(header["solver"]),
        evaluations=int(header["evaluations"]),
        history=tensors["history"].cpu(),
    )


def _read(path: Path, device: torch.device | str) -> tuple[dict, dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected {_WRITTEN_BY_US}; there is no such file")
    try:
        tensors, header = read_tensors(path, device, lambda header: header.get("format") == 1)
    except Damaged as error:
        raise wrong_value(str(path), _WRITTEN_BY_US, error.reason) from None
    if not isinstance(header.get("format"), int):
        raise wrong_value(str(path), _WRITTEN_BY_US, "one whose header does not say its format")
    if header["format"] > FORMAT:
        version = header.get("version")
        raise wrong_value(
            str(path), f"format {FORMAT} or older", f"format {header['format']}, by cvxlib {version}: upgrade"
        )
    return header, tensors


def _from_format_1(header: dict) -> dict:
    """The header of a file of form 1, which named classes of this package only, as one of form 2."""
    mixer, activation = dict(header["mixer"]), dict(header["activation"])
    mixer = {"class": f"cvxlib.{mixer.pop('name')}", "fields": mixer}
    activation = {"class": f"cvxlib.{activation.pop('name')}", "fields": activation}
    if activation["class"] == "cvxlib.GatedReLU":
        activation["fields"] = {"directions": {"tensor": "directions"}}
    loss = {"class": f"cvxlib.{header.get('loss')}", "fields": {}}
    return header | {"mixer": mixer, "activation": activation, "loss": loss}


def _build_head(header: dict, tensors: Mapping[str, Tensor], known: Mapping[str, type]) -> Head:
    mixer = decode(header["mixer"], tensors, known, Mixer)
    activation = decode(header["activation"], tensors, known, Activation)
    return Head(mixer, activation, *(tensors[name] for name in ("u", "v", "gate", "block")), pool=header["pool"])


def _build_solution(header: dict, tensors: Mapping[str, Tensor], known: Mapping[str, type]) -> Solution:
    parts = [decode(header[kind.__name__.lower()], tensors, known, kind) for kind in (Mixer, Activation, Loss)]
    program = ConvexProgram(*parts, tensors["tokens"], tensors["targets"], header["beta"], header["pool"])
    if not isinstance(program.activation, ReLU):
        places = _same_gates(program, tensors["operator.gate"], tensors["operator.block"])
        tensors = {**tensors, "block": places[tensors["block"]]}
    factors = Factors(tensors["u"], tensors["v"], tensors["block"])
    # the factors must fit the mixer, and the numbers must be theirs
    audit, primal, dual = (
        certify(program, program.head(factors), tensors.get("dual_point")),
        header["primal"],
        _dual(header),
    )
    slack = ROUNDING * max(abs(audit.primal), abs(primal), abs(dual) if math.isfinite(dual) else 0)
    if not (audit.primal <= primal + slack and audit.dual >= dual - slack):
        raise ValueError(f"it says dual={dual!r}, primal={primal!r}, but its network and its dual point give {audit!r}")
    stored = certificate_from_tensors(header, tensors)
    if audit.dual < dual or audit.primal > primal:
        stored = dataclasses.replace(audit, primal=max(primal, audit.primal), dual=min(dual, audit.dual))
    return result_from_tensors(program, header, tensors, stored)


def _same_gates(program: ConvexProgram, gate: Tensor, block: Tensor) -> Tensor:
    """(K,) where the lifted blocks of the file are among the rebuilt program's."""
    here = list(zip(program.operator.gate.tolist(), program.operator.block.tolist(), strict=True))
    return torch.tensor(
        [here.index(pair) for pair in zip(gate.tolist(), block.tolist(), strict=True)],
        dtype=torch.long,
        device=gate.device,
    )


def _classes(base: type) -> list[type]:
    """The concrete classes that the module of an abstract class defines."""
    return [
        kind
        for kind in vars(sys.modules[base.__module__]).values()
        if inspect.isclass(kind) and issubclass(kind, base) and not inspect.isabstract(kind)
    ]
