"""What a report of a fault needs to say: ``cvxlib.show_versions()``, or ``python -m cvxlib.versions`` in a shell."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import numpy as np
import torch

#: what the package needs, then what its extras add, by the names that pip knows
REQUIRED = ("torch", "numpy", "scipy", "tqdm", "safetensors")
OPTIONAL = (
    "scikit-learn",
    "cvxpy",
    "clarabel",
    "timm",
    "torchvision",
    "torchmetrics",
    "matplotlib",
    "pyarrow",
    "pyscnn",
    "jupyter-book",
    "sphinx",
    "ipykernel",
    "papermill",
    "pytest",
)
#: settings that change how many threads run, or which device is seen
SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def show_versions() -> None:
    """Print the versions, devices, thread counts and linear algebra libraries that results may depend on."""
    for title, rows in {
        "versions": {name: _version(name) for name in ("cvxlib", *REQUIRED, *OPTIONAL)},
        "system": _system(),
        "devices": _devices(),
        "threads": _threads(),
        "linear algebra": _linear_algebra(),
    }.items():
        print(f"{title}:")
        for name, value in rows.items():
            print(f"  {name}: {value}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _system() -> dict[str, str]:
    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "machine": platform.machine(),
    }


def _devices() -> dict[str, str]:
    cuda = torch.cuda.is_available()
    found = {f"cuda:{k}": torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count() if cuda else 0)}
    return {
        "cpu": f"{os.cpu_count()} logical cores",
        "CUDA": f"available, built for {torch.version.cuda}" if cuda else f"none (built for {torch.version.cuda})",
        **found,
        "MPS": "available" if torch.backends.mps.is_available() else "none",
    }


def _threads() -> dict[str, int | str]:
    settings = {name: os.environ.get(name, "not set") for name in SETTINGS}
    return {"torch": torch.get_num_threads(), "torch between operations": torch.get_num_interop_threads(), **settings}


def _linear_algebra() -> dict[str, str]:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "torch": "MKL" if torch.backends.mkl.is_available() else "LAPACK" if torch._C.has_lapack else "none",
        "NumPy": f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip(),
    }


if __name__ == "__main__":
    show_versions()
