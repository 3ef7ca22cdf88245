"""What all tests run with."""

import os

# One thread: on networks this small more gain nothing, and waiting costs far more where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power, and a checkpoint waits for a dozen files. (Processes of their own do wait.)"""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
