"""A new quantizer, discriminator, loss term, metric and data source: each is one file and one line.

A copy of the package gets a file for each, as docs/extending.md has them, and has one line changed for each. What comes
out trains, resumes bit for bit, describes, validates and tokenizes like what the package came with.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from runs import assert_same_bits, metrics, tensors

import vqgan_accel

PACKAGE = Path(vqgan_accel.__file__).parent
PAGE = PACKAGE.parent / "docs" / "extending.md"
# file -> its text, as the page has it; and in which file which line becomes which (with the import that it needs)
FILES = dict(re.findall(r"^```python\n# vqgan_accel/(\S+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))
LINES = {
    "config/quantizers/__init__.py": (
        "QuantizerConfig = (",
        "from vqgan_accel.models.quantizers.signs import SignsConfig\nQuantizerConfig = (\n    SignsConfig |",
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
    "config/metrics.py": (
        "METRICS: dict[str, MetricEntry] = {",
        "METRICS: dict[str, MetricEntry] = {\n"
        '    "edges": MetricEntry("vqgan_accel.evaluation.measures.edges.Edges", {"edges": LOWER}),\n',
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
   validate_every: 100 steps, checkpoint_every: 3 steps, keep_checkpoints: 9, validation_metrics: [edges],
   best_metric: edges}
evaluation: {metrics: [psnr, codebook], batch_size: 2}
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package that has all five."""
    folder = tmp_path_factory.mktemp("extended")
    copy = folder / "vqgan_accel"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert len(FILES) == len(LINES) == 5
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
        more = ["evaluation.split=test", "evaluation.metrics=[psnr, edges]"]
        results = evaluate("whole", overrides=more)["results"]
        print("psnr", results["psnr"], "edges", sorted(results), results["edges"] > 0)
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
    assert ["discriminator_anchors" in line for line in steps] == [False, True, True, True, True, True]
    assert ["discriminator" in line for line in steps] == [False, True, True, True, True, True]


@pytest.mark.slow
def test_everything_else_knows_them_too(runs: dict[str, Path]) -> None:
    said = (runs["whole"].parent / "said.txt").read_text()
    for words in (
        "keys True",
        f"parameters {3 * 16 * 8 + 8 + 8 * 16 + 1}",
        "rows 8",
        "edges ['edges', 'psnr', 'psnr_per_image'] True",
        "layout []",  # how hard latents are pulled does not change what a code means
        "layout ['quantizer.scale (1.0)']",
        "layout ['quantizer.dimensions (3)']",
        "unknown key 'quantizer.dimension'; did you mean 'quantizer.dimensions'?",
        "'quantizer.type' is 'sign' but must be signs, standard, ema, entropy, gumbel, ",
        "unknown key 'losses.anchors.wait'",
        "'data.backend' is 'gradient': input should be 'gradients',",
    ):
        assert words in said, said
