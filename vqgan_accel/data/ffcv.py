"""Training batches from betons by FFCV's own loader (https://ffcv.io, Leclerc et al. 2023; the extra `ffcv`).

FFCV reads, decodes and resizes in compiled threads. What is ours: the order, which comes from `TrainingOrder` in place
of FFCV's samplers; the crop and the flip, which are drawn as for every other backend and handed to the compiled
decoder; the thread; and what FFCV leaves open: broken images, torch's number of threads.

Importing this module fails where FFCV is not installed. Its last version, 1.0.2, is from 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vqgan_accel.data.background import ahead
from vqgan_accel.data.beton import JPG, BetonSource
from vqgan_accel.data.order import Key, TrainingOrder
from vqgan_accel.data.transforms import draw_view
from vqgan_accel.data.views import Batch, Failure, TrainingViews


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """FFCV sets torch's number of threads whenever it sets its own, which would change the sums of a training step."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


with _torch_threads_kept():
    import numba
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.libffcv import imdecode, resize_crop
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.pipeline_spec import PipelineSpec

BATCHES_AHEAD = 3  # that are ready before they are asked for


class FfcvLoader:
    """What `training_loader` promises. An image that FFCV cannot decode is left to `views`, which read it with Pillow
    or treat it as data.on_error says."""

    def __init__(self, views: TrainingViews, order: TrainingOrder, pin_memory: bool) -> None:
        source, config = views.source, views.config
        assert isinstance(source, BetonSource)
        self.views = views
        self.order = order
        self.pin_memory = pin_memory
        self.readable = source.readable()  # (N,)
        self.sizes = np.stack([source.rows["width"], source.rows["height"]], 1).astype(np.int64)  # (N, 2)
        pipelines: dict[str, PipelineSpec | None] = dict.fromkeys(source.field_names)
        pipelines[source.image_field] = PipelineSpec(source.image_field, _ViewDecoder(config.image_size), [])
        with _torch_threads_kept():
            self.loader = Loader(
                str(source.file),
                batch_size=order.batch_size,
                num_workers=max(1, min(config.workers, numba.config.NUMBA_NUM_THREADS)),
                seed=0,  # none would draw one from numpy's global state; the order is ours
                pipelines=pipelines,
                batches_ahead=BATCHES_AHEAD,
            )

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Generator[Batch, None, None]:
        pipeline = _Pipeline(self.loader, ())
        with closing(ahead(pipeline.batches(map(self.squares, self.order)), BATCHES_AHEAD)) as batches:
            for keys, (pixels, broken) in zip(self.order, batches, strict=True):
                images = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=self.pin_memory)
                images.copy_(torch.from_numpy(pixels))  # FFCV fills these pixels again soon
                images = images.permute(0, 3, 1, 2)
                indices, skipped = [index for _, index in keys], 0
                for place in np.flatnonzero(broken):
                    item = self.views[keys[place]]
                    if isinstance(item, Failure):
                        raise ValueError(item.sentence)
                    assert item.image is not None
                    images[place], indices[place] = item.image, item.index
                    skipped += item.skipped
                yield {"image": images, "index": torch.tensor(indices), "skipped": skipped}

    def squares(self, keys: list[Key]) -> NDArray[np.int64]:
        """(B, 5): index, left, top, side, mirrored; a side of 0 where the beton itself is damaged at that image."""
        config, seed = self.views.config, self.views.seed
        squares = np.zeros((len(keys), 5), np.int64)
        for row, (epoch, index) in zip(squares, keys, strict=True):
            row[0] = index
            if self.readable[index]:
                width, height = self.sizes[index].tolist()
                row[1:] = draw_view(width, height, config.crop_scale, config.horizontal_flip, seed, epoch, index)
        return squares


class _ViewDecoder(SimpleRGBImageDecoder):
    """Compiled: an image's square, resized by cv2.INTER_AREA, mirrored or not."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, tuple[AllocationQuery, AllocationQuery]]:
        shape, dtype = (self.image_size, self.image_size, 3), np.dtype("u1")
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=dtype)
        return state, (AllocationQuery(shape, dtype), AllocationQuery((1,), dtype))

    def generate_code(self) -> Callable[..., Any]:
        memory_read, threads = self.memory_read, Compiler.get_iterator()
        decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        size_of = Compiler.compile(_jpeg_size)
        image_size = self.image_size

        def decode(squares, buffers, rows, storage):  # type: ignore[no-untyped-def]
            views, broken = buffers  # (B, S, S, 3), (B, 1)
            for place in threads(len(squares)):
                index, left, top, side, mirrored = squares[place]
                broken[place, 0] = 1
                if side > 0:
                    row = rows[index]
                    height, width = np.uint32(row["height"]), np.uint32(row["width"])
                    data = memory_read(row["data_ptr"], storage)
                    if row["mode"] != JPG:
                        pixels = data.reshape(height, width, 3)
                        broken[place, 0] = 0
                    elif size_of(data) == (height, width):  # FFCV would write beyond the pixels of a larger one
                        pixels = np.empty((height, width, 3), np.uint8)
                        broken[place, 0] = (
                            decode_jpeg(data, pixels, height, width, height, width, 0, 0, 1, 1, False, False) != 0
                        )
                    else:
                        continue
                    resize(pixels, top, top + side, left, left + side, views[place])
                    if mirrored:
                        for y in range(image_size):
                            for x in range(image_size // 2):
                                for channel in range(3):
                                    other = views[place, y, image_size - 1 - x, channel]
                                    views[place, y, image_size - 1 - x, channel] = views[place, y, x, channel]
                                    views[place, y, x, channel] = other
            return views, broken

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode


def _jpeg_size(data):  # type: ignore[no-untyped-def]
    """(height, width) by the frame header (ITU T.81, B.2.2); (0, 0) where there is none. Compiled too."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:
            return int(data[at + 5]) * 256 + int(data[at + 6]), int(data[at + 7]) * 256 + int(data[at + 8])
        at += 2 + int(data[at + 2]) * 256 + int(data[at + 3])
    return 0, 0


class _Pipeline(EpochIterator):
    """FFCV's buffers and compiled code, for a whole run instead of an epoch: it never runs dry between two epochs.

    EpochIterator is a thread; `ahead` does its work, whose errors reach who waits and which ends at any time.
    """

    def start(self) -> None:
        pass

    def batches(self, squares: Iterator[NDArray[np.int64]]) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """(B, S, S, 3) and, for each image, whether it is broken (B, 1); overwritten BATCHES_AHEAD + 2 later."""
        numba.set_num_threads(self.loader.num_workers)  # of the thread that runs this
        for number, batch in enumerate(squares):
            (result,) = self.run_pipeline(number, batch, number % (BATCHES_AHEAD + 2), None)
            yield result
