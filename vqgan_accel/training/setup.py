"""Everything that a run needs before its first step, decided, checked and built in one place."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vqgan_accel.accelerator import start_accelerator
from vqgan_accel.config import Config, batch_scale
from vqgan_accel.data.content import require_content
from vqgan_accel.data.opening import (
    backend_of,
    count_images,
    evaluation_loader,
    open_source,
    require_apart,
    require_reader,
    training_loader,
    training_order,
)
from vqgan_accel.data.order import TrainingOrder
from vqgan_accel.data.source import ImageSource
from vqgan_accel.data.views import Batch
from vqgan_accel.describe import describe, description_lines
from vqgan_accel.distributed import decided_by_main, same_everywhere
from vqgan_accel.evaluation.metrics import Metrics
from vqgan_accel.files import lock
from vqgan_accel.losses.perceptual import build_perceptual
from vqgan_accel.models.networks import build_discriminator, build_tokenizer
from vqgan_accel.models.tokenizer import ImageTokenizer, TokenizerOutput
from vqgan_accel.run_folder import checkpoints, checkpoints_folder, step_name, step_of
from vqgan_accel.training.checkpoint import Progress, TrainingState, latest_intact, point_links, read_state, read_stream
from vqgan_accel.training.codebook import CodebookUsage
from vqgan_accel.training.initial import begin_with
from vqgan_accel.training.plan import Plan, make_plan
from vqgan_accel.training.record import changes_since_the_beginning, record_config, record_start
from vqgan_accel.training.tracking import Tracking, check_trackers

if TYPE_CHECKING:
    from vqgan_accel.data.lanes import StreamOrder

LARGEST_SCALE = 4.0  # of the learning rate by the batch size, or its inverse, without a remark
# config keys that decide which tensors a checkpoint holds
SHAPING = ("autoencoder.", "quantizer.", "discriminator.", "data.image_size", "training.ema_decay", "training.decoder")
HELD_PATIENCE = 120.0  # seconds for a former self to end: launch/slurm.sh gives it 60, an NFS lock of a dead machine 90


@dataclass
class Setup:
    accelerator: Accelerator
    plan: Plan
    run: Path
    held: ExitStack  # the run folder's lock, on the main process
    tokenizer: nn.Module  # as prepared: under DDP, wrapped
    discriminator: nn.Module | None
    perceptual: nn.Module | None
    state: TrainingState  # the unwrapped networks and all else that a checkpoint holds
    usage: CodebookUsage
    order: TrainingOrder | StreamOrder
    batches: Generator[Batch, None, None]  # from the resumed step to the last; closing it ends its workers
    validation_batches: Iterable[Batch]
    metrics: Metrics
    tracking: Tracking
    validation_protocol: dict[str, Any] | None = None  # known from the first validation on


def set_up(config: Config, resume: bool) -> Setup:
    """Raises ValueError or FileNotFoundError for whatever cannot be trained, before anything is written."""
    check_trackers(config.tracking)
    accelerator = start_accelerator(
        mixed_precision=config.training.mixed_precision,
        gradient_accumulation_steps=config.training.gradient_accumulation_steps,
        trackers=config.tracking.trackers,
        folder=config.output_dir,
    )
    device = accelerator.device
    require_reader(config.data)
    require_apart(Path(config.output_dir), config.data, "output_dir")
    training_source = open_source(config.data, "train")
    validation_source = open_source(config.data, "validation")
    images = training_source.fingerprint()
    if not same_everywhere(images):
        raise ValueError(
            f"the processes see different training images ({images} on process {accelerator.process_index}); data.path "
            "must lead to the same ones on every machine"
        )
    plan = make_plan(config, count_images(training_source), accelerator.num_processes)
    run, held = Path(config.output_dir), ExitStack()
    decided_by_main(lambda: lock_run_folder(run, held, resume))
    checkpoint = decided_by_main(lambda: checkpoint_to_resume(plan, resume, accelerator.print))

    order = training_order(
        training_source,
        config.data,
        read_stream(checkpoint) if checkpoint else None,
        seed=config.seed,
        total_batch_size=config.training.total_batch_size,
        num_rounds=plan.rounds,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        start_step=step_of(checkpoint) if checkpoint else 0,
        total_steps=plan.total_steps,
    )

    set_seed(config.seed)  # for the initial weights; every later draw is a function of position
    model, d_model = build_tokenizer(config), build_discriminator(config)
    if config.training.init_from is not None and checkpoint is None:
        for line in begin_with(config.training.init_from, config, model, d_model):
            accelerator.print(line)
    if config.training.decoder_only:
        model.encoder.requires_grad_(False)
        model.quantizer.requires_grad_(False)
    perceptual = build_perceptual(config.losses, config.weights)
    # The tokenizer stays as it is, for GroupNorm is slow in this layout (docs/performance.md), and so does D on a GPU,
    # where its blur is slow in it (docs/gpu).
    for network in (d_model if device.type == "cpu" else None, perceptual):
        if network is not None:
            network.to(memory_format=torch.channels_last)
    metrics = Metrics(
        config.training.validation_metrics, config.quantizer.num_codes, config.evaluation, config.weights, device
    )
    if (number := count_images(validation_source)) is not None:
        metrics.require(number)
    if config.data.expected_hash is not None:  # after all that is refused without reading every image
        assert isinstance(training_source, ImageSource)  # the config refuses it for streams
        require_content(training_source, config.data.workers, config.data.expected_hash)
    decided_by_main(lambda: open_run_folder(run, held, resuming=checkpoint is not None))

    average = None
    if config.training.ema_decay is not None:
        average = AveragedModel(model, device, multi_avg_fn=get_ema_multi_avg_fn(config.training.ema_decay))
    if config.training.compile:  # in place: names in checkpoints stay, and the average, made above, is not compiled
        for network in (model.encoder, model.decoder, perceptual):
            if network is not None:
                network.compile()
    optimizers: dict[str, Optimizer] = {}
    tokenizer, optimizers["tokenizer"] = accelerator.prepare(model, AdamW(decay_groups(model, plan), **adamw(plan)))
    discriminator = None
    if d_model is not None:
        d_groups = [{"params": list(d_model.parameters()), "weight_decay": config.training.weight_decay}]
        discriminator, optimizers["discriminator"] = accelerator.prepare(d_model, AdamW(d_groups, **adamw(plan)))
    if perceptual is not None:
        perceptual.to(device)

    if accelerator.num_processes > 1:
        settle_buckets(accelerator, plan, tokenizer, discriminator)

    usage = CodebookUsage(config.quantizer.num_codes, device)
    state = TrainingState(model, average, d_model, optimizers, usage.counts, Progress())
    if checkpoint is not None:
        fill(state, checkpoint, run, config)
        decided_by_main(lambda: point_links(run, state.progress.step, state.progress.best_step))
        if state.progress.training_images != images:
            accelerator.print(
                f"the training images are not those that the run began with ({images}; before: "
                f"{state.progress.training_images}): from here on their order is another"
            )
    state.progress.training_images = images
    decided_by_main(lambda: record_config(run, config, resuming=checkpoint is not None))
    validation_images = validation_source.fingerprint()
    decided_by_main(lambda: record_start(accelerator, plan, state.progress, validation_images))
    show_banner(accelerator, plan, state.progress.step, checkpoint)

    pin_memory = device.type == "cuda"
    return Setup(
        accelerator=accelerator,
        plan=plan,
        run=run,
        held=held,
        tokenizer=tokenizer,
        discriminator=discriminator,
        perceptual=perceptual,
        state=state,
        usage=usage,
        order=order,
        batches=iter(training_loader(training_source, config.data, order, pin_memory)),
        validation_batches=evaluation_loader(
            validation_source,
            config.data,
            config.evaluation.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            pin_memory,
        ),
        metrics=metrics,
        tracking=Tracking(accelerator, config, run, state.progress.step, plan.total_steps),
    )


def settle_buckets(accelerator: Accelerator, plan: Plan, tokenizer: nn.Module, discriminator: nn.Module | None) -> None:
    """One backward pass of each network for nothing, before a checkpoint is read.

    DDP lays its buckets out anew after its first reduction, and from three processes on the layout decides in which
    order a gradient's parts are added. In a resumed run the first step's sums would be other ones, in their last bit.
    """
    size = plan.config.data.image_size
    images = torch.zeros(plan.batch_size, 3, size, size, device=accelerator.device)
    seeds = torch.zeros(plan.batch_size, dtype=torch.int64)
    output: TokenizerOutput = tokenizer(images, seeds)
    accelerator.backward((output.reconstruction.sum() + output.quantizer.loss) * 0)
    accelerator.unwrap_model(tokenizer).quantizer.discard_update()
    if discriminator is not None:
        accelerator.backward(discriminator(images).sum() * 0)
    for network in (tokenizer, discriminator):
        if network is not None:
            network.zero_grad()


def checkpoint_to_resume(plan: Plan, resume: bool, say: Callable[[str], None]) -> Path | None:
    """The newest intact checkpoint in output_dir, None for a new run. An earlier run there is resumed or refused.

    One process calls it.
    """
    run = Path(plan.config.output_dir)
    found = checkpoints(run)
    if not found:
        return None
    if not resume:
        raise ValueError(
            f"output_dir {run} already holds a run, up to {found[-1].name}; add --resume to go on with it, or give "
            "another output_dir"
        )
    checkpoint = latest_intact(run, say)
    if checkpoint.name > step_name(plan.total_steps):
        raise ValueError(
            f"{checkpoint} is past the end of training (step {plan.total_steps}); raise training.max_steps or "
            "training.max_epochs"
        )
    return checkpoint


def lock_run_folder(run: Path, held: ExitStack, resume: bool) -> None:
    """Before anything in it is looked at, where it is there already. One process calls it.

    A job that was requeued may be there before its former self, on another machine, has come to its end.
    """
    if run.is_dir():
        held.enter_context(lock(run, patience=HELD_PATIENCE if resume else 0.0))


def open_run_folder(run: Path, held: ExitStack, resuming: bool) -> None:
    """Create and lock it, where that is still to be done. One process calls it."""
    try:
        checkpoints_folder(run).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {run} cannot be created ({error.strerror}); give another") from None
    held.enter_context(lock(run))
    if not resuming and checkpoints(run):
        raise ValueError(f"another process has trained in {run} meanwhile; add --resume to go on with its run")


def fill(state: TrainingState, checkpoint: Path, run: Path, config: Config) -> None:
    """Read the checkpoint into the networks and all else. ValueError, naming what has changed, if it does not fit."""
    try:
        read_state(state, checkpoint)
    except ValueError as error:
        changes = [change for change in changes_since_the_beginning(run, config) if change.startswith(SHAPING)]
        if not changes:
            raise
        raise ValueError(
            f"checkpoint {checkpoint} does not fit this config, in which this is not as it was when the run began: "
            f"{'; '.join(changes)}; resume with the config it was trained with, or give another output_dir"
        ) from error


def adamw(plan: Plan) -> dict[str, Any]:
    training = plan.config.training
    return {"lr": plan.learning_rate, "betas": training.betas, "eps": training.eps, "fused": True}


def decay_groups(model: ImageTokenizer, plan: Plan) -> list[dict[str, Any]]:
    """Weight decay on convolution weights (1x1 ones in diffusers' attention are linear layers): none on norms, biases
    and the codebook."""
    convolutions = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[id(parameter) in convolutions].append(parameter)
    return [
        {"params": groups[True], "weight_decay": plan.config.training.weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def show_banner(accelerator: Accelerator, plan: Plan, first_step: int, checkpoint: Path | None) -> None:
    """Every derived number, on the main process."""
    if not accelerator.is_main_process:
        return
    training = plan.config.training
    lines = [
        f"output             {plan.config.output_dir}" + (f", resuming from {checkpoint.name}" if checkpoint else ""),
        f"processes          {plan.num_processes} on {accelerator.device.type}, mixed precision "
        f"{accelerator.mixed_precision}, torch {torch.__version__}",
        *description_lines(describe(plan.config)),
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
