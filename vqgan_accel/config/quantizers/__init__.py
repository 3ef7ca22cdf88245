"""The quantizers' sections; their union is the list of all quantizers there are.

A new one may lie beside its module, in one file. These do not, so that a misspelt key is told before torch is imported.
"""

from typing import Annotated

from vqgan_accel.config.quantizers.gumbel import GumbelQuantizerConfig
from vqgan_accel.config.quantizers.ibq import IBQQuantizerConfig
from vqgan_accel.config.quantizers.lookup_free import BSQQuantizerConfig, FSQQuantizerConfig, LFQQuantizerConfig
from vqgan_accel.config.quantizers.nearest import (
    EMAQuantizerConfig,
    EntropyQuantizerConfig,
    KeptCodebookConfig,
    NearestCodeConfig,
    SimVQQuantizerConfig,
    StandardQuantizerConfig,
)
from vqgan_accel.config.quantizers.several import ProductQuantizerConfig, ResidualQuantizerConfig
from vqgan_accel.sections import ByType

__all__ = [
    "BSQQuantizerConfig",
    "EMAQuantizerConfig",
    "EntropyQuantizerConfig",
    "FSQQuantizerConfig",
    "GumbelQuantizerConfig",
    "IBQQuantizerConfig",
    "KeptCodebookConfig",
    "LFQQuantizerConfig",
    "NearestCodeConfig",
    "ProductQuantizerConfig",
    "QuantizerConfig",
    "QuantizerField",
    "ResidualQuantizerConfig",
    "SimVQQuantizerConfig",
    "StandardQuantizerConfig",
]

QuantizerConfig = (
    StandardQuantizerConfig
    | EMAQuantizerConfig
    | EntropyQuantizerConfig
    | GumbelQuantizerConfig
    | ResidualQuantizerConfig
    | ProductQuantizerConfig
    | SimVQQuantizerConfig
    | FSQQuantizerConfig
    | LFQQuantizerConfig
    | BSQQuantizerConfig
    | IBQQuantizerConfig
)
QuantizerField = Annotated[QuantizerConfig, ByType()]
