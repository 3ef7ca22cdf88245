"""The training loop, top to bottom.

One optimizer step: for each accumulation round the tokenizer's gradient, then the discriminator's on the same images
and the same reconstruction; then, if everything is finite on every process, both updates, the codebook's and the
average's.
"""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from vqgan_accel.compat import uncompiled
from vqgan_accel.config import LOWER_IS_BETTER, Config, GumbelQuantizerConfig
from vqgan_accel.data.opening import backend_of
from vqgan_accel.data.order import global_index
from vqgan_accel.data.views import to_float
from vqgan_accel.distributed import decided_by_main, gathered, num_processes, sum_over_processes
from vqgan_accel.evaluation.evaluate import Evaluation, evaluate_tokenizer, fingerprint, protocol
from vqgan_accel.evaluation.figures import reconstruction_grid
from vqgan_accel.files import naming, write_json
from vqgan_accel.interruption import StopRequest, TrainingInterruptedError, catch_stop_signals
from vqgan_accel.models.quantizers import GumbelQuantizer
from vqgan_accel.randomness import CODE_REINIT, QUANTIZER_NOISE, position_seed
from vqgan_accel.run_folder import VALIDATION, checkpoints_folder, picture_file
from vqgan_accel.training.checkpoint import save_checkpoint, write_state
from vqgan_accel.training.codebook import reinitialise_unused
from vqgan_accel.training.pace import Pace
from vqgan_accel.training.plan import Plan
from vqgan_accel.training.setup import Setup, set_up
from vqgan_accel.training.steps import GeneratorStep, discriminator_backward, generator_backward
from vqgan_accel.training.tracking import log_line


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
    with catch_stop_signals() as stop_request:
        setup = set_up(config, resume)
        # the bar ends its line and the data workers end before an error is told
        with setup.held, setup.tracking.bar, closing(setup.batches):
            return run_steps(setup, config, stop_request)


