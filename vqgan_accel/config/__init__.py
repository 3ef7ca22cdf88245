"""The typed schema of a run: YAML plus dotted overrides in, one validated object out.

`load_config("configs/demo.yaml", ["training.max_steps=200"])` raises `ValueError` with one sentence per mistake before
anything else starts. Everything that needs the data set's size or the number of processes is checked by
`vqgan_accel.training.plan`, still before the first step.
"""

from vqgan_accel.config.autoencoders import (
    GROUP_NORM_GROUPS,
    AutoencoderConfig,
    AutoencoderField,
    MaskGITConfig,
    TamingConfig,
)
from vqgan_accel.config.data import DataConfig
from vqgan_accel.config.discriminators import DiscriminatorConfig, StyleGAN2Config
from vqgan_accel.config.keys import config_keys, json_schema, key_lines
from vqgan_accel.config.losses import LossConfig
from vqgan_accel.config.metrics import LOWER_IS_BETTER, METRIC_RESULTS, UNITS, Metric, is_better
from vqgan_accel.config.quantizers import (
    EMAQuantizerConfig,
    EntropyQuantizerConfig,
    GumbelQuantizerConfig,
    QuantizerConfig,
    QuantizerField,
    StandardQuantizerConfig,
)
from vqgan_accel.config.reading import flat_config, literal, load_config, parse_config, save_config, validated
from vqgan_accel.config.schema import Config, EvaluationConfig, TrackingConfig, WeightFiles
from vqgan_accel.config.sentences import sentences
from vqgan_accel.config.training import TrainingConfig, batch_scale

__all__ = [
    "GROUP_NORM_GROUPS",
    "LOWER_IS_BETTER",
    "METRIC_RESULTS",
    "UNITS",
    "AutoencoderConfig",
    "AutoencoderField",
    "Config",
    "DataConfig",
    "DiscriminatorConfig",
    "EMAQuantizerConfig",
    "EntropyQuantizerConfig",
    "EvaluationConfig",
    "GumbelQuantizerConfig",
    "LossConfig",
    "MaskGITConfig",
    "Metric",
    "QuantizerConfig",
    "QuantizerField",
    "StandardQuantizerConfig",
    "StyleGAN2Config",
    "TamingConfig",
    "TrackingConfig",
    "TrainingConfig",
    "WeightFiles",
    "batch_scale",
    "config_keys",
    "flat_config",
    "is_better",
    "json_schema",
    "key_lines",
    "literal",
    "load_config",
    "parse_config",
    "save_config",
    "sentences",
    "validated",
]
