"""Quantizers, one idea a file; `build_quantizer` is the one place that knows them all."""

from __future__ import annotations

from vqgan_accel.config import (
    EMAQuantizerConfig,
    EntropyQuantizerConfig,
    GumbelQuantizerConfig,
    QuantizerConfig,
    StandardQuantizerConfig,
)
from vqgan_accel.models.quantizers.base import CodebookQuantizer, Quantizer, QuantizerOutput, count_codes
from vqgan_accel.models.quantizers.ema import EMAQuantizer
from vqgan_accel.models.quantizers.entropy import EntropyQuantizer
from vqgan_accel.models.quantizers.gumbel import GumbelQuantizer
from vqgan_accel.models.quantizers.nearest import StandardQuantizer

__all__ = [
    "CodebookQuantizer",
    "EMAQuantizer",
    "EntropyQuantizer",
    "GumbelQuantizer",
    "Quantizer",
    "QuantizerOutput",
    "StandardQuantizer",
    "build_quantizer",
    "count_codes",
]


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    size = (config.num_codes, config.embedding_dim)
    match config:
        case StandardQuantizerConfig():
            return StandardQuantizer(*size, config.commitment_cost, config.l2_normalize)
        case EMAQuantizerConfig():
            return EMAQuantizer(*size, config.commitment_cost, config.decay, config.epsilon, config.l2_normalize)
        case EntropyQuantizerConfig():
            return EntropyQuantizer(
                *size,
                config.commitment_cost,
                config.entropy_ratio,
                config.entropy_temperature,
                config.entropy_target,
                config.l2_normalize,
            )
        case GumbelQuantizerConfig():
            return GumbelQuantizer(*size, config.straight_through, config.hidden_channels)
