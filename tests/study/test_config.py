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


SEEDS = "seeds must be a non-empty list of integers of at least 0"
WRONG = {
    "a misspelt key": ("arms: {a: ''}\nval: x\nseed: [1]", "unknown key 'seed'. Did you mean 'seeds'?"),
    "no arms": (
        "val: x",
        "`arms` is missing or is not a mapping of names to flags of `ijepa train`. Required keys: arms, val. "
        "Optional keys: common, train, resolution, seeds, seconds.",
    ),
    "no val": ("arms: {a: ''}", "`val` is missing. Set it to the labeled images to score encoders on."),
    "a seed that is text": (
        "arms: {a: ''}\nval: x\nseeds: [a]",
        f"{SEEDS}, not ['a'].",
    ),
    "a seed below 0": ("arms: {a: ''}\nval: x\nseeds: [-1]", f"{SEEDS}, not [-1]."),
    "a resolution that is text": (
        "arms: {a: ''}\nval: x\nresolution: wide",
        "resolution must be an integer, native or null, not 'wide'.",
    ),
    "a resolution of 0": ("arms: {a: ''}\nval: x\nresolution: 0", "resolution must be above 0, not 0."),
    "no time at all": ("arms: {a: ''}\nval: x\nseconds: -1.5", "seconds must be above 0, not -1.5."),
    "an empty val": ("arms: {a: ''}\nval:", "val must be a string, not null."),
    "an arm that cannot be a folder": (
        "arms: {../a: ''}\nval: x",
        "invalid arm name '../a'. Names become folder names, which cannot contain '/' or start with '.'.",
    ),
    "flags without a closing quote": (
        'arms: {a: "--x \'y"}\ncommon: --steps 3\nval: x',
        "the flags of arm 'a' cannot be parsed (No closing quotation): --steps 3 --x 'y",
    ),
    "a study that is text": (
        "arms: {a: ''}\nval: 3",
        "val must be a string, not 3.",
    ),
    "broken YAML": ("arms: {a", "is not valid YAML: expected ',' or '}', but got '<stream end>' (line 1, column 9)."),
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
