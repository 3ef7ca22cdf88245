"""The loop: a resumed run is the uninterrupted one, two processes train what one trains, bad steps change nothing."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from runs import assert_same_bits, held_by_another, metrics, tensors
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import DISCRIMINATOR, merged, tiny_config, write_images

from vqgan_accel.cli import main
from vqgan_accel.config import METRIC_RESULTS, Config, load_config, save_config
from vqgan_accel.config.metrics import is_better
from vqgan_accel.evaluation.metrics import Metrics
from vqgan_accel.interruption import EXIT_INTERRUPTED, StopRequest
from vqgan_accel.losses.reconstruction import ReconstructionLoss
from vqgan_accel.run_folder import checkpoints
from vqgan_accel.training import checkpoint, networks, setup
from vqgan_accel.training.checkpoint import save_checkpoint
from vqgan_accel.training.loop import train, train_to_the_end
from vqgan_accel.training.setup import open_run
from vqgan_accel.training.tracking import trim_lines

REPOSITORY = Path(__file__).parent.parent
# everything that a checkpoint must carry: averages, an EMA codebook with re-initialisation, a GAN with lazy R1
EVERYTHING: dict[str, Any] = {
    "quantizer": {"type": "ema", "reinit_every": "1 epoch"},
    "discriminator": DISCRIMINATOR | {"adaptive_weight": True, "r1_weight": 1.0, "r1_every": 2, "start": "1 step"},
    "training": {
        "max_steps": 6,
        "ema_decay": 0.5,
        "max_grad_norm": 1.0,
        "log_every": 1,
        "validate_every": "100 steps",  # and at the end
        "checkpoint_every": "3 steps",
    },
}


def everything(folder: Path, **training: Any) -> Config:
    return tiny_config(folder, **EVERYTHING | {"training": EVERYTHING["training"] | training})


# ---- compiled networks


class Distance(torch.nn.Module):
    """Stands for a perceptual network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3).requires_grad_(False)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (self.conv(a) - self.conv(b)).square().mean((1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_compiled_networks_train_and_save_what_the_plain_ones_do(ema_decay, tmp_path, monkeypatch):
    """The validation's ragged batch must not be compiled for, with or without an average."""
    monkeypatch.setattr(networks, "build_perceptual", lambda *_: Distance())  # seeded as the networks are
    runs: dict[bool, Path] = {}
    for compiled in (False, True):
        settings = {"compile": compiled, "max_steps": 2, "ema_decay": ema_decay, "log_every": 1}
        config = everything(tmp_path / str(compiled), **settings)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        runs[compiled] = train(config)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if compiled and ema_decay is None and not hasattr(torch.compiler, "set_stance"):  # before torch 2.6
            assert graphs > 3
        else:
            assert graphs == (3 if compiled else 0)  # encoder, decoder, perceptual network
    for plain, ours in zip(*(metrics(runs[compiled]) for compiled in (False, True)), strict=True):
        assert plain.keys() == ours.keys()
        for name, value in plain.items():
            assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    names = [tensors(checkpoints(run)[-1]).keys() for run in runs.values()]
    assert names[0] == names[1]


def test_the_discriminator_and_the_perceptual_network_lie_in_channels_last_and_the_tokenizer_does_not(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(networks, "build_perceptual", lambda *_: Distance())
    with open_run(everything(tmp_path)) as run:
        made = run.networks
        assert made.adversary is not None and made.reconstruction_loss.perceptual is not None
        of = {
            "d": made.adversary.discriminator.network,
            "p": made.reconstruction_loss.perceptual,
            "t": made.tokenizer.network,
        }
        kernels = {
            name: [p for p in network.parameters() if p.ndim == 4 and p.shape[2] > 1 and p.shape[1] > 1]
            for name, network in of.items()
        }
        last = {
            name: {p.is_contiguous(memory_format=torch.channels_last) for p in found} for name, found in kernels.items()
        }
        assert last == {"d": {True}, "p": {True}, "t": {False}}


# ---- resuming


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    whole = train(everything(tmp_path / "whole"))

    config = everything(tmp_path / "broken")

    def interrupted(batches: Generator[Any, None, None]) -> Generator[Any, None, None]:
        yield from itertools.islice(batches, 4)  # in the fifth step, two after the checkpoint
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_run(config) as run:
        run.batches = interrupted(run.batches)
        train_to_the_end(run, StopRequest())
    assert [path.name for path in checkpoints(Path(config.output_dir))] == ["step_00000003"]

    resumed = train(config, resume=True)
    assert_same_bits(whole / "checkpoints" / "latest", resumed / "checkpoints" / "latest")
    assert metrics(whole) == metrics(resumed)


@pytest.mark.seconds
def test_an_interruption_between_epochs_and_within_one_is_the_same(tmp_path):
    whole = train(everything(tmp_path / "whole"))  # 2 steps an epoch: step 4 ends one, step 5 is inside one
    for step in (4, 5):
        folder = tmp_path / f"stopped at {step}"
        train(everything(folder, max_steps=step, lr_decay="6 steps"))
        resumed = train(everything(folder, lr_decay="6 steps"), resume=True)
        left, right = tensors(whole / "checkpoints" / "latest"), tensors(resumed / "checkpoints" / "latest")
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_resume_without_a_checkpoint_begins_anew(tmp_path):
    run = train(tiny_config(tmp_path), resume=True)
    assert checkpoints(run)


@pytest.mark.seconds
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, capsys):
    config = everything(tmp_path)
    run = train(config)
    expected = tensors(run / "checkpoints" / "latest")
    damaged = run / "checkpoints" / "step_00000006" / "discriminator.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    train(config, resume=True)
    said = capsys.readouterr().out
    assert "step_00000006 is damaged (discriminator.safetensors has changed since it was written)" in said
    assert "resuming from step_00000003" in said
    again = tensors(run / "checkpoints" / "latest")
    assert all(torch.equal(expected[name], again[name]) for name in expected)


@pytest.mark.seconds
def test_a_folder_in_which_another_process_trains_is_refused_and_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "HELD_PATIENCE", 0.2)  # seconds, in place of minutes, for its former self to end
    config = tiny_config(tmp_path)
    run = train(config)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with held_by_another(run), pytest.raises(ValueError, match=f"another process is at work in {run}"):
        train(config, resume=True)
    before[run / ".lock"] = (run / ".lock").stat().st_mtime_ns
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    train(config, resume=True)


@pytest.mark.slow
def test_a_requeued_job_waits_for_its_former_self_and_is_told_to_start_again(tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path)
    save_config(config, tmp_path / "tiny.yaml")
    run = train(config)
    with held_by_another(run) as former:
        threading.Timer(2, former.kill).start()
        assert main(["train", str(tmp_path / "tiny.yaml"), "--resume"]) == 0
        assert former.poll() is not None  # it was waited for
    monkeypatch.setattr(setup, "HELD_PATIENCE", 0.2)
    with held_by_another(run):
        assert main(["train", str(tmp_path / "tiny.yaml"), "--resume"]) == EXIT_INTERRUPTED
        assert main(["train", str(tmp_path / "tiny.yaml")]) == 2
    assert capsys.readouterr().err.count("another process is at work in") == 2


@pytest.mark.seconds
def test_a_changed_setting_takes_effect_where_a_run_is_resumed(tmp_path, capsys):
    train(everything(tmp_path, max_steps=3))
    config = everything(tmp_path, eps=1e3, weight_decay=0.0)  # steps too small to change a float32
    run = train(config, resume=True)
    assert "config changed since the run began: training.eps: 1e-08 -> 1000.0" in capsys.readouterr().out
    before, after = (load_file(path / "tokenizer" / SAFETENSORS_WEIGHTS_NAME) for path in checkpoints(run)[-2:])
    name = "encoder.conv_in.weight"
    assert (before[name] - after[name]).abs().max() < 1e-7


@pytest.mark.seconds
def test_other_training_images_are_told_where_a_run_is_resumed(tmp_path, capsys):
    run = train(everything(tmp_path, max_steps=3))
    (tmp_path / "images" / "train" / "007.png").rename(tmp_path / "images" / "train" / "008.png")
    train(everything(tmp_path), resume=True)
    said = capsys.readouterr().out
    assert "the training images are not those that the run began with (8 images, names " in said
    train(everything(tmp_path, max_steps=7), resume=True)  # told once
    assert "the training images are not those" not in capsys.readouterr().out
    assert len(checkpoints(run)) == 3


@pytest.mark.seconds
@pytest.mark.parametrize("lost", ["latest", "best"])
def test_a_link_that_an_interruption_left_behind_is_made_good(tmp_path, lost):
    config = everything(tmp_path)
    run = train(config)
    link = run / "checkpoints" / lost
    right = os.readlink(link)
    link.unlink()
    link.symlink_to("step_00000003")
    train(config, resume=True)
    assert os.readlink(link) == right


@pytest.mark.seconds
def test_checkpoints_that_cannot_be_read_just_now_are_neither_overlooked_nor_given_up(tmp_path, monkeypatch):
    config = everything(tmp_path)
    run = train(config)
    before = sorted(path.name for path in (run / "checkpoints").iterdir())

    def stale(*arguments: Any) -> None:
        raise OSError(116, "Stale file handle", "checkpoints")

    for module, name in ((os, "listdir"), (checkpoint, "_fingerprint")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stale)
            with pytest.raises(OSError, match="Stale file handle"):
                train(config, resume=True)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before


@pytest.mark.parametrize(
    ("manifest", "fault"), [(None, "is missing"), ("{}", "is incomplete"), ("[", "cannot be read")]
)
def test_a_checkpoint_without_a_sound_manifest_is_damaged(tmp_path, manifest, fault):
    run = train(tiny_config(tmp_path))
    file = run / "checkpoints" / "latest" / "manifest.json"
    assert checkpoint.damage(file.parent) is None
    file.unlink() if manifest is None else file.write_text(manifest)
    assert fault in (checkpoint.damage(file.parent) or "")


@pytest.mark.seconds
def test_a_folder_in_the_place_of_a_link_is_put_right(tmp_path):
    config = everything(tmp_path)
    run = train(config)
    for name in ("latest", "best"):
        link = run / "checkpoints" / name
        target = link.resolve()
        link.unlink()
        shutil.copytree(target, link)  # as `cp -L` does
    train(config, resume=True)
    assert os.readlink(run / "checkpoints" / "latest") == "step_00000006"


def test_a_run_that_another_process_began_meanwhile_is_not_trained_over(tmp_path, monkeypatch):
    original = networks.build_tokenizer

    def slowly(config: Config) -> Any:
        (tmp_path / "run" / "checkpoints" / "step_00000007").mkdir(parents=True)
        return original(config)

    monkeypatch.setattr(networks, "build_tokenizer", slowly)
    with pytest.raises(ValueError, match=r"another process has trained in .*/run meanwhile; add --resume"):
        train(tiny_config(tmp_path))


def test_a_checkpoint_without_a_discriminator_is_refused_by_a_config_with_one(tmp_path):
    train(tiny_config(tmp_path))
    with pytest.raises(
        ValueError, match=r"step_00000002 does not fit this config.*: discriminator.type: None -> stylegan2; resume"
    ):
        train(tiny_config(tmp_path, discriminator=DISCRIMINATOR, training={"max_steps": 4}), resume=True)
    assert load_config(tmp_path / "run" / "config.yaml").discriminator is None  # still that of the checkpoint


@pytest.mark.seconds
@pytest.mark.parametrize("text", ["", "training: [", "unknown: 1\n"])
def test_a_run_whose_config_file_cannot_be_read_goes_on_with_the_given_one(tmp_path, capsys, text):
    config = tiny_config(tmp_path, training={"max_steps": 3})
    run = train(tiny_config(tmp_path))
    (run / "config.yaml").write_text(text)
    train(config, resume=True)
    assert "config changed since the run began: in what way is not known" in capsys.readouterr().out
    assert load_config(run / "config.yaml") == config


# ---- what is told of a run


@pytest.mark.parametrize("rest", ["", '{"step": 4, "total": 0.', '{"total": 1}\n', "\x00\x00\x00", "7\n"])
def test_metrics_are_cut_at_the_resumed_step_and_of_what_is_no_line(tmp_path, rest):
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "total": 1.0}) for step in (1, 2, 3, 3, 4)]
    file.write_text("\n".join(lines) + "\n" + rest)
    trim_lines(file, 3)
    assert file.read_text().splitlines() == lines[:4]


