"""What the oldest versions of setup.cfg lack. An entry goes when its version becomes the lower bound."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version


def accelerator_device() -> torch.device | None:
    """This machine's GPU, or what it has in its place; None on a CPU, and for Apple's GPU, which has no float64."""
    if hasattr(torch, "accelerator"):  # torch 2.6
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return None if found is None or found.type == "mps" else found
    return torch.device("cuda") if torch.cuda.is_available() else None


def uncompiled() -> AbstractContextManager[None]:
    """Compiled modules run as they were before. torch < 2.6 cannot: there a batch of a new size is compiled for."""
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()


def tf32_switches() -> list[tuple[Any, str, Any, Any]]:
    """What lets convolutions (the first) and all else of float32 be rounded to TF32: owner, attribute, its value for
    TF32 and for IEEE. torch 2.9 gave it other names, and refuses to read the old ones where the new ones differ."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(cudnn, "conv"):
        return [(owner, "fp32_precision", "tf32", "ieee") for owner in (cudnn.conv, cudnn.rnn, products)]
    return [(owner, "allow_tf32", True, False) for owner in (cudnn, products)]


@contextmanager
def safe_global(name: type) -> Iterator[None]:
    """One class that torch.load may meet: torch.serialization.safe_globals, which torch 2.5 brought."""
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([name])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def destroy_process_group() -> None:
    """torch.distributed's, which before torch 2.8 waits for gloo's threads and keeps Python's lock meanwhile: one that
    still holds the last collective's tensors needs it to let them go (pytorch pull request 154976)."""
    if Version(torch.__version__) < Version("2.8"):
        time.sleep(0.1)  # it gets the lock and is done
    dist.destroy_process_group()
