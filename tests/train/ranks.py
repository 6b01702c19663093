"""Ranks without torchrun: forked from a process that has imported everything, because each import takes seconds.

Run as a script, in a process that has started no threads yet: `python ranks.py TASK FOLDER ...`.
"""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import TCPStore

from ijepa_enhanced import distributed
from ijepa_enhanced.batch import Batch, MaskedBatch
from ijepa_enhanced.config import build
from ijepa_enhanced.data.loader import masked
from ijepa_enhanced.distributed import Ranks, ranks_of_run
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.jepa import JEPA, StepSize
from ijepa_enhanced.masks import MaskConfig, draw_masks
from ijepa_enhanced.merge_plan import plan_merges
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.objective import ObjectiveConfig
from ijepa_enhanced.packed import Packed
from ijepa_enhanced.randomness import Purpose, generator
from ijepa_enhanced.train import agreement, loop
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.optimizer import StepSettings, make_optimizer
from ijepa_enhanced.train.parallel import parallelize, whole_tensor
from ijepa_enhanced.train.saved import read_train_config
from ijepa_enhanced.train.step import train_step

STORES: list[TCPStore] = []
"""Kept until this process ends."""
PACKS = 4
"""Packs of a step."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration that ranks must train as one process does."""

    objective: ObjectiveConfig = dataclasses.field(default_factory=lambda: ObjectiveConfig(contrastive_weight=0.5))
    images: tuple[int, ...] = (3, 1, 2, 0)
    """Images of each pack of a step. With one, there is no contrastive loss; with none, no loss."""
    rate: float = 0.1
    recompute: bool = True
    frozen: bool = False


CASES = {
    "all": Case(),
    "frozen": Case(ObjectiveConfig(vicreg_weight=0.0), rate=0.0, recompute=False, frozen=True),
    "no prediction": Case(ObjectiveConfig(prediction_weight=0.0, vicreg_weight=1.0), (1, 2, 1, 1), recompute=False),
}


def make_pack(seed: int, images: int, rate: float) -> MaskedBatch:
    """Random patches of two views of each image."""
    grids = [(4 + image % 3, 5) for image in range(images) for _ in range(2)]
    patches = np.random.default_rng(seed).integers(0, 256, (sum(a * b for a, b in grids), 192), dtype=np.uint8)
    packed = Packed.of_grids(patches, np.array(grids, dtype=np.int64).reshape(-1, 2))
    masks = [draw_masks(*grid, MaskConfig(), generator(seed, Purpose.MASKS, image=i)) for i, grid in enumerate(grids)]
    ids, plan = torch.arange(images).repeat_interleave(2), plan_merges(packed.segments.lengths, rate, 2, 0)
    return masked(Batch(packed, ids, None, (0, 0), (), merge_plan=plan), masks, rate, 2)


