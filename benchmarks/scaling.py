"""What many GPUs would cost: bytes on the wire, measured; how much of them backward passes hide, simulated.

    python benchmarks/scaling.py [CONFIG] [--size 256] [--batch 4]

One real step under DDP on this CPU notes when each gradient bucket of each network is ready, as a share of its backward
pass, and how large it is. A simulated network then sends the buckets one after another while an assumed GPU computes: a
bucket begins when it is ready and the one before it has gone; what is still on its way when the backward pass ends is
waited for. An all-reduce of n bytes over P processes takes 2 (P - 1) / P n / bandwidth and a latency. What else an
update sends is small and waited for: a latency each. Everything about GPUs here is an assumption, printed with the
result; nothing of it was measured.
"""

import argparse
import os
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from one_round import Game
from step_flops import CASES, COUNTED, RECIPE, build, counted, halves
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vqgan_accel.config import load_config
from vqgan_accel.losses.perceptual import perceptual_shell
from vqgan_accel.models.build import build_discriminator, build_tokenizer

IMAGES_PER_GPU = 32
OTHER_REDUCTIONS = 6  # of an update, at most: losses, lambda's two gradients, use of the codes, EMA's counts and sums
GPU_RATES = {"as the seed ran": 50e12, "fast": 125e12}  # FLOP/s: 10.2 A100-hours an epoch; 40 % of an A100's bf16 rate


class Wire(NamedTuple):
    name: str
    processes: int
    bandwidth: float  # bytes/s of a ring all-reduce ("bus bandwidth")
    latency: float  # seconds of one all-reduce


WIRES = [
    Wire("8 A100, NVLink", 8, 200e9, 50e-6),
    Wire("8 x 8, 8 HDR InfiniBand ports a node", 64, 150e9, 100e-6),
    Wire("8 x 8, 1 HDR InfiniBand port a node", 64, 20e9, 100e-6),
    Wire("128 x 8, 8 HDR InfiniBand ports a node", 1024, 150e9, 400e-6),
    Wire("128 x 8, 1 HDR InfiniBand port a node", 1024, 20e9, 400e-6),
]


@dataclass
class Bucket:
    ready: float  # share of the backward pass
    size: int  # bytes


class Recorder:
    """When the buckets of a network's gradient are ready, and how large they are."""

    def __init__(self, network: DistributedDataParallel) -> None:
        self.ready: list[tuple[float, int]] = []
        network.register_comm_hook(None, self.note)

    def note(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        gradient = bucket.buffer()
        self.ready.append((time.perf_counter(), gradient.numel() * gradient.element_size()))
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(gradient)
        return future


class NotedBackward(Accelerator):
    """An Accelerator that notes when each backward pass began and ended, and lets DDP wait though it is one process."""

    def no_sync(self, model: DistributedDataParallel) -> AbstractContextManager[None]:
        return model.no_sync()

    def backward(self, loss: torch.Tensor, **settings: Any) -> None:
        self.spans: list[tuple[float, float]] = [*getattr(self, "spans", []), (time.perf_counter(), 0.0)]
        super().backward(loss, **settings)
        self.spans[-1] = (self.spans[-1][0], time.perf_counter())


def buckets_of_a_step(config_file: str, size: int, batch: int) -> dict[str, list[Bucket]]:
    config = load_config(config_file, [f"data.image_size={size}"])
    assert config.discriminator is not None
    perceptual = perceptual_shell(config)
    networks: list[nn.Module | None] = [build_tokenizer(config), build_discriminator(config)]
    accelerator = NotedBackward(cpu=True)
    tokenizer, discriminator = (DistributedDataParallel(network) for network in networks if network is not None)
    recorders = {"tokenizer": Recorder(tokenizer), "discriminator": Recorder(discriminator)}
    images = torch.rand(batch, 3, size, size) * 2 - 1
    for _ in range(2):  # DDP lays its buckets out anew after the first
        accelerator.spans = []
        for recorder in recorders.values():
            recorder.ready.clear()
        game = Game(accelerator, tokenizer, config.losses, perceptual, discriminator, config.discriminator)
        game.second_half(images, game.first_half(images))
    _, *spans = accelerator.spans  # of the discriminator's half on reconstructions, which sends nothing
    return {
        name: [Bucket((ready - begun) / (ended - begun), size) for ready, size in recorder.ready]
        for (name, recorder), (begun, ended) in zip(recorders.items(), spans, strict=True)
    }


def sending(bucket: Bucket, wire: Wire) -> float:
    """Seconds of its all-reduce."""
    return 2 * (wire.processes - 1) / wire.processes * bucket.size / wire.bandwidth + wire.latency


def waited(buckets: list[Bucket], backward: float, wire: Wire) -> float:
    """Seconds between the end of a backward pass of `backward` seconds and the arrival of its last bucket."""
    free = 0.0
    for bucket in buckets:
        free = max(free, bucket.ready * backward) + sending(bucket, wire)
    return max(0.0, free - backward)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=RECIPE)
    parser.add_argument("--size", type=int, default=256, help="pixels a side of the step on this CPU")
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo")
    buckets = buckets_of_a_step(arguments.config, arguments.size, arguments.batch)
    dist.destroy_process_group()
    print("measured, of one update")
    for name, found in buckets.items():
        ready = ", ".join(f"{bucket.ready:.0%}" for bucket in found)
        print(f"  {name:14}{sum(b.size for b in found) / 1e6:8.1f} MB in {len(found)} buckets, ready at {ready}")

    config = load_config(arguments.config)
    (alone, _), (first, second) = (
        [1e9 * counted(half) for half in halves(config, case, build(config, case, COUNTED), plain=False)]
        for case in (CASES[0], CASES[3])  # the tokenizer by itself, and with the adaptive weight
    )
    backwards = {"tokenizer": alone[1], "discriminator": second[1]}  # FLOP an image
    total = (first + second).sum()
    print(
        f"\nassumed: {total / 1e12:.3f} TFLOP an image of {config.data.image_size} px, at a rate that few images keep"
    )
    for name, rate in GPU_RATES.items():
        print(f"  a GPU '{name}': {rate / 1e12:.0f} TFLOP/s")
    for wire in WIRES:
        print(f"  {wire.name}: {wire.bandwidth / 1e9:.0f} GB/s, {1e6 * wire.latency:.0f} us an all-reduce")
    group, batch = config.discriminator.group[1] if config.discriminator else 1, config.training.total_batch_size
    for title, images in (
        (f"{IMAGES_PER_GPU} images a GPU", lambda processes: IMAGES_PER_GPU),
        (f"the recipe's {batch} images in all", lambda processes: batch // processes),
    ):
        print(f"\n{title:40}{'GPU':>17}{'step, ms':>10}{'sent, ms':>10}{'waited, ms':>12}{'efficiency':>12}")
        for wire in WIRES:
            number = images(wire.processes)
            if number < group:
                print(f"{wire.name:40}{f'{number} images a GPU, and {group} are compared with one another':>61}")
                continue
            for name, rate in GPU_RATES.items():
                step = number * total / rate
                sent = sum(sending(bucket, wire) for found in buckets.values() for bucket in found)
                late = sum(waited(found, number * backwards[each] / rate, wire) for each, found in buckets.items())
                late += OTHER_REDUCTIONS * wire.latency
                figures = f"{1e3 * step:10.0f}{1e3 * sent:10.1f}{1e3 * late:12.2f}{step / (step + late):12.1%}"
                print(f"{wire.name:40}{name:>17}{figures}")


if __name__ == "__main__":
    main()
