"""What the training loop costs beside its networks: seconds of a step in the loop over seconds of the same forward and
backward passes alone.

    python benchmarks/overhead.py [--steps 40] [--log-every 10]

A real run of `vqgan_accel.training.loop` on image files, with loading, gradient norms, optimizers, the codebook, the
average of the weights, the check for non-finite values and logging. Before each of its steps the same networks do
forward and backward on the images of the step before, timed apart; their gradients are thrown away. Validation and
checkpoints are left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqgan_accel.config import Config, load_config
from vqgan_accel.data.views import Batch, to_float
from vqgan_accel.interruption import StopRequest
from vqgan_accel.training.loop import adversary_at, train_to_the_end
from vqgan_accel.training.round import tokenizer_backward
from vqgan_accel.training.setup import Run, open_run

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny import write_images

SIZES = {  # of the networks
    "the demo's": "configs/demo.yaml",
    "the recipe's": "configs/imagenet/standard_vqgan_cb1024_adaptive_R1.yaml",
}


def networks_alone(run: Run, images: Tensor) -> None:
    """Forward and backward of the step that is about to come, and nothing kept of it."""
    networks, adversary = run.networks, adversary_at(run, run.progress.step)
    made = tokenizer_backward(
        run.accelerator, networks.tokenizer, networks.reconstruction_loss, adversary, images, None
    )
    if adversary is not None and made.verdict is not None:
        adversary.learn(images, made.verdict)
    networks.tokenizer.network.quantizer.discard_update()
    for learner in networks.learners:
        learner.optimizer.zero_grad()


class TimedPace:
    """A run's Pace that also notes the seconds of each step in the loop, its logging included, and, between two steps,
    those of the networks alone."""

    def __init__(self, run: Run) -> None:
        self.run, self.pace = run, run.pace
        self.batch: Batch | None = None
        self.in_loop: list[float] = []
        self.alone: list[float] = []
        self.began: float | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pace, name)

    def next(self, batches: Iterator[Batch]) -> Batch:
        self.batch = self.pace.next(batches)
        return self.batch

    def begin_step(self) -> None:
        if self.began is not None:
            self.in_loop.append(time.perf_counter() - self.began)
        if self.batch is not None:
            start = time.perf_counter()
            networks_alone(self.run, to_float(self.batch["image"]))
            self.alone.append(time.perf_counter() - start)
        self.began = time.perf_counter()
        self.pace.begin_step()


def measure(config: Config) -> tuple[list[float], list[float]]:
    """Seconds of each step in the loop, its logging included, and of its networks alone."""
    with open_run(config) as run:
        timed = run.pace = TimedPace(run)
        train_to_the_end(run, StopRequest())
    return timed.in_loop[1:], timed.alone  # the first step has no images to compare with, and warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--log-every", type=int, default=10)
    arguments = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for split, number in (("train", 64), ("validation", 4)):
            write_images(Path(folder) / "images" / split, number, 64)
        for title, file in SIZES.items():
            config = load_config(
                file,
                [
                    f"output_dir={folder}/{Path(file).stem}",
                    f"data.path={folder}/images",
                    "data.image_size=64",
                    "data.workers=0",
                    "losses.perceptual_weight=0",
                    "discriminator.start=0 steps",
                    "training.total_batch_size=8",
                    "training.ema_decay=0.99",
                    f"training.max_steps={arguments.steps}",
                    f"training.log_every={arguments.log_every}",
                    f"training.validate_every={arguments.steps} steps",
                    f"training.checkpoint_every={arguments.steps} steps",
                    "training.validation_metrics=[psnr]",
                ],
            )
            in_loop, alone = measure(config)
            a, b = statistics.median(in_loop), statistics.median(alone)
            lines.append(f"{title:16}{a:10.4f}{b:14.4f}{a / b:10.3f}{1e3 * (a - b):17.1f}")
    print(f"\n{'networks':16}{'in the loop':>10}{'alone':>14}{'ratio':>10}{'difference, ms':>17}")
    print("\n".join(lines))
    print(
        f"medians of {arguments.steps - 2} steps, seconds, 64 px, batch 8, torch with {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
