"""A device "fake", to test what runs on any device. Its tensors live in the host's memory, and the CPU computes.

Like a real device it refuses to compute with a tensor of another device, unless that has no dimensions. Like MPS it has
no float64. It changes PyTorch for the rest of the process, so a test runs this file in a process of its own.
"""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.devices import autocast, best_device, device_name
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.jepa import JEPA, StepSize
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.objective import ObjectiveConfig
from ijepa_enhanced.train.optimizer import StepSettings, make_optimizer
from ijepa_enhanced.train.step import train_step

NAME = "fake"
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
"""Operations that may have operands on two devices."""


class Backend:
    """What PyTorch asks of the module `torch.fake`."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Fake(Tensor):
    """A tensor whose device is "fake", around one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Fake":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=f"{NAME}:0", **layout)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operation, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Sees every operation, also those that have no operand, such as `torch.zeros`."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operation, args, kwargs or {})


def compute(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
    fakes = [x for x in tensors if isinstance(x, Fake)]
    if fakes and operation not in COPIES and any(x.ndim for x in tensors if not isinstance(x, Fake)):
        raise RuntimeError(f"{operation} has operands on two devices.")
    asked = kwargs.get("device")
    there = fakes != [] if asked is None else torch.device(asked).type == NAME
    if asked is not None and there:
        kwargs = kwargs | {"device": torch.device("cpu")}
    same = {id(x.inner): x for x in fakes}  # what an operation in place returns
    found = operation(*tree_map_only(Fake, lambda x: x.inner, args), **tree_map_only(Fake, lambda x: x.inner, kwargs))
    if not there:
        return found

    def wrap(inner: Tensor) -> Tensor:
        if inner.dtype == torch.float64:
            raise TypeError(f"{operation}: the device {NAME} has no float64.")
        return same[id(inner)] if id(inner) in same else Fake(inner)

    return tree_map_only(Tensor, wrap, found)


def embedded(device: torch.device) -> Tensor:
    """Features of images of different sizes, whose tokens merge, one vector after another."""
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((64, 96), (120, 48), (33, 77))]
    encoder = Encoder.random(EncoderConfig("Ti", 8, 2).architecture, Preprocessing(), seed=0).to(device)
    return encoder.embed(images, merge_rate=0.1).cpu().flatten()


def trained(device: torch.device, batches: list[MaskedBatch]) -> Tensor:
    """The losses of two steps."""
    torch.manual_seed(0)
    objective = ObjectiveConfig(contrastive_weight=1.0)
    model = JEPA(EncoderConfig("Ti", 8, 2).architecture, PredictorConfig(32, 1, 2), objective, views=2).to(device)
    optimizer, found = make_optimizer(model), []
    size = StepSize(sum(len(batch.targets.index) for batch in batches), len(batches))
    precision = autocast(device, torch.float32)  # with `auto`, some processors would compute in bfloat16
    for _ in range(2):
        settings = StepSettings(1e-3, 0.05, 0.9)
        result = train_step(model, model, optimizer, batches, size, settings, 1.0, precision, device)
        found += [loss.total.detach().cpu()[None] for loss in result.losses]
    return torch.cat(found)


def main(batches: Path) -> None:
    """Print as JSON which device PyTorch finds, and how far its results are from those of the CPU."""
    packs, cpu = pickle.loads(batches.read_bytes()), torch.device("cpu")
    # Before the first backward pass, which makes a thread for each device that there is.
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    library = torch.library.Library("_", "IMPL")  # a name, so that it lives until the end
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast changes nothing
    expected = embedded(cpu), trained(cpu, packs)
    with Mode():
        device = best_device()
        found = embedded(device), trained(device, packs)
    apart = [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(found, expected, strict=True)]
    print(json.dumps({"device": str(device), "name": device_name(device), "apart": apart}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
