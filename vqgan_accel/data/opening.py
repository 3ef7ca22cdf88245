"""The one door to the images: from the config to a source, and from a source to batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from PIL import Image
from torch import Tensor

from vqgan_accel.config import DataConfig
from vqgan_accel.data.crops import views_of
from vqgan_accel.data.division import divided
from vqgan_accel.data.folder import require_outside
from vqgan_accel.data.loading import ImageLoader
from vqgan_accel.data.order import TrainingOrder
from vqgan_accel.data.protocols import Crop
from vqgan_accel.data.source import ImageSource, SplitName, is_stored_dataset
from vqgan_accel.data.sources import SOURCES
from vqgan_accel.data.views import FixedViews, TrainingViews
from vqgan_accel.extras import is_installed

if TYPE_CHECKING:
    from vqgan_accel.data.ffcv import FfcvLoader
    from vqgan_accel.data.lanes import StreamOrder
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
    names = whole.stored_names()
    if names is None:
        raise ValueError(
            f"data.validation_fraction {fraction:g} goes by the images' names, which {whole.title} does not keep; give "
            "it to make-beton, which then writes train.beton and validation.beton, and not here"
        )
    return divided(whole, names, fraction, config.validation_group, split_name)


def open_whole(config: DataConfig, split_name: SplitName) -> ImageSource:
    """A split as the data set has it, without data.validation_fraction."""
    if config.path is None:
        raise ValueError("data.path is not set; give data.path=FOLDER")
    module = import_module(SOURCES[backend_of(config)])  # now: `datasets` alone takes seconds
    source: ImageSource = module.open_split(config, split_of(config, split_name), f"data.{split_name}_split")
    return source


def backend_of(config: DataConfig) -> str:
    """data.backend, a key of SOURCES; for `auto` what fits data.path: betons, what `datasets` stores, a folder of
    files, else a name on the hub. Betons are FFCV's where it is installed."""
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


def training_order(
    source: ImageSource | StreamSource,
    config: DataConfig,
    stream_states: dict[str, dict[str, Any]] | None = None,
    **position: int,
) -> TrainingOrder | StreamOrder:
    """Which images this process sees, and when. `position`: what TrainingOrder takes beside the number of images.
    `stream_states`: where a stream stood at start_step, of all processes.

    ValueError where there are too few images, or too few shards of a stream.
    """
    if isinstance(source, ImageSource):
        return TrainingOrder(num_images=len(source), **position)
    from vqgan_accel.data.lanes import StreamOrder

    return StreamOrder(source, shuffle_buffer=config.shuffle_buffer, states=stream_states, **position)


def training_loader(
    source: ImageSource | StreamSource, config: DataConfig, order: TrainingOrder | StreamOrder, pin_memory: bool
) -> ImageLoader | FfcvLoader:
    """Micro-batches in `order`, each image cropped and flipped by its key (order.seed, epoch, index).

    With data.on_error=skip a broken image's place is taken by the next readable one, under that one's own key; in a
    stream by the next readable one of the micro-batch.
    Iterating raises ValueError, one sentence, at a broken image otherwise, and where no image at all is readable.
    `require_reader` has been asked before.
    """
    if not isinstance(source, ImageSource):
        from vqgan_accel.data.stream import StreamTrainingViews

        rows = StreamTrainingViews(source, config, order.seed)
        return ImageLoader(rows, config, pin_memory, batch_sampler=order)
    assert isinstance(order, TrainingOrder) and order.num_images == len(source)
    views = TrainingViews(source, config, order.seed)
    if backend_of(config) == "ffcv":
        from vqgan_accel.data.ffcv import FfcvLoader

        return FfcvLoader(views, order, pin_memory)
    return ImageLoader(views, config, pin_memory, batch_sampler=order)


def evaluation_loader(
    source: ImageSource | StreamSource,
    config: DataConfig,
    batch_size: int,
    process_index: int,
    num_processes: int,
    pin_memory: bool,
    crop: Crop = "square",
) -> ImageLoader:
    """The images (of a stream the shards) process_index, process_index + num_processes, ...: over all processes each
    image exactly once.

    Nothing is padded: the last batch may be small, and processes may have different numbers of batches. With
    data.on_error=skip broken images are left out, so that a batch may even be (0, 3, S, S). Errors as in training.
    """
    if not isinstance(source, ImageSource):
        from vqgan_accel.data.stream import StreamEvaluationViews, StreamShare

        rows = StreamEvaluationViews(source, config, crop)
        share = StreamShare(source, batch_size, process_index, num_processes)
        return ImageLoader(rows, config, pin_memory, batch_sampler=share)
    shard = range(process_index, len(source), num_processes)
    views = FixedViews(source, config, partial(views_of, crop=crop))
    return ImageLoader(views, config, pin_memory, sampler=shard, batch_size=batch_size)


def views_loader(
    source: ImageSource,
    config: DataConfig,
    batches: Iterable[list[int]],
    views: Callable[[Image.Image, int], list[Tensor]],
    pin_memory: bool,
) -> ImageLoader:
    """For every list of indices a batch with all `views` of these images, those of one image in a row.

    Errors and broken images as in evaluation_loader.
    """
    return ImageLoader(FixedViews(source, config, views), config, pin_memory, batch_sampler=batches)
