"""Write the demo's data set: the colour photographs that scikit-image and scikit-learn ship, cut into overlapping
patches.

python launch/demo_photographs.py FOLDER

The split is by photograph, never by patch: chelsea (a cat) and china (a temple) are seen in validation alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image

TRAIN = ("astronaut", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry", "retina", "flower")
VALIDATION = ("chelsea", "china")
PATCH = 64  # pixels a side
SHORT_SIDES = (160, 256, 384)  # each photograph at several sizes, so that a patch shows parts and wholes


def photograph(name: str) -> Image.Image:
    pixels = load_sample_image(f"{name}.jpg") if name in ("china", "flower") else getattr(data, name)()
    return Image.fromarray(np.asarray(pixels)[..., :3])


def patches(image: Image.Image, stride: int) -> list[Image.Image]:
    """Square patches at every size in SHORT_SIDES, `stride` pixels apart."""
    cut = []
    for short in SHORT_SIDES:
        scale = short / min(image.size)
        resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        for top in range(0, resized.height - PATCH + 1, stride):
            for left in range(0, resized.width - PATCH + 1, stride):
                cut.append(resized.crop((left, top, left + PATCH, top + PATCH)))
    return cut


def main(folder: Path) -> None:
    for split, names, stride in (("train", TRAIN, PATCH // 2), ("validation", VALIDATION, PATCH)):
        for name in names:
            target = folder / split / name
            target.mkdir(parents=True, exist_ok=True)
            cut = patches(photograph(name), stride)
            for index, patch in enumerate(cut):
                patch.save(target / f"{index:04d}.png")
            print(f"{split}/{name}: {len(cut)} patches of {PATCH} px")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
