"""From a config to a run that is ready for its next step, in acts that each decide one thing.

Until `claim_folder` nothing has been written, and everything that a config can ask for in vain has been refused.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from vqgan_accel.accelerator import start_accelerator
from vqgan_accel.config import Config
from vqgan_accel.data.content import require_content
from vqgan_accel.data.opening import (
    backend_of,
    count_images,
    open_source,
    require_apart,
    require_reader,
    training_loader,
    training_order,
)
from vqgan_accel.data.order import TrainingOrder
from vqgan_accel.data.source import ImageSource
from vqgan_accel.data.views import Batch
from vqgan_accel.describe import describe, step_gflop
from vqgan_accel.distributed import decided_by_main, same_everywhere
from vqgan_accel.evaluation.evaluate import open_measurement
from vqgan_accel.files import lock
from vqgan_accel.run_folder import checkpoints, checkpoints_folder, step_name, step_of
from vqgan_accel.status import leaving_a_word
from vqgan_accel.training.arithmetic import arithmetic
from vqgan_accel.training.banner import show_banner
from vqgan_accel.training.checkpoint import latest_intact, point_links, read_state
from vqgan_accel.training.codebook import CodebookUsage
from vqgan_accel.training.networks import Networks, build_networks, prepare_networks, settle_buckets
from vqgan_accel.training.pace import Pace, Work
from vqgan_accel.training.plan import Plan, make_plan
from vqgan_accel.training.record import changes_since_the_beginning, record_config, record_start
from vqgan_accel.training.state import Progress, Stateful, StreamPosition, read_stream
from vqgan_accel.training.tracking import Tracking, check_trackers
from vqgan_accel.training.validation import Validation

if TYPE_CHECKING:
    from vqgan_accel.data.lanes import StreamOrder
    from vqgan_accel.data.stream import StreamSource

# config keys that decide which tensors a checkpoint holds
SHAPING = ("autoencoder.", "quantizer.", "discriminator.", "data.image_size", "training.ema_decay", "training.decoder")
HELD_PATIENCE = 120.0  # seconds for a former self to end: launch/slurm.sh gives it 60, an NFS lock of a dead machine 90


@dataclass(frozen=True)
class Ground:
    """What a run stands on: its processes, its images, its place on the disk."""

    config: Config
    accelerator: Accelerator
    plan: Plan
    folder: Path
    checkpoint: Path | None  # that it goes on from
    training_source: ImageSource | StreamSource
    validation_source: ImageSource | StreamSource
    training_images: str  # the split's fingerprint


@dataclass
class Run:
    """A run between two steps."""

    config: Config
    accelerator: Accelerator
    plan: Plan
    folder: Path
    networks: Networks
    batches: Generator[Batch, None, None]  # from the next step to the last; closing it ends its workers
    validation: Validation
    usage: CodebookUsage
    progress: Progress
    state: dict[str, Stateful]  # everything that a checkpoint holds
    tracking: Tracking
    pace: Pace
    saved_step: int | None  # of the newest checkpoint


@contextmanager
def open_run(config: Config, resume: bool = False) -> Iterator[Run]:
    """While it is open the folder is this process's own. Every process calls it.

    Raises ValueError or FileNotFoundError for whatever cannot be trained, before anything is written.
    """
    with ExitStack() as held:
        held.enter_context(arithmetic(config.training))
        run = set_up(config, resume, held)
        if run.accelerator.is_main_process:
            held.enter_context(leaving_a_word(run.folder, lambda: is_done(run)))
        # the bar ends its line and the data workers end before an error is told
        with run.tracking.bar, closing(run.batches):
            yield run


def is_done(run: Run) -> bool:
    return run.progress.step == run.plan.total_steps and not run.progress.validation_due


def set_up(config: Config, resume: bool, held: ExitStack) -> Run:
    ground = take_ground(config, resume, held)
    accelerator, plan = ground.accelerator, ground.plan
    order = open_order(ground)
    built = build_networks(config, ground.checkpoint is None, accelerator.print)
    validation = open_validation(ground)
    require_expected_content(ground)
    decided_by_main(lambda: claim_folder(ground.folder, held, ground.checkpoint is not None))

    networks = prepare_networks(built, config, accelerator)
    settle_buckets(networks, accelerator, plan.batch_size, config.data.image_size)
    usage = CodebookUsage(config.quantizer.codebook_sizes, accelerator.device)
    progress = Progress()
    stream = StreamPosition(order.states_at, progress)
    state = {"progress": progress, "usage": usage, **networks.state(), "stream": stream}
    if ground.checkpoint is not None:
        go_on_from(ground.checkpoint, state, progress, ground)
    progress.training_images = ground.training_images
    summary = describe(config)
    announce(ground, progress, summary)
    return Run(
        config=config,
        accelerator=accelerator,
        plan=plan,
        folder=ground.folder,
        networks=networks,
        batches=iter(training_loader(ground.training_source, config.data, order, accelerator.device.type == "cuda")),
        validation=validation,
        usage=usage,
        progress=progress,
        state=state,
        tracking=Tracking(accelerator, config, ground.folder, progress.step, plan.total_steps),
        pace=Pace(accelerator.device, work_of(summary, plan), config.data, backend_of(config.data)),
        saved_step=progress.step if ground.checkpoint else None,
    )


def take_ground(config: Config, resume: bool, held: ExitStack) -> Ground:
    """Processes, images, plan; the lock of a folder that is there already, and the checkpoint to go on from."""
    check_trackers(config.tracking)
    accelerator = start_accelerator(
        config.training.mixed_precision,
        config.training.timeout_minutes,
        gradient_accumulation_steps=config.training.gradient_accumulation_steps,
        trackers=config.tracking.trackers,
        folder=config.output_dir,
    )
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
    folder = Path(config.output_dir)
    decided_by_main(lambda: lock_run_folder(folder, held, resume))
    checkpoint = decided_by_main(lambda: checkpoint_to_resume(plan, resume, accelerator.print))
    return Ground(config, accelerator, plan, folder, checkpoint, training_source, validation_source, images)


def open_order(ground: Ground) -> TrainingOrder | StreamOrder:
    """Which images come when, from the checkpoint's step on. ValueError where there are too few."""
    config, plan, checkpoint = ground.config, ground.plan, ground.checkpoint
    return training_order(
        ground.training_source,
        config.data,
        read_stream(checkpoint) if checkpoint else None,
        seed=config.seed,
        total_batch_size=config.training.total_batch_size,
        num_rounds=plan.rounds,
        process_index=ground.accelerator.process_index,
        num_processes=plan.num_processes,
        start_step=step_of(checkpoint) if checkpoint else 0,
        total_steps=plan.total_steps,
    )


