"""Files of tensors that are whole or not there: written under a temporary name and renamed, and never containing code."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

#: of the header in a file's metadata
KEY = "cvxlib"


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict) -> None:
    """Write tensors with a JSON header to a temporary name beside ``path``, and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        safetensors.torch.save_file(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
            temporary,
            metadata={KEY: json.dumps(header)},
        )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict]:
    """The tensors and the header of a file; ``ValueError`` if it is damaged or foreign."""
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as stream:
            header = json.loads((stream.metadata() or {})[KEY])
            return {name: stream.get_tensor(name) for name in stream.keys()}, header
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or foreign ({error})") from None


def digest(words: object, *tensors: Tensor | None) -> str:
    """A fingerprint of words and tensors."""
    state = hashlib.blake2b(repr(words).encode(), digest_size=16)
    for tensor in tensors:
        if tensor is not None:
            state.update(repr((tensor.shape, tensor.dtype)).encode())
            for part in tensor.detach().split(1024):
                state.update(part.cpu().contiguous().numpy().data)
    return state.hexdigest()
