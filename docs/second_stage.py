"""From a run, or from another trainer's checkpoint, to the data set of a second stage. CI runs it.

    python docs/second_stage.py OUTPUT --run RUN
    python docs/second_stage.py OUTPUT [--checkpoint CKPT --config YAML] [--images FOLDER]

By default the checkpoint is a small one that the PyTorch-Lightning trainer wrote (tests/golden, random weights), and
the images are photographs that scikit-image and scikit-learn ship (`pip install .[demo]`). Each step is also a command;
it is printed above what the step says.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from vqgan_accel import load_tokenizer, load_tokens, reconstruct, tokenize
from vqgan_accel.evaluation.figures import reconstruction_grid
from vqgan_accel.interop.lightning import import_lightning
from vqgan_accel.tokens.read import read_manifest

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "lightning_standard_head"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a folder that is not there yet")
    parser.add_argument("--run", type=Path, help="a run of yours: its tokenizer, and the images that it was trained on")
    parser.add_argument("--checkpoint", type=Path, default=GOLDEN.with_suffix(".ckpt"))
    parser.add_argument("--config", type=Path, default=GOLDEN.with_suffix(".yaml"))
    parser.add_argument("--images", type=Path, help="with a folder train/, and in it one folder for each class")
    arguments = parser.parse_args()
    output = arguments.output
    if output.exists():
        sys.exit(f"{output} is there already; give another folder")
    if arguments.images and not any(path.is_dir() for path in (arguments.images / "train").glob("*")):
        sys.exit(f"{arguments.images / 'train'} has no folders, of which each would be a class")
    output.mkdir(parents=True)
    if arguments.run:
        tokenizer, settings = arguments.run, ["evaluation.split=train", "data.workers=0"]
        print(f"\n$ vqgan-accel tokenize {tokenizer} --views flip --output tokens")
    else:
        tokenizer = output / "imported"
        images = arguments.images or photographs(output / "images")
        settings = [f"data.path={images}", "evaluation.split=train", "data.workers=0"]
        import_and_look(arguments.checkpoint, arguments.config, images, output)
        print("\n$ vqgan-accel tokenize imported --data images --views flip --output tokens")
    manifest = tokenize(tokenizer, output=output / "tokens", views="flip", overrides=settings)
    print(f"{manifest['rows']} grids of {manifest['code_grid']} codes below {manifest['num_codes']}")

    print('\n>>> load_tokens("tokens")')
    second_stage(tokenizer, output)


def import_and_look(checkpoint: Path, config: Path, images: Path, output: Path) -> None:
    print(f"\n$ vqgan-accel import lightning {checkpoint.name} --config {config.name} --output imported")
    print("\n".join(import_lightning(checkpoint, config, output / "imported")))

    print("\n$ vqgan-accel reconstruct imported images --output reconstructions")
    for row in reconstruct(output / "imported", inputs=[images], output=output / "reconstructions", tile=1024):
        print(f"{row['width']} x {row['height']} px: PSNR {row['psnr']:.2f} dB, {row['bits_per_pixel']:.3f} bits/pixel")


def second_stage(tokenizer: Path, output: Path) -> None:
    """What a transformer's training loop would read, the smallest model of it, and the way back to pixels."""
    rows, manifest = load_tokens(output / "tokens"), read_manifest(output / "tokens")
    print(rows)
    loader = DataLoader(rows.with_format("numpy"), batch_size=8, collate_fn=to_batch)  # type: ignore[arg-type]
    num_codes = manifest["num_codes"]
    pairs = torch.ones(num_codes, num_codes)  # how often a code follows another, row by row; with one of each for free
    for codes in loader:
        pairs.index_put_((codes[:, :-1], codes[:, 1:]), torch.ones(()), accumulate=True)
    bits = -(pairs / pairs.sum() * (pairs / pairs.sum(1, keepdim=True)).log2()).sum()
    print(f"a code takes {torch.tensor(num_codes).log2():.2f} bits, and {bits:.2f} once the one before it is known")

    pixels = load_tokenizer(tokenizer).decode(next(iter(loader)).view(-1, *manifest["code_grid"]))
    reconstruction_grid(pixels[::2], pixels[1::2]).save(output / "decoded.png")
    shown = rows[: len(pixels) : 2]
    names = rows.features["label"].names if "label" in rows.features else None
    called = [names[label] for label in shown["label"]] if names else shown["file_name"]
    print(f"decoded.png: {', '.join(dict.fromkeys(called))} from their codes, and from those of their mirror images")


def to_batch(rows: list[dict[str, object]]) -> torch.Tensor:
    """codes (B, h*w), int64: torch computes little with uint16."""
    return torch.stack([torch.as_tensor(row["codes"]).long() for row in rows])


def photographs(folder: Path) -> Path:
    """folder/train/NAME/*.png: each photograph in four parts."""
    sys.path.insert(0, str(ROOT / "launch"))
    from demo_photographs import VALIDATION, photograph

    for name in ("astronaut", "coffee", *VALIDATION):
        image = photograph(name)
        (folder / "train" / name).mkdir(parents=True)
        width, height = image.width // 2, image.height // 2
        for part, (left, top) in enumerate([(0, 0), (width, 0), (0, height), (width, height)]):
            image.crop((left, top, left + width, top + height)).save(folder / "train" / name / f"{part}.png")
    return folder


if __name__ == "__main__":
    main()