def run_steps(setup: Setup, config: Config, stop_request: StopRequest) -> Path:
    accelerator, plan, state, tracking = setup.accelerator, setup.plan, setup.state, setup.tracking
    quantizer, optimizers, progress = state.tokenizer.quantizer, state.optimizers, state.progress
    pace, backend = Pace(), backend_of(config.data)  # which looks at the disk: once

    while progress.step < plan.total_steps:
        step = progress.step
        pace.begin_step()
        adversarial = config.discriminator if plan.adversarial_at(step) else None
        learning = ["tokenizer", "discriminator"] if adversarial else ["tokenizer"]

        # ---- schedules
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate_at(step)
        if isinstance(config.quantizer, GumbelQuantizerConfig):
            assert isinstance(quantizer, GumbelQuantizer)
            quantizer.temperature, quantizer.kl_cost = plan.gumbel_at(step, config.quantizer)

        # ---- gradients of both networks, accumulated over rounds
        setup.tokenizer.train()
        if config.training.decoder_only:
            quantizer.eval()  # no noise, no statistics, no update from them
        rounds: list[GeneratorStep] = []
        losses: list[dict[str, Tensor]] = []
        skipped_images = 0
        for index in range(plan.rounds):
            batch = pace.next(setup.batches)
            skipped_images += batch["skipped"]
            images = to_float(batch["image"].to(accelerator.device, non_blocking=True))  # (B, 3, H, W) in [-1, 1]
            seeds = noise_seeds(plan, step, index, accelerator.process_index)
            with accelerator.accumulate(setup.tokenizer, *([setup.discriminator] if adversarial else [])):
                generated = generator_backward(
                    accelerator,
                    setup.tokenizer,
                    setup.perceptual,
                    setup.discriminator,
                    images,
                    seeds,
                    config.losses,
                    adversarial,
                    plan.reaches_tokenizer_at(step),
                )
                parts = generated.losses
                if adversarial and setup.discriminator is not None and generated.fake_logits is not None:
                    parts = parts | discriminator_backward(
                        accelerator,
                        setup.discriminator,
                        images,
                        generated.fake_logits,
                        adversarial,
                        with_r1=plan.r1_at(step),
                    )
            rounds.append(generated)
            losses.append(parts)

        # ---- the update, if every value of every process is finite
        norms = {f"grad_norm_{name}": clip(optimizers[name], config.training.max_grad_norm) for name in learning}
        values, skipped, stop = global_values(losses, norms, skipped_images, bool(stop_request))
        sound = all(math.isfinite(value) for value in values.values())
        if sound:
            for name in learning:
                optimizers[name].step()
            quantizer.apply_update()
            if state.average is not None:
                state.average.update_parameters(state.tokenizer)
            setup.usage.add(torch.cat([generated.codes for generated in rounds]))
        else:
            quantizer.discard_update()
            listed = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            tracking.say(f"step {step + 1} skipped, for not all of its values are finite: {listed}")
        for name in learning:
            optimizers[name].zero_grad()
        progress.step = step + 1
        progress.bad_steps += not sound
        progress.bad_steps_in_a_row = 0 if sound else progress.bad_steps_in_a_row + 1
        progress.skipped_images += skipped

        # ---- the codebook at the end of an epoch
        if plan.ends_epoch(progress.step):
            values |= {f"epoch_{name}": value for name, value in setup.usage.metrics().items()}
            if sound and (source := plan.reinit_at(step)):
                values["reinitialised_codes"] = reinitialise_unused(
                    quantizer,
                    optimizers["tokenizer"],
                    setup.usage,
                    [generated.latents for generated in rounds],
                    source,
                    position_seed(CODE_REINIT, config.seed, step),
                )
            setup.usage.reset()

        # ---- log
        pace.end_step()
        finished = progress.step == plan.total_steps
        tracking.advance({"loss": f"{values['total']:.4f}"})
        if not sound or finished or progress.step % config.training.log_every == 0 or "epoch_perplexity" in values:
            values |= {
                **({"epoch": progress.step / plan.steps_per_epoch} if plan.steps_per_epoch else {}),
                "learning_rate": plan.learning_rate_at(step),
                "bad_steps": progress.bad_steps,
                "skipped_images": progress.skipped_images,
            }
            if warning := pace.warning(config.data, backend):
                tracking.say(warning)
            clock = pace.report()
            tracking.log(progress.step, values, clock)
            left = pace.time_left(plan, progress.step, clock["step_time"])
            tracking.say(log_line(progress.step, plan.total_steps, values, clock, left))
        if progress.bad_steps_in_a_row >= config.training.max_bad_steps:
            stop_diverged(setup)

        # ---- validate
        is_best = False
        if finished or progress.step % plan.validate_every == 0:
            with pace.validation():
                is_best = validate(setup)

        # ---- save; and stop, if any process was asked to
        if finished or is_best or stop or progress.step % plan.checkpoint_every == 0:
            save(setup)
        if stop and not finished:
            tracking.close()
            reason = stop_request.signal.name if stop_request.signal else "a signal to another process"
            raise TrainingInterruptedError(
                f"stopped by {reason} after step {progress.step} of {plan.total_steps}, which is saved; go on with "
                "--resume"
            )

    decided_by_main(lambda: write_report(setup))
    tracking.close()
    return setup.run


def noise_seeds(plan: Plan, step: int, round_index: int, process_index: int) -> Tensor | None:
    """(B,) seeds of this process's samples in a round, for the quantizer that draws noise: functions of their
    position."""
    if not isinstance(plan.config.quantizer, GumbelQuantizerConfig):
        return None
    samples = [
        global_index(local, round_index, process_index, plan.num_processes, plan.rounds)
        for local in range(plan.batch_size)
    ]
    return torch.tensor([position_seed(QUANTIZER_NOISE, plan.config.seed, step, int(sample)) for sample in samples])


