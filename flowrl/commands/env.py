"""`flowrl env`: what a bug report needs to know, on any machine, however broken.

Versions come from the packages' metadata, so that a package which does not import is still listed;
torch alone is imported, and if that fails the reason is a line of the output.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from flowrl import __version__

PACKAGES = (
    "torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "safetensors",
    "timm", "open-clip-torch", "vector-quantize-pytorch", "wandb", "tensorboard", "pydantic",
    "omegaconf", "optuna", "typer", "rich", "numpy", "scipy", "scikit-image", "pillow",
    "matplotlib",
)  # fmt: skip
VARIABLES = (
    "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "WANDB_MODE", "WORLD_SIZE",
    "PYTORCH_CUDA_ALLOC_CONF",
)  # fmt: skip


def run() -> None:
    """Print `describe_environment` to standard output, aligned."""
    rows = list(describe_environment())
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def describe_environment() -> Iterator[tuple[str, str]]:
    """Pairs of a name and what this machine has of it; nothing in here raises."""
    yield "flowrl", __version__
    yield "commit", _commit()
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "platform", platform.platform()
    yield "cpu cores", f"{usable_cores()} usable of {os.cpu_count()}"
    yield from _torch()
    for name in PACKAGES:
        yield name, _version(name)
    for name in VARIABLES:
        yield name, os.environ.get(name, "not set")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def usable_cores() -> int | None:
    """CPU cores that this process may use; None where the system does not say."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _commit() -> str:
    """The commit of the checkout that flowrl runs from, with '+' for local changes."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return "not a checkout"
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    if head.returncode:
        return f"unknown ({head.stderr.partition(chr(10))[0]})"
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _torch() -> Iterator[tuple[str, str]]:
    try:
        import torch
    except Exception as error:  # a broken install raises anything from OSError to RuntimeError
        reason = (str(error).splitlines() or [""])[0]
        yield "torch import", f"failed: {type(error).__name__}: {reason}"
        return
    yield "torch threads", f"{torch.get_num_threads()} ({torch.get_num_interop_threads()} interop)"
    yield "CUDA build", torch.version.cuda or "none"
    if not torch.cuda.is_available():
        yield "CUDA devices", "none"
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"CUDA device {index}", f"{device.name}, {device.total_memory / 2**30:.1f} GiB"
