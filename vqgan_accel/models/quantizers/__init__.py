"""Quantizers, one idea a file; the sections of `vqgan_accel/config/quantizers/` build them."""

from __future__ import annotations

from vqgan_accel.models.quantizers.base import (
    CodebookQuantizer,
    Quantizer,
    QuantizerOutput,
    count_all_codes,
    count_codes,
)
from vqgan_accel.models.quantizers.bsq import BSQQuantizer
from vqgan_accel.models.quantizers.ema import EMAQuantizer
from vqgan_accel.models.quantizers.entropy import EntropyQuantizer
from vqgan_accel.models.quantizers.fsq import FSQQuantizer
from vqgan_accel.models.quantizers.gumbel import GumbelQuantizer
from vqgan_accel.models.quantizers.ibq import IBQQuantizer
from vqgan_accel.models.quantizers.lfq import LFQQuantizer
from vqgan_accel.models.quantizers.nearest import StandardQuantizer
from vqgan_accel.models.quantizers.product import ProductQuantizer
from vqgan_accel.models.quantizers.residual import ResidualQuantizer
from vqgan_accel.models.quantizers.simvq import SimVQQuantizer

__all__ = [
    "BSQQuantizer",
    "CodebookQuantizer",
    "EMAQuantizer",
    "EntropyQuantizer",
    "FSQQuantizer",
    "GumbelQuantizer",
    "IBQQuantizer",
    "LFQQuantizer",
    "ProductQuantizer",
    "Quantizer",
    "QuantizerOutput",
    "ResidualQuantizer",
    "SimVQQuantizer",
    "StandardQuantizer",
    "count_all_codes",
    "count_codes",
]
