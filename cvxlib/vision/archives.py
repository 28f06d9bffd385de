"""Archives: a download that resumes and is checked before it counts, and an unpacking that stays inside its folder."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import lzma
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from cvxlib.ground.checks import wrong_value

#: seconds without an answer, or without a byte, after which the network counts as absent
TIMEOUT = 5.0
_CHUNK = 1 << 16
Member = TypeVar("Member", tarfile.TarInfo, zipfile.ZipInfo)
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)


def checksum(path: Path, algorithm: str = "sha256") -> str:
    """The hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def obtain(url: str, path: Path, md5: str, *, download: bool = True, timeout: float = TIMEOUT) -> Path:
    """A published file: the one at ``path`` if it is whole, otherwise downloaded there.

    The bytes arrive in ``path`` with ``.part`` appended, where an interrupted download goes on the next time; the file takes
    its name only when its checksum is right.

    Args:
        url: where the file is published.
        path: where it is kept, or may be put by hand.
        md5: the checksum that its publisher states.
        download: whether the network may be used.
        timeout: seconds to wait for the server.

    Returns:
        ``path``.

    Raises:
        ValueError: the file, or what came over the network, has another checksum.
        FileNotFoundError: there is no file and ``download`` is off.
        ConnectionError: no connection, or it broke off.
    """
    if path.exists():
        if (found := checksum(path, "md5")) != md5:
            raise wrong_value(
                str(path), f"the whole file of {url}, MD5 {md5}", f"MD5 {found}; delete the file and run again"
            )
        return path
    if not download:
        raise FileNotFoundError(f"{path} does not exist; allow the download, or put the file of {url} there by hand")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    # a process that ended between the last byte and the renaming leaves a whole file
    if not (part.exists() and checksum(part, "md5") == md5):
        try:
            _fetch(url, part, timeout)
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if type(error) is URLError else error
            raise ConnectionError(
                f"{url} could not be downloaded ({reason}); run again with a network, which continues where it stopped, "
                f"or put the file at {path} by hand"
            ) from error
        if (found := checksum(part, "md5")) != md5:
            part.unlink()
            raise wrong_value(
                url, f"a file with MD5 {md5}", f"one with MD5 {found}; run again, or put the file at {path} by hand"
            )
    os.replace(part, path)
    return path


def _fetch(url: str, part: Path, timeout: float) -> None:
    """Append to ``part`` what it lacks of ``url``, or write it afresh where the server does not serve ranges."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "cvxlib"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urlopen(Request(url, headers=headers), timeout=timeout)
    except HTTPError as error:
        if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
        part.unlink()  # longer than the file itself
        return _fetch(url, part, timeout)
    with response:
        resumed = (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-")
        if response.status == HTTPStatus.PARTIAL_CONTENT and not resumed:
            raise ConnectionError("the server sent another range than the one asked for")
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        name = part.name.removesuffix(".part")
        with (
            part.open("ab" if resumed else "wb") as file,
            tqdm(desc=name, total=total, initial=have, unit="B", unit_scale=True) as bar,
        ):
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            if total is not None and file.tell() < total:
                raise ConnectionError(f"it stopped after {file.tell()} of {total} bytes")


def extract(archive: Path, folder: Path) -> Path:
    """Unpack a tar (plain or compressed) or zip archive below ``folder``, once for each content.

    The files are written under a temporary name that is then renamed, so the folder that is returned is whole. Only regular files
    and folders are taken: links, devices and paths that lead outside are refused.

    Args:
        archive: the file.
        folder: where the unpacked folder is kept.

    Returns:
        ``folder / key``, with the archive's SHA-256 as key.

    Raises:
        ValueError: not such an archive, a damaged one, or one with a member that is refused.
    """
    target = folder / checksum(archive)
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        try:
            if zipfile.is_zipfile(archive):
                _unzip(archive, whole)
            else:
                _untar(archive, whole)
        except _DAMAGED as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(":")
            raise wrong_value(str(archive), "a whole tar or zip archive", f"{reason}; fetch it anew") from error
        try:
            os.rename(whole, target)
        except OSError:
            if not target.exists():  # otherwise another process has unpacked the same content meanwhile
                raise
    return target


def _untar(archive: Path, folder: Path) -> None:
    def regular(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
        _refuse(archive, member.name, member.isfile() or member.isdir())
        return tarfile.data_filter(member, path)

    with tarfile.open(archive) as file:
        file.extractall(folder, members=_progress(file, archive), filter=regular)
        # tarfile takes the end of the file for the end of the archive, and leaves a compressor's checksum at its end unread
        if file.fileobj.tell() == file.offset:
            raise EOFError("the archive's end is missing")
        while file.fileobj.read(_CHUNK):
            pass


def _unzip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in _progress(file.infolist(), archive):
            _refuse(archive, member.filename, True)
            file.extract(member, folder)


def _refuse(archive: Path, name: str, regular: bool) -> None:
    path = PurePosixPath(name)
    if not regular or path.is_absolute() or ".." in path.parts:
        raise wrong_value(
            str(archive), "an archive of regular files and folders that stay inside it", f"member {name!r}"
        )


def _progress(members: Iterable[Member], archive: Path) -> Iterable[Member]:
    return tqdm(members, desc=f"unpacking {archive.name}", unit=" files", delay=1)
