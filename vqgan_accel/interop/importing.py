"""What the importers share: another program's YAML file, read key by key, and the folder that an import becomes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from vqgan_accel.config import Config, save_config
from vqgan_accel.files import written_as_a_whole
from vqgan_accel.models.tokenizer import ImageTokenizer
from vqgan_accel.models.weights import read_safely
from vqgan_accel.run_folder import CONFIG, DISCRIMINATOR, TOKENIZER

REQUIRED = object()
WRAPPERS = ("module.", "_orig_mod.")


class Settings:
    """A YAML file of another program. FileNotFoundError or ValueError names the file, and the key that is wrong."""

    def __init__(self, file: Path) -> None:
        self.file = file
        if not file.is_file():
            raise FileNotFoundError(f"there is no YAML file at {file}")
        try:
            self.values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from None

    def take(self, key: str, kind: Callable[[Any], Any] = lambda value: value, default: Any = REQUIRED) -> Any:
        """What stands at a dotted key, as `kind`; where it is missing or null, `default`, if there is one."""
        values, missing = self.values, False
        for part in key.split("."):
            missing = not isinstance(values, dict) or part not in values
            values = None if missing else values[part]
        if values is None and default is not REQUIRED:
            return default
        if missing:
            raise ValueError(f"{self.file} is not a YAML file of that program: it has no '{key}'")
        try:
            return kind(values)
        except (TypeError, ValueError):
            raise ValueError(f"{self.file}: '{key}' is {values!r}, which is no {kind.__name__}") from None


def read_state_dict(checkpoint: Path, *known: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights by name, the whole checkpoint). `known`: names that the program's networks always have, and by which
    they are told from others.

    ValueError where the file cannot be read safely or holds something else.
    """
    found = read_safely(checkpoint, "the checkpoint")
    whole = found if isinstance(found, dict) else {}
    # LlamaGen's averaged weights before the others; or no more than the weights
    candidates = [
        tensors_by_name(part) for part in (whole.get("ema"), whole.get("state_dict"), whole.get("model"), whole)
    ]
    for weights in candidates:
        if all(name in weights for name in known):
            return weights, whole
    missing = next(name for name in known if all(name not in weights for weights in candidates) or name == known[-1])
    raise ValueError(f"{checkpoint} has no weights '{missing}': it is another program's checkpoint")


def tensors_by_name(part: object) -> dict[str, Tensor]:
    """What of a checkpoint's part is weights, without the prefixes of DistributedDataParallel and torch.compile."""
    items = part.items() if isinstance(part, dict) else ()
    weights = {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}
    while weights and (wrapper := next((w for w in WRAPPERS if all(name.startswith(w) for name in weights)), None)):
        weights = {name.removeprefix(wrapper): tensor for name, tensor in weights.items()}
    return weights


def numbers(values: Any) -> list[float]:
    return [float(value) for value in values]


def whole_numbers(values: Any) -> list[int]:
    return [int(value) for value in values]


def write_import(output: Path, config: Config, tokenizer: ImageTokenizer, discriminator: nn.Module | None) -> None:
    """output/config.yaml, output/tokenizer/ and, where there is one, output/discriminator.safetensors."""
    with written_as_a_whole(output) as partial:
        tokenizer.save_pretrained(partial / TOKENIZER)
        if discriminator is not None:
            save_file(discriminator.state_dict(), partial / DISCRIMINATOR)
        save_config(config, partial / CONFIG)
