"""Images per second of `vqgan-accel tokenize` beside a bare loop of `encode` on images that are in memory already.

    python benchmarks/tokenize_speed.py [CONFIG] [--size 128] [--workers 1] [--repeats 3]

The tokenizer has the recipe's networks and random weights; the images are the 512 photographs (JPEG) of loading.py.
tokenize's time is that of the whole call: reading the weights, decoding and cropping images, writing parquet. The two
take turns; the fastest turn of each is shown.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path

import torch
from loading import BATCH, IMAGES, write_photographs
from step_flops import RECIPE
from step_time import fastest

from vqgan_accel.config import load_config
from vqgan_accel.data.opening import evaluation_loader, open_source
from vqgan_accel.data.views import to_float
from vqgan_accel.models.build import build_tokenizer
from vqgan_accel.tokens.write import tokenize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=RECIPE)
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder / "images", short_side=256)
        settings = [
            f"data.image_size={arguments.size}",
            f"data.path={folder / 'images'}",
            f"data.workers={arguments.workers}",
            f"evaluation.batch_size={BATCH}",
            "evaluation.split=train",
        ]
        config = load_config(arguments.config, settings)
        tokenizer = build_tokenizer(config).eval()
        tokenizer.save_pretrained(folder / "tokenizer")
        source = open_source(config.data, "train")
        images = [batch["image"] for batch in evaluation_loader(source, config.data, BATCH, 0, 1, pin_memory=False)]
        turns = iter(range(arguments.repeats + 1))

        def bare() -> None:
            for batch in images:
                tokenizer.encode(to_float(batch))

        def whole() -> None:
            tokenize(folder / "tokenizer", output=folder / f"tokens{next(turns)}", overrides=settings)

        seconds = fastest({"bare": bare, "tokenize": whole}, arguments.repeats)
    print(
        f"{arguments.config} at {arguments.size} px, {IMAGES} images, {arguments.workers} workers; torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads of {platform.machine()}"
    )
    for what, time in seconds.items():
        print(f"{what:10}{IMAGES / time:8.1f} images/s")
    print(f"ratio     {seconds['bare'] / seconds['tokenize']:8.3f}")


if __name__ == "__main__":
    main()
