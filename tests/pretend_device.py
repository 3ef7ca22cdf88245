"""A pretend accelerator on the CPU: what would go wrong on a GPU goes wrong here, where no GPU is.

Its tensors say that they are on device `vdev:0` and hold a CPU tensor with the true values. A process that has called
`plug_in` runs anything on it, inside `on_device()`; with ACCELERATE_TORCH_DEVICE=vdev:0 the package's own entry points
do. There it

- raises RuntimeError, with the place, where a GPU would: tensors of both devices in one operator, a generator of the
  other one, CPU tensors in a collective (NCCL takes none), fused AdamW of tensors whose strides differ (which a CPU
  takes, and mixes up);
- counts in `Seen.waits`, by what and by place, where the host would wait for a GPU: a value asked for (`item`,
  `tolist`, `bool`), a copy to the host, a copy from it that is not `non_blocking`, an operator whose result's size
  depends on values (`nonzero`, masks);
- lists in `Seen.collectives` what would go over the wire.

The place is the package's line, the innermost there is. What kernels do by themselves, how long anything takes, and how
much memory, only a GPU can tell.

torch's PrivateUse1 device belongs to a process for good, and makes torch believe in an accelerator: `plug_in` is for
processes of their own, such as tests/test_device.py starts.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

import vqgan_accel

PACKAGE = str(Path(vqgan_accel.__file__).parent) + os.sep
NAME = "vdev"  # of the device, to torch


def is_possible() -> bool:
    """Whether this torch lets a device be written in Python. 2.4 does not yet."""
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


class Place(NamedTuple):
    """A line of the package."""

    file: str  # below vqgan_accel/; empty where no line of it has led there
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


class Collective(NamedTuple):
    name: str  # allreduce_, broadcast_, ...
    bytes: int  # of the tensors that this process gives
    place: Place


class Seen:
    """What has happened on the device since `on_device()` began or `clear` was called."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.waits: Counter[tuple[str, Place]] = Counter()
        self.collectives: list[Collective] = []


SEEN = Seen()  # of the device that is plugged in: there is one


@contextlib.contextmanager
def on_device() -> Iterator[Seen]:
    """Whatever is asked of `vdev` is done while it is open."""
    SEEN.clear()
    with mock.patch("torch.Generator", Generator), _Dispatch():
        yield SEEN


def place() -> Place:
    """The innermost line of the package that is at work in this thread, or in the main one, which waits for autograd's
    threads."""
    for frame in (sys._getframe(1), sys._current_frames().get(threading.main_thread().ident or 0)):
        if (found := _innermost(frame)) is not None:
            return found
    return Place("", 0, "")


def _innermost(frame: FrameType | None) -> Place | None:
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            return Place(code.co_filename.removeprefix(PACKAGE), frame.f_lineno, code.co_name)
        frame = frame.f_back
    return None


def wait_for(what: str) -> None:
    SEEN.waits[what, place()] += 1


def refuse(operator: str, reason: str) -> None:
    raise RuntimeError(f"{operator}: {reason}, at {place()}")


# ---- tensors and generators of the device


class DeviceTensor(Tensor):
    """Says that it is on the device; `inner` has its values."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> DeviceTensor:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operator, args, kwargs or {})

    # What torch does in C++ without an operator:

    def tolist(self) -> Any:
        wait_for("tolist")
        return self.inner.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.inner})"

    def __format__(self, spec: str) -> str:
        return repr(self) if self.dim() else format(self.item(), spec)


class Generator(torch.Generator):
    """Draws on the device what the CPU's would with its seed."""

    own: ClassVar[dict[int, Generator]] = {}  # by address, for operators get another Python object

    def __new__(cls, device: Any = "cpu") -> Any:
        generator = super().__new__(cls)
        if is_ours(device):
            cls.own[generator._cdata] = generator
        return generator

    def __init__(self, device: Any = "cpu") -> None: ...

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0) if self._cdata in self.own else torch.device("cpu")


def is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


# ---- operators

# Their result's size, or what they do next, depends on values.
WAITING = {
    "_local_scalar_dense": "item",
    **dict.fromkeys(["nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"], "a size from values"),
    **dict.fromkeys(["bincount", "histc", "repeat_interleave"], "a size from values"),
    **dict.fromkeys(["equal", "_linalg_svd", "_linalg_eigh", "linalg_eig", "_linalg_eigvals"], "a value is looked at"),
}
INDEXING = {"index", "index_put_", "index_put", "_unsafe_index", "_index_put_impl_"}


class _Dispatch(TorchDispatchMode):
    """Sees also what has no tensor of ours yet: `torch.zeros(3, device="vdev")`."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operator, args, kwargs or {})


def run(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On the tensors inside, after a look at what a GPU would say."""
    given = list(tensors([args, kwargs]))
    ours = [tensor for tensor in given if isinstance(tensor, DeviceTensor)]
    others = [tensor for tensor in given if not isinstance(tensor, DeviceTensor)]
    name, to_us = operator._schema.name.partition("::")[2], is_ours(kwargs.get("device"))
    if operator.namespace == "c10d":
        look_at_collective(name, given, others)
    elif ours or to_us:
        look_at(name, args, kwargs, ours, others)
    if not ours and not to_us:
        return operator(*args, **kwargs)
    if to_us:
        kwargs = kwargs | {"device": torch.device("cpu")}
    result = operator(*inside(args), **inside(kwargs))
    if name == "_to_copy" and kwargs.get("device") is not None and not to_us:
        return result
    if name == "copy_" and not isinstance(args[0], DeviceTensor):
        return result
    return wrapped(result, {id(tensor.inner): tensor for tensor in ours}, name)


