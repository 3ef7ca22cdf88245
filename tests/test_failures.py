"""What the first errors of a new cluster are told as: the cause in torch's words, the address, and what to look at."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Rank, from_a_new_process
from tiny import tiny_config

from vqgan_accel.config import save_config
from vqgan_accel.failures import known_failure
from vqgan_accel.interruption import StopRequest
from vqgan_accel.status import status
from vqgan_accel.training import loop
from vqgan_accel.training.setup import Run

REPOSITORY = Path(__file__).parent.parent
GONE = "another process of this run has stopped; its own message says why"
PAIR = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534]"
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, {kind}, NCCL version 2.28.9\n{text}"


def nccl(kind: str, last: str) -> dist.DistBackendError:
    return dist.DistBackendError(NCCL.format(kind=kind, text=f"ncclX: what it means.\nLast error:\n{last}"))


@pytest.fixture(autouse=True)
def meeting_point(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "23456", "RANK": "3", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"{PAIR} Connection closed by peer [127.0.0.1]:4321"),
        RuntimeError(f"{PAIR} Read error [127.0.0.1]:4321: Connection reset by peer"),
        nccl("remote process exited or there was a network error", "socketProgress: Connection closed by remote peer"),
    ],
)
def test_of_a_process_that_is_gone_its_own_message_is_the_cause(error: RuntimeError) -> None:
    assert known_failure(error) == GONE


@pytest.mark.parametrize(
    ("error", "cause", "advice"),
    [
        (
            dist.DistNetworkError(
                "The server socket has failed to listen. port: 23456, name: EADDRINUSE, message: ..."
            ),
            "port: 23456, name: EADDRINUSE",
            "the port is taken",
        ),
        (
            nccl("invalid usage", "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b0"),
            "rank 1 and rank 0 both on CUDA device 1b0",
            "two processes were given the same GPU",
        ),
        (
            nccl("internal error", "Bootstrap : no socket interface found"),
            "no socket interface found",
            "NCCL_SOCKET_IFNAME",
        ),
        (
            RuntimeError("[enforce fail at gloo/transport/tcp/device.cc:84] Unable to find address for: eth77"),
            "eth77",
            "GLOO_SOCKET_IFNAME",
        ),
        (
            dist.DistNetworkError(
                "The client socket has timed out after 600000ms while trying to connect to (gpu07, 1)."
            ),
            "timed out after 600000ms while trying to connect to (gpu07, 1)",
            "not every process has come",
        ),
        (
            dist.DistStoreError("Timed out after 601 seconds waiting for clients. 7/8 clients joined."),
            "7/8 clients joined",
            "not every process has come",
        ),
        (
            nccl("unhandled system error", "Error while creating shared memory segment /dev/shm/nccl-1 (size 9637888)"),
            "shared memory segment",
            "--shm-size",
        ),
        (
            dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)"),
            "SeqNum=7",
            "training.timeout_minutes",
        ),
        (nccl("unhandled cuda error", "Cuda failure 999 'unknown error'"), "Cuda failure 999", "NCCL_DEBUG=INFO"),
    ],
)
def test_any_other_error_between_processes_is_told_with_its_cause_its_place_and_what_to_do(
    error: RuntimeError, cause: str, advice: str
) -> None:
    sentence = known_failure(error)
    assert sentence is not None and GONE not in sentence
    assert cause in sentence and advice in sentence
    assert "process 3 of 8 meets the others at 127.0.0.1:23456" in sentence


def test_a_first_machine_whose_name_is_not_known_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-machine.invalid")
    sentence = known_failure(dist.DistNetworkError("The client socket has timed out after 600000ms"))
    assert "no-such-machine.invalid:23456, a name that is not known here" in str(sentence)
    assert "MASTER_ADDR, --main_process_ip" in str(sentence)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
        nccl("unhandled cuda error", "Cuda failure 2 'out of memory'"),
    ],
)
def test_a_lack_of_memory_is_told_in_all_its_spellings_with_the_keys_that_help(error: RuntimeError) -> None:
    sentence = str(known_failure(error))
    assert sentence.startswith("out of memory; ")
    for key in ("training.gradient_accumulation_steps", "training.mixed_precision", "training.total_batch_size"):
        assert key in sentence
    assert " ".join(str(error).split())[:100] in sentence


def test_what_torch_cannot_do_in_a_fixed_order_names_the_setting() -> None:
    error = RuntimeError("foo_backward_cuda does not have a deterministic implementation, but you set ...")
    assert "training.deterministic" in str(known_failure(error)) and "foo_backward_cuda" in str(known_failure(error))


def test_an_error_that_may_be_ours_has_no_sentence() -> None:
    assert known_failure(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")) is None


@pytest.mark.slow
def test_a_taken_port_is_told_by_the_command_line(tmp_path: Path) -> None:
    save_config(tiny_config(tmp_path, training={"total_batch_size": 8}), tmp_path / "tiny.yaml")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        started = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = subprocess.run(
            [sys.executable, REPOSITORY / "train.py", tmp_path / "tiny.yaml"],
            env=os.environ | started | {"ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 2
    assert "error (process 0): the processes cannot work together (" in done.stderr
    assert "EADDRINUSE" in done.stderr and f"127.0.0.1:{port}" in done.stderr and "the port is taken" in done.stderr
    assert GONE not in done.stderr


def step_that_breaks(me: Rank) -> None:
    original = loop.take_step

    def take_step(run: Run, stop_request: StopRequest) -> loop.StepTaken:
        if me.rank == 2 and run.progress.step == 1:
            raise KeyError("what went wrong")
        return original(run, stop_request)

    loop.take_step = take_step


@pytest.mark.slow
def test_a_process_that_breaks_ends_all_others_and_they_point_at_its_error(tmp_path: Path) -> None:
    settings = {"total_batch_size": 8, "max_steps": 50, "log_every": 1}
    save_config(tiny_config(tmp_path, training=settings), tmp_path / "tiny.yaml")
    outcome = from_a_new_process([str(tmp_path / "tiny.yaml")], step_that_breaks, number=4)
    assert not outcome.hung
    assert outcome.codes == [2, 2, 1, 2]  # a traceback, and sentences
    assert "KeyError: 'what went wrong'" in outcome.output and outcome.output.count(GONE) == 3
    assert status(tmp_path / "run").word == "interrupted"
