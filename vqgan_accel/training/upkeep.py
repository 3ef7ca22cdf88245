"""When the codebook is looked after in a run; how is in codebook.py."""

from __future__ import annotations

import torch

from vqgan_accel.data.views import Batch, to_float
from vqgan_accel.randomness import CODE_INIT, CODE_REINIT, position_seed
from vqgan_accel.training.codebook import initialise_by_kmeans, reinitialise_rare
from vqgan_accel.training.round import Round
from vqgan_accel.training.setup import Run


def give_first_codes(run: Run, batches: list[Batch]) -> None:
    """Where the codebook begins with the first step's latents. A codebook that came with a checkpoint stays."""
    config, tokenizer = run.config, run.networks.tokenizer.network
    if not config.quantizer.starts_from_latents or config.training.init_from is not None:
        return
    latents = []
    for batch in batches:
        images = to_float(batch["image"].to(run.accelerator.device, non_blocking=True))
        with torch.no_grad(), run.accelerator.autocast():
            latents.append(tokenizer.latents(images).float())
    initialise_by_kmeans(tokenizer.quantizer, latents, position_seed(CODE_INIT, config.seed))


def look_after_codes(run: Run, rounds: list[Round]) -> dict[str, float]:
    """Where an epoch ended, or another time over which they are counted: the codes' uses, and new vectors for codes
    that are hardly used. rounds: of the step before, none where it was skipped."""
    plan = run.plan
    if not plan.reports_usage_at(run.progress.step):
        return {}
    name = "epoch" if plan.usage_every == plan.steps_per_epoch else "recent"
    values = {f"{name}_{key}": value for key, value in run.usage.metrics().items()}
    step = run.progress.step - 1
    if rounds and (reinit := plan.reinit_at(step)):
        values["reinitialised_codes"] = reinitialise_rare(
            run.networks.tokenizer.network.quantizer,
            run.networks.tokenizer.optimizer,
            run.usage,
            [made.latents for made in rounds],
            reinit,
            position_seed(CODE_REINIT, run.config.seed, step),
        )
    run.usage.reset()
    return values
