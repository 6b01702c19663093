"""What the CPU does, on a GPU: a step, compiled and not, and a run with its scores. `pytest -m gpu` runs it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.devices import HostCopy, autocast, autocast_dtype
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.evaluate.sweep import network_costs
from ijepa_enhanced.jepa import JEPA, StepSize
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig
from ijepa_enhanced.models.preprocessing import Preprocessing
from ijepa_enhanced.objective import ObjectiveConfig
from ijepa_enhanced.packed import Packed, Segments
from ijepa_enhanced.train.optimizer import StepSettings, make_optimizer
from ijepa_enhanced.train.parallel import replicate, shard, whole_tensor
from ijepa_enhanced.train.step import train_step
from one_pack import make_colors, pack_losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
DEPTH = 2
# Two views of each image; packs of other numbers of views, of tokens and of longest views.
PACKS = [
    [(3, 3), (9, 9), (2, 2), (1, 8), (7, 5), (4, 6)],
    [(5, 4), (3, 7), (4, 4), (6, 6)],
    [(3, 3)] * 8,
    [(13, 16), (5, 5)],
]
LOCAL = [(2, 3), (3, 3), (1, 2)]

MakeBatch = Callable[..., MaskedBatch]
MakeStream = Callable[..., Packed]


def make_packs(make_batch: MakeBatch, make_stream: MakeStream) -> list[MaskedBatch]:
    """With masks and local views."""
    packs = []
    for number, grids in enumerate(PACKS):
        batch, local = make_batch(grids, number), make_stream(LOCAL * (len(grids) // 2), seed=number)
        seen = Segments.of([*batch.context.segments.lengths, *local.segments.lengths])
        colors = {"colors": make_colors(len(grids)), "unmasked_colors": make_colors(len(local.segments))}
        packs.append(dataclasses.replace(batch, unmasked=local, seen=seen, **colors))
    return packs


def make_jepa() -> JEPA:
    torch.manual_seed(0)
    encoder = EncoderConfig("Ti", 8, DEPTH, patch_embed="mlp").architecture
    return JEPA(encoder, PredictorConfig(32, 1, 2), ObjectiveConfig(contrastive_weight=1.0), views=2)


def steps(model: JEPA, packs: list[MaskedBatch], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The parts of the loss of each pack, and the gradients of them all."""
    found = []
    for pack in packs:
        with autocast(device, dtype):
            losses = pack_losses(model, pack.to(device), len(pack.targets.index))
        losses.total.backward()
        found.append(torch.stack([losses.prediction, losses.vicreg, losses.contrastive]).cpu())
    found.append(torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None]).cpu())
    model.zero_grad()
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("precision", "bound"),
    [
        ("fp32", 1e-4),  # float32 rounds at 6e-8, and the projector's norm divides by what may be small
        ("bf16", 0.1),  # bfloat16 rounds at 4e-3, some ten layers one after another
    ],
)
def test_a_step_is_that_of_the_cpu(
    make_batch: MakeBatch, make_stream: MakeStream, precision: str, bound: float
) -> None:
    packs = make_packs(make_batch, make_stream)
    expected = steps(make_jepa(), packs, torch.device("cpu"), torch.float32)
    found = steps(make_jepa().to(DEVICE), packs, DEVICE, autocast_dtype(precision, DEVICE))
    for ours, theirs in zip(found, expected, strict=True):
        assert distance(ours, theirs) < bound


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own
def test_compiled_once_a_step_of_any_pack_is_the_same(make_batch: MakeBatch, make_stream: MakeStream) -> None:
    packs = make_packs(make_batch, make_stream)
    dtype = autocast_dtype("auto", DEVICE)
    expected = steps(make_jepa().to(DEVICE), packs, DEVICE, dtype)
    model = make_jepa().to(DEVICE)
    torch.compiler.reset()
    # As train/loop.py does.
    for module in (model.normalize, model.student, model.teacher, model.predictor):
        module.compile(dynamic=True, fullgraph=True)
    found = steps(model, packs[:1], DEVICE, dtype)[:1]
    with torch.compiler.set_stance("fail_on_recompile"):
        found += steps(model, packs[1:], DEVICE, dtype)[:-1]
        found += steps(model, packs, DEVICE, dtype)[-1:]
    torch.compiler.reset()
    for ours, theirs in zip(found, expected, strict=True):
        # As above: fused kernels keep in float32 what eager ones round to bfloat16 between them.
        assert distance(ours, theirs) < 0.1


