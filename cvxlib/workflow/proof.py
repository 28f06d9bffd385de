r"""Proof files: a certificate's lower bound with all that is needed to prove it again, by a checker that shares no code with the package.

A file is an uncompressed ``.npz``: a JSON header, the dual point, the gates' masks as bits, and tokens and targets or only their SHA-256.
What it proves and how is said in :mod:`cvxlib.verify`, which reads it: ``python -m cvxlib.verify FILE [TOKENS TARGETS]``.
It is imported only where it is used, so that this command finds it not imported already.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cvxlib.ground.checks import instance, require, wrong_value
from cvxlib.ground.one_process import require_alone
from cvxlib.ground.provenance import VERSION
from cvxlib.model import mixers
from cvxlib.model.activations import GatedReLU, Linear
from cvxlib.model.losses import CrossEntropy, SquaredLoss
from cvxlib.operators.lifted import chunks
from cvxlib.program.certificate import Certificate
from cvxlib.program.program import ConvexProgram

if TYPE_CHECKING:
    from cvxlib import verify


def save_certificate(
    path: str | os.PathLike, program: ConvexProgram, certificate: Certificate, *, include_data: bool = True
) -> verify.Proof:
    r"""Write a proof of a certificate's lower bound, for anybody to check: ``python -m cvxlib.verify FILE``.

    The checker reads the file before it gets its name, so that one that proves less than it says is never left behind.

    Args:
        path: the file, by custom ``*.npz``; an existing one is replaced at once or not at all.
        program: the program that the certificate is about, with gates that are fixed.
        certificate: an interval for it, with a dual point, computed in float64 (as :func:`cvxlib.certify` does).
        include_data: write tokens and targets; where they are large or private, their SHA-256 alone, and whoever checks the file gives
            them as ``.npy`` files of the same dtype.

    Returns:
        What the checker proved: ``bound``, ``claimed`` and a ``statement`` in words.

    Raises:
        TypeError: an argument of another kind.
        ValueError: the checker does not know the mixer, activation or loss, other processes hold samples, the certificate has no
            dual point, or its bound is more than the checker can prove.
        OSError: the file cannot be written.

    Source: book, chapter "Certificates"; proof files and small checkers are the manner of VIPR (Cheung, Gleixner and Steffy 2017).
    """
    from cvxlib import verify

    instance("program", program, ConvexProgram, "a ConvexProgram")
    instance("certificate", certificate, Certificate, "a Certificate")
    require_alone("program", program.reduce)
    _require_known(program)
    require(certificate.dual_point is not None, "certificate", "one with a dual point", "one whose bound needs none")
    rows = (len(program.rows), program.mixer.outputs)
    require(tuple(certificate.dual_point.shape) == rows, "certificate", f"a dual point {rows}", certificate.dual_point)

    data = {"tokens": program.tokens.cpu().numpy(), "targets": program.targets.cpu().numpy()}
    arrays = {"dual": certificate.dual_point.detach().double().cpu().numpy()}
    if isinstance(program.activation, GatedReLU):
        arrays["masks"] = _packed_masks(program)
    header = _header(program, certificate, arrays | data)
    if include_data:
        arrays |= data
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as stream:
            np.savez(stream, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
        proof = verify.check(temporary, **data)
        os.replace(temporary, path)
    except verify.Refused as refusal:
        expected = "a bound that the checker can prove (cvxlib.certify computes one in float64)"
        raise wrong_value("certificate", expected, f"one of which it says: {refusal}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return proof


def _require_known(program: ConvexProgram) -> None:
    """Raise the ``ValueError`` unless the checker knows the program's parts, which are of exactly these classes."""
    from cvxlib import verify

    known = [getattr(mixers, name) for name in verify.FIELDS]
    for part, kinds, expected in (
        (program.mixer, known, "a mixer of this package: the checker knows no other"),
        (program.activation, (Linear, GatedReLU), "Linear or GatedReLU: the gates of a ReLU are not fixed"),
        (program.loss, (SquaredLoss, CrossEntropy), "SquaredLoss or CrossEntropy: the checker knows no other"),
    ):
        require(type(part) in kinds, "program", expected, part)


def _packed_masks(program: ConvexProgram) -> np.ndarray:
    """(B, P, n, bytes) the gates that the program is about, as bits."""
    blocks = []
    for b, seen in enumerate(program.mixer.split(program.tokens)):
        parts, start = [], 0
        for part in chunks(program.mixer, seen, 9 * program.gates.count):
            masks = program.frozen.masks(b, start, start + len(part))  # (n, P, a, h)
            start += len(part)
            parts.append(np.packbits(masks.transpose(0, 1).flatten(2).cpu().numpy(), axis=2))
        blocks.append(np.concatenate(parts, 1))
    return np.stack(blocks)


def _header(program: ConvexProgram, certificate: Certificate, arrays: dict[str, np.ndarray]) -> dict:
    """What the file is about, in words and numbers, and a digest of them."""
    from cvxlib import verify

    mixer = program.mixer
    header = {
        "format": verify.MARK,
        "version": VERSION,
        "mixer": {"name": type(mixer).__name__, **dataclasses.asdict(mixer)},
        "gates": program.gates.count,
        "loss": type(program.loss).__name__,
        "pool": program.pool,
        "beta": float(program.beta).hex(),
        "bound": float(certificate.dual).hex(),
        "level": certificate.assurance.name.lower(),
        "sha256": {name: verify.fingerprint(array) for name, array in arrays.items()},
    }
    return header | {"digest": hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()}