def clip(optimizer: Optimizer, max_norm: float | None) -> Tensor:
    """The norm of a network's gradient (already reduced: the same on every rank), clipped to `max_norm` where given."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)


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


def validate(setup: Setup) -> bool:
    """Measure the (averaged) tokenizer on the whole validation split; True where it is the best so far."""
    state, training, step = setup.state, setup.plan.config.training, setup.state.progress.step
    with uncompiled():  # or the last, smaller batch of the split would be compiled for
        evaluation = evaluate_tokenizer(
            state.averaged_tokenizer or state.tokenizer,
            setup.validation_batches,
            setup.metrics,
            setup.accelerator.device,
            setup.plan.config.data.image_size,
            setup.plan.config.evaluation.grid_images,
            hash_pixels=setup.validation_protocol is None,  # the images are the same ones every time
        )
    if setup.validation_protocol is None:
        setup.validation_protocol = protocol(setup.plan.config, evaluation, setup.metrics)
    setup.tracking.log(step, {f"validation/{name}": value for name, value in evaluation.results.items()})
    listed = ", ".join(f"{name} {value:.4g}" for name, value in evaluation.results.items())
    setup.tracking.say(f"step {step}: validation on {evaluation.num_images} images: {listed}")
    decided_by_main(lambda: record_validation(setup, evaluation))
    value = evaluation.results[training.best_metric]
    sign = -1 if training.best_metric in LOWER_IS_BETTER else 1
    is_best = math.isfinite(value) and (state.progress.best is None or sign * value > sign * state.progress.best)
    if is_best:
        state.progress.best, state.progress.best_step = value, step
    return is_best


def record_validation(setup: Setup, evaluation: Evaluation) -> None:
    """What a report shows of it beside the results. One process calls it."""
    step, images_protocol = setup.state.progress.step, setup.validation_protocol
    assert images_protocol is not None
    record = {"step": step, "protocol": images_protocol, "fingerprint": fingerprint(images_protocol)}
    write_json(setup.run / VALIDATION, record | {"code_counts": evaluation.code_counts.tolist()}, indent=None)
    if len(evaluation.originals):
        grid = reconstruction_grid(evaluation.originals, evaluation.reconstructions)
        picture = picture_file(setup.run, step)
        with naming(picture):
            picture.parent.mkdir(exist_ok=True)
            grid.save(picture)
        setup.tracking.picture(step, "validation", grid)


def save(setup: Setup, extra: int = 0) -> None:
    """A checkpoint of the current step, by the main process while the others wait; `extra` more older ones are kept."""
    progress = setup.state.progress
    keep = setup.plan.config.training.keep_checkpoints + extra
    setup.state.stream = gathered(setup.order.states_at(progress.step))

    def write() -> None:
        setup.tracking.sync()
        save_checkpoint(
            setup.run, progress.step, lambda folder: write_state(setup.state, folder), keep, progress.best_step
        )

    decided_by_main(write)


def write_report(setup: Setup) -> None:
    """RUN/report.html, and a last line that says where to go next. The training is done: nothing that goes wrong here
    may undo it. One process calls it."""
    from vqgan_accel.report import report  # its template engine is loaded for nothing else

    progress, run = setup.state.progress, setup.run
    try:
        page = f"look at {report([run])}"
    except Exception as error:
        page = f"its report could not be written ({' '.join(str(error).split())})"
    best, value = checkpoints_folder(run) / ("latest" if progress.best is None else "best"), ""
    if progress.best is not None:
        value = f" (step {progress.best_step:,}, {setup.plan.config.training.best_metric} {progress.best:.4g})"
    setup.tracking.say(
        f"trained {progress.step:,} steps; {page}; best checkpoint: {best}{value}; next: vqgan-accel evaluate {best}"
    )


def stop_diverged(setup: Setup) -> NoReturn:
    """The weights are those from before the skipped steps: save them, beside the older checkpoints, and stop."""
    save(setup, extra=1)
    decided_by_main(lambda: write_report(setup))
    setup.tracking.close()
    number = setup.state.progress.bad_steps_in_a_row
    raise FloatingPointError(
        f"training stopped at step {setup.state.progress.step}: {number} steps in a row were not finite "
        f"(training.max_bad_steps); {setup.run / 'checkpoints' / 'latest'} holds the weights from before them. "
        "Look at the skipped steps' values in metrics.jsonl; a lower base_lr or max_grad_norm=1 often helps"
    )
