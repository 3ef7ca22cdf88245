"""What a run says before its first step: every number that was derived."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vqgan_accel.config import batch_scale
from vqgan_accel.data.opening import backend_of
from vqgan_accel.describe import description_lines
from vqgan_accel.training.plan import Plan

LARGEST_SCALE = 4.0  # of the learning rate by the batch size, or its inverse, without a remark


def show_banner(
    accelerator: Accelerator, plan: Plan, first_step: int, checkpoint: Path | None, summary: dict[str, Any]
) -> None:
    """summary: `describe`'s."""
    training = plan.config.training
    lines = [
        f"output             {plan.config.output_dir}" + (f", resuming from {checkpoint.name}" if checkpoint else ""),
        f"processes          {plan.num_processes} on {accelerator.device.type}, mixed precision "
        f"{accelerator.mixed_precision}, torch {torch.__version__}",
        *_slow_float32(accelerator, training.tf32),
        *description_lines(summary),
        f"batch              {training.total_batch_size} = {plan.num_processes} processes x {plan.rounds} rounds x "
        f"{plan.batch_size} images",
        f"data               {_counted(plan)}; backend {backend_of(plan.config.data)}"
        + (", streaming" if plan.config.data.streaming else ""),
        f"training           steps {first_step:,} to {plan.total_steps:,}"
        + (f" ({plan.total_steps / plan.steps_per_epoch:.1f} epochs)" if plan.steps_per_epoch else ""),
        f"learning rate      {plan.learning_rate:.3g} = {training.base_lr:g} x {training.lr_scaling} of "
        f"{training.total_batch_size}/{training.base_batch_size}; warm-up {plan.warmup_steps} steps, cosine to "
        f"{plan.learning_rate * training.lr_final_ratio:.3g} over {plan.decay_steps:,}",
        *_far_from_base(plan),
        f"adversarial        {_adversarial(plan)}",
        f"every              {training.log_every} steps a log line, {plan.validate_every} a validation, "
        f"{plan.checkpoint_every} a checkpoint",
    ]
    print("\n".join(lines), flush=True)


def _slow_float32(accelerator: Accelerator, tf32: bool) -> list[str]:
    if accelerator.device.type != "cuda" or accelerator.mixed_precision != "no" or tf32:
        return []
    return [
        "                   NOTE: float32 convolutions take about three times as long as with training.tf32=true, and "
        "about four times as long as with training.mixed_precision=bf16"
    ]


def _adversarial(plan: Plan) -> str:
    start, heard = plan.discriminator_start, plan.discriminator_warmup
    if start is None:
        return "off"
    if start >= plan.total_steps:
        return f"NEVER: discriminator.start is step {start:,}, and training ends at step {plan.total_steps:,}"
    if heard and start + heard >= plan.total_steps:
        return (
            f"from step {start:,}, NEVER reaching the tokenizer: with discriminator.warmup that is step "
            f"{start + heard:,}, and training ends at step {plan.total_steps:,}"
        )
    return f"from step {start:,}" + (f", reaching the tokenizer after {heard:,} more" if heard else "")


def _far_from_base(plan: Plan) -> list[str]:
    """The rule of scaling is known to hold near the batch it was tuned at."""
    training, factor = plan.config.training, batch_scale(plan.config.training)
    if 1 / LARGEST_SCALE <= factor <= LARGEST_SCALE:
        return []
    return [
        f"                   NOTE: that is {factor:.3g} x training.base_lr, far from where the rule was tried; for a "
        f"batch of {training.total_batch_size} set base_lr yourself, with training.lr_scaling=none"
    ]


def _counted(plan: Plan) -> str:
    if plan.num_images is None:
        return "an unknown number of training images"
    data = plan.config.data
    counted = f"{plan.num_images:,} training images, {plan.steps_per_epoch:,} steps per epoch"
    if data.validation_fraction is None:
        return counted
    return (
        f"{counted}; validation is {data.validation_fraction:g} of data.train_split {data.train_split}, by a hash of "
        f"each {data.validation_group}'s name"
    )
