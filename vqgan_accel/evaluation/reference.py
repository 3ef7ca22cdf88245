"""What reconstructions are compared with where that is not their own images: evaluation.reference, and files for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from vqgan_accel.accelerator import start_accelerator
from vqgan_accel.config import Config, parse_config
from vqgan_accel.data.opening import evaluation_loader, open_source
from vqgan_accel.data.source import ImageSource
from vqgan_accel.data.views import Batch, to_float
from vqgan_accel.distributed import sum_over_processes
from vqgan_accel.evaluation.collected import Moments, sums_of
from vqgan_accel.evaluation.comparable import pictures_protocol, pixel_hash
from vqgan_accel.evaluation.measures.base import Need, real
from vqgan_accel.evaluation.measures.frechet import Frechet, gaussian
from vqgan_accel.evaluation.metrics import Metrics, measure_class
from vqgan_accel.files import naming
from vqgan_accel.models.precision import ieee_float32

if TYPE_CHECKING:
    from vqgan_accel.data.stream import StreamSource

KEY = "evaluation.reference"


def open_reference(config: Config, metrics: Metrics, accelerator: Accelerator) -> None:
    """Have `metrics` compare with evaluation.reference; every process calls it. ValueError or FileNotFoundError where
    there is none, or where it was made otherwise than reconstructions are looked at."""
    settings = config.evaluation
    wanted = [need for need in metrics.needs if need.side is real]
    if settings.reference is None or not wanted:
        return
    if Path(settings.reference).suffix == ".npz":
        known, what = from_file(Path(settings.reference), config, metrics, wanted, accelerator)
    else:
        data = config.data.model_copy(update={"path": settings.reference, "backend": "auto", "label_column": None})
        what = collect(metrics, images_of(config.model_copy(update={"data": data}), accelerator), accelerator)
        known = metrics.collected_reference()
    metrics.set_reference(known, what)


def images_of(config: Config, accelerator: Accelerator) -> Iterator[Batch]:
    """This process's share of evaluation.split of data.path."""
    yield from share_of(open_source(config.data, config.evaluation.split), config, accelerator)


def share_of(source: ImageSource | StreamSource, config: Config, accelerator: Accelerator) -> Iterable[Batch]:
    """What this process measures of it: as evaluation.protocol crops, evaluation.batch_size at a time."""
    return evaluation_loader(
        source,
        config.data,
        config.evaluation.batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
        crop=config.evaluation.rules.crop,
    )


@torch.no_grad()
@ieee_float32()
def collect(metrics: Metrics, batches: Iterator[Batch], accelerator: Accelerator) -> dict[str, Any]:
    """Show `metrics` all these images, and return how many they are and the hash of their pixels."""
    counted = torch.zeros(2, dtype=torch.int64)
    for batch in batches:
        metrics.update_reference(to_float(batch["image"].to(accelerator.device)), batch["index"])
        counted += torch.tensor([len(batch["image"]), sum(pixel_hash(image) for image in batch["image"])])
    number, pixels = sum_over_processes(counted.to(accelerator.device)).tolist()
    metrics.require(number)
    return {"num_images": number, "images_hash": f"{pixels:016x}"}


# ---- files


def from_file(
    file: Path, config: Config, metrics: Metrics, wanted: Sequence[Need], accelerator: Accelerator
) -> tuple[dict[Need, Tensor], dict[str, Any]]:
    """Statistics where the file has them, else those of its samples `arr_0`."""
    if not file.is_file():
        raise FileNotFoundError(f"{KEY}: there is no file {file}")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files if name != "arr_0"}
            samples = arrays["arr_0"] if "arr_0" in arrays.files else None
    except Exception as error:  # on a file of something else, or of Python objects, numpy raises nearly every type
        raise ValueError(f"{KEY}: {file} is not an .npz file of plain arrays ({error})") from None
    if "protocol" in found:
        require_same_protocol(file, json.loads(str(found["protocol"])), config, metrics, wanted)
    known = {need: statistics_in(file, found, need, metrics) for need in wanted if is_in(found, need)}
    what: dict[str, Any] = {}
    if known:
        digest = hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in known.values()))
        what["statistics_sha256"] = digest.hexdigest()
    if missing := [need for need in wanted if need not in known]:
        if samples is None:
            names = [measure.name for measure in metrics.measures if {*measure.needs} & {*missing}]
            raise ValueError(
                f"{KEY}: {file} has neither statistics of {missing[0].network} nor samples (arr_0), which "
                f"{', '.join(names)} need; give a data set, or leave them out of the metrics"
            )
        what |= collect(metrics, batches_of(file, samples, config, accelerator), accelerator)
        known = metrics.collected_reference() | known
    return known, what


