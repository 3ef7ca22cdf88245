"""What a planted line is, and which tests watch its file."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple


class Mutant(NamedTuple):
    file: str  # below vqgan_accel/
    line: str  # text that occurs once in it
    wrong: str  # what it becomes
    effect: str


# file -> the fast tests that watch it, the quickest first. The first pattern that fits counts.
TESTS = {
    "training/plan.py": ("test_plan.py", "test_codebook_life.py", "test_config.py", "test_plain_trainer.py"),
    "words.py": ("test_record.py",),
    "schedules.py": ("test_schedules.py", "test_plan.py"),
    "training/checkpoint.py": ("test_state.py", "test_validation.py", "test_training.py"),
    "training/state.py": ("test_state.py", "test_bad_steps.py", "test_training.py", "test_plain_trainer.py"),
    "training/codebook.py": (
        "test_codebook.py",
        "test_codebook_life.py",
        "test_kmeans.py",
        "test_bad_steps.py",
        "test_state.py",
        "test_plain_trainer.py",
    ),
    "training/upkeep.py": (
        "test_upkeep.py",
        "test_loop.py",
        "test_codebook_life.py",
        "test_kmeans.py",
        "test_several_codes.py",
        "test_bad_steps.py",
        "test_plain_trainer.py",
    ),
    "training/arithmetic.py": ("test_arithmetic.py",),
    "training/banner.py": ("test_banner.py",),
    "training/initial.py": ("test_fine_tuning.py",),
    "training/learner.py": ("test_learner.py", "test_plain_trainer.py"),
    "training/loop.py": (
        "test_validation.py",
        "test_loop.py",
        "test_bad_steps.py",
        "test_plan.py",
        "test_plain_trainer.py",
        "test_training.py",
        "test_fine_tuning.py",
    ),
    "training/measure.py": ("test_measure.py",),
    "training/pace.py": ("test_pace.py",),
    "training/record.py": ("test_record.py",),
    "training/setup.py": ("test_setup.py", "test_first_hours.py", "test_training.py", "test_cli.py"),
    "training/tracking.py": ("test_tracking.py", "test_pace.py", "test_training.py", "test_report.py"),
    "training/validation.py": ("test_validation.py", "test_report.py"),
    "training/adversary.py": (
        "test_losses.py",
        "test_plain_trainer.py",
        "test_mixed_precision.py",
        "test_fine_tuning.py",
    ),
    "training/round.py": ("test_losses.py", "test_plain_trainer.py"),
    "training/networks.py": (
        "test_setup.py",
        "test_plain_trainer.py",
        "test_fine_tuning.py",
        "test_training.py",
        "test_evaluation.py",
    ),
    "training/*": ("test_plain_trainer.py", "test_bad_steps.py", "test_training.py", "test_fine_tuning.py"),
    "losses/*": ("test_losses.py", "test_plain_trainer.py"),
    **{f"models/quantizers/{name}.py": ("test_lookup_free.py", "test_quantizers.py") for name in ("fsq", "lfq", "bsq")},
    **{
        f"models/quantizers/{name}.py": ("test_several_codes.py", "test_lookup_free.py", "test_plain_trainer.py")
        for name in ("residual", "product", "several")
    },
    "evaluation/measures/codes.py": ("test_several_codes.py", "test_upkeep.py", "test_metrics.py"),
    "models/quantizers/ibq.py": ("test_large_codebooks.py",),
    "models/quantizers/simvq.py": ("test_large_codebooks.py",),
    "models/quantizers/entropy.py": ("test_large_codebooks.py", "test_quantizers.py"),
    "models/quantizers/base.py": (
        "test_rotation.py",
        "test_quantizers.py",
        "test_codebook_life.py",
        "test_kmeans.py",
        "test_codebook.py",
    ),
    "models/quantizers/ema.py": ("test_quantizers.py", "test_codebook_life.py", "test_codebook.py"),
    "models/quantizers/*": ("test_quantizers.py", "test_codebook.py", "test_plain_trainer.py"),
    "models/discriminators/*": ("test_stylegan2.py", "test_convolution.py", "test_discriminators.py"),
    "models/tokenizer.py": ("test_tokenizer.py",),
    "data/order.py": ("test_data_order.py", "test_data_loading.py"),
    "data/protocols.py": ("test_protocols.py",),
    "data/crops.py": ("test_protocols.py",),
    "data/opening.py": ("test_data_loading.py", "test_data_sources.py"),
    "data/lanes.py": ("test_data_stream.py",),
    "evaluation/reconstruct.py": ("test_reconstruct.py",),
    "evaluation/pixels.py": ("test_protocols.py",),
    "evaluation/measures/*": ("test_measures.py", "test_metrics.py"),
    "evaluation/reference.py": ("test_reference.py",),
    "evaluation/keeping.py": ("test_reference.py",),
    "evaluation/*": ("test_metrics.py", "test_measures.py", "test_reference.py", "test_evaluation.py"),
    "models/efficientnet.py": ("test_measures.py",),
    "models/dinov2.py": ("test_measures.py",),
    "config/metrics.py": ("test_training.py", "test_report.py"),
    "config/*": ("test_config.py", "test_sections.py", "test_plan.py", "test_plain_trainer.py"),
}


def tests_of(mutant: Mutant) -> tuple[str, ...]:
    return next(names for pattern, names in TESTS.items() if fnmatchcase(mutant.file, pattern))
