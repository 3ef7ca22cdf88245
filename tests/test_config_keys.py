"""No key of the config is silently ignored: the library reads every field of every section.

Reads are recorded while tiny runs of all kinds go on. What only validates, compares (layout_of) or prints (the banner)
is no use of a key, and reads by tests or by pydantic do not count. What a section says of itself (its stride, whether
it has codes to replace) is used where somebody asks for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args, get_origin

import datasets
import pytest
import torch
from accelerate import Accelerator
from helpers import TAMING, tiny_tokenizer
from tiny import DISCRIMINATOR, QUANTIZERS, having, tiny_config, tiny_quantizer, write_splits

import vqgan_accel
from vqgan_accel.config import Config, DataConfig, EvaluationConfig, LossConfig, WeightFiles, config_keys
from vqgan_accel.data.opening import open_source
from vqgan_accel.evaluation.collected import Moments
from vqgan_accel.evaluation.evaluate import evaluate
from vqgan_accel.evaluation.measures.base import Need, Seen, Setting, real
from vqgan_accel.evaluation.measures.perturbed import perturbed
from vqgan_accel.evaluation.metrics import Metrics
from vqgan_accel.evaluation.networks import Networks
from vqgan_accel.evaluation.reference import open_reference
from vqgan_accel.losses.perceptual import build_perceptual
from vqgan_accel.models.tokenizer import TokenizerConfig
from vqgan_accel.sections import Section, TermSection, sections_of
from vqgan_accel.training.loop import train

pytestmark = pytest.mark.slow

PACKAGE = str(Path(vqgan_accel.__file__).parent)
SCHEMA = (str(Path(PACKAGE) / "config"), str(Path(PACKAGE) / "sections.py"))
BANNER = str(Path(PACKAGE) / "training" / "banner.py")

Read = tuple[str, str]  # class, field


def is_use(frame: FrameType | None) -> bool:
    """Whether a read there is by code that acts on what it reads."""
    while frame is not None and frame.f_code.co_filename.startswith((*SCHEMA, __file__)):  # a property has us between
        if frame.f_code.co_name in NO_USE:
            return False
        frame = frame.f_back
    file = frame.f_code.co_filename if frame is not None else ""
    return file.startswith(PACKAGE) and file != BANNER


@contextmanager
def recording() -> Iterator[set[Read]]:
    """Collects which fields the package's own code reads."""
    reads: set[Read] = set()
    plain = Section.__getattribute__

    def recorded(self: Section, name: str) -> Any:
        value = plain(self, name)
        if name in type(self).model_fields and is_use(sys._getframe(1)):
            reads.add((type(self).__name__, name))
        return value

    Section.__getattribute__ = recorded  # type: ignore[method-assign]
    try:
        yield reads
    finally:
        del Section.__getattribute__


def sections(model: type[Section] = Config) -> list[type[Section]]:
    """The config's classes: itself, its sections, and every type of each."""
    parts = [part for field in model.model_fields.values() for part in sections_of(field.annotation)]
    return [model, *(section for part in parts for section in sections(part))]


def leaves(model: type[Section] = Section) -> list[type[Section]]:
    """The package's sections that no other inherits."""
    if not model.__subclasses__():
        return [model] if model.__module__.startswith("vqgan_accel.") else []
    return [leaf for part in model.__subclasses__() for leaf in leaves(part)]


NO_USE = {"layout_of", *(name for part in sections() for name in part.__pydantic_decorators__.model_validators)}


def fields() -> set[Read]:
    """Every field, but for those that can hold one value only: there is nothing to ignore."""
    return {
        (section.__name__, name)
        for section in sections()
        for name, field in section.model_fields.items()
        if not (get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1)
    }


