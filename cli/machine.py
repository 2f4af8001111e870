"""What the command runs on: the device, the versions, and the backends by name."""

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from longspan.backends import Backend, Unsupported, load

from .page import Refused, refused


def find_device(name: str | None) -> torch.device:
    """Take the device that was asked for, or the GPU if there is one, or else the CPU.

    Raises:
        Refused: For a device that this machine does not have.
    """
    usable = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        refused("device", f"one of {', '.join(usable)} on this machine", repr(name))
    wanted = f"cuda:{device.index or 0}" if device.type == "cuda" else name
    if wanted not in usable:
        refused("device", f"one of {', '.join(usable)} on this machine", repr(name))
    return device


def load_backend(name: str) -> Backend:
    """Load a backend by name.

    Raises:
        Refused: For an unknown name, or one that this machine can never run.
    """
    try:
        return load(name)
    except ValueError as error:
        raise Refused(str(error)) from None
    except Unsupported as error:
        msg = f"backend {name!r} cannot run on this machine: {error}"
        raise Refused(msg) from None


def describe(device: torch.device) -> dict[str, Any]:
    """Name the device and the versions that a result depends on."""
    gpu = device.type == "cuda"
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": installed("triton"),
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def installed(package: str) -> str | None:
    """Version of a package, or None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def said(machine: dict[str, Any]) -> str:
    """Write the machine as one line."""
    triton = machine["triton"] or "not installed"
    return f"{machine['device_name']} ({machine['device']}) · torch {machine['torch']} · triton {triton}"
