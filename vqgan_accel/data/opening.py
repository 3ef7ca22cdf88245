"""The one door to the images: from the config to a source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from vqgan_accel.config import DataConfig
from vqgan_accel.data.beton import BetonSource
from vqgan_accel.data.division import divided
from vqgan_accel.data.folder import FolderSource, require_outside
from vqgan_accel.data.source import ImageSource, SplitName, is_stored_dataset
from vqgan_accel.extras import is_installed

if TYPE_CHECKING:
    from vqgan_accel.data.hub import HubSource
    from vqgan_accel.data.stream import StreamSource

GET_FFCV = (
    "run `bash launch/install_ffcv.sh VENV` (Debian, Ubuntu), or set data.backend=beton, which reads the same files "
    "with Pillow, more slowly"
)


def open_source(config: DataConfig, split_name: SplitName) -> ImageSource | StreamSource:
    """The images of one split: by index, or one after another where data.streaming.

    ValueError or FileNotFoundError, one sentence, for a wrong path, split or column.
    """
    if not config.streaming:
        return open_indexed(config, split_name)
    if config.path is None or backend_of(config) != "hub":
        raise ValueError(
            f"data.streaming is for Hugging Face data sets, and data.path {config.path} is none; set it to false"
        )
    from vqgan_accel.data.stream import StreamSource  # importing `datasets` takes seconds

    return StreamSource(config, split_of(config, split_name), f"data.{split_name}_split")


def open_indexed(config: DataConfig, split_name: SplitName) -> ImageSource:
    """The same where every image must be found by its index: a stream, which cannot, is downloaded."""
    fraction = config.validation_fraction
    if fraction is None or split_name == "test":
        return open_whole(config, split_name)
    whole = open_whole(config, "train")
    if isinstance(whole, BetonSource):
        raise ValueError(
            f"data.validation_fraction {fraction:g} goes by the images' names, which {whole.file} does not keep; give "
            "it to make-beton, which then writes train.beton and validation.beton, and not here"
        )
    return divided(whole, whole.stored_names(), fraction, config.validation_group, split_name)


def open_whole(config: DataConfig, split_name: SplitName) -> FolderSource | HubSource | BetonSource:
    """A split as the data set has it, without data.validation_fraction."""
    if config.path is None:
        raise ValueError("data.path is not set; give data.path=FOLDER")
    path, split, key = Path(config.path).expanduser(), split_of(config, split_name), f"data.{split_name}_split"
    match backend_of(config):
        case "folder":
            return FolderSource(path, split, key, config.label_column)
        case "hub":
            from vqgan_accel.data.hub import HubSource

            return HubSource(config, split, key)
        case "ffcv" | "beton":
            return BetonSource(path, split, key, config.label_column)


def backend_of(config: DataConfig) -> Literal["folder", "hub", "ffcv", "beton"]:
    """data.backend; for `auto` what fits data.path: betons, what `datasets` stores, a folder of files, else a name on
    the hub. Betons are FFCV's where it is installed."""
    if config.backend != "auto":
        return config.backend
    path = Path(str(config.path)).expanduser()
    if path.is_dir() and any(path.glob("*.beton")):
        return "ffcv" if is_installed("ffcv") else "beton"
    return "folder" if path.is_dir() and not is_stored_dataset(path) else "hub"


def require_apart(output: Path, config: DataConfig, key: str) -> None:
    """ValueError where `output`, which `key` named, lies among the images of a split."""
    for split_name in get_args(SplitName) if config.path is not None else ():
        require_outside(output, Path(str(config.path)).expanduser() / split_of(config, split_name), key)


def count_images(source: ImageSource | StreamSource) -> int | None:
    """None for a stream that does not know."""
    return len(source) if isinstance(source, ImageSource) else source.num_images


def require_reader(config: DataConfig) -> None:
    """ValueError where training would need FFCV and it is not installed."""
    if backend_of(config) == "ffcv":
        try:
            import vqgan_accel.data.ffcv  # noqa: F401
        except (ImportError, OSError) as error:  # the latter where OpenCV's or libjpeg-turbo's library is missing
            raise ValueError(f"data.backend=ffcv needs FFCV, which is not installed ({error}); {GET_FFCV}") from error


def split_of(config: DataConfig, split_name: SplitName) -> str:
    """What the data set itself calls it; what data.validation_fraction cuts off is called validation."""
    validation = config.validation_split if config.validation_fraction is None else "validation"
    return {"train": config.train_split, "validation": validation, "test": config.test_split}[split_name]
