"""How many cores decode and compute."""

import os
from pathlib import Path

import pytest
import torch

from ijepa_enhanced import devices
from ijepa_enhanced.devices import all_cores, default_workers, free_memory, threads
from ijepa_enhanced.evaluate import protocol
from ijepa_enhanced.evaluate.features import Features
from ijepa_enhanced.evaluate.tokens import InferenceConfig


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(devices, "CGROUPS", Path(os.devnull))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.usefixtures("eight_cores")
def test_all_cores_decode_and_the_ranks_of_a_machine_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_workers() == 8
    assert InferenceConfig(32).workers == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert default_workers() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert default_workers() == 1


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("limit", "workers"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8)]
)
def test_a_container_has_the_cores_of_its_limit(
    limit: str, workers: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr(devices, "CGROUPS", tmp_path)
    assert default_workers() == workers


@pytest.mark.usefixtures("eight_cores")
def test_a_job_has_what_all_of_its_control_groups_allow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "slurm" / "job" / "step"
    own.mkdir(parents=True)
    (tmp_path / "membership").write_text("1:cpu:/elsewhere\n0::/slurm/job/step\n")
    (own.parent / "cpu.max").write_text("300000 100000\n")
    (own / "cpu.max").write_text("max 100000\n")
    for name, value in (("max", "9000000"), ("current", "5000000"), ("stat", "anon 0")):
        (own.parent / f"memory.{name}").write_text(value)
    monkeypatch.setattr(devices, "CGROUPS", tmp_path)
    monkeypatch.setattr(devices, "OWN_CGROUP", tmp_path / "membership")
    assert default_workers() == 3
    assert free_memory()["memory"] == 4_000_000


def test_what_is_free_is_told_truly() -> None:
    free = free_memory()
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 10**8 < free["memory"] <= machine
    if Path("/dev/shm").is_dir():
        room = os.statvfs("/dev/shm")
        assert free["/dev/shm"] == pytest.approx(room.f_bavail * room.f_frsize, abs=10**9)


def test_a_container_has_the_memory_of_its_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "CGROUPS", tmp_path)
    (tmp_path / "memory.current").write_text("7000000\n")
    (tmp_path / "memory.stat").write_text("anon 3000000\ninactive_file 2000000\n")
    (tmp_path / "memory.max").write_text("10000000\n")
    assert free_memory()["memory"] == 10_000_000 - 7_000_000 + 2_000_000
    (tmp_path / "memory.max").write_text("4000000\n")
    assert free_memory()["memory"] == 0
    for unlimited in ("max\n", str(2**62)):
        (tmp_path / "memory.max").write_text(unlimited)
        assert free_memory()["memory"] > 10**8


@pytest.mark.usefixtures("eight_cores")
def test_scoring_has_all_cores_and_gives_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(train: Features, val: Features, how: protocol.Scoring) -> list[protocol.Answer]:
        seen.append(torch.get_num_threads())
        return [protocol.Answer("spy", torch.zeros(2, dtype=torch.int64))]

    monkeypatch.setitem(protocol.FEATURE_PROTOCOLS, "spy", spy)
    features = Features(torch.eye(2), torch.arange(2), torch.arange(2), {}, 1.0)
    with threads(1):
        assert protocol.score(features, features, ["spy"])["spy"] == 0.5
        assert seen == [8]
        assert torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        with all_cores():
            assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("device", "cores", "expected"), [("cuda", 5, 5), ("cpu", 5, 0), ("cpu", 6, 1), ("cpu", 17, 2)]
)
def test_workers_of_training_leave_the_cores_of_a_cpu_to_the_network(
    monkeypatch: pytest.MonkeyPatch, device: str, cores: int, expected: int
) -> None:
    monkeypatch.setattr(devices, "default_workers", lambda: cores)
    assert devices.training_workers(None, torch.device(device)) == expected
    assert devices.training_workers(3, torch.device(device)) == 3