def test_copies_of_the_weights_count_for_every_setting_of_a_sweep(pictures: Path) -> None:
    index = open_catalog(open_source(str(pictures)), cache=False)
    encoder = Encoder.random(EncoderConfig("Ti", 8, 1).architecture, Preprocessing(), seed=0).to(DEVICE)
    first, second = network_costs(encoder, [index], [(40, 0.0)] * 2, torch.bfloat16)
    assert first["peak_megabytes"] == second["peak_megabytes"]


@pytest.mark.parametrize("rate", ["0.0", "0.2"])
def test_a_run_and_its_scores(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rate: str) -> None:
    main = pytest.importorskip(
        "ijepa_enhanced.cli", reason="needs what a bare GPU image lacks", exc_type=ImportError
    ).main
    run = tmp_path / "run"
    tiny = "--encoder.variant Ti --encoder.patch_size 8 --encoder.depth 2 --predictor.width 32 --predictor.depth 1"
    data = "--data.tokens_per_pack 512 --data.masked_views 2 --data.local_views 2"
    data += " --data.min_resolution 32 --data.max_resolution 48"
    loss = "--predictor.heads 2 --objective.contrastive_weight 1 "
    loss += f"--merging.teacher_rate {rate} --merging.student_rate {rate}"
    length = "--data.workers 1 --steps 6 --log_every 2 --checkpoint_every 3 --monitor.every 3"
    what = f"train {tiny} {data} {loss} {length} --data.source {pictures} --run {run}"
    assert main(what.split()) == 0, capsys.readouterr().err
    assert (run / "report.html").is_file()
    protocols = "--protocols knn linear attentive finetune --finetune.epochs 2"
    scored = (
        f"evaluate {run} --train {pictures} --val {pictures} --resolution 40 {protocols} --merge-rate {rate} --json"
    )
    assert main(scored.split()) == 0, capsys.readouterr().err
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    # The classes differ in brightness, and a linear layer finds that after any encoder.
    assert scores["linear"] == 1.0
    encoder = Encoder.from_pretrained(run)
    images = sorted(pictures.rglob("*.*"))
    expected = encoder.embed(images, resolution=40)
    found = encoder.to(DEVICE).embed(images, resolution=40).cpu()
    # bfloat16, as above.
    assert distance(found, expected) < 0.1


def test_the_host_does_not_wait_for_a_later_step() -> None:
    copy = HostCopy(torch.arange(3.0, device=DEVICE).sum())
    torch.cuda._sleep(2**31)  # clock cycles: about a second
    assert copy.read() == 3
    assert not torch.cuda.current_stream().query(), "the later step is not done"


def test_ddp_and_fsdp_make_the_steps_of_one_gpu(make_batch: MakeBatch, make_stream: MakeStream, tmp_path: Path) -> None:
    """One NCCL rank shows that `ddp` and `fsdp` run on CUDA. tests/train/test_parallel.py tests the sums over ranks."""
    packs = make_packs(make_batch, make_stream)[:2]
    size = StepSize(sum(len(pack.targets.index) for pack in packs), len(packs))

    def three_steps(share: Callable[[JEPA], torch.nn.Module]) -> dict[str, Tensor]:
        model = make_jepa().to(DEVICE)
        network = share(model)
        optimizer = make_optimizer(model)
        for _ in range(3):
            settings, exact = StepSettings(1e-3, 0.05, 0.9), autocast(DEVICE, torch.float32)
            result = train_step(model, network, optimizer, packs, size, settings, 1.0, exact, DEVICE)
            assert result.grad_norm.read().isfinite()
        return {name: whole_tensor(value).clone() for name, value in model.state_dict().items()}

    def sharded(model: JEPA) -> JEPA:
        shard(model, init_device_mesh("cuda", (1,)))
        return model

    expected = three_steps(lambda model: model)
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for share in (replicate, sharded):
            for name, value in three_steps(share).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    finally:
        torch.distributed.destroy_process_group()
