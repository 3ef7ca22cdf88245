"""A new quantizer, discriminator, loss term and data source: each is one file and one line.

A copy of the package gets a file for each and has one line changed for each. What comes out trains, resumes bit for
bit, describes, validates and tokenizes like what the package came with.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from runs import assert_same_bits, metrics, tensors

import vqgan_accel

PACKAGE = Path(vqgan_accel.__file__).parent

QUANTIZER = """
from typing import Literal

import torch
from torch import Tensor

from vqgan_accel.models.quantizers.base import Quantizer, QuantizerOutput, straight_through
from vqgan_accel.sections import Learning, QuantizerSection


class SignsConfig(QuantizerSection):
    type: Literal["signs"]
    dimensions: int = 4
    scale: float = 1.0
    pull: Learning[float] = 0.25

    @property
    def num_codes(self) -> int:
        return 2**self.dimensions

    @property
    def embedding_dim(self) -> int:
        return self.dimensions

    def build(self) -> Quantizer:
        return SignQuantizer(self.dimensions, self.scale, self.pull)

    def at_step(self, step: int, steps_per_epoch: int | None) -> dict[str, float]:
        return {"pull": self.pull * (step + 1)}


class SignQuantizer(Quantizer):
    def __init__(self, dimensions: int, scale: float, pull: float) -> None:
        super().__init__()
        self.num_codes, self.input_channels, self.scale, self.pull = 2**dimensions, dimensions, scale, pull
        self.register_buffer("powers", 2 ** torch.arange(dimensions), persistent=False)

    def choose_float(self, latents: Tensor) -> Tensor:
        return ((latents > 0) * self.powers.view(-1, 1, 1)).sum(1)

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        return self.scale * ((codes[:, None] // self.powers.view(-1, 1, 1) % 2) * 2.0 - 1)

    def quantize(self, latents: Tensor, sample_seeds: Tensor | None) -> QuantizerOutput:
        codes = self.choose_float(latents)
        quantized = self.codes_to_latents(codes)
        loss = self.pull * (latents - quantized.detach()).square().mean()
        return QuantizerOutput(straight_through(latents, quantized), codes, loss, {"pull_loss": loss.detach()})
"""

DISCRIMINATOR = """
from contextlib import nullcontext
from typing import Literal

from torch import Tensor, nn

from vqgan_accel.models.discriminators.base import Discriminator
from vqgan_accel.models.precision import without_autocast
from vqgan_accel.sections import DiscriminatorSection


class PatchesConfig(DiscriminatorSection):
    type: Literal["patches"] = "patches"
    channels: int = 8

    def build(self, image_size: int) -> Discriminator:
        return Patches(self.channels)


class Patches(Discriminator):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, channels, 4, 2, 1), nn.SiLU(), nn.Conv2d(channels, 1, 4, 2, 1))

    def forward(self, images: Tensor, full_precision: bool = False) -> Tensor:
        with without_autocast(images) if full_precision else nullcontext():
            return self.body(images).float()
"""

TERM = """
import torch
from torch import Tensor
from torch.nn import functional as F

from vqgan_accel.distributed import mean_over_processes
from vqgan_accel.losses.terms import LossTerm
from vqgan_accel.sections import TermSection


class AnchorsConfig(TermSection):
    weight: float = 0.1
    decay: float = 0.5

    def build(self) -> LossTerm:
        return Anchors(self.weight, self.decay)