def look_at(name: str, args: Any, kwargs: Any, ours: list[DeviceTensor], others: list[Tensor]) -> None:
    if name in WAITING:
        wait_for(WAITING[name])
    if name in ("_to_copy", "copy_"):
        look_at_copy(name, args, kwargs, ours, others)
    elif name in INDEXING:
        look_at_indices(name, args)
    elif found := [tuple(tensor.shape) for tensor in others if tensor.dim()]:  # scalars go along with a kernel
        refuse(name, f"tensors of both devices, of the CPU those of shape {found}")
    generator = kwargs.get("generator")
    if generator is not None and generator._cdata not in Generator.own:
        refuse(name, "a generator of the CPU")
    if name == "_fused_adamw_":
        look_at_strides(args)


def look_at_copy(name: str, args: Any, kwargs: Any, ours: list[DeviceTensor], others: list[Tensor]) -> None:
    non_blocking = kwargs.get("non_blocking")
    if name == "copy_":
        moves, here = bool(ours and others), not isinstance(args[0], DeviceTensor)
        non_blocking = non_blocking or args[2:3] == (True,)
    else:
        moves = kwargs.get("device") is not None and is_ours(kwargs["device"]) != bool(ours)
        here = bool(ours)
    if moves and here:
        wait_for("a copy to the host")
    elif moves and not non_blocking:
        wait_for("a blocking copy from the host")


def look_at_indices(name: str, args: Any) -> None:
    indices = [index for index in args[1] if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        wait_for("a mask as index")
    if any(not isinstance(index, DeviceTensor) for index in indices):
        wait_for("a blocking copy from the host")
    if any(isinstance(x, Tensor) and x.dim() and not isinstance(x, DeviceTensor) for x in (args[0], *args[2:])):
        refuse(name, "tensors of both devices")


def look_at_strides(args: Any) -> None:
    """As CUDA's fused kernel does (aten/src/ATen/native/ForeachUtils.h, check_fast_path_restrictions)."""
    for group in zip(*args[:4], strict=True):  # parameters, gradients, both moments
        layouts = {tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n != 1) for t in group}
        if len(layouts) > 1 or len({tensor.dtype for tensor in group}) > 1:
            refuse("fused AdamW", f"strides {[t.stride() for t in group]} of a parameter, its gradient, its moments")


def look_at_collective(name: str, given: list[Tensor], others: list[Tensor]) -> None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("broadcast_object_list", "all_gather_object"):
            return  # torch itself puts Python objects on the group's device, and this group takes the CPU's
        frame = frame.f_back
    if others:
        refuse(name, f"CPU tensors of shape {[tuple(tensor.shape) for tensor in others]}")
    SEEN.collectives.append(Collective(name, sum(t.numel() * t.element_size() for t in given), place()))


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors(each)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def inside(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.inner
    if isinstance(value, tuple | list):
        return type(value)(inside(each) for each in value)
    if isinstance(value, dict):
        return {key: inside(each) for key, each in value.items()}
    return value


def wrapped(value: Any, outside: dict[int, DeviceTensor], name: str) -> Any:
    """Results in tensors of ours; those that were given (in-place operators return them) in the ones they had."""
    if isinstance(value, Tensor):
        before = outside.get(id(value))
        if before is None:
            return DeviceTensor(value)
        if before.shape != value.shape or before.stride() != value.stride():
            raise NotImplementedError(f"{name} changes the shape of a tensor in place")  # of its inner one alone
        return before
    if isinstance(value, tuple | list):
        return type(value)(wrapped(each, outside, name) for each in value)
    return value


# ---- what torch asks a device for


class _Module:
    """torch.vdev"""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None: ...

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def synchronize(self, device: Any = None) -> None:
        wait_for("synchronize")


# `torch.tensor(..., device="vdev")` and DDP's buckets go below every mode: they ask the backend itself.


def _empty_strided(size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, **_: Any) -> Any:
    return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size: Any, dtype: Any = None, layout: Any = None, device: Any = None, **more: Any) -> Any:
    memory_format = more.get("memory_format") or torch.contiguous_format
    return DeviceTensor(torch.empty(size, dtype=dtype, memory_format=memory_format))


def _copy_from(source: Tensor, destination: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(destination, DeviceTensor):
        wait_for("a copy to the host")
    elif not isinstance(source, DeviceTensor):
        wait_for("a blocking copy from the host")
    inside(destination).copy_(inside(source))
    return destination


_KERNELS: list[torch.library.Library] = []  # they go when this does


def plug_in() -> None:
    """Make torch know the device. Once in a process, before its first backward pass: autograd has a thread for it."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    # From the CPU to a GPU a Parameter stays the same object; to a subclass only by a swap.
    torch.__future__.set_swap_module_params_on_conversion(True)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _KERNELS.append(library)
