"""The section that says how long and how fast a run learns, and what is kept of it."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from vqgan_accel.config.metrics import METRIC_RESULTS, MetricNames
from vqgan_accel.sections import Duration, DurationField, Section


def _yaml_no(value: object) -> object:
    return "no" if value is False else value  # YAML 1.1 reads an unquoted no as false


PrecisionField = Annotated[
    Literal["auto", "no", "bf16"],
    BeforeValidator(_yaml_no),
    WithJsonSchema({"enum": ["auto", "no", "bf16", False]}),
]


class TrainingConfig(Section):
    max_epochs: float | None = Field(
        None,
        gt=0,
        description="training ends at max_epochs or max_steps, whichever comes first",
    )
    max_steps: int | None = Field(None, ge=1, description="optimizer steps")
    init_from: str | None = Field(
        None,
        description="a run, a checkpoint, an import's or a tokenizer's folder, or USER/NAME on the hub, whose weights"
        " training begins with; the discriminator's too, where there are some",
    )
    decoder_only: bool = Field(
        False,
        description="with init_from: encoder and codebook stay as they are, and so do all codes",
    )
    total_batch_size: int = Field(
        256,
        ge=1,
        description="images per optimizer step: processes x accumulation x per-process batch",
    )
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        description="rounds per optimizer step; more of them take less memory",
    )
    mixed_precision: PrecisionField = Field("auto", description="auto: what `accelerate launch` says, else no")
    timeout_minutes: float = Field(
        30.0,
        gt=0,
        description="as long may one process keep the others waiting (reading a data set's list, saving, a download);"
        " a process that hangs is noticed after it",
    )
    tf32: bool = Field(
        False,
        description="the networks' float32 convolutions in TF32 on GPUs that have it: three times faster, 10 bits of"
        " mantissa. R1, lambda, validations and `tokenize` never are; with bf16 there is nothing left for it",
    )
    deterministic: bool = Field(
        False,
        description="on a GPU by algorithms that add in a fixed order, so that a resumed run is there, too, bit for bit"
        " the uninterrupted one; slower (docs/exactness.md)",
    )
    compile: bool = Field(
        False,
        description="encoder, decoder and perceptual network by torch.compile (docs/performance.md says when)",
    )
    base_lr: float = Field(1e-4, gt=0, description="learning rate of both networks at base_batch_size")
    base_batch_size: int = Field(256, ge=1, description="see base_lr and lr_scaling")
    lr_scaling: Literal["sqrt", "linear", "none"] = Field(
        "sqrt",
        description="lr = base_lr * f(total_batch_size / base_batch_size)",
    )
    lr_warmup: DurationField = Field(Duration(0, "steps"), description="linear from 0")
    lr_decay: DurationField | None = Field(
        None,
        description="cosine from the start of training to lr_final_ratio; null: all of training",
    )
    lr_final_ratio: float = Field(0.1, ge=0, le=1, description="of the last learning rate to the first; 1: constant")
    betas: Annotated[tuple[float, float], Field(strict=False)] = Field((0.9, 0.999), description="AdamW, both networks")
    eps: float = Field(1e-8, gt=0, description="AdamW, both networks")
    weight_decay: float = Field(1e-4, ge=0, description="the tokenizer's convolution weights and all of D")
    max_grad_norm: float | None = Field(
        None,
        gt=0,
        description="clip each network's gradient to this norm; null: do not",
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="average of the tokenizer's weights, per step; null: none",
    )
    max_bad_steps: int = Field(10, ge=1, description="steps in a row with a non-finite loss before the run stops")
    log_every: int = Field(50, ge=1, description="steps between two lines of metrics.jsonl")
    validate_every: DurationField = Field(
        Duration(1, "epochs"),
        description="on the whole validation split; also after the last step",
    )
    validation_metrics: MetricNames = Field(
        ("l2", "psnr", "ssim", "codebook"),
        description="of the validations inside training",
    )
    checkpoint_every: DurationField = Field(
        Duration(1, "epochs"),
        description="also after the last step, a new best one and a signal",
    )
    keep_checkpoints: int = Field(3, ge=1, description="the newest ones; the best one stays besides")
    best_metric: str = Field("psnr", description="of the validation results: whose best value `checkpoints/best` has")

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.max_epochs is None and self.max_steps is None:
            raise ValueError("give max_epochs or max_steps: nothing says when training ends")
        if self.total_batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"total_batch_size {self.total_batch_size} is not divisible by gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}"
            )
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas are two numbers in [0, 1), not {list(self.betas)}")
        if self.decoder_only and self.init_from is None:
            raise ValueError("decoder_only keeps an encoder as it is: say in init_from whose")
        if self.deterministic and self.compile:
            raise ValueError("deterministic cannot be promised with compile, which may round otherwise each time")
        results = [name for metric in self.validation_metrics for name in METRIC_RESULTS[metric]]
        if self.best_metric not in results:
            raise ValueError(
                f"best_metric '{self.best_metric}' is not among the validation results: {', '.join(results) or 'none'}"
            )
        for name, every in (("validate_every", self.validate_every), ("checkpoint_every", self.checkpoint_every)):
            if every.value == 0:
                raise ValueError(f"{name} is {every}; give at least 1 step")
        for limit, unit in ((self.max_epochs, "epochs"), (self.max_steps, "steps")):
            if limit is not None and self.lr_warmup.unit == unit and self.lr_warmup.value > limit:
                raise ValueError(f"lr_warmup ({self.lr_warmup}) is longer than training ({limit:g} {unit}); shorten it")
        return self


def batch_scale(training: TrainingConfig) -> float:
    """Factor from base_lr to the learning rate in use."""
    ratio = training.total_batch_size / training.base_batch_size
    return {"sqrt": math.sqrt(ratio), "linear": ratio, "none": 1.0}[training.lr_scaling]
