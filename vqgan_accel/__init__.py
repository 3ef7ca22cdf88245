"""Image tokenizers (VQ-VAE, VQ-GAN) on Hugging Face Accelerate.

    from vqgan_accel import load_config, load_tokenizer, train

    run = train(load_config("imagenet/standard_vqgan_cb1024_adaptive_R1", ["data.path=IMAGENET"]))
    codes = load_tokenizer(run).encode(images)

These names are the public interface; `help()` of each says shapes, ranges, units and errors. Each is imported when it
is first asked for, so that `import vqgan_accel` itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqgan_accel.config import Config, load_config
    from vqgan_accel.evaluation.evaluate import evaluate
    from vqgan_accel.evaluation.reconstruct import reconstruct
    from vqgan_accel.models.tokenizer import ImageTokenizer, load_tokenizer
    from vqgan_accel.tokens.read import load_tokens
    from vqgan_accel.tokens.write import tokenize
    from vqgan_accel.training.loop import train

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ImageTokenizer",
    "evaluate",
    "load_config",
    "load_tokenizer",
    "load_tokens",
    "reconstruct",
    "tokenize",
    "train",
]

_HOMES = {
    "Config": "config",
    "ImageTokenizer": "models.tokenizer",
    "evaluate": "evaluation.evaluate",
    "load_config": "config",
    "load_tokenizer": "models.tokenizer",
    "load_tokens": "tokens.read",
    "reconstruct": "evaluation.reconstruct",
    "tokenize": "tokens.write",
    "train": "training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # the next time it is found without asking here
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
