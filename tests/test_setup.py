"""How a run is made ready: what it is refused for, and what it stands on."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DISCRIMINATOR, tiny_config, write_images, write_splits

from vqgan_accel.config import parse_config
from vqgan_accel.evaluation.metrics import Metrics
from vqgan_accel.training import setup
from vqgan_accel.training.loop import train
from vqgan_accel.training.plan import make_plan
from vqgan_accel.training.setup import HELD_PATIENCE, lock_run_folder, open_run, work_of


def test_a_resumed_run_waits_for_its_former_self_and_a_new_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def lock(run: Path, patience: float = 0.0) -> Any:
        waits.append(patience)
        return nullcontext()

    monkeypatch.setattr(setup, "lock", lock)
    with ExitStack() as held:
        lock_run_folder(tmp_path, held, resume=True)
        lock_run_folder(tmp_path, held, resume=False)
        lock_run_folder(tmp_path / "not there", held, resume=True)
    assert waits == [HELD_PATIENCE, 0.0] and HELD_PATIENCE > 60


def test_processes_that_see_other_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "same_everywhere", lambda fingerprint: False)
    with pytest.raises(ValueError, match=r"the processes see different training images \(8 images, .* on process 0\)"):
        train(tiny_config(tmp_path))
    assert not (tmp_path / "run").exists()


def test_too_few_images_for_a_metric_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def require(metrics: Any, number: int) -> None:
        asked.append(number)
        raise ValueError("too few")

    monkeypatch.setattr(Metrics, "require", require)
    write_images(tmp_path / "images" / "validation", 1)
    write_images(tmp_path / "images" / "train", 8, seed=1)
    with pytest.raises(ValueError, match="too few"):
        train(tiny_config(tmp_path))
    assert asked == [1] and not (tmp_path / "run").exists()


def test_validations_in_training_have_metrics_of_their_own(tmp_path: Path) -> None:
    metrics = {"validation_metrics": ["l2"], "best_metric": "l2"}
    with open_run(tiny_config(tmp_path, training=metrics, evaluation={"metrics": ["psnr"]})) as run:
        assert run.validation.metrics.names == ("l2",)


def test_a_step_asks_of_the_devices_what_describe_says() -> None:
    training = {"max_steps": 9, "total_batch_size": 32, "gradient_accumulation_steps": 2}
    plan = make_plan(parse_config({"training": training, "data": {"image_size": 16}}), 100, num_processes=4)
    gflop = {"encoder": 1.0, "decoder": 2.0, "discriminator": 0.5, "perceptual": 0.2}
    work = work_of({"gflop_per_image": gflop}, plan)
    assert work.images == 32 and work.processes == 4  # the images of all processes and rounds
    assert work.gflop == pytest.approx(9.3) and work.gflop_adversarial == pytest.approx(9.3 + 3.5)


def test_a_run_goes_on_at_its_checkpoints_step_with_the_order_that_follows(tmp_path: Path) -> None:
    train(tiny_config(tmp_path, discriminator=DISCRIMINATOR))
    config = tiny_config(tmp_path, discriminator=DISCRIMINATOR, training={"max_steps": 5})
    with open_run(config, resume=True) as run:
        assert run.progress.step == run.tracking.bar.n == 2 and run.tracking.bar.total == 5
        rest = [batch["image"] for batch in run.batches]
    with open_run(
        tiny_config(tmp_path / "whole", data={"path": str(tmp_path / "images")}, training={"max_steps": 5})
    ) as run:
        whole = [batch["image"] for batch in run.batches]
    assert len(rest) == 3 and len(whole) == 5
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[2:], strict=True))


def test_the_seed_decides_the_initial_weights(tmp_path: Path) -> None:
    weights, same_images = [], {"path": str(write_splits(tmp_path / "images"))}
    for number, seed in enumerate((3, 3, 4)):
        config = tiny_config(tmp_path / str(number), seed=seed, data=same_images, discriminator=DISCRIMINATOR)
        with open_run(config) as run:
            weights.append([learner.network.state_dict() for learner in run.networks.learners])
    first, again, other = weights
    for mine, same, another in zip(first, again, other, strict=True):
        assert all(torch.equal(mine[name], same[name]) for name in mine)
        assert not all(torch.equal(mine[name], another[name]) for name in mine)
