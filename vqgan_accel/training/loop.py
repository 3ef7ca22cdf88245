"""The training loop, top to bottom.

One optimizer step: for each accumulation round the gradients of both networks on the same images and the same
reconstruction (training/round.py); then, if everything is finite on every process, the update of all that has state.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from vqgan_accel.config import Config, is_better
from vqgan_accel.data.order import global_index
from vqgan_accel.data.views import to_float
from vqgan_accel.distributed import decided_by_main, num_processes, sum_over_processes
from vqgan_accel.interruption import StopRequest, TrainingInterruptedError, catch_stop_signals
from vqgan_accel.randomness import QUANTIZER_NOISE, position_seed
from vqgan_accel.run_folder import BEST, LATEST, checkpoints_folder
from vqgan_accel.training.adversary import Adversary
from vqgan_accel.training.checkpoint import note_validation, save_checkpoint, write_state
from vqgan_accel.training.learner import Learner
from vqgan_accel.training.plan import Plan
from vqgan_accel.training.round import Round, tokenizer_backward
from vqgan_accel.training.setup import Run, open_run
from vqgan_accel.training.tracking import log_line
from vqgan_accel.training.upkeep import give_first_codes, look_after_codes
from vqgan_accel.training.validation import ValidationStopped


def train(config: Config, resume: bool = False) -> Path:
    """Train as `config` says, in `config.output_dir`; with `resume`, go on from its newest intact checkpoint if it
    has one.

    Runs on one process, or on many (DDP) under `accelerate launch` or `torchrun`. Returns the run folder. Raises
    ValueError or FileNotFoundError before the first step for what cannot be trained, TrainingInterruptedError after a
    signal, once the step is finished and saved, FloatingPointError where training diverges, OSError where the disk is
    full. Scripts that call it on many processes end in `distributed.leaving_process_group`, as the command line does.

    >>> train(load_config("my.yaml", ["output_dir=runs/first"]))
    output             runs/first
    ...
    PosixPath('runs/first')
    """
    with catch_stop_signals() as stop_request, open_run(config, resume) as run:
        return train_to_the_end(run, stop_request)


def train_to_the_end(run: Run, stop_request: StopRequest) -> Path:
    plan, progress = run.plan, run.progress
    validate_if_due(run, stop_request)  # where the run was stopped before or in it
    while progress.step < plan.total_steps:
        taken = take_step(run, stop_request)
        values = taken.values | look_after_codes(run, taken.rounds if taken.sound else [])
        report_step(run, values, taken.sound)
        if progress.bad_steps_in_a_row >= run.config.training.max_bad_steps:
            stop_diverged(run)
        progress.validation_due = plan.validates_at(progress.step)
        if taken.stop or plan.saves_at(progress.step):
            save(run)  # before the validation, which may take longer than anybody grants
        if taken.stop:
            stop_interrupted(run, stop_request)
        validate_if_due(run, stop_request)
    decided_by_main(lambda: write_report(run))
    run.tracking.close()
    return run.folder


class StepTaken(NamedTuple):
    values: dict[str, float]  # losses and norms of the global batch, the same on every process
    sound: bool  # they are all finite, and the step was applied
    stop: bool  # some process was asked to
    rounds: list[Round]


def take_step(run: Run, stop_request: StopRequest) -> StepTaken:
    """One optimizer step of all processes. The request is looked at when its gradients are there."""
    step, plan, networks = run.progress.step, run.plan, run.networks
    run.pace.begin_step()

    # ---- schedules
    adversary = adversary_at(run, step)
    learning: list[Learner[Any]] = [networks.tokenizer, *([adversary.discriminator] if adversary else [])]
    for learner in networks.learners:
        learner.set_learning_rate(plan.learning_rate_at(step))
    for name, value in plan.quantizer_at(step).items():
        setattr(networks.tokenizer.network.quantizer, name, value)
    networks.tokenizer.wrapped.train()
    if run.config.training.decoder_only:
        networks.tokenizer.network.quantizer.eval()  # no noise, no statistics, no update from them

    # ---- gradients of both networks, accumulated over rounds
    rounds: list[Round] = []
    skipped_images = 0
    batches = [run.pace.next(run.batches) for _ in range(plan.rounds)]
    if step == 0:
        give_first_codes(run, batches)
    for index, batch in enumerate(batches):
        skipped_images += batch["skipped"]
        images = to_float(batch["image"].to(run.accelerator.device, non_blocking=True))  # (B, 3, H, W) in [-1, 1]
        seeds = noise_seeds(plan, step, index, run.accelerator.process_index)
        with run.accelerator.accumulate(*(learner.wrapped for learner in learning)):
            made = tokenizer_backward(
                run.accelerator, networks.tokenizer, networks.reconstruction_loss, adversary, images, seeds
            )
            if adversary is not None and made.verdict is not None:
                made.losses.update(adversary.learn(images, made.verdict))
        run.usage.add(made.codes)
        rounds.append(made)

    # ---- the update, if every value of every process is finite
    norms = {f"grad_norm_{learner.name}": learner.clip(run.config.training.max_grad_norm) for learner in learning}
    values, skipped, stop = global_values([made.losses for made in rounds], norms, skipped_images, bool(stop_request))
    sound = all(math.isfinite(value) for value in values.values())
    if sound:
        for learner in learning:
            learner.optimizer.step()
    for part in run.state.values():
        part.apply_update() if sound else part.discard_update()
    for learner in learning:
        learner.optimizer.zero_grad()
    run.progress.skipped_images += skipped
    return StepTaken(values, sound, stop, rounds)


def adversary_at(run: Run, step: int) -> Adversary | None:
    """As it plays in this step; None where there is none, or not yet."""
    adversary = run.networks.adversary
    if adversary is None:
        return None
    adversary.phase, adversary.with_r1 = run.plan.phase_at(step), run.plan.r1_at(step)
    return None if adversary.phase == "absent" else adversary


def noise_seeds(plan: Plan, step: int, round_index: int, process_index: int) -> tuple[int, ...] | None:
    """Seeds of this process's B samples in a round, for the quantizer that draws noise: functions of their position."""
    if not plan.config.quantizer.draws_noise:
        return None
    samples = [
        global_index(local, round_index, process_index, plan.num_processes, plan.rounds)
        for local in range(plan.batch_size)
    ]
    return tuple(position_seed(QUANTIZER_NOISE, plan.config.seed, step, int(sample)) for sample in samples)


