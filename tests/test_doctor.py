"""`ijepa doctor` says what works, and what to do about what does not."""

import importlib.metadata
import json

import pytest
import torch

from ijepa_enhanced.cli import main
from ijepa_enhanced.commands import doctor
from ijepa_enhanced.commands.doctor import Check


def test_it_says_something_about_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])["checks"]
    names = [check["name"] for check in found]
    for name in ("versions", "device", "CPU cores", "free memory", "image formats", "extra plots", "smoke test"):
        assert name in names
    assert f"torch {torch.__version__}" in lines[0]
    assert all(check["advice"] for check in found if check["state"] != "ok")


def test_a_problem_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "checks", lambda: iter([Check("device", "problem", "none", "Get one.")]))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines() == ["PROBLEM  device          none", f"{'':<23}  -> Get one."]


def test_a_build_without_cuda_beside_a_driver_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.device_check().state == "note"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert doctor.device_check().state == "problem"


def test_any_gpu_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "best_device", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (2**33, 2**34))
    found = doctor.device_check()
    assert (found.state, found.found) == ("note", "1 x mps, 16 GiB")


def test_small_shared_memory_and_many_threads_come_with_the_option_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "default_workers", lambda: 4)
    monkeypatch.setattr(doctor, "free_memory", lambda: {"memory": 2**34, "/dev/shm": 64 * 2**20})
    *_, shared = doctor.memory_checks()
    assert (shared.state, shared.found) == ("note", "0.1 GiB in /dev/shm")
    assert "--shm-size=105m" in shared.advice
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert doctor.cores_check().advice.startswith("Set OMP_NUM_THREADS=4")


def test_extras_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = [
        "torch>=2.11",
        "datasets>=4; extra == 'data'",
        'fsspec[http]; extra == "data"',
        "no-such-package ; extra == 'other'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: requirements)
    assert doctor.extras() == {"data": ["datasets", "fsspec"], "other": ["no-such-package"]}
    *_, other = doctor.extras_checks()
    assert (other.state, other.found) == ("note", "no-such-package not installed")
    assert other.advice == "If you need it: pip install 'ijepa-enhanced[other]'"


def test_a_leak_between_the_views_of_a_pack_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(self: doctor.Encoder, images: list[object], precision: str) -> torch.Tensor:
        return torch.full((len(images), 4), float(len(images)))

    monkeypatch.setattr(doctor.Encoder, "embed", leaking)
    found = doctor.smoke_check()
    assert (found.state, found.found) == ("problem", "features differ by 2")
