"""What evaluation.protocol moves: one tokenizer, the same photographs, measured as each laboratory measures.

    python benchmarks/protocols.py RUN [--windows 200]

The photographs are windows of about 250 x 190 pixels, cut at random places from those that the demo's training has not
seen, so that every crop has something to resize. Each line is what `evaluate.py RUN --data WINDOWS
evaluation.protocol=...` gives.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import runpy
import tempfile
from pathlib import Path

import numpy as np

from vqgan_accel.data.protocols import PROTOCOLS
from vqgan_accel.evaluation.evaluate import evaluate

PHOTOGRAPHS = runpy.run_path(str(Path(__file__).parent.parent / "launch" / "demo_photographs.py"))
METRICS = ["psnr", "ssim", "fd_mobilenet"]


def write_windows(folder: Path, number: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = [PHOTOGRAPHS["photograph"](name) for name in PHOTOGRAPHS["VALIDATION"]]
    for index in range(number):
        image = images[index % len(images)]
        width, height = rng.integers(230, 271), rng.integers(180, 201)
        left, top = rng.integers(image.width - width), rng.integers(image.height - height)
        image.crop((left, top, left + width, top + height)).save(folder / f"{index:04d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--windows", type=int, default=200)
    options = parser.parse_args()
    print(f"| evaluation.protocol | {' | '.join(METRICS)} | fingerprint |\n| --- |{' ---: |' * len(METRICS)} --- |")
    with tempfile.TemporaryDirectory() as folder:
        write_windows(Path(folder) / "validation", options.windows)
        for name in PROTOCOLS:
            overrides = [f"evaluation.protocol={name}", f"evaluation.metrics={METRICS}".replace("'", "")]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                report = evaluate(options.run, data=folder, output=Path(folder) / name, overrides=overrides)
            found = " | ".join(f"{report['results'][metric]:.5g}" for metric in METRICS)
            print(f"| `{name}` | {found} | {report['fingerprint']} |", flush=True)


if __name__ == "__main__":
    main()
