"""What pyproject.toml and CITATION.cff say about the package agrees."""

import tomllib
from pathlib import Path

import yaml

import ijepa_enhanced

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_developers_have_every_extra() -> None:
    extras = ",".join(PROJECT["project"]["optional-dependencies"])
    assert f"ijepa-enhanced[{extras}]" in PROJECT["dependency-groups"]["dev"]


def test_the_citation_is_of_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == ijepa_enhanced.__version__


def test_the_files_of_github_are_yaml() -> None:
    files = sorted((ROOT / ".github").rglob("*.yml"))
    assert {"bug.yml", "idea.yml", "test.yml"} <= {path.name for path in files}
    assert all(yaml.safe_load(path.read_text())["name"] for path in files)
