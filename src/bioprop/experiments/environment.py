"""The machine and the versions, which a figure depends on besides its settings."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

CLONE = Path(__file__).parents[3]


def processor() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def hardware(device: torch.device) -> str:
    """Processor, threads of arithmetic, and the GPU where one is used."""
    threads = torch.get_num_threads()
    cpu = f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{torch.cuda.get_device_name(device)}; {cpu}" if device.type == "cuda" else cpu


def versions() -> str:
    """Versions of bioprop (and the commit, in a clone), torch, Lightning and Python."""
    own = " ".join(filter(None, ("bioprop", _installed("bioprop"), _commit())))
    rest = f"torch {torch.__version__}, pytorch-lightning {_installed('pytorch-lightning')}"
    return f"{own}, {rest}, Python {platform.python_version()}"


def _installed(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:  # imported from a path, not installed
        return ""


def _commit() -> str:
    """The clone's commit in parentheses, marked where files differ from it; empty outside a clone."""
    if not (CLONE / ".git").exists():
        return ""
    command = ["git", "-C", str(CLONE), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"({described})"
