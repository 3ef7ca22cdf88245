"""The arguments of each command, and what the Tab key offers for them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vqgan_accel import __version__, commands

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]
    Run = Callable[[argparse.Namespace], int | None]

TOKENIZER_PATH = "a run, a checkpoint, an import, a folder of save_pretrained, or USER/NAME on the Hugging Face hub"


def build_parser() -> argparse.ArgumentParser:
    """Options with `run`, what to do with them; `debug`; and, of most commands, `overrides`."""
    parser = argparse.ArgumentParser(
        prog="vqgan-accel", allow_abbrev=False, description="Train and evaluate image tokenizers (VQ-VAE, VQ-GAN)."
    )
    parser.add_argument("--version", action="version", version=f"vqgan_accel {__version__}")
    parsers = parser.add_subparsers(required=True, metavar="command")
    for group in (
        _add_training,
        _add_configs,
        _add_data,
        _add_pictures,
        _add_tokens,
        _add_exchange,
        _add_reports,
        _add_installation,
    ):
        group(parsers)
    return parser


def _add_training(parsers: Subparsers) -> None:
    train = _add(parsers, "train", "Train a tokenizer; also under accelerate launch or torchrun.", commands.run_train)
    _take_config(train)
    train.add_argument("--resume", action="store_true", help="go on from output_dir's newest checkpoint, if it has one")

    evaluate = _add(
        parsers,
        "evaluate",
        "Measure a tokenizer on a split; also under accelerate launch or torchrun.",
        commands.run_evaluate,
    )
    _take_tokenizer(evaluate)
    _take_overrides(evaluate)
    _take_data(evaluate)
    evaluate.add_argument(
        "--output", type=Path, help="folder for the results (default: evaluation/SPLIT in the run, or DATA_SPLIT)"
    )

    made = _add(
        parsers,
        "statistics",
        "Mean and covariance of a data set's features, for evaluation.reference; also under accelerate launch.",
        commands.run_statistics,
    )
    made.add_argument("data", metavar="DATA", help="what data.path may be: a folder, a data set, a name on the hub")
    _take_overrides(made, "data.image_size=256 evaluation.protocol=adm evaluation.split=train")
    made.add_argument("--output", type=Path, required=True, help="a new .npz file")


def _add_configs(parsers: Subparsers) -> None:
    new = _add(parsers, "new", "Look at pictures and machine, and write a config for them.", commands.run_new)
    new.add_argument("--data", metavar="PATH", required=True, help="the pictures: what data.path may be")
    new.add_argument("--output", type=Path, help="YAML file (default: NAME.yaml here, after the pictures)")
    _take_overrides(new, "data.image_size=128 training.max_steps=5000")

    describe = _add(
        parsers, "describe", "Parameters, latent grid, bits per pixel and GFLOP of a config.", commands.run_describe
    )
    _take_config(describe)
    describe.add_argument("--json", action="store_true", help="print JSON")

    keys = _add(
        parsers, "keys", "The keys of a config: type, default and meaning of all, or of some.", commands.run_keys
    )
    taken = keys.add_argument("prefix", nargs="?", default="", help="how they begin: training, quantizer.kl")
    taken.completer = complete_key  # type: ignore[attr-defined]
    keys.add_argument("--json-schema", action="store_true", help="print the JSON schema of a config file, for editors")


def _add_data(parsers: Subparsers) -> None:
    data_info = _add(
        parsers,
        "data-info",
        "What a config's data set holds: sizes, broken images, decode rates.",
        commands.run_data_info,
    )
    _take_config(data_info)
    data_info.add_argument("--hash", action="store_true", help="also a hash of all bytes, for data.expected_hash")
    data_info.add_argument("--output", type=Path, default=Path("data_info"), help="folder for the contact sheets")

    make_beton = _add(parsers, "make-beton", "Write a data set as FFCV's beton files.", commands.run_make_beton)
    _take_overrides(make_beton, "data.train_split=train[:90%%]")
    make_beton.add_argument("--source", required=True, help="what data.path may be: a folder, a data set, a hub name")
    make_beton.add_argument("--output", type=Path, required=True, help="folder for train.beton, validation.beton, ...")
    make_beton.add_argument(
        "--max-resolution",
        type=int,
        required=True,
        help="pixels of the longer side, at most; of a 4:3 photograph a crop at 256 px is not enlarged from 410 px on",
    )
    make_beton.add_argument(
        "--write-mode",
        choices=("jpg", "raw", "smart"),
        default="jpg",
        help="jpg: small files; raw: the exact pixels, fastest; smart: raw up to 192 x 192 px, jpg above",
    )
    make_beton.add_argument("--quality", type=int, default=95, help="of JPEG, 1 to 100")


def _add_pictures(parsers: Subparsers) -> None:
    reconstruct = _add(
        parsers, "reconstruct", "Images of any size beside what a tokenizer makes of them.", commands.run_reconstruct
    )
    _take_tokenizer(reconstruct)
    reconstruct.add_argument("inputs", type=Path, nargs="+", metavar="input", help="image files, or folders of them")
    reconstruct.add_argument("--output", type=Path, required=True, help="folder for the pictures and a table")
    reconstruct.add_argument("--tile", type=int, default=1024, help="pixels; larger images are done in tiles")
    reconstruct.add_argument("--lpips", action="store_true", help="with LPIPS (VGG) in the table")
    reconstruct.add_argument("--vgg16", metavar="FILE", help="its backbone's published weights (default: a download)")

    codes = _add(
        parsers,
        "codebook",
        "Where a tokenizer's codes lie, and which of them a split uses: pictures.",
        commands.run_codebook,
    )
    _take_tokenizer(codes)
    _take_overrides(codes)
    _take_data(codes)
    codes.add_argument("--output", type=Path, required=True, help="folder for the pictures and a table")


def _add_tokens(parsers: Subparsers) -> None:
    tokens = _add(
        parsers, "tokenize", "The codes of a data set, as parquet; also under accelerate launch.", commands.run_tokenize
    )
    _take_tokenizer(tokens)
    _take_overrides(tokens, "data.workers=8 evaluation.batch_size=64")
    _take_data(tokens)
    tokens.add_argument("--split", choices=("train", "validation", "test"), default="train", help="default: train")
    tokens.add_argument(
        "--views",
        choices=("center", "flip", "10crop"),
        default="center",
        help="of every image its centre, that and its mirror image, or five crops and theirs",
    )
    tokens.add_argument("--shard-images", type=int, help="images in a file (default: at most 10,000)")
    tokens.add_argument("--output", type=Path, required=True, help="folder; what it holds of the same codes is kept")

    probe = _add(
        parsers, "probe", "How well a small model predicts a tokenizer's codes, and its samples.", commands.run_probe
    )
    _take_tokenizer(probe)
    _take_overrides(probe, "evaluation.metrics=[fd_mobilenet]")
    probe.add_argument("--tokens", type=Path, required=True, help="folder that `tokenize` wrote with this tokenizer")
    probe.add_argument("--steps", type=int, default=2000, help="of training, 64 images each (default: 2000)")
    probe.add_argument("--samples", type=int, default=64, help="images to draw and decode (default: 64)")
    probe.add_argument("--seed", type=int, default=0, help="of all that is random")
    probe.add_argument("--output", type=Path, required=True, help="folder for probe.json and samples.png")


def _add_exchange(parsers: Subparsers) -> None:
    imports = _add(
        parsers,
        "import",
        "Another program's checkpoint, as a folder that evaluate reads like ours.",
        commands.run_import,
    )
    imports.add_argument(
        "format",
        choices=("lightning", "taming", "llamagen", "diffusers"),
        help="lightning: SerezD's vqvae-vqgan-pytorch-lightning; taming: VQModel or GumbelVQ of taming-transformers; "
        "llamagen: LlamaGen's VQ tokenizers; diffusers: its VQModel",
    )
    imports.add_argument("checkpoint", type=Path, help="file; diffusers: folder, or USER/NAME on the hub")
    imports.add_argument("--config", type=Path, help="lightning, taming: the YAML file that it was trained with")
    imports.add_argument("--output", type=Path, required=True, help="folder for tokenizer/, config.yaml and the rest")

    exports = _add(parsers, "export", "A tokenizer for other libraries and other people.", commands.run_export)
    exports.add_argument(
        "format",
        choices=("diffusers", "hub"),
        help="diffusers: its VQModel (the taming architecture); hub: a repository with recipe, metrics and model card",
    )
    _take_tokenizer(exports)
    exports.add_argument("--output", type=Path, required=True, help="folder for it")
    exports.add_argument("--push", metavar="USER/NAME", help="hub: upload it there, too")
    exports.add_argument("--private", action="store_true", help="with --push: a repository that is new is private")


def _add_reports(parsers: Subparsers) -> None:
    statuses = _add(
        parsers,
        "status",
        "How a training stands. Exit status 0: finished, 1: failed, 3: running, 75: interrupted, go on with --resume.",
        commands.run_status,
    )
    statuses.add_argument("run_folder", type=Path, metavar="run", help="output_dir of a training")

    reports = _add(
        parsers,
        "report",
        "One page of one run, or of several over each other: curves, pictures, scores.",
        commands.run_report,
    )
    reports.add_argument("runs", type=Path, nargs="+", metavar="run", help="output_dir of a training")
    reports.add_argument("--output", type=Path, help="HTML file (default: report.html in the run; of several: here)")

    compares = _add(
        parsers,
        "compare",
        "Runs side by side as a table: configs, progress, scores that compare.",
        commands.run_compare,
    )
    compares.add_argument("runs", type=Path, nargs="+", metavar="run", help="output_dir of a training")
    compares.add_argument("--format", choices=("text", "csv", "markdown"), default="text", help="default: text")


def _add_installation(parsers: Subparsers) -> None:
    _add(parsers, "recipes", "The recipes that come with vqgan_accel, a line each.", commands.run_recipes)

    launch_files = _add(
        parsers,
        "launch-files",
        "Copy accelerate's config files and the scripts for clusters to a folder.",
        commands.run_launch_files,
    )
    launch_files.add_argument("folder", type=Path, help="folder for them; nothing there is overwritten")

    doctor = _add(
        parsers, "doctor", "Versions, devices, and what is missing here and what it would enable.", commands.run_doctor
    )
    doctor.add_argument("config", type=Path, nargs="?", help="YAML file or recipe whose weights.* settings to check")


def _add(parsers: Subparsers, name: str, summary: str, run: Run) -> argparse.ArgumentParser:
    command = parsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run)
    return command


def _take_overrides(command: argparse.ArgumentParser, example: str = "training.max_steps=200 data.path=FOLDER") -> None:
    taken = command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=f"such as {example}")
    taken.completer = complete_override  # type: ignore[attr-defined]  # argcomplete looks for it


def _take_config(command: argparse.ArgumentParser) -> None:
    taken = command.add_argument("config", type=Path, help="YAML file, or a recipe's name: `vqgan-accel recipes`")
    taken.completer = complete_config  # type: ignore[attr-defined]
    _take_overrides(command)


def _take_tokenizer(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", type=Path, help=TOKENIZER_PATH)


def _take_data(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", metavar="PATH", help="what data.path may be (default: the run's own)")


def complete_config(prefix: str, **_: object) -> list[str]:
    """Recipes and YAML files that begin so."""
    import glob

    from vqgan_accel.recipes import recipes

    found = [*glob.glob(f"{glob.escape(prefix)}*.yaml"), *glob.glob(f"{glob.escape(prefix)}*/")]
    return found + [name for name in recipes() if name.startswith(prefix)]


def complete_override(prefix: str, **_: object) -> list[str]:
    """Config keys that begin so, with their equals sign."""
    from vqgan_accel.config import config_keys

    keys = config_keys()
    sections = {key.rpartition(".")[0] for key in keys}
    return [f"{key}=" for key in keys if key.startswith(prefix) and key not in sections]


def complete_key(prefix: str, **_: object) -> list[str]:
    """Config keys and sections that begin so."""
    from vqgan_accel.config import config_keys

    return [key for key in config_keys() if key.startswith(prefix)]