def train_every_kind(folder: Path) -> None:
    """Each quantizer; discriminator, R1, accumulation, averaging, trackers, a broken image, the hub, a stream."""
    adversarial = {**DISCRIMINATOR, "adaptive_weight": True, "r1_weight": 1.0, "r1_every": 2, "start": "1 step"}
    everything = {
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "ema_decay": 0.9,
        "max_grad_norm": 1.0,
        "lr_decay": "3 steps",
    }
    tracking = {"trackers": ["tensorboard", "wandb"], "wandb_mode": "offline"}
    more = {"discriminator": adversarial, "training": everything, "tracking": tracking, "data": {"on_error": "skip"}}
    (write_splits(folder / "standard" / "images") / "train" / "broken.png").touch()
    for kind in QUANTIZERS:
        quantizer = {"type": kind, **having(kind, reinit_every="1 epoch")}
        train(tiny_config(folder / kind, quantizer=quantizer, **(more if kind == "standard" else {})))
    evaluate(folder / "entropy" / "run", overrides=["evaluation.split=test", "evaluation.save_reconstructions=png"])
    hub = {"backend": "hub", "path": str(folder / "ema" / "images")}
    train(tiny_config(folder / "hub", data=hub))
    train(tiny_config(folder / "taming", autoencoder=TAMING, data={"validation_fraction": 0.3}))
    warm = {**DISCRIMINATOR, "warmup": "1 step"}
    decoder = {"init_from": str(folder / "ema" / "run"), "decoder_only": True}
    train(tiny_config(folder / "decoder", quantizer={"type": "ema"}, training=decoder, discriminator=warm))
    steps = {"validate_every": "2 steps", "checkpoint_every": "2 steps"}
    train(tiny_config(folder / "stream", data=hub | {"streaming": True}, training=steps))


def read_what_a_network_connection_would(folder: Path) -> None:
    """Fields of published weights, and of data sets on the hub: up to the error that nothing is there."""
    weights = WeightFiles(**dict.fromkeys(WeightFiles.model_fields, str(folder / "none")))
    for network in ("lpips_vgg", "lpips_alex", "lpips_squeeze", "mobilenet_v2"):
        with pytest.raises(FileNotFoundError):
            build_perceptual(LossConfig(perceptual_network=network), weights)
    for metric in ("lpips", "rfid", "mobilenet_distance", "fd_mobilenet", "fd_efficientnet", "fd_dinov2", "pfid"):
        with pytest.raises(FileNotFoundError):
            Metrics([metric], (100,), EvaluationConfig(), weights, torch.device("cpu"))
    few = EvaluationConfig(pfid_neighbours=2)
    setting = Setting(few, Networks(weights, torch.device("cpu")), (16,), torch.device("cpu"))
    images, codes = torch.zeros(1, 3, 16, 16), torch.zeros(1, 4, 4, dtype=torch.int64)
    perturbed(Seen(setting, images, images, codes, torch.arange(1), tiny_tokenizer(tiny_quantizer("standard")), None))
    reference = EvaluationConfig(reference=str(folder / "none.npz"))
    config = Config(training={"max_steps": 1}, evaluation=reference)
    metrics = Metrics([], (2,), reference, weights, torch.device("cpu"))
    metrics.needs = [Need("inception", real, Moments)]
    with pytest.raises(FileNotFoundError):
        open_reference(config, metrics, Accelerator(cpu=True))
    with pytest.raises(FileNotFoundError):
        open_source(DataConfig(backend="hub", path="nobody/nothing", subset="a", revision="b"), "train")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_the_library_reads_every_field_of_the_config(tmp_path, offline):
    with recording() as reads:
        train_every_kind(tmp_path)
        read_what_a_network_connection_would(tmp_path)
    unread = sorted(f"{section}.{name}" for section, name in fields() - reads)
    assert not unread, f"set by users and read by nothing: {', '.join(unread)}"


def test_every_key_that_a_user_can_write_is_among_those_fields():
    names = {name for section in sections() for name in section.model_fields}
    assert {key.rsplit(".", 1)[-1] for key in config_keys()} == names
    # (TermSection: of which there is none yet. TokenizerConfig: what a saved tokenizer has of a config.)
    assert set(sections()) == set(leaves()) - {TermSection, TokenizerConfig}


def test_reads_by_tests_checks_and_pydantic_do_not_count():
    minimal = {"training": {"max_steps": 1}}
    with recording() as reads:
        config = Config.model_validate(minimal)
        assert config.training.max_steps == 1
        config.model_dump(mode="json")
        assert config == Config.model_validate(minimal)
    assert reads == set()
    with recording() as reads, pytest.raises(ValueError, match=r"data\.path"):
        open_source(config.data, "train")
    assert reads == {("DataConfig", name) for name in ("streaming", "validation_fraction", "path")}
    assert "__getattribute__" not in vars(Section)
