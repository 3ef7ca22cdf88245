"""What went wrong in users' first hours, each told now in a sentence that says what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import reset_accelerate
from runs import held_by_another
from tiny import DISCRIMINATOR, tiny_config, write_images

from vqgan_accel.accelerator import processes_asked_for, start_accelerator
from vqgan_accel.config import DataConfig, parse_config
from vqgan_accel.data.content import content_hash, content_sum
from vqgan_accel.data.folder import FolderSource
from vqgan_accel.data.make_beton import BetonOptions, make_betons
from vqgan_accel.data.opening import open_indexed
from vqgan_accel.describe import perceptual_flop
from vqgan_accel.evaluation.reconstruct import reconstruct
from vqgan_accel.files import FolderHeldError
from vqgan_accel.training.loop import train

EMA = {"data": {"path": "x"}, "training": {"max_steps": 1}, "quantizer": {"type": "ema", "num_codes": 64, "decay": 0.9}}


def test_another_type_begins_with_its_defaults_and_says_what_it_leaves_out(capsys):
    config = parse_config(EMA, ["quantizer.type=entropy"])
    assert (config.quantizer.type, config.quantizer.num_codes) == ("entropy", 64)
    assert capsys.readouterr().err == "quantizer.type=entropy leaves out what config says of another type: decay 0.9\n"
    assert parse_config(EMA, ["quantizer.type=ema"]).quantizer.decay == 0.9
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match=r"'quantizer\.decay' belongs to another quantizer\.type"):
        parse_config(EMA, ["quantizer.type=standard", "quantizer.decay=0.5"])


@pytest.mark.seconds
def test_resuming_with_other_networks_names_the_keys_that_changed(tmp_path):
    train(tiny_config(tmp_path))
    with pytest.raises(ValueError, match=r"when the run began: autoencoder\.channels: 32 -> 64; resume with") as error:
        train(tiny_config(tmp_path, autoencoder={"channels": 64}, training={"max_steps": 4}), resume=True)
    assert "size mismatch" not in str(error.value)


def test_the_banner_says_what_will_never_happen_and_what_is_far_from_tried(tmp_path, capsys):
    train(tiny_config(tmp_path, discriminator={**DISCRIMINATOR, "start": "500 steps"}))
    said = capsys.readouterr().out
    assert "adversarial        NEVER: discriminator.start is step 500, and training ends at step 2" in said
    assert "NOTE: that is 0.125 x training.base_lr" in said and "training.lr_scaling=none" in said


def test_what_would_write_among_the_images_is_refused(tmp_path):
    config = tiny_config(tmp_path)
    inside = tmp_path / "images" / "train" / "run"
    with pytest.raises(ValueError, match=r"output_dir .* lies among the images of"):
        train(config.model_copy(update={"output_dir": str(inside)}))
    with pytest.raises(ValueError, match=r"--output .* lies among the images of"):
        reconstruct(tmp_path, inputs=[tmp_path / "images"], output=tmp_path / "images" / "out")
    assert not inside.exists()


def test_training_images_other_than_the_expected_ones_stop_the_run(tmp_path):
    config = tiny_config(tmp_path)
    source = FolderSource(tmp_path / "images", "train")
    whole = content_hash(content_sum(source, threads=3))
    assert whole == content_hash(sum(content_sum(source, 1, first, 3) for first in range(3)))  # shares add up
    expected = config.model_copy(update={"data": config.data.model_copy(update={"expected_hash": whole})})
    run = train(expected)
    file = Path(source.name(0))
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)  # under the same name, of the same size
    with pytest.raises(ValueError, match=r"the training images on .* are not those of data\.expected_hash"):
        train(expected.model_copy(update={"output_dir": str(tmp_path / "other")}))
    assert run.is_dir() and not (tmp_path / "other").exists()


def test_accelerates_dynamo_is_refused_and_training_compile_named(monkeypatch):
    reset_accelerate()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    with pytest.raises(ValueError, match=r"dynamo_backend AOT_EAGER .* training\.compile=true"):
        start_accelerator("no", 1)
    reset_accelerate()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/env/bin/python /env/bin/accelerate launch --cpu --num_processes 2 train.py demo.yaml", 2),
        ("/env/bin/python /env/bin/accelerate launch --num_processes=1 -m vqgan_accel train demo", 1),
        ("/env/bin/python /env/bin/accelerate env", 1),
        ("/bin/bash", 1),
        ("", 1),
    ],
)
def test_how_many_processes_a_launcher_was_asked_for(command, expected):
    assert processes_asked_for(command.split()) == expected


@pytest.mark.parametrize(("network", "size"), [("lpips_vgg", 64), ("mobilenet_v2", 128), ("lpips_alex", 256)])
def test_the_perceptual_networks_cost_what_counting_them_gives(network, size):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from vqgan_accel.losses.perceptual import perceptual_shell

    config = parse_config(EMA | {"losses": {"perceptual_network": network}})
    with torch.device("meta"):
        shell = perceptual_shell(config)
        images = torch.empty(1, 3, size, size)
    assert shell is not None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shell.to("meta")(images, images)
    assert perceptual_flop(config.losses, size) == pytest.approx(counter.get_total_flops(), rel=1e-4)


def test_a_name_that_is_no_utf8_is_told_with_the_backend_that_reads_it(tmp_path):
    write_images(tmp_path / "images" / "train", 2)
    os.rename(tmp_path / "images" / "train" / "000.png", os.fsencode(tmp_path / "images" / "train") + b"/caf\xe9.png")
    data = DataConfig(path=str(tmp_path / "images"), backend="hub")
    with pytest.raises(ValueError, match=r"caf.\.png in data\.path .* not UTF-8.*data\.backend=folder"):
        open_indexed(data, "train")
    assert len(open_indexed(data.model_copy(update={"backend": "folder"}), "train")) == 2


def test_two_make_betons_in_one_folder_are_kept_apart(tmp_path):
    write_images(tmp_path / "images" / "train", 2)
    (tmp_path / "betons").mkdir()
    with held_by_another(tmp_path / "betons"):
        data = DataConfig(path=str(tmp_path / "images"), workers=0)
        with pytest.raises(FolderHeldError, match=r"another process is at work in .*betons"):
            make_betons(data, tmp_path / "betons", BetonOptions(64, "raw", 95))
        assert [path.name for path in (tmp_path / "betons").iterdir()] == [".lock"]
