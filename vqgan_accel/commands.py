"""What each command does with its arguments: the library's function is called, and what it returns is printed.

Every function imports what it needs when it runs: `--help` and a misspelt option answer at once.
"""

from __future__ import annotations

import argparse
import json
import os


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
        evaluate(options.path, data=options.data, output=options.output, overrides=options.overrides)


def run_statistics(options: argparse.Namespace) -> None:
    from vqgan_accel.distributed import leaving_process_group
    from vqgan_accel.evaluation.reference import statistics

    with leaving_process_group():
        lines = statistics(options.data, output=options.output, overrides=options.overrides)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines))


def run_new(options: argparse.Namespace) -> None:
    from vqgan_accel.new import new

    print("\n".join(new(options.data, options.output, options.overrides)))


def run_describe(options: argparse.Namespace) -> None:
    from vqgan_accel.config import load_config
    from vqgan_accel.describe import describe, description_lines

    summary = describe(load_config(options.config, options.overrides))
    print(json.dumps(summary, indent=2) if options.json else "\n".join(description_lines(summary)))


def run_keys(options: argparse.Namespace) -> None:
    from vqgan_accel.config import json_schema, key_lines

    if options.json_schema and options.prefix:
        raise ValueError("--json-schema is of a whole config file: leave the prefix out")
    print(json.dumps(json_schema(), indent=2) if options.json_schema else "\n".join(key_lines(options.prefix)))


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
    rows = reconstruct(
        options.path, inputs=options.inputs, output=options.output, tile=options.tile, metrics=metrics, weights=weights
    )
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


def run_codebook(options: argparse.Namespace) -> None:
    from vqgan_accel.evaluation.codebook import codebook

    print("\n".join(codebook(options.path, data=options.data, output=options.output, overrides=options.overrides)))


def run_probe(options: argparse.Namespace) -> None:
    from vqgan_accel.evaluation.probe import probe

    results = probe(
        options.path,
        tokens=options.tokens,
        output=options.output,
        steps=options.steps,
        samples=options.samples,
        seed=options.seed,
        overrides=options.overrides,
    )
    for name, value in results.items():
        print(f"  {name:<20}{value:>12.5g}")
    print(f"written to {options.output}")


def run_tokenize(options: argparse.Namespace) -> None:
    from vqgan_accel.distributed import leaving_process_group
    from vqgan_accel.tokens.write import tokenize

    with leaving_process_group():
        manifest = tokenize(
            options.path,
            data=options.data,
            output=options.output,
            overrides=[f"evaluation.split={options.split}", *options.overrides],
            views=options.views,
            shard_images=options.shard_images,
        )
    if manifest["complete"] and os.environ.get("RANK", "0") == "0":
        left_out = f", {manifest['skipped_images']} unreadable images left out" if manifest["skipped_images"] else ""
        grid = " x ".join(str(side) for side in manifest["code_grid"])
        codes = f"{manifest['rows']:,} x {grid} codes in {manifest['shards']} shards"
        print(f"{options.output}: {codes}{left_out}, {'with' if manifest['labels'] else 'without'} labels")


def run_export(options: argparse.Namespace) -> None:
    if options.push and options.format != "hub":
        raise ValueError("--push is for `export hub`")
    if options.format == "diffusers":
        from vqgan_accel.interop.diffusers import export_diffusers

        print("\n".join(export_diffusers(options.path, output=options.output)))
        return
    from vqgan_accel.interop.hub import export_hub, push_to_hub

    print("\n".join(export_hub(options.path, output=options.output, repo=options.push)))
    if options.push:
        print(f"pushed to {push_to_hub(options.output, options.push, options.private)}")


def run_status(options: argparse.Namespace) -> int:
    from vqgan_accel.status import EXIT, status

    found = status(options.run_folder)
    print(found)
    return EXIT[found.word]


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
