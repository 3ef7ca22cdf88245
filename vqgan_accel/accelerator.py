"""The one place that starts Accelerate: one device, or DDP on any number of nodes; what a GAN was not proven on is
refused."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from accelerate.utils import DynamoBackend

from vqgan_accel.compat import accelerator_device
from vqgan_accel.interruption import parent_command


def start_accelerator(
    mixed_precision: Literal["auto", "no", "bf16"],
    timeout_minutes: float,
    gradient_accumulation_steps: int = 1,
    trackers: Sequence[str] = (),
    folder: str | None = None,
) -> Accelerator:
    """`auto` takes what `accelerate launch` says; timeout_minutes: as long may one process keep the others waiting.
    Raises ValueError for precisions and strategies that are not supported."""
    # torch prefers a new name for DDP's broadcast_buffers, which Accelerate does not pass on yet
    warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
    # Accelerate's DDP asks for the GPU with the number of the local rank, also where each process sees one alone, as
    # number 0 (SLURM's --gpus-per-task, --gpu-bind). Where two processes would share a GPU, NCCL says so.
    if torch.cuda.device_count() == 1 and "LOCAL_RANK" in os.environ:
        os.environ["LOCAL_RANK"] = "0"
    accelerator = Accelerator(
        cpu=accelerator_device() is None,  # without it torchrun's processes on a CPU would not find each other
        mixed_precision=None if mixed_precision == "auto" else mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                # Buffers are made equal by what fills them; an unused parameter would be a bug, not a case to search
                # for.
                broadcast_buffers=False,
                find_unused_parameters=False,
                gradient_as_bucket_view=True,  # what was reduced need not be copied back
            ),
            InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes)),
        ],
    )
    require_all_processes(accelerator)
    require_proven(accelerator)
    return accelerator


def require_all_processes(accelerator: Accelerator) -> None:
    """ValueError where Accelerate does not see all that were started; on a CPU it may start fewer than it was asked
    for, which is said."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise ValueError(
            f"{started} processes were started, but Accelerate sees {accelerator.num_processes}: they would "
            "train apart; on a CPU start them with torchrun (launch/two_cpu_processes.sh)"
        )
    if started == 1 and (asked := processes_asked_for(parent_command())) > 1:
        accelerator.print(
            f"{asked} processes were asked for, and on a CPU `accelerate launch` starts one (accelerate issue 2741): "
            f"this run has one; for {asked}: torchrun --standalone --nproc_per_node {asked} -m vqgan_accel train ..."
        )


def require_proven(accelerator: Accelerator) -> None:
    """ValueError for strategies, compilers and precisions that a GAN was not proven with."""
    supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in supported:
        raise ValueError(
            f"{accelerator.distributed_type.value} is not supported: with two alternating networks only one device and "
            "DDP (MULTI_GPU, MULTI_CPU) are proven; change the accelerate config's distributed_type"
        )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError(
            f"dynamo_backend {accelerator.state.dynamo_plugin.backend.value} (from the accelerate config or "
            "ACCELERATE_DYNAMO_BACKEND) would compile the discriminator, whose R1 penalty torch.compile cannot "
            "differentiate twice; set it to no, and training.compile=true, which compiles the other networks"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed precision {accelerator.mixed_precision} (from the accelerate config) is not supported: one "
            "gradient scaler would serve two networks' optimizers; use bf16 or no"
        )


def processes_asked_for(command: Sequence[str]) -> int:
    """Of `accelerate launch` with these words and the config file that it reads; 1 where it is another program."""
    words = list(command)
    program = next((place for place, word in enumerate(words) if Path(word).name == "accelerate"), None)
    if program is None or "launch" not in words[program + 1 : program + 2]:
        return 1
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    arguments = launch_command_parser().parse_args(words[program + 2 :])
    if arguments.num_processes is not None:
        return arguments.num_processes
    file = arguments.config_file or default_config_file
    return load_config_from_file(file).num_processes if Path(file).is_file() else 1
