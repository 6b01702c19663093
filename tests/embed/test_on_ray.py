"""The Ray engine: the same files as the local engine, whatever dies; and our messages instead of Ray's.

The cluster has two CPUs, and two GPUs that are only numbers: actors that ask for one embed on the CPU.
"""

import dataclasses
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ijepa_enhanced import Encoder
from ijepa_enhanced.cli import main
from ijepa_enhanced.commands import embed as command
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.embed import on_ray
from ijepa_enhanced.embed.plan import EmbedPlan
from ijepa_enhanced.embed.rows import PackFeatures
from ijepa_enhanced.embed.run import Engine
from ijepa_enhanced.embed.settings import load_settings
from ijepa_enhanced.errors import RequestError

ray = pytest.importorskip("ray")

# Ray itself warns of these, and the last of its processes when it starts and stops.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)
OPTIONS = ["--resolution", "32", "--merge-rate", "0.2", "--layers", "2", "--tokens", "--dtype", "float16"]


@pytest.fixture(scope="module")
def cluster(index_cache: Path) -> Iterator[None]:
    """Ray on this machine; its processes inherit the cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "none,nothing")  # CUDA finds neither
        ray.init(
            "local",
            num_cpus=2,
            num_gpus=2,
            object_store_memory=2**28,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="critical",
        )
    yield
    ray.shutdown()


def embed(source: Path, encoder: Path, out: Path, *more: str) -> int:
    return main(["embed", str(source), "--weights", str(encoder), "--out", str(out), *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    "needs", [pytest.param({"num_gpus": 1, "num_cpus": 0}, marks=pytest.mark.slow), {"num_cpus": 1}]
)
def test_the_files_are_those_of_the_local_engine(
    needs: dict[str, int], photos: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With GPUs, tasks decode for the actors. Without, actors decode for themselves."""
    assert on_ray.actors() == (2, {"num_gpus": 1, "num_cpus": 0})
    monkeypatch.setattr(on_ray, "actors", lambda: (2, needs))
    monkeypatch.setattr(command, "tokens_at_once", lambda device, tokens: 40)  # several packs
    assert embed(photos, encoder, tmp_path / "local", *OPTIONS, "--workers", "0") == 0
    assert embed(photos, encoder, tmp_path / "ray", *OPTIONS, "--engine", "ray") == 0
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert ray.is_initialized(), "a connection that the command did not make stays"


@pytest.fixture(scope="module")
def stamps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,100 images of a few patches: rows of two files."""
    folder = tmp_path_factory.mktemp("stamps")
    random = np.random.default_rng(0)
    for number in range(1100):
        pixels = random.integers(0, 256, (*random.integers(8, 20, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    return folder


def processes(*names: str) -> list[int]:
    """Return the processes of this test's cluster whose titles begin with one of these names."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title, parent = (folder / "cmdline").read_text(), parent_of(int(folder.name))
            if title.startswith(tuple(f"ray::{name}" for name in names)) and parent_of(parent) == os.getpid():
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_nothing_is_lost_when_an_actor_and_tasks_are_killed(
    stamps: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "tokens_at_once", lambda device, tokens: 32)  # about 150 packs
    assert embed(stamps, encoder, tmp_path / "local", "--resolution", "16", "--workers", "0") == 0
    killed: list[int] = []

    def killing(plan: EmbedPlan, depth: int) -> Engine:
        engine = made(plan, depth)

        def run(files: Sequence[int]) -> Iterator[PackFeatures]:
            for number, pack in enumerate(engine(files)):
                if number == 5:
                    actors, tasks = processes("MapWorker"), processes("ReadRange", "IDLE")
                    assert len(actors) == 2
                    killed.extend([actors[0], *tasks])
                    for process in killed:
                        os.kill(process, signal.SIGKILL)
                yield pack

        return run

    made = on_ray.ray_engine
    monkeypatch.setattr(on_ray, "ray_engine", killing)
    assert embed(stamps, encoder, tmp_path / "ray", "--resolution", "16", "--engine", "ray") == 0
    assert len(killed) > 1
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def scaled(encoder: Path, factor: float, out: Path) -> Path:
    """An encoder whose features are `factor` times as large."""
    model = Encoder.from_pretrained(encoder)
    model.network.blocks.norm.weight.data *= factor
    model.save_pretrained(out)
    return out


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_our_errors_arrive_as_they_are(
    photos: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large, infinite = scaled(encoder, 1e6, tmp_path / "large"), scaled(encoder, 1e38, tmp_path / "infinite")
    assert embed(photos, large, tmp_path / "a", "--engine", "ray", "--dtype", "float16") == 2
    errors = capsys.readouterr().err
    assert errors.endswith("\nijepa: The features of cats/01.jpg are too large for float16. Use --dtype float32.\n")
    assert embed(photos, infinite, tmp_path / "b", "--engine", "ray") == 1
    errors += capsys.readouterr().err
    assert f"\nijepa: The features of cats/01.jpg in {photos} contain NaN or infinite values" in errors
    assert "Traceback" not in errors
    assert "ray::" not in errors


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_machine_with_other_files_is_named(photos: Path, encoder: Path, tmp_path: Path) -> None:
    assert embed(photos, encoder, tmp_path / "local", "--workers", "0") == 0
    settings, catalog = load_settings(tmp_path / "local"), open_catalog(open_source(str(photos)))
    node = re.escape(f"(On the Ray node {socket.gethostname()}.)")
    for change, words in (
        ({"source_hash": "0"}, f"{photos} does not contain the same images here as where the command runs"),
        ({"encoder_hash": "0"}, f"{encoder} is not the same encoder here as where the command runs"),
        ({"encoder": "/nowhere"}, "No such file or folder: /nowhere"),
    ):
        plan = EmbedPlan(dataclasses.replace(settings, **change), catalog, 8, 16384, 4096)
        with pytest.raises(RequestError, match=rf"^{words}\. {node}(?m:$)"):
            next(on_ray.ray_engine(plan, Encoder.from_pretrained(encoder).config)([0]))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("localhost", "RAY_ADDRESS must be HOST:PORT, for example 127.0.0.1:6379, not localhost."),
        (
            "127.0.0.1:1",
            "No Ray cluster answers at RAY_ADDRESS=127.0.0.1:1: Connection refused. Correct the address, or unset "
            "RAY_ADDRESS to start Ray on this machine.",
        ),
    ],
)
def test_an_address_without_a_cluster(address: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"), on_ray.ray_cluster():
        pass


def test_requests_that_ray_cannot_meet(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(*more: str) -> str:
        assert embed(Path("synthetic"), encoder, tmp_path / "out", "--engine", "ray", *more) == 2
        return capsys.readouterr().err

    assert "--workers has no effect with --engine ray" in message("--workers", "1")
    monkeypatch.setitem(sys.modules, "ray.data", None)
    assert "--engine ray requires Ray. Install it with: pip install 'ijepa-enhanced[ray]'" in message()
    for name, value in (("TORCHELASTIC_RUN_ID", "run"), ("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    assert "--engine ray does not run under torchrun" in message()
    assert not (tmp_path / "out").exists()
