"""The examples in the docstrings of the public names, run as they stand, in an empty folder.

    python tests/examples.py        with whatever vqgan_accel is installed, in the current folder

CI runs it with the wheel in an environment of its own; tests/test_api.py runs it with the checkout.
"""

from __future__ import annotations

import doctest
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import vqgan_accel

# in an order in which each finds what the ones before it have made
NAMES = (
    "load_config",
    "train",
    "load_tokenizer",
    "ImageTokenizer",
    "evaluate",
    "reconstruct",
    "tokenize",
    "load_tokens",
)
RECIPE = """
data: {path: photographs, image_size: 16, workers: 0}
autoencoder: {channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1}
quantizer: {type: standard, num_codes: 16, embedding_dim: 8}
losses: {perceptual_weight: 0}
training: {max_steps: 2, total_batch_size: 4, log_every: 1}
evaluation: {batch_size: 4, grid_images: 2}
"""


def prepare(folder: Path) -> None:
    """What the examples speak of: my.yaml and photographs/ with two splits, here of noise and 20 px a side."""
    (folder / "my.yaml").write_text(RECIPE)
    for split, number in (("train", 8), ("validation", 3)):
        (folder / "photographs" / split).mkdir(parents=True)
        for index in range(number):
            pixels = np.random.default_rng((index, number)).integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photographs" / split / f"{index}.png")


def run(names: tuple[str, ...] = NAMES) -> dict[str, int]:
    """Examples tried, by name. AssertionError, after doctest's report, where one gives something else."""
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scope = {name: getattr(vqgan_accel, name) for name in NAMES} | {"torch": torch, "images": images}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    tried = dict.fromkeys(names, 0)
    for name in names:
        for test in doctest.DocTestFinder(exclude_empty=True).find(scope[name], name):
            test.globs = scope  # as one session
            tried[name] += runner.run(test, clear_globs=False).attempted
    assert not runner.failures, f"{runner.failures} examples gave something else"
    return tried


def main() -> None:
    if any(Path.cwd().iterdir()):
        sys.exit(f"{Path.cwd()} is not empty: run this in an empty folder")
    warnings.simplefilter("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    prepare(Path.cwd())
    tried = run()
    print(f"{vqgan_accel.__file__}: {sum(tried.values())} examples of {len(tried)} names give what they say")


if __name__ == "__main__":
    main()
