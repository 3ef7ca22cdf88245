"""What the errors of torch that are not our bugs mean, in a sentence: memory, data workers, other processes, a cluster.

torch has few types for these, so they are known by their words. The cause is always told as torch has it: only for a
process that is gone there is nothing to add, for its own message says why.
"""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist

from vqgan_accel.interruption import ANOTHER_HAS_STOPPED

LONGEST_CAUSE = 300  # characters of torch's own words

OUT_OF_MEMORY = (
    "out of memory",  # CUDA, HIP, XPU, MPS, NCCL
    "can't allocate memory",  # torch's allocator on a CPU
    "not enough memory",
    "Cannot allocate memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_INITIALIZED",  # what cuDNN and cuBLAS say where no memory is left for their own state
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
)
GONE = (  # a process that was there has ended
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection closed by remote peer",
    "Broken pipe",
    "remote process exited",
    "Application timeout caused pair closure",  # gloo, where a process takes its end of the line with it
)
# what is in the error -> what to do, the first that fits
CLUSTER = (
    (
        ("EADDRINUSE", "address already in use"),
        "the port is taken, by another run or by what is left of one: end it, or take another port (MASTER_PORT, "
        "--main_process_port of accelerate, --master_port of torchrun)",
    ),
    (
        ("Duplicate GPU detected",),
        "two processes were given the same GPU: start as many as the machine has GPUs, each with a local rank of its "
        "own (--num_processes, CUDA_VISIBLE_DEVICES)",
    ),
    (
        ("invalid device ordinal",),
        "a process asks for a GPU that it cannot see: start as many as the machine has GPUs (--num_processes, "
        "CUDA_VISIBLE_DEVICES)",
    ),
    (
        ("no socket interface found", "unable to find address for"),
        "no network interface fits: name the one that joins the machines, as `ip addr` lists it (NCCL_SOCKET_IFNAME, "
        "GLOO_SOCKET_IFNAME)",
    ),
    (
        ("a name that is not known here", "resolve hostname"),
        "give the first machine's address (MASTER_ADDR, --main_process_ip)",
    ),
    (
        ("No space left on device", "/dev/shm"),
        "NCCL shares memory in /dev/shm: give the container more of it (docker run --shm-size=16g or --ipc=host)",
    ),
    (
        ("caught collective operation timeout", "timed out waiting"),
        "another process has not come to the same point in time: it hangs, or works at something that takes longer "
        "than training.timeout_minutes",
    ),
    (
        ("timed out", "timeout", "connection refused", "connectFullMesh"),
        "not every process has come: was each started, with the same address, port and number of processes, and is the "
        "port open between the machines?",
    ),
    (
        ("No backend type associated with device type",),
        "a tensor on one kind of device met processes that talk over another kind: this is a bug of vqgan_accel",
    ),
)


def known_failure(error: RuntimeError) -> str | None:
    """A sentence for an error that is not our bug, None for one that may be."""
    words = " ".join(str(error).split())
    if isinstance(error, torch.cuda.OutOfMemoryError) or contains(words, OUT_OF_MEMORY):
        return (
            "out of memory; raise training.gradient_accumulation_steps, which keeps the batch, or set "
            "training.mixed_precision=bf16, or lower training.total_batch_size (outside of training: "
            f"evaluation.batch_size) ({words[:LONGEST_CAUSE]})"
        )
    if "DataLoader worker" in words:
        return "a data worker died; if the machine is short of memory, lower data.workers"
    if "does not have a deterministic implementation" in words:
        return f"training.deterministic cannot be kept here; set it to false ({words[:LONGEST_CAUSE]})"
    if isinstance(error, dist.DistError) or "gloo/" in words or "NCCL" in words:
        return failure_between_processes(words)
    return None


def failure_between_processes(words: str) -> str:
    """words: the error's own."""
    if contains(words, GONE):
        return ANOTHER_HAS_STOPPED
    cause = words[words.rfind("Last error:") :] if "Last error:" in words else words
    told = f"the processes cannot work together ({cause[:LONGEST_CAUSE]}; {meeting_point()})"
    advice = next((advice for parts, advice in CLUSTER if contains(words + told, parts)), None)
    return f"{told}; {advice or 'NCCL_DEBUG=INFO and TORCH_DISTRIBUTED_DEBUG=DETAIL say more'}"


def meeting_point() -> str:
    """Which process this is, and where it meets the others."""
    address, port = os.environ.get("MASTER_ADDR", "no MASTER_ADDR"), os.environ.get("MASTER_PORT", "no MASTER_PORT")
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    place = f"process {rank} of {size} meets the others at {address}:{port}"
    try:
        socket.getaddrinfo(address, None)
    except OSError:  # torch itself says of this only that it has waited too long
        place += ", a name that is not known here"
    return place


def contains(words: str, parts: tuple[str, ...]) -> bool:
    return any(part.lower() in words.lower() for part in parts)