def open_validation(ground: Ground) -> Validation:
    """ValueError or FileNotFoundError where a metric's network is missing, or there are too few images for one."""
    config, accelerator = ground.config, ground.accelerator
    names, sizes = config.training.validation_metrics, config.quantizer.codebook_sizes
    metrics, batches = open_measurement(config, names, sizes, ground.validation_source, accelerator)
    return Validation(config, batches, metrics, accelerator.device)


def require_expected_content(ground: Ground) -> None:
    """After all that is refused without reading every image."""
    data = ground.config.data
    if data.expected_hash is not None:
        assert isinstance(ground.training_source, ImageSource)  # the config refuses it for streams
        require_content(ground.training_source, data.workers, data.expected_hash)


def go_on_from(checkpoint: Path, state: dict[str, Stateful], progress: Progress, ground: Ground) -> None:
    """Read the checkpoint into the networks and all else. ValueError, naming what has changed, if it does not fit."""
    try:
        read_state(state, checkpoint)
    except ValueError as error:
        changes = [
            change for change in changes_since_the_beginning(ground.folder, ground.config) if change.startswith(SHAPING)
        ]
        if not changes:
            raise
        raise ValueError(
            f"checkpoint {checkpoint} does not fit this config, in which this is not as it was when the run began: "
            f"{'; '.join(changes)}; resume with the config it was trained with, or give another output_dir"
        ) from error
    decided_by_main(lambda: point_links(ground.folder, progress.step, progress.best_step))
    if progress.training_images != ground.training_images:
        ground.accelerator.print(
            f"the training images are not those that the run began with ({ground.training_images}; before: "
            f"{progress.training_images}): from here on their order is another"
        )


def announce(ground: Ground, progress: Progress, summary: dict[str, Any]) -> None:
    """Keep in the folder what begins here, and show it."""
    accelerator, plan, checkpoint = ground.accelerator, ground.plan, ground.checkpoint
    decided_by_main(lambda: record_config(ground.folder, ground.config, resuming=checkpoint is not None))
    validation_images = ground.validation_source.fingerprint()
    decided_by_main(lambda: record_start(accelerator, plan, progress, validation_images))
    if accelerator.is_main_process:
        show_banner(accelerator, plan, progress.step, checkpoint, summary)


def work_of(summary: dict[str, Any], plan: Plan) -> Work:
    """From what `describe` says."""
    gflop = summary["gflop_per_image"]
    each = [step_gflop(gflop, adversarial) for adversarial in (False, True)]
    return Work(plan.config.training.total_batch_size, plan.num_processes, *each)


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


def claim_folder(run: Path, held: ExitStack, resuming: bool) -> None:
    """Create and lock it, where that is still to be done. One process calls it."""
    try:
        checkpoints_folder(run).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {run} cannot be created ({error.strerror}); give another") from None
    held.enter_context(lock(run))
    if not resuming and checkpoints(run):
        raise ValueError(f"another process has trained in {run} meanwhile; add --resume to go on with its run")
