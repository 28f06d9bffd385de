"""Files that are whole or not there: written under a temporary name and renamed, never containing code, and checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cvxlib.ground.checks import require
from cvxlib.ground.identity import feed

#: of the header and of the checksum in a file's metadata
KEY, CHECKSUM = "cvxlib", "checksum"
#: characters of a header; a longer one is not parsed
LONGEST_HEADER = 2**26


class Damaged(ValueError):
    """A file that cannot be read; ``reason`` says what it is instead."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged or foreign: {reason}")
        self.reason = reason


def is_there(path: str | os.PathLike) -> bool:
    """Whether there is a file; ``ValueError`` if there is something else, which to read might take for ever."""
    path = Path(path)
    require(not path.exists() or path.is_file(), str(path), "a file, or a name that is free", "what is no regular file")
    return path.exists()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path``, to be written to; it takes the place of ``path`` if the block ends without an error.

    A symbolic link stays, and the file that it points to is replaced. The file keeps its permissions, if it was there.

    Raises:
        ValueError: ``path`` is there and no regular file (a folder, a device, a pipe).
        OSError: the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    there = is_there(target)
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.part")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        if there:
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write tensors with a JSON header and a checksum over both.

    Raises:
        ValueError: ``path`` is there and no regular file.
        OSError: the file cannot be written.
    """
    text = json.dumps(header)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            metadata = {KEY: text, CHECKSUM: _checksum(text, tensors)}
            safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} cannot be written ({error})") from error


def read_tensors(
    path: Path, device: torch.device | str = "cpu", unchecked: Callable[[dict[str, Any]], bool] = lambda header: False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file.

    Args:
        path: the file.
        device: where the tensors go.
        unchecked: from the header, whether the file is of a kind that was once written without a checksum.

    Raises:
        Damaged: (a ``ValueError``) it is truncated or foreign, or its checksum tells that it has changed since it was written.
    """
    if not path.is_file():
        raise Damaged(path, "no regular file")
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}
    except (safetensors.SafetensorError, UnicodeDecodeError) as error:
        raise Damaged(path, f"a truncated or foreign one ({error})") from None
    if KEY not in metadata:
        raise Damaged(path, "a safetensors file of another origin")
    text = metadata[KEY]
    try:
        header = json.loads(text) if len(text) <= LONGEST_HEADER else None
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"one with a damaged header ({error})") from None
    if not isinstance(header, dict):
        raise Damaged(path, "one with a damaged header")
    if CHECKSUM in metadata or not unchecked(header):
        if metadata.get(CHECKSUM) != _checksum(text, tensors):
            raise Damaged(path, "one that has changed since it was written (its checksum does not agree)")
    return tensors, header


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    """Of the header's text, and of the tensors with their names."""
    state = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        state.update(json.dumps(name).encode())
        feed(state, tensors[name])
    return state.hexdigest()
