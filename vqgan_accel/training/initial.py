"""Fine-tuning: the weights that a run begins with."""

from __future__ import annotations

from torch import nn

from vqgan_accel.config import Config
from vqgan_accel.models.build import layout_differences
from vqgan_accel.models.opening import open_tokenizer
from vqgan_accel.models.tokenizer import ImageTokenizer
from vqgan_accel.models.weights import fit_state, load_state
from vqgan_accel.run_folder import DISCRIMINATOR

SETTING = "training.init_from"


def begin_with(folder: str, config: Config, tokenizer: ImageTokenizer, discriminator: nn.Module | None) -> list[str]:
    """Fill freshly built networks with those of a run (its newest checkpoint, averaged where it has averages), a
    checkpoint, an import or a saved tokenizer. Returns lines that say what was found.

    A discriminator is looked for beside the tokenizer's folder; without one it stays fresh. FileNotFoundError or
    ValueError where there is no tokenizer, or one of another shape.
    """
    try:
        opened = open_tokenizer(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{SETTING}: {error}") from None
    if keys := layout_differences(config, opened.tokenizer):
        raise ValueError(f"{SETTING}: {opened.folder} has another {', '.join(keys)}; give this run the same")
    tokenizer.load_state_dict(opened.tokenizer.state_dict())
    lines = [f"beginning with the tokenizer of {opened.folder}"]
    if discriminator is not None:
        file = opened.folder.parent / DISCRIMINATOR
        if file.is_file():
            fit_state(discriminator, load_state(file, SETTING), SETTING, str(file))
        lines.append(f"beginning with the discriminator of {file}" if file.is_file() else "with a fresh discriminator")
    return lines
