"""`ijepa doctor`: what this machine and this installation can do, with advice for each part that is missing."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from PIL import features

from ijepa_enhanced.commands.options import Common
from ijepa_enhanced.commands.setup import print_json
from ijepa_enhanced.devices import (
    MEGABYTE,
    SHARED_MEMORY,
    best_device,
    default_workers,
    device_name,
    free_memory,
    multiplies_bf16,
)
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.preprocessing import Preprocessing

PACKAGE = "ijepa-enhanced"
CODECS = {
    "jpg": "JPEG",
    "zlib": "PNG",
    "webp": "WebP",
    "avif": "AVIF",
    "libtiff": "compressed TIFF",
    "jpg_2000": "JPEG 2000",
}
"""What Pillow calls the libraries that it was built with, and the formats that they decode."""
SHARED_PER_WORKER = 2 * 16384 * (16**2 * 3 + 32)
"""Bytes of shared memory that a worker needs with the recipes for GPUs: two packs of 16,384 tokens, each of P * P * 3
bytes of pixels and 32 bytes of positions and indices (see `data.loader.check_shared_memory`)."""
AGREEMENT = 1e-3
"""Largest difference of features, whose size is about 1, between an image alone and in a pack. In float32 they differ
by about 1e-6 (tests/test_packing_invariance.py). GPUs may compute products in TF32, which rounds at 5e-4."""


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis."""

    name: str
    state: Literal["ok", "note", "problem"]
    found: str
    advice: str = ""


def run(options: Common) -> int:
    """Print every check; the exit code is 1 if one of them is a problem."""
    found = []
    for check in checks():
        found.append(check)
        mark = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}[check.state]
        print(f"{mark}  {check.name:<14}  {check.found}")
        if check.advice:
            print(f"{'':<9}{'':<14}  -> {check.advice}")
    print_json(options, {"checks": [asdict(check) for check in found]})
    return int(any(check.state == "problem" for check in found))


def checks() -> Iterator[Check]:
    """Yield all checks, the fast ones first."""
    yield Check("versions", "ok", versions())
    yield device_check()
    yield cores_check()
    yield from memory_checks()
    yield codecs_check()
    yield from extras_checks()
    yield smoke_check()


def versions() -> str:
    """Return the versions that a bug report needs."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in (PACKAGE, "numpy", "pillow")]
    found.insert(1, f"torch {torch.__version__}")  # with the build, such as +cu130, which its metadata may lack
    return ", ".join((*found, f"Python {platform.python_version()}", f"{platform.system()} {platform.machine()}"))


def device_check() -> Check:
    """Check for a GPU that PyTorch can use, and that it supports bfloat16."""
    device = best_device()
    if device.type != "cpu":
        _, memory = torch.accelerator.get_memory_info(device)
        found = f"{torch.accelerator.device_count()} x {device_name(device)}, {memory / 2**30:.0f} GiB"
        if multiplies_bf16(device):
            return Check("device", "ok", f"{found}, bfloat16")
        return Check("device", "note", found, "It computes in float32, so training is slower and needs more memory.")
    if shutil.which("nvidia-smi"):
        return Check(
            "device",
            "problem",
            f"CPU, although there is an NVIDIA driver (PyTorch {torch.__version__})",
            "Install a build of PyTorch for your CUDA version: see pytorch.org/get-started.",
        )
    precision = "bfloat16" if multiplies_bf16(device) else "float32"
    return Check("device", "note", f"CPU, {precision}", "Train with the recipe own-images-cpu.")


def cores_check() -> Check:
    """Check the CPU cores, and how many of them PyTorch uses."""
    cores, threads = default_workers(), torch.get_num_threads()
    found = f"{cores}, and PyTorch uses {threads}"
    if threads > cores:
        return Check("CPU cores", "note", found, f"Set OMP_NUM_THREADS={cores}: more threads than cores are slow.")
    return Check("CPU cores", "ok", found)


def memory_checks() -> Iterator[Check]:
    """Check the memory, and the part of it that data workers can share."""
    free = free_memory()
    yield Check("free memory", "ok", f"{free['memory'] / 2**30:.1f} GiB")
    shared = free.get(str(SHARED_MEMORY))
    if shared is None:
        return
    need = SHARED_PER_WORKER * default_workers()
    enough = shared >= need
    yield Check(
        "shared memory",
        "ok" if enough else "note",
        f"{shared / 2**30:.1f} GiB in {SHARED_MEMORY}",
        "" if enough else f"In a container, add --shm-size={need // MEGABYTE + 1}m, or use fewer data workers.",
    )


def codecs_check() -> Check:
    """Check which image formats Pillow decodes."""
    have = [title for name, title in CODECS.items() if features.check(name)]
    lack = [title for name, title in CODECS.items() if not features.check(name)]
    advice = f"{', '.join(lack)} cannot be decoded. Install Pillow from PyPI, whose wheels decode them." if lack else ""
    return Check("image formats", "note" if lack else "ok", ", ".join(have), advice)


def extras_checks() -> Iterator[Check]:
    """Check which extras of this package are installed."""
    for extra, packages in extras().items():
        lack = [name for name in packages if not installed(name)]
        yield Check(
            f"extra {extra}",
            "note" if lack else "ok",
            f"{', '.join(lack)} not installed" if lack else "installed",
            f"If you need it: pip install '{PACKAGE}[{extra}]'" if lack else "",
        )


def extras() -> dict[str, list[str]]:
    """Return the packages of each extra for users."""
    found: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires(PACKAGE) or []:
        marked = re.fullmatch(r"([\w.-]+)[^;]*;.*extra == ['\"](\w+)['\"].*", requirement)
        if marked:
            found.setdefault(marked[2], []).append(marked[1])
    return found


def installed(name: str) -> bool:
    """Return whether a package is installed."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def smoke_check() -> Check:
    """Embed three images of different sizes in one pack, and compare one of them with its feature alone."""
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((64, 96), (120, 48), (33, 77))]
    start = time.perf_counter()
    try:
        encoder = Encoder.random(EncoderConfig("Ti", depth=2).architecture, Preprocessing(), 0).to(best_device())
        together, alone = encoder.embed(images, precision="fp32"), encoder.embed(images[:1], precision="fp32")
        difference = float((together[0] - alone[0]).abs().max())
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        return Check("smoke test", "problem", first, "Reinstall PyTorch for this machine: see pytorch.org/get-started.")
    seconds = time.perf_counter() - start
    if not difference < AGREEMENT:
        advice = "Report this line: a view must not depend on the other views of its pack."
        return Check("smoke test", "problem", f"features differ by {difference:.2g}", advice)
    return Check("smoke test", "ok", f"three images embedded in {seconds:.1f} s")
