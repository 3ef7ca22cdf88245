"""Every number that follows from the config, the data set's size and the number of processes, decided and checked
before the first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vqgan_accel.config import Config, TrainingConfig, batch_scale
from vqgan_accel.data.order import steps_per_epoch
from vqgan_accel.schedules import learning_rate
from vqgan_accel.sections import Duration, Reinit, Section

# of the adversarial game: the discriminator is not there yet; it learns alone; it teaches the tokenizer, too
Phase = Literal["absent", "alone", "teaching"]


@dataclass(frozen=True)
class Plan:
    config: Config
    num_images: int | None  # None: a stream of unknown length, for which nothing counts epochs
    num_processes: int
    batch_size: int  # images per process and accumulation round
    steps_per_epoch: int | None
    total_steps: int
    learning_rate: float  # at its peak
    warmup_steps: int
    decay_steps: int
    discriminator_start: int | None  # optimizer step of the discriminator's first update; None: never
    discriminator_warmup: int  # steps from then on in which its loss does not reach the tokenizer
    reinit_every: int | None  # steps between two replacements of codes; None: never
    usage_every: int  # steps over which the use of codes is counted, and after which it is reported
    validate_every: int  # steps
    checkpoint_every: int

    @property
    def rounds(self) -> int:
        """Accumulation rounds per optimizer step."""
        return self.config.training.gradient_accumulation_steps

    def learning_rate_at(self, step: int) -> float:
        final = self.learning_rate * self.config.training.lr_final_ratio
        return learning_rate(step, self.learning_rate, final, self.warmup_steps, self.decay_steps)

    def quantizer_at(self, step: int) -> dict[str, float]:
        """What of the quantizer follows a schedule: attribute -> its value."""
        return self.config.quantizer.at_step(step, self.steps_per_epoch)

    def phase_at(self, step: int) -> Phase:
        if self.discriminator_start is None or step < self.discriminator_start:
            return "absent"
        return "alone" if step < self.discriminator_start + self.discriminator_warmup else "teaching"

    def r1_at(self, step: int) -> bool:
        """R1 is applied on the first adversarial step and every r1_every-th after it."""
        discriminator, start = self.config.discriminator, self.discriminator_start
        if discriminator is None or start is None or discriminator.r1_weight == 0:
            return False
        return step >= start and (step - start) % discriminator.r1_every == 0

    def validates_at(self, step: int) -> bool:
        """Whether the tokenizer is validated after `step` steps."""
        return step == self.total_steps or step % self.validate_every == 0

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        return step == self.total_steps or step % self.checkpoint_every == 0

    def reports_usage_at(self, step: int) -> bool:
        """Whether the use of codes is reported after `step` steps, and counted anew."""
        return step % self.usage_every == 0

    def reinit_at(self, step: int) -> Reinit | None:
        """How codes are replaced at the end of this step; None where they stay."""
        due = self.reinit_every is not None and (step + 1) % self.reinit_every == 0
        return self.config.quantizer.reinit if due else None


def make_plan(config: Config, num_images: int | None, num_processes: int) -> Plan:
    """Raises ValueError, naming the keys, for combinations that cannot be trained."""
    training = config.training
    total, rounds = training.total_batch_size, training.gradient_accumulation_steps
    if total % (rounds * num_processes):
        raise ValueError(
            f"training.total_batch_size {total} is not divisible by gradient_accumulation_steps {rounds} x "
            f"{num_processes} processes; the nearest that is: "
            f"{max(1, round(total / (rounds * num_processes))) * rounds * num_processes}"
        )
    batch_size = total // (rounds * num_processes)
    key, group = config.discriminator.group if config.discriminator else ("", 1)
    if batch_size % group:
        raise ValueError(
            f"{batch_size} images per process and round (training.total_batch_size {total} / {rounds} rounds / "
            f"{num_processes} processes) cannot be split into discriminator.{key} {group}; make them a multiple of it"
        )
    if num_images is None:
        require_steps(config)
    epoch = steps_per_epoch(num_images, total) if num_images is not None else None
    total_steps = total_steps_of(training, epoch)
    if total_steps < 1:
        raise ValueError(f"training.max_epochs {training.max_epochs} is less than one step of {epoch} an epoch")
    warmup = training.lr_warmup.steps(epoch)
    if warmup > total_steps:
        raise ValueError(
            f"training.lr_warmup ({training.lr_warmup}, {warmup} steps) is longer than training "
            f"({total_steps} steps); shorten it"
        )
    start = config.discriminator.start.steps(epoch) if config.discriminator else None
    if start is not None and start >= total_steps and training.max_steps is None:
        raise ValueError(f"discriminator.start (step {start}) is not before training ends (step {total_steps})")
    validate_every = max(1, training.validate_every.steps(epoch))
    reinit = config.quantizer.reinit
    reinit_every = max(1, reinit.every.steps(epoch)) if reinit else None
    return Plan(
        config=config,
        num_images=num_images,
        num_processes=num_processes,
        batch_size=batch_size,
        steps_per_epoch=epoch,
        total_steps=total_steps,
        learning_rate=training.base_lr * batch_scale(training),
        warmup_steps=warmup,
        decay_steps=training.lr_decay.steps(epoch) if training.lr_decay else total_steps,
        discriminator_start=start,
        discriminator_warmup=config.discriminator.warmup.steps(epoch) if config.discriminator else 0,
        reinit_every=reinit_every,
        usage_every=usage_window(reinit_every, epoch) or validate_every,
        validate_every=validate_every,
        checkpoint_every=max(1, training.checkpoint_every.steps(epoch)),
    )


def usage_window(reinit_every: int | None, epoch: int | None) -> int | None:
    """Steps over which uses are counted: an epoch, unless codes are replaced at other times. Both are in steps."""
    if reinit_every is None or (epoch is not None and reinit_every % epoch == 0):
        return epoch
    return reinit_every


def total_steps_of(training: TrainingConfig, epoch: int | None) -> int:
    """At max_epochs or max_steps, whichever comes first; an epoch has `epoch` steps, None where nobody knows."""
    limits = [training.max_steps] if training.max_steps is not None else []
    limits += [round(training.max_epochs * epoch)] if training.max_epochs is not None and epoch is not None else []
    return min(limits)


def require_steps(config: Config) -> None:
    """ValueError, naming every key, where something is given in epochs of a data set whose length nobody knows."""
    given = {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in in_epochs(config).items()}
    if given or config.training.max_steps is None:
        listed = ", ".join(f"{key} is {value}" for key, value in given.items())
        raise ValueError(
            "the length of the streamed data set is not known, so nothing can be counted in epochs; give "
            f"training.max_steps and every duration in steps ({listed}), or set data.streaming=false"
        )


def in_epochs(section: Section, prefix: str = "") -> dict[str, Duration | float]:
    """Key -> value of everything that is given in epochs: durations, and what is called `..._epochs`."""
    found: dict[str, Duration | float] = {}
    for name, value in section:
        if isinstance(value, Section):
            found |= in_epochs(value, f"{prefix}{name}.")
        counted = value.value if isinstance(value, Duration) and value.unit == "epochs" else None
        if counted or (name.endswith("_epochs") and value is not None):
            found[prefix + name] = value
    return found
