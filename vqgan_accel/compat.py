"""What the oldest versions of setup.cfg lack. An entry goes when its version becomes the lower bound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def accelerator_device() -> torch.device | None:
    """This machine's GPU, or what it has in its place; None on a CPU."""
    if hasattr(torch, "accelerator"):  # torch 2.6
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cuda") if torch.cuda.is_available() else None


def uncompiled() -> AbstractContextManager[None]:
    """Compiled modules run as they were before. torch < 2.6 cannot: there a batch of a new size is compiled for."""
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()


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
