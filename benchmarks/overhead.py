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
from pathlib import Path

import torch
from torch import Tensor

from vqgan_accel.config import Config, load_config
from vqgan_accel.training import loop
from vqgan_accel.training.pace import Pace
from vqgan_accel.training.setup import Setup
from vqgan_accel.training.steps import discriminator_backward, generator_backward

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny import write_images

SIZES = {  # of the networks
    "the demo's": "configs/demo.yaml",
    "the recipe's": "configs/imagenet/standard_vqgan_cb1024_adaptive_R1.yaml",
}


def networks_alone(setup: Setup, config: Config, images: Tensor) -> None:
    """Forward and backward of the step that is about to come, and nothing kept of it."""
    plan, step = setup.plan, setup.state.progress.step
    adversarial = config.discriminator if plan.adversarial_at(step) else None
    made = generator_backward(
        setup.accelerator,
        setup.tokenizer,
        setup.perceptual,
        setup.discriminator,
        images,
        None,
        config.losses,
        adversarial,
    )
    if adversarial and setup.discriminator is not None and made.fake_logits is not None:
        discriminator_backward(
            setup.accelerator, setup.discriminator, images, made.fake_logits, adversarial, plan.r1_at(step)
        )
    setup.state.tokenizer.quantizer.discard_update()
    for optimizer in setup.state.optimizers.values():
        optimizer.zero_grad()


def measure(config: Config) -> tuple[list[float], list[float]]:
    """Seconds of each step in the loop, its logging included, and of its networks alone."""
    setups: list[Setup] = []
    batches: list[Tensor] = []
    in_loop: list[float] = []
    alone: list[float] = []
    began: list[float] = []

    class TimedPace(Pace):
        def begin_step(self) -> None:
            if began:
                in_loop.append(time.perf_counter() - began.pop())
            if batches:
                start = time.perf_counter()
                networks_alone(setups[0], config, batches.pop())
                alone.append(time.perf_counter() - start)
            began.append(time.perf_counter())
            super().begin_step()

    def set_up(*arguments: object) -> Setup:
        setups.append(originals[0](*arguments))
        return setups[0]

    def to_float(images: Tensor) -> Tensor:
        batches[:] = [originals[1](images)]
        return batches[0]

    originals = loop.set_up, loop.to_float
    loop.set_up, loop.to_float, loop.Pace = set_up, to_float, TimedPace  # type: ignore[assignment, misc]
    try:
        loop.train(config)
    finally:
        (loop.set_up, loop.to_float), loop.Pace = originals, Pace  # type: ignore[misc]
    return in_loop[1:], alone  # the first step has no images to compare with, and warms up


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