@pytest.mark.seconds
def test_a_resumed_run_goes_on_in_its_tensorboard_curves(tmp_path):
    settings = {"tracking": {"trackers": ["tensorboard"]}, "training": {"log_every": 1, "checkpoint_every": "2 steps"}}
    train(tiny_config(tmp_path, **merged(settings, {"training": {"max_steps": 4, "lr_decay": "6 steps"}})))
    run = tmp_path / "run"
    for name in ("step_00000004", "latest"):  # a crash after step 4 was logged: it comes again
        path = run / "checkpoints" / name
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    train(tiny_config(tmp_path, **merged(settings, {"training": {"max_steps": 6}})), resume=True)
    curves = EventAccumulator(str(run / "vqgan_accel")).Reload()
    assert [event.step for event in curves.Scalars("l1")] == [1, 2, 3, 4, 5, 6]
    logged = {line["step"]: line["l1"] for line in metrics(run) if "l1" in line}
    assert [event.value for event in curves.Scalars("l1")] == pytest.approx(list(logged.values()))
    waited, whole = ([event.value for event in curves.Scalars(name)] for name in ("data_time", "step_time"))
    assert len(whole) == 6 and all(0 <= some <= all_of_it for some, all_of_it in zip(waited, whole, strict=True))
    assert not any("step_time" in line for line in metrics(run))  # which would differ from an uninterrupted run's


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path):
    tracking = {"trackers": ["wandb"], "wandb_mode": "offline"}
    identities = set()
    for max_steps in (2, 4):
        config = tiny_config(tmp_path, tracking=tracking, training={"max_steps": max_steps, "lr_decay": "4 steps"})
        run = train(config, resume=max_steps == 4)
        identities.add((run / "wandb_id").read_text())
    (identity,) = identities
    folders = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert folders and all(identity in name for name in folders)