def five_steps(kind: Any, case: Case, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The whole weights after five steps, from initial weights that only rank 0 has."""
    torch.manual_seed(0)
    teacher = Encoder.random(EncoderConfig("Ti", 8, depth=1).architecture, Preprocessing(), 1) if case.frozen else None
    torch.manual_seed(ranks.rank)
    sizes = EncoderConfig("Ti", 8, depth=2).architecture, PredictorConfig(32, 1, 2)
    model = JEPA(*sizes, case.objective, 2, teacher=teacher)
    model.student.blocks.recompute = case.recompute
    network = parallelize(model, kind, ranks)
    optimizer = make_optimizer(model)
    for group in optimizer.param_groups:
        # AdamW divides each gradient by its magnitude. Some gradients are only rounding errors, such as that of a bias
        # before a BatchNorm, and would make full steps. An epsilon well above these errors keeps such steps small.
        group["eps"] = 1e-4
    for step in range(5):
        packs = [make_pack(PACKS * step + number, images, case.rate) for number, images in enumerate(case.images)]
        size = StepSize(sum(len(pack.targets.index) for pack in packs), PACKS)
        settings, autocast = StepSettings(1e-3, 0.05, 0.9), torch.autocast("cpu", enabled=False)
        own = packs[ranks.rank :: ranks.world]
        train_step(model, network, optimizer, own, size, settings, 1.0, autocast, torch.device("cpu"))
    return {name: whole_tensor(value).detach().clone() for name, value in model.state_dict().items()}


def compare(out: Path, local_world_size: int, cases: tuple[str, ...]) -> None:
    """Write the largest difference of a weight between these ranks and one process, for each of the cases."""
    found = {}
    with ranks_of_run() as ranks:
        ranks = dataclasses.replace(ranks, local_world_size=local_world_size)
        for name in cases:
            case = CASES[name]
            alone = five_steps("ddp", case, Ranks()) if ranks.main else {}
            for kind in ("ddp", "fsdp"):
                weights = five_steps(kind, case, ranks)
                found[f"{kind}: {name}"] = [float((weights[key] - alone[key]).abs().max()) for key in alone]
        if ranks.main:
            out.write_text(json.dumps({name: max(values) for name, values in found.items()}))


def run(file: Path, folder: Path, resume: bool, seen: Path | None = None, **changes: Any) -> None:
    """Train, and write epoch and row of each image that this rank trains on into `seen`."""
    config = dataclasses.replace(build(TrainConfig, read_train_config(file)), **changes)
    if seen is not None:
        original, path = loop.train_step, seen.with_suffix(f".{os.environ.get('RANK', '0')}")

        def recorded(model: JEPA, network: Any, optimizer: Any, batches: Any, *rest: Any) -> Any:
            with path.open("a") as file:
                for batch in batches:
                    for image in batch.image_ids.tolist():
                        file.write(json.dumps([batch.cursor[0], image]) + "\n")
            return original(model, network, optimizer, batches, *rest)

        loop.train_step = recorded
    loop.train(config, folder, resume)


def fork(world: int, task: Callable[..., None], *arguments: Any, **options: Any) -> list[int]:
    """Run a task as each of `world` ranks, and return their exit codes."""
    return [wait(child) for child in start(world, task, *arguments, **options)]


def wait(child: int) -> int:
    """Wait until a process ends, and return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start(world: int, task: Callable[..., None], *arguments: Any, **options: Any) -> list[int]:
    """Start a task as each of `world` ranks, and return their process numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            launched = {"TORCHELASTIC_RUN_ID": "run", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank}
            launched |= {
                "TORCHELASTIC_USE_AGENT_STORE": True,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world,
                "LOCAL_WORLD_SIZE": world,
            }
            os.environ |= {name: str(value) for name, value in launched.items()} if world > 1 else {}
            try:
                task(*arguments, **options)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            sys.stderr.flush()
            os._exit(0)
        children.append(child)
    # Like torchrun's agent, this process holds the store through which ranks meet, so that any rank may hang. It starts
    # threads, so the ranks are forked before.
    STORES.append(TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False))
    return children


def compared(folder: Path, world: int, local_world_size: int, *cases: str) -> None:
    """Task: `compare` with `world` ranks, as if each machine had `local_world_size` of them."""
    assert fork(world, compare, folder / "differences.json", local_world_size, cases) == [0] * world


def continued(folder: Path, kind: str) -> None:
    """Task: train in 4 ranks, and continue from the middle in 1, 2 and 3, sharded in turns."""
    file, four = folder / "run.yaml", folder / "four"
    assert fork(4, run, file, four, False, folder / "seen-4", parallel=kind) == [0] * 4
    for world, other in ((1, "ddp"), (2, "ddp"), (3, "fsdp")):
        copy = folder / f"continued-{world}"
        shutil.copytree(four, copy)
        shutil.rmtree(copy / "checkpoints" / "step-00000002")
        assert fork(world, run, file, copy, True, folder / f"seen-{world}", parallel=other) == [0] * world


def hang(file: Path, folder: Path, hung: int) -> None:
    """Train, and hang in the fourth step if this is the rank `hung`."""
    distributed.STEP_TIMEOUT, agreement.ANSWER_TIMEOUT = timedelta(seconds=4), 6.0
    original, steps = loop.train_step, itertools.count(1)

    def stopped(*arguments: Any) -> Any:
        if next(steps) == 4 and int(os.environ["RANK"]) == hung:
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(*arguments)

    loop.train_step = stopped
    loop.train(build(TrainConfig, read_train_config(file)), folder)


def hung(folder: Path, rank: int) -> None:
    """Task: train in 3 ranks. One hangs, and is killed when the others have ended, as torchrun does."""
    children = start(3, hang, folder / "run.yaml", folder / "run", rank)
    codes = [wait(child) for number, child in enumerate(children) if number != rank]
    os.kill(children[rank], signal.SIGKILL)
    assert codes == [1, 1]
    assert wait(children[rank]) == -signal.SIGKILL


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, folder, *rest = sys.argv[1:]
    values = [int(value) if value.isdigit() else value for value in rest]
    {"compared": compared, "continued": continued, "hung": hung}[name](Path(folder), *values)  # type: ignore[operator]