def global_values(
    losses: list[dict[str, Tensor]], norms: dict[str, Tensor], skipped_images: int, stop: bool
) -> tuple[dict[str, float], int, bool]:
    """Losses as means over rounds and processes, skipped images of all processes, and whether any wants to `stop`.

    One all-reduce and the step's only transfer to the host, so every rank sees the same numbers, and a nan on any of
    them, and decides alike.
    """
    names = list(losses[0])
    means = torch.stack([torch.stack([parts[name] for name in names]) for parts in losses]).mean(0)
    counts = torch.tensor([float(skipped_images), float(stop)]).to(means.device, non_blocking=True)
    sums = sum_over_processes(torch.cat([counts, means]))
    everything = [sums[:2], sums[2:] / num_processes(), torch.stack(list(norms.values()))]
    skipped, stopping, *numbers = torch.cat(everything).tolist()
    return dict(zip([*names, *norms], numbers, strict=True)), int(skipped), stopping > 0


def report_step(run: Run, values: dict[str, float], sound: bool) -> None:
    """On the progress bar, and every log_every steps, or where there is something to be said, in the logs."""
    plan, progress, tracking = run.plan, run.progress, run.tracking
    step = progress.step
    run.pace.end_step()
    if not sound:
        listed = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        tracking.say(f"step {step} skipped, for not all of its values are finite: {listed}")
    tracking.advance({"loss": f"{values['total']:.4f}"})
    regular = step == plan.total_steps or step % run.config.training.log_every == 0
    if not (regular or plan.reports_usage_at(step) or not sound):
        return
    values |= {
        **({"epoch": step / plan.steps_per_epoch} if plan.steps_per_epoch else {}),
        "learning_rate": plan.learning_rate_at(step - 1),
        "bad_steps": progress.bad_steps,
        "skipped_images": progress.skipped_images,
    }
    if warning := run.pace.warning():
        tracking.say(warning)
    clock = run.pace.report(plan.phase_at(step - 1) != "absent")
    tracking.log(step, values, clock)
    left = run.pace.time_left(plan, step, clock["step_time"])
    tracking.say(log_line(step, plan.total_steps, values, clock, left))


