"""When the codebook is looked after in a run; how is in codebook.py."""

from __future__ import annotations

import torch

from vqgan_accel.data.views import Batch, to_float
from vqgan_accel.distributed import sum_over_processes
from vqgan_accel.evaluation.measures.codes import error_sums, quantization_error
from vqgan_accel.models.quantizers import Quantizer
from vqgan_accel.randomness import CODE_INIT, CODE_REINIT, position_seed
from vqgan_accel.sections import QuantizerSection
from vqgan_accel.training.codebook import initialise_by_kmeans, reinitialise_rare
from vqgan_accel.training.round import Round
from vqgan_accel.training.setup import Run

COLLAPSED = 0.1  # of the codes


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
    """Where an epoch ended, or another time over which they are counted: how the codebook is, and new vectors for codes
    that are hardly used. rounds: of the step before, none where it was skipped."""
    plan, quantizer = run.plan, run.networks.tokenizer.network.quantizer
    if not plan.reports_usage_at(run.progress.step):
        return {}
    name = "epoch" if plan.usage_every == plan.steps_per_epoch else "recent"
    values = {f"{name}_{key}": value for key, value in run.usage.metrics().items()} | health(quantizer, rounds)
    warn_of_collapse(run)
    step = run.progress.step - 1
    if rounds and (reinit := plan.reinit_at(step)):
        values["reinitialised_codes"] = reinitialise_rare(
            quantizer,
            run.networks.tokenizer.optimizer,
            run.usage,
            [made.latents for made in rounds],
            reinit,
            position_seed(CODE_REINIT, run.config.seed, step),
        )
    run.usage.reset()
    return values


@torch.no_grad()
def health(quantizer: Quantizer, rounds: list[Round]) -> dict[str, float]:
    """The mean length of the codes' vectors, where they are learnt, and how far the latents of a step were from
    theirs."""
    found: dict[str, float] = {}
    if quantizer.state_dict():
        vectors = [quantizer.code_vectors(place) for place in range(len(quantizer.codebook_sizes))]
        found["codebook_norm"] = float(torch.cat([part.norm(dim=1) for part in vectors]).mean())
    sums = [error_sums(quantizer, made.latents, made.codes) for made in rounds]
    if known := [one for one in sums if one is not None]:
        found["quantization_error"] = quantization_error(sum_over_processes(torch.stack(known).sum(0)))
    return found


def warn_of_collapse(run: Run) -> None:
    """A line in the terminal where, after the warm-up, fewer codes are in use than a tenth of those that could be. It
    comes again if they have recovered in between."""
    usage, plan, config = run.usage, run.plan, run.config
    parts = usage.counts.split(usage.sizes)
    could = sum(min(len(part), int(part.sum())) for part in parts)
    share = int((usage.counts > 0).sum()) / max(could, 1)
    low = share < COLLAPSED and run.progress.step > plan.warmup_steps
    if low and not usage.low:
        window, helps = f"{plan.usage_every:,} steps", "; ".join(remedies(config.quantizer))
        run.tracking.say(
            f"step {run.progress.step}: {share:.1%} of the codes were in use in the last {window}; what helps: {helps} "
            "(docs/quantizers.md)"
        )
    usage.low = low


def remedies(section: QuantizerSection, key: str = "quantizer") -> list[str]:
    """Settings of a quantizer that keep its codes alive and are not set yet, the surest first."""
    inner = getattr(section, "inner", None)
    if inner is not None:
        return remedies(inner, f"{key}.inner")
    tried = {
        "reinit_every": (None, f"{key}.reinit_every='1 epoch', or in steps"),
        "init": ("uniform", f"{key}.init=kmeans"),
        "l2_normalize": (False, f"{key}.l2_normalize=true with {key}.embedding_dim=8"),
        "entropy_ratio": (0.0, f"{key}.entropy_ratio=0.1"),
    }
    found = [words for name, (default, words) in tried.items() if getattr(section, name, ...) == default]
    return [*found, f"another {key}.type: ema, simvq, or fsq, whose codes need no care"]
