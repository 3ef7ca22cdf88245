"""The one door to a saved tokenizer: from a run, a folder or a name on the hub to the networks and their config."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vqgan_accel.config import Config, literal, load_config, parse_config
from vqgan_accel.models.build import layout_differences
from vqgan_accel.models.finding import find_tokenizer
from vqgan_accel.models.tokenizer import ImageTokenizer


class Opened(NamedTuple):
    tokenizer: ImageTokenizer  # in eval mode, on the CPU
    folder: Path  # that it was read from
    config_file: Path | None  # of its run, where it has one

    @property
    def home(self) -> Path:
        """Where results of it are kept: the run's folder, or its own."""
        return self.config_file.parent if self.config_file else self.folder

    def config(self, overrides: Sequence[str] = (), data: str | Path | None = None) -> Config:
        """The run's config, or the defaults for a tokenizer without one, with the images at `data` in place of its own
        and the overrides applied.

        data: what data.path may be; its backend and its labels are found anew. ValueError or FileNotFoundError where
        the config, with the overrides, is not this tokenizer's.
        """
        overrides = [*_data_overrides(data), *overrides]
        config = self._config_of_run(self.config_file, overrides) if self.config_file else self._own_config(overrides)
        size, stride = config.data.image_size, self.tokenizer.stride
        if size % stride:
            raise ValueError(f"data.image_size {size} is not a multiple of the tokenizer's stride {stride}")
        return config

    def _config_of_run(self, file: Path, overrides: Sequence[str]) -> Config:
        config = load_config(file, overrides)
        if keys := layout_differences(config, self.tokenizer):
            raise ValueError(
                f"{file} with the overrides is not the config of the tokenizer that lies there, which has another "
                f"{', '.join(keys)}"
            )
        return config

    def _own_config(self, overrides: Sequence[str]) -> Config:
        own = self.tokenizer.settings.model_dump(mode="json")
        values = {
            "data": {"image_size": own["image_size"]},
            "training": {"max_steps": 1},
            "autoencoder": own["autoencoder_config"],
            "quantizer": own["quantizer_config"],
        }
        return parse_config(values, overrides)


def open_tokenizer(model: str | Path) -> Opened:
    """The tokenizer that `load_tokenizer` would give, where it lies and which run it is of. Errors are those of
    `load_tokenizer`."""
    folder, config_file = find_tokenizer(Path(model))
    return Opened(ImageTokenizer.from_pretrained(folder), folder, config_file)


def _data_overrides(path: str | Path | None) -> list[str]:
    if path is None:
        return []
    quoted = json.dumps(literal(str(path)), ensure_ascii=False)  # a name may look like YAML or OmegaConf
    return [f"data.path={quoted}", "data.backend=auto", "data.label_column=null"]  # labels are this data's own
