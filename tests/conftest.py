"""What all tests run with."""

import os

# One thread: on networks this small more gain nothing, and waiting costs far more where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# The files that take minutes begin first: where two share the work, none of them is left to the last alone.
LONG = {f"test_{name}.py" for name in ("world_size", "faults", "device", "gpu_check", "training", "launch")}


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not any(item.get_closest_marker(mark) for mark in ("slow", "seconds")):
            item.add_marker(pytest.mark.fast)
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power, and a checkpoint waits for a dozen files. (Processes of their own do wait.)"""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
