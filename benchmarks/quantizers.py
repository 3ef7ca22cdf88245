"""Every quantizer on the demo's photographs, at equal steps and about equal bits: all of configs/quantizers/.

    python benchmarks/quantizers.py [--steps 270] [--seed 0] [--only ema fsq] [--data demo_photographs]

The demo's networks and losses without the discriminator, whose noise would hide what quantizers differ in. Measured on
the demo's validation photographs: PSNR, the distance in EfficientNet-Lite0, which nothing is trained on (lower is
better; it needs the `dev` extra), codes in use and perplexity, the error of quantization, bits a pixel by the codes'
own frequencies, and seconds a step beside those of `standard`. The photographs: python launch/demo_photographs.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from vqgan_accel import evaluate, load_config, train
from vqgan_accel.recipes import recipes

METRICS = ("psnr", "efficientnet_distance", "codebook")


def measured(recipe: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    steps = arguments.steps
    overrides = [
        f"output_dir={folder / recipe}",
        f"data.path={arguments.data}",
        f"seed={arguments.seed}",
        "discriminator=null",
        "losses.perceptual_weight=0",
        f"training.max_steps={steps}",
        f"training.validate_every={steps} steps",
        f"training.checkpoint_every={steps} steps",
        "training.validation_metrics=[psnr]",
        f"evaluation.metrics=[{', '.join(METRICS)}]",
    ]
    config = load_config(f"quantizers/{recipe}", overrides)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run = train(config)
        results = evaluate(run)["results"]
    times = [json.loads(line)["step_time"] for line in (run / "clock.jsonl").read_text().splitlines()]
    return results | {"step_time": statistics.median(times), "codes": config.quantizer.num_codes}


def row(recipe: str, found: dict[str, Any], reference: float | None) -> list[str]:
    return [
        recipe,
        f"{found['psnr']:.2f}",
        f"{found['efficientnet_distance']:.4f}",
        f"{found['codebook_usage']:.0f}",
        f"{found['perplexity']:.0f} of {found['codes']}",
        f"{found['quantization_error']:.3f}" if "quantization_error" in found else "",
        f"{found['bits_per_pixel']:.3f}",
        f"{found['step_time'] / reference:.2f}" if reference else "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=270)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="of the names in configs/quantizers/")
    parser.add_argument("--data", default="demo_photographs")
    arguments = parser.parse_args()
    names = [name.removeprefix("quantizers/") for name in recipes() if name.startswith("quantizers/")]
    names = sorted(names, key=lambda name: name != "standard")  # the first, which others are compared with
    print(
        f"torch {torch.__version__} with {torch.get_num_threads()} threads, {arguments.steps} steps of 8 photographs\n"
    )
    head = [
        "recipe",
        "PSNR, dB",
        "EfficientNet distance",
        "codes in use, %",
        "perplexity",
        "error",
        "bits/pixel",
        "time",
    ]
    print(f"| {' | '.join(head)} |\n| {' | '.join(['---'] * len(head))} |")
    reference = None
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            if arguments.only and name not in arguments.only:
                continue
            found = measured(name, arguments, Path(folder))
            reference = reference or found["step_time"]
            print(f"| {' | '.join(row(name, found, reference))} |", flush=True)


if __name__ == "__main__":
    main()