class Anchors(LossTerm):
    anchor: Tensor
    new: Tensor

    def __init__(self, weight: float, decay: float) -> None:
        super().__init__()
        self.weight, self.decay = weight, decay
        self.register_buffer("anchor", torch.zeros(()))
        self.register_buffer("new", torch.zeros(2), persistent=False)

    def on_reconstruction(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        return (reconstruction.mean((2, 3)) - images.mean((2, 3))).square().mean()

    def on_fake(self, logits: Tensor) -> Tensor:
        return F.relu(self.anchor - logits).square().mean()

    def on_real(self, logits: Tensor) -> Tensor:
        self.new += torch.stack([logits.detach().mean(), torch.ones(())])
        return F.relu(logits - self.anchor).square().mean()

    def apply_update(self) -> None:
        total, rounds = mean_over_processes(self.new)
        if rounds:
            self.anchor.lerp_(total / rounds, 1 - self.decay)
        self.discard_update()

    def discard_update(self) -> None:
        self.new.zero_()
"""

SOURCE = """
import numpy as np
from PIL import Image

from vqgan_accel.config import DataConfig
from vqgan_accel.data.source import Labels


def open_split(config: DataConfig, split: str, key: str) -> "Gradients":
    return Gradients(split)


class Gradients:
    def __init__(self, split: str) -> None:
        self.split, self.title = split, f"gradients[{split}]"

    def __len__(self) -> int:
        return 8

    def name(self, index: int) -> str:
        return f"{self.title} {index}"

    def file_name(self, index: int) -> str:
        return str(index)

    def stored_names(self) -> list[str] | None:
        return [str(index) for index in range(len(self))]

    def labels(self) -> Labels | None:
        return None

    def fingerprint(self) -> str:
        return f"8 gradients of {self.split}"

    def stored(self, index: int) -> bytes:
        return self.open(index).tobytes()

    def open(self, index: int) -> Image.Image:
        rows = np.random.default_rng(index + 100 * len(self.split)).integers(0, 256, (16, 16, 3))
        return Image.fromarray(rows.astype(np.uint8))
"""

# file -> its text; and in which file which line becomes which (with the import that it needs)
FILES = {
    "models/quantizers/signs.py": QUANTIZER,
    "models/discriminators/patches.py": DISCRIMINATOR,
    "losses/anchors.py": TERM,
    "data/gradients.py": SOURCE,
}
LINES = {
    "config/quantizers.py": (
        "QuantizerConfig = StandardQuantizerConfig |",
        "from vqgan_accel.models.quantizers.signs import SignsConfig\n"
        "QuantizerConfig = SignsConfig | StandardQuantizerConfig |",
    ),
    "config/discriminators.py": (
        "DiscriminatorConfig = StyleGAN2Config",
        "from vqgan_accel.models.discriminators.patches import PatchesConfig\n"
        "DiscriminatorConfig = StyleGAN2Config | PatchesConfig",
    ),
    "config/losses.py": (
        "class LossConfig(Section):",
        "from vqgan_accel.losses.anchors import AnchorsConfig\n"
        "class LossConfig(Section):\n"
        "    anchors: AnchorsConfig | None = None",
    ),
    "data/sources.py": ("SOURCES = {", 'SOURCES = {\n    "gradients": "vqgan_accel.data.gradients",'),
}

CONFIG = """
output_dir: run
data: {backend: gradients, path: anywhere, image_size: 16, workers: 0}
autoencoder: {channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1}
quantizer: {type: signs, dimensions: 3}
losses: {perceptual_weight: 0, anchors: {weight: 0.5}}
discriminator: {type: patches, r1_weight: 1.0, r1_every: 2, adaptive_weight: true, weight: 0.8, start: 1 step}
training:
  {max_steps: 6, total_batch_size: 4, gradient_accumulation_steps: 2, base_lr: 0.01, ema_decay: 0.5, log_every: 1,
   validate_every: 100 steps, checkpoint_every: 3 steps, keep_checkpoints: 9}
evaluation: {metrics: [psnr, codebook], batch_size: 2}
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package that has all four."""
    folder = tmp_path_factory.mktemp("extended")
    copy = folder / "vqgan_accel"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in FILES.items():
        (copy / name).write_text(text)
    for name, (line, changed) in LINES.items():
        text = (copy / name).read_text()
        assert text.count(line) == 1, f"{name} has no longer the line that an extension changes"
        (copy / name).write_text(text.replace(line, changed))
    return folder


def python(extended: Path, script: str, folder: Path) -> str:
    """What it prints, run in `folder` with the extended package."""
    environment = os.environ | {"PYTHONPATH": str(extended), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-c", dedent(script)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(extended: Path) -> dict[str, Path]:
    """One in one go, and one that went on from its checkpoint; what else is asked of them is printed."""
    (extended / "toy.yaml").write_text(CONFIG)
    said = python(
        extended,
        """
        import shutil
        from pathlib import Path

        from vqgan_accel import evaluate, load_config, load_tokenizer, tokenize, train
        from vqgan_accel.config import config_keys
        from vqgan_accel.describe import describe
        from vqgan_accel.models.build import layout_differences

        config = load_config("toy.yaml", ["output_dir=whole"])
        train(config)
        shutil.copytree("whole", "broken")
        shutil.rmtree("broken/checkpoints/step_00000006")
        config = load_config("toy.yaml", ["output_dir=broken"])
        train(config, resume=True)

        print("keys", {"quantizer.dimensions", "losses.anchors.weight", "discriminator.channels"} <= set(config_keys()))
        print("parameters", describe(config)["parameters"]["discriminator"])
        print("psnr", evaluate("whole", overrides=["evaluation.split=test"])["results"]["psnr"])
        print("rows", tokenize("whole", output="tokens")["rows"])
        saved = load_tokenizer("whole")
        for change in ("quantizer.pull=9", "quantizer.scale=2", "quantizer.dimensions=4"):
            print("layout", layout_differences(load_config("toy.yaml", [change]), saved))
        for wrong in ("quantizer.dimension=3", "quantizer.type=sign", "losses.anchors.wait=1", "data.backend=gradient"):
            try:
                load_config("toy.yaml", [wrong])
            except ValueError as error:
                print("error", error)
        """,
        extended,
    )
    (extended / "said.txt").write_text(said)
    return {"whole": extended / "whole", "broken": extended / "broken"}


@pytest.mark.slow
def test_they_train_and_resume_bit_for_bit_with_all_that_they_keep(runs: dict[str, Path]) -> None:
    whole, broken = runs["whole"], runs["broken"]
    assert_same_bits(whole / "checkpoints" / "latest", broken / "checkpoints" / "latest")
    assert metrics(whole) == metrics(broken)
    early, late = (tensors(whole / "checkpoints" / f"step_0000000{step}") for step in (3, 6))
    assert (
        early["anchors.safetensors:anchor"] != 0
        and early["anchors.safetensors:anchor"] != late["anchors.safetensors:anchor"]
    )
    steps = [line for line in metrics(whole) if "l1" in line]
    assert all({"pull_loss", "anchors"} <= line.keys() for line in steps)
    assert ["discriminator" in line for line in steps] == [False, True, True, True, True, True]


@pytest.mark.slow
def test_everything_else_knows_them_too(runs: dict[str, Path]) -> None:
    said = (runs["whole"].parent / "said.txt").read_text()
    for words in (
        "keys True",
        f"parameters {3 * 16 * 8 + 8 + 8 * 16 + 1}",
        "rows 8",
        "layout []",  # how hard latents are pulled does not change what a code means
        "layout ['quantizer.scale (1.0)']",
        "layout ['quantizer.dimensions (3)']",
        "unknown key 'quantizer.dimension'; did you mean 'quantizer.dimensions'?",
        "'quantizer.type' is 'sign' but must be signs, standard, ema, entropy or gumbel",
        "unknown key 'losses.anchors.wait'",
        "'data.backend' is 'gradient': input should be 'gradients',",
    ):
        assert words in said, said