def names_in_file(network: str) -> tuple[str, str]:
    """Of mean and covariance: Inception's as everybody's files have them."""
    return ("mu", "sigma") if network == "inception" else (f"mu_{network}", f"sigma_{network}")


def is_in(found: Mapping[str, np.ndarray], need: Need) -> bool:
    return need.kind is Moments and all(name in found for name in names_in_file(need.network))


def statistics_in(file: Path, found: Mapping[str, np.ndarray], need: Need, metrics: Metrics) -> Tensor:
    size = int(metrics.networks[need.network].num_features)  # type: ignore[arg-type]
    mean, covariance = (found[name] for name in names_in_file(need.network))
    if mean.shape != (size,) or covariance.shape != (size, size):
        raise ValueError(
            f"{KEY}: {file} has statistics of shapes {mean.shape} and {covariance.shape}, and those of {need.network} "
            f"are of {size} features"
        )
    device = metrics.setting.device
    return sums_of(*(torch.from_numpy(array.astype(np.float64)).to(device) for array in (mean, covariance)))


def require_same_protocol(
    file: Path, made_with: dict[str, Any], config: Config, metrics: Metrics, wanted: Sequence[Need]
) -> None:
    hashes = metrics.network_hashes()
    here = pictures_protocol(config) | {f"weights of {need.network}": hashes[need.network] for need in wanted}
    there = made_with | {f"weights of {name}": hash_ for name, hash_ in made_with["feature_networks_sha256"].items()}
    differ = [f"{name} {there[name]} and here it is {value}" for name, value in here.items()
              if name in there and there[name] != value]  # fmt: skip
    if differ:
        raise ValueError(
            f"{KEY}: {file} was made with another protocol: {'; '.join(differ)}. Make one with this protocol: "
            "vqgan-accel statistics"
        )


def batches_of(file: Path, samples: np.ndarray, config: Config, accelerator: Accelerator) -> Iterator[Batch]:
    """This process's share of (N, H, W, 3) uint8."""
    size = config.data.image_size
    if samples.dtype != np.uint8 or samples.shape[1:] != (size, size, 3):
        raise ValueError(
            f"{KEY}: arr_0 in {file} is {samples.dtype} of shape {samples.shape}, and images of data.image_size {size} "
            f"are uint8 of (N, {size}, {size}, 3)"
        )
    share = torch.arange(accelerator.process_index, len(samples), accelerator.num_processes)
    for index in share.split(config.evaluation.batch_size):
        image = torch.from_numpy(samples[index.numpy()]).permute(0, 3, 1, 2).contiguous()
        yield {"image": image, "index": index, "skipped": 0}


def statistics(data: str | Path, *, output: str | Path, overrides: Sequence[str] = ()) -> list[str]:
    """Write an .npz file for evaluation.reference with mean and covariance of the features of all images of
    evaluation.split, for every Frechet distance in evaluation.metrics; on many processes every one calls it. Returns
    lines that say what it holds.

    data: what data.path may be; overrides: `section.key=value` of the defaults. The file has mu and sigma of Inception
    (mu_NETWORK, sigma_NETWORK of others) and, as JSON, the protocol that they were made with. ValueError or
    FileNotFoundError where images or weights cannot be had.
    """
    output = Path(output)
    if output.suffix != ".npz" or output.exists():
        raise ValueError(f"--output {output} must be the name of a new .npz file")
    values = {"data": {"backend": "auto", "path": str(data)}, "training": {"max_steps": 1}}
    config = parse_config(values, overrides, source="statistics")
    settings = config.evaluation
    names = [name for name in settings.metrics if issubclass(measure_class(name), Frechet)]
    if not names:
        raise ValueError("evaluation.metrics has no Frechet distance, such as rfid, to make statistics for")
    accelerator = start_accelerator("no", config.training.timeout_minutes)
    metrics = Metrics(names, (max(settings.pfid_neighbours, 1),), settings, config.weights, accelerator.device)
    made = collect(metrics, images_of(config, accelerator), accelerator)
    made |= pictures_protocol(config) | {"feature_networks_sha256": metrics.network_hashes()}
    arrays: dict[str, np.ndarray] = {"protocol": np.array(json.dumps(made, sort_keys=True))}
    for need, sums in metrics.collected_reference().items():
        arrays |= zip(names_in_file(need.network), (part.cpu().numpy() for part in gaussian(sums[0])), strict=True)
    if accelerator.is_main_process:
        write_arrays(output, arrays)
    accelerator.wait_for_everyone()
    networks = ", ".join(metrics.network_hashes())
    return [f"{output}: {networks} of {made['num_images']:,} images, {made['crop']}, {made['image_size']} px"]


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    partial = path.with_name(f".{path.stem}.partial.npz")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(partial, **arrays)  # type: ignore[arg-type]
        partial.replace(path)
