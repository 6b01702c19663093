"""A study file is read as it is written, and what is wrong with it is said."""

from pathlib import Path

import pytest

from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.study.config import StudyConfig, load_study


def test_a_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("arms: {a: , 2: --steps 3}\nval: x\nresolution: native\nseeds: [3, 1, 3]\nseconds: 1.5")
    arms = {"a": "", "2": "--steps 3"}
    assert load_study(path) == StudyConfig(arms, "x", resolution="native", seeds=(3, 1), seconds=1.5)
    path.write_text("arms: {a: ''}\nval: x\ntrain: null\nresolution: null\nseconds: null")
    assert load_study(path) == StudyConfig({"a": ""}, "x")
    assert load_study(path).resolution is None


WRONG = {
    "a misspelt key": ("arms: {a: ''}\nval: x\nseed: [1]", "unknown key 'seed'. Did you mean 'seeds'?"),
    "no arms": ("val: x", "must hold arms, val and may hold common, train, resolution, seeds, seconds."),
    "no val": ("arms: {a: ''}", "val is missing, the source that encoders are scored on."),
    "a seed that is text": (
        "arms: {a: ''}\nval: x\nseeds: [a]",
        "seeds must be a list of whole numbers from 0, not ['a'].",
    ),
    "a seed below 0": ("arms: {a: ''}\nval: x\nseeds: [-1]", "seeds must be a list of whole numbers from 0, not [-1]."),
    "a resolution that is text": ("arms: {a: ''}\nval: x\nresolution: wide", "resolution cannot be 'wide'."),
    "a resolution of 0": ("arms: {a: ''}\nval: x\nresolution: 0", "resolution must be above 0, not 0."),
    "no time at all": ("arms: {a: ''}\nval: x\nseconds: -1.5", "seconds must be above 0, not -1.5."),
    "an empty val": ("arms: {a: ''}\nval:", "val cannot be None."),
    "an arm that cannot be a folder": (
        "arms: {../a: ''}\nval: x",
        "an arm cannot be named '../a', because its runs are folders of that name: "
        "leave out '/', and '.' at the beginning.",
    ),
    "broken YAML": ("arms: {a", "is not valid YAML: while parsing a flow mapping"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str) -> None:
    content, message = WRONG[name]
    path = tmp_path / "study.yaml"
    path.write_text(content)
    with pytest.raises(RequestError) as error:
        load_study(path)
    assert str(error.value).startswith(str(path))
    assert str(error.value).endswith(message)
