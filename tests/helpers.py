"""What several test files share: golden numbers, one measure of error, and tokenizers small enough to run at once."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor, nn

from vqgan_accel.config import QuantizerConfig
from vqgan_accel.models.tokenizer import ImageTokenizer

GOLDEN = Path(__file__).parent / "golden"
# a layout for tiny_tokenizer(**TAMING), or for a config's `autoencoder`
TAMING = {"type": "taming", "channels": 32, "channel_multipliers": [1, 2, 2], "num_res_blocks": 1, "latent_channels": 8}
# On networks this small threads gain nothing, and where other jobs hold a core each operation waits for its threads:
# the same test took 0.2 s with one thread and 21 s with two.
torch.set_num_threads(1)


def mostly_slow(cases: Collection[Any], *others: Any, fast: Collection[Any] = ()) -> list[Any]:
    """Parameters of a test that takes seconds for each: `fast` are run by -m fast, too, `others` by -m "not slow", and
    the rest are slow, and still run by tests/mutations."""
    assert {*others, *fast} <= set(cases)

    def marked(case: Any) -> Any:
        marks = [pytest.mark.seconds] if case in others else [pytest.mark.slow, pytest.mark.mutations]
        return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks)

    return [case if case in fast else marked(case) for case in cases]


def reset_accelerate() -> None:
    """Its state is of the whole process: without this the next Accelerator would have the last one's precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def load_golden(name: str) -> dict[str, Tensor]:
    """Inputs `in.*`, outputs `out.*`, gradients `grad.*` and, under their own names, weights."""
    return load_file(GOLDEN / f"{name}.safetensors")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def check_gradients(actual: nn.Module, expected: nn.Module, tolerance: float) -> None:
    """Every parameter has a gradient in both, and the same one.

    The measure is the parameter's largest gradient, or a hundredth of the network's largest: a bias before a norm with
    one channel a group has a gradient of zero, of which only rounding is left.
    """
    gradients = {}
    for (name, parameter), other in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None, name
        gradients[name] = (parameter.grad, other.grad)
    largest = max(other.abs().max().item() for _, other in gradients.values())
    assert largest > 0
    for name, (gradient, other) in gradients.items():
        scale = max(other.abs().max().item(), largest / 100)
        assert (gradient - other).abs().max().item() <= tolerance * scale, name


def tiny_tokenizer(quantizer: QuantizerConfig, image_size: int = 16, **autoencoder: object) -> ImageTokenizer:
    """Random weights from a fixed seed, stride 4, and latents spread as wide as the codebook so that many codes are in
    use."""
    torch.manual_seed(0)
    layout = {"channels": 32, "channel_multipliers": [1, 2], "num_res_blocks": 1, **autoencoder}
    tokenizer = ImageTokenizer(layout, quantizer.model_dump(mode="json"), image_size)
    spread_codebook(tokenizer.quantizer)
    for parameter in tokenizer.parameters():  # biases and norms start at 0 and 1, which would hide a missing one
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return tokenizer


@torch.no_grad()
def spread_codebook(quantizer: nn.Module) -> None:
    """Codes of unit scale in place of U(-1/K, 1/K)."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*quantizer.named_parameters(), *quantizer.named_buffers()]:
        if name.rpartition(".")[2] in ("codebook", "sums"):  # its own, or one of several quantizers'
            tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