def test_a_tracker_that_cannot_start_is_told_before_the_first_step(tmp_path, monkeypatch):
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(Accelerator, "init_trackers", refuse)
    config = tiny_config(tmp_path, tracking={"trackers": ["tensorboard"]})
    with pytest.raises(ValueError, match="trackers tensorboard cannot be started: no route to host"):
        train(config)
    assert not checkpoints(tmp_path / "run")


# ---- checkpoints


def test_the_newest_checkpoints_and_the_best_are_kept_and_the_links_lead_to_them(tmp_path):
    def write(folder: Path) -> None:
        (folder / "weights").write_text(folder.name)

    for step in range(1, 7):
        save_checkpoint(tmp_path, step, write, keep=2, best_step=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002", "step_00000005", "step_00000006"]
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step_00000006"
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step_00000002"


def test_a_checkpoint_is_never_pruned_for_a_damaged_later_one(tmp_path):
    def write(folder: Path) -> None:
        (folder / "weights").write_text(folder.name)

    save_checkpoint(tmp_path, 6, write, keep=1, best_step=None)  # damaged, say; the run went back to before it
    save_checkpoint(tmp_path, 4, write, keep=1, best_step=None)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000004", "step_00000006"]


def test_leftovers_of_interruptions_go_with_the_next_checkpoint(tmp_path):
    write = lambda folder: (folder / "weights").write_text(folder.name)  # noqa: E731
    folder = tmp_path / "checkpoints"
    for name in (".step_00000001.partial", ".step_00000009.removed"):
        (folder / name).mkdir(parents=True)
        (folder / name / "weights").write_text("half")
    (folder / ".latest.partial").symlink_to("nowhere")
    save_checkpoint(tmp_path, 1, write, keep=1, best_step=1)
    assert sorted(path.name for path in folder.iterdir()) == ["best", "latest", "step_00000001"]


def test_a_failure_while_saving_leaves_the_older_checkpoints_as_they_were(tmp_path):
    save_checkpoint(tmp_path, 1, lambda folder: (folder / "weights").write_text("1"), keep=1, best_step=1)

    def full_disk(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"step_00000002 cannot be written \(.*No space .*put that right, .*--resume"):
        save_checkpoint(tmp_path, 2, full_disk, keep=1, best_step=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001"]
    assert (tmp_path / "checkpoints" / "best" / "weights").read_text() == "1"
    assert not list((tmp_path / "checkpoints").glob(".*"))


# ---- non-finite steps


class Poisoned(ReconstructionLoss):
    """NaN in those calls (from 0)."""

    def __init__(self, sound: ReconstructionLoss, bad_calls: set[int]) -> None:
        super().__init__(sound.config, sound.perceptual, sound.terms)
        self.bad_calls, self.calls = bad_calls, iter(range(10**6))

    def __call__(self, *images: torch.Tensor) -> Any:
        total, parts = super().__call__(*images)
        if next(self.calls) in self.bad_calls:
            total, parts = total * float("nan"), {name: part * float("nan") for name, part in parts.items()}
        return total, parts


def train_poisoned(config: Config, bad_calls: set[int], resume: bool = False) -> Path:
    with open_run(config, resume) as run:
        run.networks.reconstruction_loss = Poisoned(run.networks.reconstruction_loss, bad_calls)
        return train_to_the_end(run, StopRequest())


@pytest.mark.seconds
def test_a_non_finite_step_changes_no_weight_no_moment_and_no_codebook(tmp_path):
    settings = {"checkpoint_every": "1 step", "keep_checkpoints": 9}
    run = train_poisoned(everything(tmp_path, **settings), {3})
    before, after = (tensors(run / "checkpoints" / f"step_0000000{step}") for step in (3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    later = tensors(run / "checkpoints" / "step_00000005")
    assert not torch.equal(after["tokenizer/diffusion_pytorch_model.safetensors:encoder.conv_in.weight"],
                           later["tokenizer/diffusion_pytorch_model.safetensors:encoder.conv_in.weight"])  # fmt: skip
    (skipped,) = [line for line in metrics(run) if line["step"] == 4]
    assert skipped["l1"] == "nan" and skipped["bad_steps"] == 1
    assert metrics(run)[-2]["bad_steps"] == 1


def test_a_diverged_run_that_is_resumed_stops_again(tmp_path):
    for resume in (False, True):
        with pytest.raises(FloatingPointError, match="steps in a row"):
            train_poisoned(everything(tmp_path, max_bad_steps=2, max_steps=9), set(range(100)), resume)


def test_one_bad_accumulation_round_spoils_its_whole_step(tmp_path):
    config = everything(tmp_path, gradient_accumulation_steps=2, max_steps=2, checkpoint_every="1 step")
    run = train_poisoned(config, {2})  # the first of the second step's two rounds
    before, after = (tensors(run / "checkpoints" / f"step_0000000{step}") for step in (1, 2))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_too_many_bad_steps_in_a_row_stop_the_run_with_the_weights_from_before(tmp_path):
    settings = {"max_bad_steps": 3, "max_steps": 9, "checkpoint_every": "2 steps", "keep_checkpoints": 9}
    with pytest.raises(FloatingPointError, match=r"stopped at step 5: 3 steps in a row .*max_bad_steps"):
        train_poisoned(everything(tmp_path, **settings), set(range(2, 100)))
    saved = tmp_path / "run" / "checkpoints"
    before, latest = tensors(saved / "step_00000002"), tensors(saved / "latest")
    assert (saved / "latest").resolve().name == "step_00000005"
    assert all(torch.equal(before[name], latest[name]) for name in before)
    assert all(tensor.isfinite().all() for tensor in latest.values())


# ---- phases


@pytest.mark.seconds
def test_the_discriminator_rests_until_its_start(tmp_path):
    settings = {"max_steps": 3, "checkpoint_every": "1 step", "log_every": 1, "base_lr": 1e-1}
    alone = train(tiny_config(tmp_path / "alone", training=settings))
    adversarial = DISCRIMINATOR | {"start": "2 steps", "weight": 10.0}
    run = train(tiny_config(tmp_path / "game", discriminator=adversarial, training=settings))
    first, second, third = (tensors(path) for path in checkpoints(run))
    weights = [name for name in first if name.startswith("discriminator.safetensors:")]
    assert all(torch.equal(first[name], second[name]) for name in weights)
    assert all((second[name] - third[name]).abs().max() > 1e-4 for name in weights)
    moments = {name for name in third if ":discriminator/" in name}
    assert not moments & second.keys() and {float(third[name]) for name in moments if name.endswith("/step")} == {1.0}
    *resting, playing = [line for line in metrics(run) if "l1" in line]
    *expected, other = [line for line in metrics(alone) if "l1" in line]
    assert resting == expected
    assert playing["l1"] == other["l1"] and playing["grad_norm_tokenizer"] != other["grad_norm_tokenizer"]
    assert playing.keys() - other.keys() == {
        *("generator", "adversarial_weight", "discriminator", "logits_real", "logits_fake", "grad_norm_discriminator")
    }


def test_the_average_is_the_closed_form_of_the_weights_it_saw(tmp_path):
    settings = {"max_steps": 3, "checkpoint_every": "1 step", "ema_decay": 0.75, "base_lr": 1e-1}
    run = train(tiny_config(tmp_path, training=settings))
    w1, w2, w3 = (load_file(path / "tokenizer" / SAFETENSORS_WEIGHTS_NAME) for path in checkpoints(run))
    average = load_file(run / "checkpoints" / "latest" / "tokenizer_ema" / SAFETENSORS_WEIGHTS_NAME)
    for name, value in average.items():
        expected = 0.75 * (0.75 * w1[name] + 0.25 * w2[name]) + 0.25 * w3[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    name = "decoder.conv_out.weight"  # of which another average would be far from it
    assert min((a[name] - b[name]).abs().max() for a, b in ((w1, w2), (w2, w3), (w1, w3))) > 1e-3


LOWER = {"l2", "lpips", "lpips_vgg", "lpips_alex", "lpips_squeeze", "mobilenet_distance", "efficientnet_distance"}
LOWER |= {"rfid", "fd_mobilenet", "fd_efficientnet", "fd_dinov2", "pfid", "kid"}
LOWER |= {"rfid_std", "fd_mobilenet_std", "fd_efficientnet_std", "fd_dinov2_std", "pfid_std"}
LOWER |= {"kid_std", "inception_score_std", "quantization_error"}
HIGHER = {"psnr", "psnr_per_image", "ssim", "ms_ssim", "inception_score", "precision", "recall"}
HIGHER |= {"perplexity", "codebook_usage", "bits_per_token", "bits_per_pixel"}


def test_every_metric_has_a_direction_here():
    assert sorted([*LOWER, *HIGHER]) == sorted({result for results in METRIC_RESULTS.values() for result in results})


@pytest.mark.parametrize("metric", sorted(LOWER | HIGHER))
def test_of_each_metric_the_better_value_is_the_lower_or_the_higher_one(metric):
    assert is_better(metric, 1.0, 2.0) == (metric in LOWER)
    assert is_better(metric, 2.0, 1.0) == (metric in HIGHER)
    assert not is_better(metric, 1.0, 1.0) and not is_better(metric, float("nan"), 1.0)


@pytest.mark.seconds
@pytest.mark.parametrize(("metric", "best"), [("l2", 4), ("psnr", 3)])
def test_best_leads_to_the_best_validation_and_of_equals_to_the_first(metric, best, tmp_path, monkeypatch):
    values = iter([float("nan"), 2.0, 3.0, 1.0, 3.0, 1.0])
    monkeypatch.setattr(Metrics, "compute", lambda self: {metric: next(values)})
    training = {"validation_metrics": [metric], "best_metric": metric, "validate_every": "1 step", "max_steps": 6}
    training |= {"checkpoint_every": "1 step", "keep_checkpoints": 1}
    run = train(tiny_config(tmp_path, training=training))
    assert (run / "checkpoints" / "best").resolve().name == f"step_{best:08}"
    assert [path.name for path in checkpoints(run)] == [f"step_{step:08}" for step in (best, 6)]


@pytest.mark.slow
@pytest.mark.mutations
def test_sixty_steps_on_four_images_learn_them(tmp_path):
    """Noise, so that nothing is learnt but these images: uniform grey would give 10.8 dB."""
    for split in ("train", "validation"):
        write_images(tmp_path / "images" / split, 4, seed=0)
    training = {"max_steps": 60, "base_lr": 3e-3, "lr_scaling": "none", "log_every": 1, "validate_every": "60 steps"}
    data = {"path": str(tmp_path / "images"), "crop_scale": None, "horizontal_flip": False}
    run = train(tiny_config(tmp_path, data=data, training=training))
    losses = [line["l1"] for line in metrics(run) if "l1" in line]
    assert losses[-1] < 0.35 * losses[0]
    assert metrics(run)[-1]["validation/psnr"] > 16


# ---- one process and many


def run_processes(config: Config, number: int) -> list[dict[str, Any]]:
    """Train under torchrun on the CPU; the metrics it logged."""
    run = Path(config.output_dir)
    run.parent.mkdir(parents=True, exist_ok=True)
    save_config(config, run.parent / "config.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    command += [str(REPOSITORY / "train.py"), str(run.parent / "config.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"processes          {number} on cpu" in done.stdout
    return metrics(run)


@pytest.mark.slow
def test_two_processes_under_torchrun_train_what_one_trains(tmp_path):
    """test_world_size.py has 20 steps of every quantizer, but a smooth discriminator; this one has the real kinks."""
    values = EVERYTHING | {
        "data": {"path": str(tmp_path / "images")},
        "training": EVERYTHING["training"] | {"gradient_accumulation_steps": 2, "total_batch_size": 8},
    }
    write_images(tmp_path / "images" / "train", 16)
    write_images(tmp_path / "images" / "validation", 3)
    one = metrics(train(tiny_config(tmp_path / "one", **values)))
    two = run_processes(tiny_config(tmp_path / "two", **values), 2)
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for index, (a, b) in enumerate(zip(one, two, strict=True)):
        # the first step differs by rounding alone; AdamW's division magnifies it from then on
        tolerance = 2e-6 if index == 0 else 1e-3
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (index, name)


def test_a_checkpoint_that_lacks_a_file_is_said_to_and_is_set_aside(tmp_path):
    def write(folder: Path) -> None:
        (folder / "weights").write_text("some")
        (folder / "progress.json").write_text("{}")

    for step in (1, 2):
        save_checkpoint(tmp_path, step, write, keep=2, best_step=None)
    (tmp_path / "checkpoints" / "step_00000002" / "weights").unlink()
    said: list[str] = []
    assert checkpoint.latest_intact(tmp_path, said.append).name == "step_00000001"
    assert len(said) == 1 and "step_00000002 is damaged (weights is missing)" in said[0]
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001"]