def validate_if_due(run: Run, stop_request: StopRequest) -> None:
    """The validation that belongs to this step. A request to stop ends it between two batches; it is then done over
    when the run goes on."""
    progress = run.progress
    if not progress.validation_due:
        return
    saved = run.saved_step == progress.step
    try:
        is_best = validate(run, stop_request)
    except ValidationStopped:
        if not saved:
            save(run)
        stop_interrupted(run, stop_request)
    progress.validation_due = False
    if saved:
        decided_by_main(lambda: note_validation(run.folder, progress))
    elif is_best:
        save(run)


def validate(run: Run, stop_request: StopRequest) -> bool:
    """Measure the (averaged) tokenizer on the whole validation split; True where it is the best so far."""
    progress, tracking, metric = run.progress, run.tracking, run.config.training.best_metric
    with run.pace.validation():
        evaluation = run.validation.measure(run.networks.best_tokenizer, stop_request)
    tracking.log(progress.step, {f"validation/{name}": value for name, value in evaluation.results.items()})
    listed = ", ".join(f"{name} {value:.4g}" for name, value in evaluation.results.items())
    tracking.say(f"step {progress.step}: validation on {evaluation.num_images} images: {listed}")

    def record() -> None:
        for name, picture in run.validation.record(run.folder, progress.step, evaluation).items():
            tracking.picture(progress.step, name, picture)

    decided_by_main(record)
    value = evaluation.results.get(metric, math.nan)  # (a Gumbel quantizer has no quantization_error)
    if not math.isfinite(value) or (progress.best is not None and not is_better(metric, value, progress.best)):
        return False
    progress.best, progress.best_step = value, progress.step
    return True


def save(run: Run, extra: int = 0) -> None:
    """A checkpoint of the current step, by the main process while the others wait; `extra` more older ones are kept."""
    progress = run.progress
    keep = run.config.training.keep_checkpoints + extra
    for part in run.state.values():
        part.gather()

    def write() -> None:
        run.tracking.sync()
        save_checkpoint(
            run.folder, progress.step, lambda folder: write_state(run.state, folder), keep, progress.best_step
        )

    decided_by_main(write)
    run.saved_step = progress.step


def write_report(run: Run) -> None:
    """RUN/report.html, and a last line that says where to go next. The training is done: nothing that goes wrong here
    may undo it. One process calls it."""
    from vqgan_accel.report import report  # its template engine is loaded for nothing else

    progress = run.progress
    try:
        page = f"look at {report([run.folder])}"
    except Exception as error:
        page = f"its report could not be written ({' '.join(str(error).split())})"
    best, value = checkpoints_folder(run.folder) / (LATEST if progress.best is None else BEST), ""
    if progress.best is not None:
        value = f" (step {progress.best_step:,}, {run.config.training.best_metric} {progress.best:.4g})"
    run.tracking.say(
        f"trained {progress.step:,} steps; {page}; best checkpoint: {best}{value}; next: vqgan-accel evaluate {best}"
    )


def stop_interrupted(run: Run, stop_request: StopRequest) -> NoReturn:
    """The step is saved."""
    run.tracking.close()
    reason = stop_request.signal.name if stop_request.signal else "a signal to another process"
    raise TrainingInterruptedError(
        f"stopped by {reason} after step {run.progress.step} of {run.plan.total_steps}, which is saved; go on with "
        "--resume"
    )


def stop_diverged(run: Run) -> NoReturn:
    """The weights are those from before the skipped steps: save them, beside the older checkpoints, and stop."""
    save(run, extra=1)
    decided_by_main(lambda: write_report(run))
    run.tracking.close()
    raise FloatingPointError(
        f"training stopped at step {run.progress.step}: {run.progress.bad_steps_in_a_row} steps in a row were not "
        f"finite (training.max_bad_steps); {run.folder / 'checkpoints' / 'latest'} holds the weights from before them. "
        "Look at the skipped steps' values in metrics.jsonl; a lower base_lr or max_grad_norm=1 often helps"
    )
