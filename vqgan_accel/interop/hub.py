"""A tokenizer as a repository of the Hugging Face hub: weights, recipe, measurements, a model card that shows them."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError

from vqgan_accel.config import UNITS, Config, WeightFiles, parse_config, save_config
from vqgan_accel.describe import describe, description_lines
from vqgan_accel.files import require_absent, write_json, written_as_a_whole
from vqgan_accel.models.opening import open_tokenizer
from vqgan_accel.models.weights import state_hash
from vqgan_accel.run_folder import CONFIG, EVALUATION, EVALUATION_RESULTS

SHOWN = ("results", "tokenizer_sha256", "skipped_images", "protocol", "fingerprint")  # of evaluate.py's report


def export_hub(model: str | Path, *, output: str | Path, repo: str | None = None) -> list[str]:
    """Write output/ with the tokenizer of a run, a checkpoint or a saved tokenizer (`ImageTokenizer.from_pretrained`
    reads it), config.yaml, evaluation_SPLIT.json of what was measured with just these weights, and README.md, the model
    card. Returns lines that say what is in it. repo: the name USER/NAME that it will have, for the card.

    Paths of this machine stay out of it. FileNotFoundError or ValueError where there is no tokenizer.
    """
    output = Path(output)
    require_absent(output)
    opened = open_tokenizer(model)
    tokenizer, folder, config = opened.tokenizer, opened.folder, public(opened.config())
    reports = measurements(opened.home / EVALUATION, state_hash(tokenizer))
    name = repo or f"USER/{output.name}"
    tokenizer.register_to_config(_name_or_path=name)  # diffusers would leave the path it was read from
    with written_as_a_whole(output) as partial:
        tokenizer.save_pretrained(partial)
        save_config(config, partial / CONFIG)
        for split, report in reports.items():
            write_json(partial / f"evaluation_{split}.json", report)
        recipe = (partial / CONFIG).read_text(encoding="utf-8")
        model_card(name, config, recipe, reports).save(partial / "README.md")
    measured = [f"measured on {split}: protocol {report['fingerprint']}" for split, report in reports.items()]
    return [
        f"{output}: {folder}, with its recipe and a model card",
        *(measured or ["not measured: see evaluate.py"]),
    ]


def push_to_hub(folder: Path, repo: str, private: bool) -> str:
    """Upload what export_hub wrote to the repository USER/NAME, which is created where there is none, and return its
    address. ValueError where the hub refuses."""
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload with vqgan_accel")
    except (OSError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder} is written, but could not be pushed to {repo} ({reason}); log in with `hf auth login`, then "
            f"`hf upload {repo} {folder}` does the rest"
        ) from None
    return f"{api.endpoint}/{repo}"


def public(config: Config) -> Config:
    """Without paths that lead out of the working folder: their last parts say what is meant."""

    def shown(text: str | None) -> str | None:
        if text is None:
            return None
        leads_out = PurePath(text).is_absolute() or text.startswith("~") or ".." in PurePath(text).parts
        return PurePath(text).name if leads_out else text

    values = config.model_dump(mode="json") | {"output_dir": shown(config.output_dir)}
    values["data"]["path"] = shown(config.data.path)
    values["training"]["init_from"] = shown(config.training.init_from)
    values["weights"] = WeightFiles().model_dump()
    return parse_config(values)


def measurements(folder: Path, tokenizer_hash: str) -> dict[str, dict[str, Any]]:
    """split -> what evaluate.py wrote there, where it was of these weights; without the place of the checkpoint."""
    found = {}
    for file in sorted(folder.glob(f"*/{EVALUATION_RESULTS}")):
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            same = report["tokenizer_sha256"] == tokenizer_hash
            shown = {key: report[key] for key in SHOWN}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is not what evaluate.py writes ({error!r}); evaluate again") from None
        if same:
            found[file.parent.name] = shown
    return found


def model_card(name: str, config: Config, recipe: str, reports: dict[str, dict[str, Any]]) -> ModelCard:
    data = PurePath(config.data.path or "unknown").name
    results = [
        EvalResult(
            task_type="image-to-image",
            task_name="Image reconstruction",
            dataset_type=data,
            dataset_name=data,
            dataset_split=split,
            metric_type=metric,
            metric_value=value,
            metric_args={"protocol": report["fingerprint"]},
        )
        for split, report in reports.items()
        for metric, value in report["results"].items()
    ]
    header = ModelCardData(
        library_name="vqgan_accel",
        tags=["image-tokenizer", "vq-vae" if config.discriminator is None else "vq-gan", config.quantizer.type],
        model_name=PurePath(name).name,
        eval_results=results or None,
    )
    lines = [
        "---",
        header.to_yaml(),
        "---",
        "",
        f"# {PurePath(name).name}",
        "",
        "An image tokenizer, to be used with vqgan_accel.",
        "",
        "```python",
        "from vqgan_accel.models.tokenizer import ImageTokenizer",
        "",
        f'tokenizer = ImageTokenizer.from_pretrained("{name}")',
        "codes = tokenizer.encode(images)  # (B, 3, H, W) in [-1, 1] -> (B, h, w) int64",
        "images = tokenizer.decode(codes)",
        "```",
        "",
        "```",
        *description_lines(describe(config)),
        "```",
        "",
        "## Measurements",
        "",
        *(line for split, report in reports.items() for line in measurement_lines(split, report)),
        *([] if reports else ["Not measured.", ""]),
        "## Recipe",
        "",
        "```yaml",
        recipe.rstrip(),
        "```",
        "",
    ]
    return ModelCard("\n".join(lines), ignore_metadata_errors=False)


def measurement_lines(split: str, report: dict[str, Any]) -> list[str]:
    protocol = report["protocol"]
    return [
        f"{protocol['num_images']:,} images of `{split}`, {protocol['image_size']} px, protocol "
        f"`{report['fingerprint']}`: two numbers compare if and only if their protocols are equal.",
        "",
        "| metric | value |",
        "| --- | ---: |",
        *(f"| {name} | {value:.5g} {UNITS.get(name, '')} |" for name, value in report["results"].items()),
        "",
    ]
