"""Published weights of fixed networks: from a file that the user names, or torchvision's download, checked either
way."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vqgan_accel.compat import safe_global
from vqgan_accel.files import one_at_a_time

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

    from torchvision.models import WeightsEnum

PUBLISHED = {  # our name -> torchvision's, of its ImageNet weights
    "vgg16": "VGG16_Weights.IMAGENET1K_V1",
    "alexnet": "AlexNet_Weights.IMAGENET1K_V1",
    "squeezenet": "SqueezeNet1_1_Weights.IMAGENET1K_V1",
    "mobilenet_v2": "MobileNet_V2_Weights.IMAGENET1K_V1",
}
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of pixels in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)
# Checkpoints of Lightning before 1.5, taming-transformers' published ones among them, have this class as a dict's key.
# An empty one of that name is read in its place: Lightning's own is neither needed nor imported.
IGNORED = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})


def published(name: str) -> WeightsEnum:
    """torchvision's entry of `name`, a key of PUBLISHED: where its weights are downloaded from."""
    from torchvision.models import get_weight  # takes seconds, and not every command needs such a network

    return get_weight(PUBLISHED[name])


def cached(url: str) -> Path:
    """Where torchvision and torch-fidelity keep what they download from there."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name


def cached_weights(name: str) -> Path:
    """Where a download of `name`, a key of PUBLISHED, is kept."""
    return cached(published(name).url)


def downloading(url: str) -> AbstractContextManager[None]:
    """Around what may download a file from there: one process does, the others find it. Nobody waits where it is."""
    file = cached(url)
    return nullcontext() if file.is_file() else one_at_a_time(file.parent)


def load_published(name: str, file: str | None) -> dict[str, Tensor]:
    """torchvision's ImageNet state dict of `name`, a key of PUBLISHED, from `file` or, where None, its download.

    FileNotFoundError or ValueError says which file is wrong and which setting to give instead.
    """
    if file is not None:
        return load_state(Path(file), f"weights.{name}")
    weights = published(name)
    try:
        with downloading(weights.url):
            return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (URLError, OSError, RuntimeError) as error:
        raise ValueError(
            f"the ImageNet weights of {name} could not be downloaded from {weights.url} ({error}); "
            f"fetch that file elsewhere and give its path as weights.{name}=FILE, or choose losses and "
            "metrics without it"
        ) from None


def load_state(file: Path, setting: str) -> dict[str, Tensor]:
    """A state dict from a .safetensors or a PyTorch file, never executing what a pickle asks for."""
    state = read_safely(file, setting)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{setting}: {file} does not hold a plain state dict (names to tensors)")
    return state


def read_safely(file: Path, setting: str) -> object:
    """What a .safetensors or a PyTorch file holds, as long as that is tensors and plain values."""
    if not file.is_file():
        raise FileNotFoundError(f"{setting}: there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with safe_global(IGNORED):
            return torch.load(file, "cpu", weights_only=True)
    except Exception as error:  # on a file of something else the readers raise nearly every type there is
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(f"{setting}: {file} is not a file of weights that can be read safely ({reason})") from None


def fit_state(module: nn.Module, state: dict[str, Tensor], setting: str, file: str | None) -> None:
    """load_state_dict with the mismatch as one sentence."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{setting}: {file or 'the download'} holds the weights of another network: {reason}"
        ) from None


def state_hash(module: nn.Module) -> str:
    """sha256 over a module's tensors in the order of their names: the same weights, the same hash, whatever the
    file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class FixedModule(nn.Module):
    """Never leaves eval mode: no dropout, no batch statistics."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


def freeze(module: nn.Module) -> nn.Module:
    """Eval mode, no parameter gradients."""
    return module.eval().requires_grad_(False)


def require_finite(module: nn.Module, name: str) -> None:
    """ValueError where training has diverged: what it computes means nothing."""
    bad = [key for key, tensor in module.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{name} has weights that are nan or infinite ({bad[0]}); take an earlier checkpoint")
