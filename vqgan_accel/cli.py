# PYTHON_ARGCOMPLETE_OK
"""The `vqgan-accel` command; train.py and evaluate.py call it too."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vqgan_accel import __version__
from vqgan_accel.files import FolderHeldError
from vqgan_accel.interruption import EXIT_INTERRUPTED, TrainingInterruptedError

USER_ERRORS = (
    ValueError,
    OSError,
    FloatingPointError,
)  # told in a sentence; anything else is our bug and shows its traceback
TOKENIZER_PATH = "a run, a checkpoint, an import, a folder of save_pretrained, or USER/NAME on the Hugging Face hub"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 2 after an error told in one sentence (`--debug` shows its traceback); 75
    (EXIT_INTERRUPTED) where training stopped on a signal and can go on with --resume, or could not go on yet, because
    another process still holds the run's folder."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # set by the shell that wants to know what could follow
        import argcomplete

        argcomplete.autocomplete(parser)
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no positional after an option; overrides may stand anywhere
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    try:
        options.run(options)
    except (*USER_ERRORS, RuntimeError) as error:
        sentence = explain(error)
        if options.debug or sentence is None:
            raise
        rank = os.environ.get("RANK")
        where = f" (process {rank})" if rank is not None and os.environ.get("WORLD_SIZE", "1") != "1" else ""
        print(f"error{where}: {sentence}", file=sys.stderr, flush=True)
        # a requeued job whose former self is still at work: not an end, but a reason to start again later
        return EXIT_INTERRUPTED if isinstance(error, FolderHeldError) and getattr(options, "resume", False) else 2
    except TrainingInterruptedError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def explain(error: Exception) -> str | None:
    """The sentence for the user; None for an error that is ours and not theirs."""
    if isinstance(error, RuntimeError):
        from vqgan_accel.distributed import known_failure

        return known_failure(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vqgan-accel", allow_abbrev=False, description="Train and evaluate image tokenizers (VQ-VAE, VQ-GAN)."
    )
    parser.add_argument("--version", action="version", version=f"vqgan_accel {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, summary: str, run: object) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run)
        return command

    def take_overrides(
        command: argparse.ArgumentParser, example: str = "training.max_steps=200 data.path=FOLDER"
    ) -> None:
        taken = command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=f"such as {example}")
        taken.completer = complete_override  # type: ignore[attr-defined]  # argcomplete looks for it

    def take_config(command: argparse.ArgumentParser) -> None:
        taken = command.add_argument("config", type=Path, help="YAML file, or a recipe's name: `vqgan-accel recipes`")
        taken.completer = complete_config  # type: ignore[attr-defined]
        take_overrides(command)

    train = add("train", "Train a tokenizer; also under accelerate launch or torchrun.", run_train)
    take_config(train)
    train.add_argument("--resume", action="store_true", help="go on from output_dir's newest checkpoint, if it has one")

    evaluate = add(
        "evaluate", "Measure a tokenizer on a split; also under accelerate launch or torchrun.", run_evaluate
    )
    evaluate.add_argument("path", type=Path, help=TOKENIZER_PATH)
    take_overrides(evaluate)
    evaluate.add_argument("--output", type=Path, help="folder for the results (default: evaluation/SPLIT in the run)")

    new = add("new", "Look at pictures and machine, and write a config for them.", run_new)
    new.add_argument("--data", metavar="PATH", required=True, help="the pictures: what data.path may be")
    new.add_argument("--output", type=Path, help="YAML file (default: NAME.yaml here, after the pictures)")
    take_overrides(new, "data.image_size=128 training.max_steps=5000")

    describe = add("describe", "Parameters, latent grid, bits per pixel and GFLOP of a config.", run_describe)
    take_config(describe)
    describe.add_argument("--json", action="store_true", help="print JSON")

    data_info = add("data-info", "What a config's data set holds: sizes, broken images, decode rates.", run_data_info)
    take_config(data_info)
    data_info.add_argument("--hash", action="store_true", help="also a hash of all bytes, for data.expected_hash")
    data_info.add_argument("--output", type=Path, default=Path("data_info"), help="folder for the contact sheets")

    make_beton = add("make-beton", "Write a data set as FFCV's beton files.", run_make_beton)
    take_overrides(make_beton, "data.train_split=train[:90%%]")
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

    reconstruct = add("reconstruct", "Images of any size beside what a tokenizer makes of them.", run_reconstruct)
    reconstruct.add_argument("path", type=Path, help=TOKENIZER_PATH)
    reconstruct.add_argument("inputs", type=Path, nargs="+", metavar="input", help="image files, or folders of them")
    reconstruct.add_argument("--output", type=Path, required=True, help="folder for the pictures and a table")
    reconstruct.add_argument("--tile", type=int, default=1024, help="pixels; larger images are done in tiles")
    reconstruct.add_argument("--lpips", action="store_true", help="with LPIPS (VGG) in the table")
    reconstruct.add_argument("--vgg16", metavar="FILE", help="its backbone's published weights (default: a download)")

    imports = add("import", "Another program's checkpoint, as a folder that evaluate reads like ours.", run_import)
    imports.add_argument(
        "format",
        choices=("lightning", "taming", "llamagen", "diffusers"),
        help="lightning: SerezD's vqvae-vqgan-pytorch-lightning; taming: VQModel or GumbelVQ of taming-transformers; "
        "llamagen: LlamaGen's VQ tokenizers; diffusers: its VQModel",
    )
    imports.add_argument("checkpoint", type=Path, help="file; diffusers: folder, or USER/NAME on the hub")
    imports.add_argument("--config", type=Path, help="lightning, taming: the YAML file that it was trained with")
    imports.add_argument("--output", type=Path, required=True, help="folder for tokenizer/, config.yaml and the rest")

    codes = add("codebook", "Where a tokenizer's codes lie, and which of them a split uses: pictures.", run_codebook)
    codes.add_argument("path", type=Path, help=TOKENIZER_PATH)
    take_overrides(codes)
    codes.add_argument("--data", metavar="PATH", help="what data.path may be (default: the run's own)")
    codes.add_argument("--output", type=Path, required=True, help="folder for the pictures and a table")

    tokens = add("tokenize", "The codes of a data set, as parquet; also under accelerate launch.", run_tokenize)
    tokens.add_argument("path", type=Path, help=TOKENIZER_PATH)
    take_overrides(tokens, "data.workers=8 evaluation.batch_size=64")
    tokens.add_argument("--data", metavar="PATH", help="what data.path may be (default: the run's own)")
    tokens.add_argument("--split", choices=("train", "validation", "test"), default="train", help="default: train")
    tokens.add_argument(
        "--views",
        choices=("center", "flip", "10crop"),
        default="center",
        help="of every image its centre, that and its mirror image, or five crops and theirs",
    )
    tokens.add_argument("--shard-images", type=int, help="images in a file (default: at most 10,000)")
    tokens.add_argument("--output", type=Path, required=True, help="folder; what it holds of the same codes is kept")

    exports = add("export", "A tokenizer for other libraries and other people.", run_export)
    exports.add_argument(
        "format",
        choices=("diffusers", "hub"),
        help="diffusers: its VQModel (the taming architecture); hub: a repository with recipe, metrics and model card",
    )
    exports.add_argument("path", type=Path, help=TOKENIZER_PATH)
    exports.add_argument("--output", type=Path, required=True, help="folder for it")
    exports.add_argument("--push", metavar="USER/NAME", help="hub: upload it there, too")
    exports.add_argument("--private", action="store_true", help="with --push: a repository that is new is private")

    reports = add("report", "One page of one run, or of several over each other: curves, pictures, scores.", run_report)
    reports.add_argument("runs", type=Path, nargs="+", metavar="run", help="output_dir of a training")
    reports.add_argument("--output", type=Path, help="HTML file (default: report.html in the run; of several: here)")

    compares = add("compare", "Runs side by side as a table: configs, progress, scores that compare.", run_compare)
    compares.add_argument("runs", type=Path, nargs="+", metavar="run", help="output_dir of a training")
    compares.add_argument("--format", choices=("text", "csv", "markdown"), default="text", help="default: text")

    add("recipes", "The recipes that come with vqgan_accel, a line each.", run_recipes)

    launch_files = add(
        "launch-files", "Copy accelerate's config files and the scripts for clusters to a folder.", run_launch_files
    )
    launch_files.add_argument("folder", type=Path, help="folder for them; nothing there is overwritten")

    doctor = add("doctor", "Versions, devices, and what is missing here and what it would enable.", run_doctor)
    doctor.add_argument("config", type=Path, nargs="?", help="YAML file or recipe whose weights.* settings to check")
    return parser


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


# The commands import what they need when they run: `--help` and a misspelt option answer at once.


def run_train(options: argparse.Namespace) -> None:
    from vqgan_accel.config import load_config

    config = load_config(options.config, options.overrides)  # a misspelt key is told before torch is imported

    from vqgan_accel.distributed import leaving_process_group
    from vqgan_accel.training.loop import train

    with leaving_process_group():
        train(config, options.resume)


def run_evaluate(options: argparse.Namespace) -> None:
    from vqgan_accel.distributed import leaving_process_group
    from vqgan_accel.evaluation.evaluate import evaluate

    with leaving_process_group():
        evaluate(options.path, options.overrides, options.output)


def run_new(options: argparse.Namespace) -> None:
    from vqgan_accel.new import new

    print("\n".join(new(options.data, options.output, options.overrides)))


def run_describe(options: argparse.Namespace) -> None:
    from vqgan_accel.config import load_config
    from vqgan_accel.describe import describe, description_lines

    summary = describe(load_config(options.config, options.overrides))
    print(json.dumps(summary, indent=2) if options.json else "\n".join(description_lines(summary)))


def run_recipes(options: argparse.Namespace) -> None:
    from vqgan_accel.recipes import recipes, summary

    found = recipes()
    width = max(map(len, found), default=0)
    print("\n".join(f"{name:<{width}}  {summary(file)}" for name, file in found.items()))


def run_launch_files(options: argparse.Namespace) -> None:
    from vqgan_accel.recipes import copy_launch_files

    print("\n".join(map(str, copy_launch_files(options.folder))))


def run_data_info(options: argparse.Namespace) -> None:
    from vqgan_accel.config import load_config
    from vqgan_accel.data.info import data_info

    config = load_config(options.config, options.overrides)
    print("\n".join(data_info(config.data, options.output, options.hash)))


def run_make_beton(options: argparse.Namespace) -> None:
    from vqgan_accel.config import parse_config
    from vqgan_accel.data.make_beton import BetonOptions, make_betons

    values = {"data": {"backend": "auto", "path": options.source}, "training": {"max_steps": 1}}
    data = parse_config(values, options.overrides, source="make-beton").data
    make_betons(data, options.output, BetonOptions(options.max_resolution, options.write_mode, options.quality))


def run_reconstruct(options: argparse.Namespace) -> None:
    from vqgan_accel.config import Metric, WeightFiles
    from vqgan_accel.evaluation.reconstruct import TABLE, reconstruct

    metrics: tuple[Metric, ...] = ("psnr", "ssim", "lpips") if options.lpips else ("psnr", "ssim")
    weights = WeightFiles(vgg16=options.vgg16)
    rows = reconstruct(options.path, options.inputs, options.output, options.tile, metrics, weights)
    for row in rows:
        figures = ", ".join(f"{name} {row[name]:.4g}" for name in ["bits_per_pixel", *metrics] if row[name] is not None)
        print(f"{row['file']}: {row['width']} x {row['height']} px, {figures}")
    print(f"written to {options.output} ({TABLE} and a picture of each)")


def run_import(options: argparse.Namespace) -> None:
    from vqgan_accel.interop.lightning import import_lightning
    from vqgan_accel.interop.taming import import_diffusers, import_llamagen, import_taming

    if (options.config is not None) != (options.format in ("lightning", "taming")):
        raise ValueError("give --config=YAML for lightning and taming, and none for the others: they have no such file")
    match options.format:
        case "lightning":
            lines = import_lightning(options.checkpoint, options.config, options.output)
        case "taming":
            lines = import_taming(options.checkpoint, options.config, options.output)
        case "llamagen":
            lines = import_llamagen(options.checkpoint, options.output)
        case "diffusers":
            lines = import_diffusers(str(options.checkpoint), options.output)
    print("\n".join(lines))


def data_overrides(path: str | None) -> list[str]:
    """--data=PATH, whatever it is."""
    if path is None:
        return []
    from vqgan_accel.config import literal

    quoted = json.dumps(literal(path), ensure_ascii=False)  # a name may look like YAML or OmegaConf
    return [f"data.path={quoted}", "data.backend=auto", "data.label_column=null"]  # labels are this data's own


def run_codebook(options: argparse.Namespace) -> None:
    from vqgan_accel.evaluation.codebook import codebook

    print("\n".join(codebook(options.path, options.output, [*data_overrides(options.data), *options.overrides])))


def run_tokenize(options: argparse.Namespace) -> None:
    from vqgan_accel.distributed import leaving_process_group
    from vqgan_accel.tokens.write import tokenize

    settings = [*data_overrides(options.data), f"evaluation.split={options.split}", *options.overrides]
    with leaving_process_group():
        manifest = tokenize(options.path, options.output, options.views, options.shard_images, settings)
    if manifest["complete"] and os.environ.get("RANK", "0") == "0":
        left_out = f", {manifest['skipped_images']} unreadable images left out" if manifest["skipped_images"] else ""
        height, width = manifest["code_grid"]
        codes = f"{manifest['rows']:,} x {height} x {width} codes in {manifest['shards']} shards"
        print(f"{options.output}: {codes}{left_out}, {'with' if manifest['labels'] else 'without'} labels")


def run_export(options: argparse.Namespace) -> None:
    if options.push and options.format != "hub":
        raise ValueError("--push is for `export hub`")
    if options.format == "diffusers":
        from vqgan_accel.interop.diffusers import export_diffusers

        print("\n".join(export_diffusers(options.path, options.output)))
        return
    from vqgan_accel.interop.hub import export_hub, push_to_hub

    print("\n".join(export_hub(options.path, options.output, options.push)))
    if options.push:
        print(f"pushed to {push_to_hub(options.output, options.push, options.private)}")


def run_report(options: argparse.Namespace) -> None:
    from vqgan_accel.report import report

    print(report(options.runs, options.output))


def run_compare(options: argparse.Namespace) -> None:
    from vqgan_accel.report import compare

    print(compare(options.runs, options.format), end="")


def run_doctor(options: argparse.Namespace) -> None:
    from vqgan_accel.config import WeightFiles, load_config
    from vqgan_accel.doctor import doctor_lines

    weights = load_config(options.config).weights if options.config else WeightFiles()
    print("\n".join(doctor_lines(weights)))
