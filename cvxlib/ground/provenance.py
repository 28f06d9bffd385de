"""Where a result came from: machine, versions, seed; and writing it down without ever leaving half a file."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TypedDict

import torch

from cvxlib.ground.tensor_files import replacing


def _own_version() -> str:
    try:
        return metadata.version("cvxlib")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "0+unknown"


#: this package's version, which is written in pyproject.toml alone
VERSION = _own_version()
#: packages whose versions a result may depend on
PACKAGES = ("cvxlib", "torch", "numpy", "cvxpy", "scikit-learn", "timm", "torchvision")


class Provenance(TypedDict):
    """Where a result came from, ready for JSON."""

    machine: str
    system: str
    versions: dict[str, str]
    seed: int


def provenance(seed: int, device: torch.device | str = "cpu") -> Provenance:
    """The machine, the versions and the seed behind a result, ready for JSON.

    Args:
        seed: of the run.
        device: where it ran; a CUDA device is given by its name.
    """
    device = torch.device(device)
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    machine = f"{_processor()}, {os.cpu_count()} cores"
    if device.type == "cuda":
        machine += f"; {torch.cuda.get_device_name(device)}"
    return {
        "machine": machine,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "seed": seed,
    }


def write_json(path: str | Path, data: Mapping[str, object]) -> Path:
    """Write JSON to a temporary name beside ``path`` and rename it: a reader sees the old file or the new one, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        json.dump(data, stream, indent=1, allow_nan=False)
        stream.write("\n")
    return path


def _processor() -> str:
    """The processor's marketing name where the system tells it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
