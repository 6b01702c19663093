"""Recipes and configuration files: what is found, what is refused and in which words, what may change on resuming."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from ijepa_enhanced.commands.flags import parse
from ijepa_enhanced.commands.setup import train_config
from ijepa_enhanced.config import as_options, build, checked, find_config, keys_of, recipe_names
from ijepa_enhanced.errors import RequestError, did_you_mean, unknown
from ijepa_enhanced.train.config import OptimConfig, TrainConfig
from ijepa_enhanced.train.saved import (
    FREE_ON_RESUME,
    check_resumable,
    config_of_run,
    flatten,
    load_config,
    read_train_config,
)


def refused(file: Path) -> str:
    with pytest.raises(RequestError, match=r".") as error:
        read_train_config(find_config(str(file)))
    return str(error.value)


def test_a_file_sets_values_by_their_dotted_names(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "run: runs/mine\nsteps: 3\nepochs: 2\noptim:\n  lr: 1e-3\ndata: {source: photos, min_resolution: null}\n"
    )
    assert find_config(str(file)) == file
    found = read_train_config(file)
    assert found == {
        "run": "runs/mine",
        "steps": 3,
        "epochs": 2.0,
        "optim.lr": 0.001,  # text to YAML 1.1, which asks for a dot in 1.0e-3
        "data.source": "photos",
        "data.min_resolution": None,
    }
    assert type(found["epochs"]) is float


def test_all_keys_are_known(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(TrainConfig())))
    assert read_train_config(file) == flatten(dataclasses.asdict(TrainConfig()))
    assert build(TrainConfig, read_train_config(file)) == TrainConfig()


def test_every_key_has_a_type_a_default_and_help() -> None:
    keys = keys_of(TrainConfig)
    assert list(keys) == list(flatten(dataclasses.asdict(TrainConfig())))
    assert (keys["optim.lr"].kind, keys["optim.lr"].default, keys["optim.lr"].group) == (float, 1e-3, OptimConfig)
    assert keys["optim.lr"].help.startswith("Peak learning rate")
    # Over several lines in the source.
    assert "\n" not in keys["encoder.max_grid"].help
    assert keys["encoder.max_grid"].help.endswith("of a training view, in patches.")
    assert all(key.help for key in keys.values())


def test_values_that_are_set_replace_defaults() -> None:
    config = build(TrainConfig, {"steps": 7, "optim.lr": 0.5})
    assert config == TrainConfig(steps=7, optim=OptimConfig(lr=0.5))


@pytest.mark.parametrize("values", [{"optim.lr": -1.0}, {"steps": 0}])
def test_a_value_out_of_range_is_a_bad_request(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"(optim.lr must be above 0, not -1.0|steps must be at least 1, not 0)\."):
        build(TrainConfig, values)


@pytest.mark.parametrize(
    ("kind", "given", "value"),
    [
        (int, "3", 3),
        (int, -3, -3),
        (float, "1e-3", 0.001),
        (float, 2, 2.0),
        (bool, "true", True),
        (bool, False, False),
        (str, "3", "3"),
        (str, "null", "null"),
        (int | None, "null", None),
        (int | None, None, None),
        (int | Literal["native"], "native", "native"),
        (int | Literal["native"], "64", 64),
        (Literal["auto", "bf16"], "bf16", "bf16"),
    ],
)
def test_a_value_gets_its_type(kind: Any, given: Any, value: Any) -> None:
    found = checked("it", kind, given)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (int, "2.5", "an integer, not '2.5'"),
        (int, 2.0, "an integer, not 2.0"),
        (int, True, "an integer, not true"),
        (int, None, "an integer, not null"),
        (int, [1, 2], "an integer, not [1, 2]"),
        (int | None, "x", "an integer or null, not 'x'"),
        (float, "fast", "a number, not 'fast'"),
        (float, True, "a number, not true"),
        (bool, "maybe", "true or false, not 'maybe'"),
        (bool, 1, "true or false, not 1"),
        (str, 3, "a string, not 3"),
        (int | Literal["native"], "big", "an integer or native, not 'big'"),
        (Literal["auto", "bf16", "fp32"], "fp16", "auto, bf16 or fp32, not 'fp16'"),
    ],
)
def test_a_value_of_another_type_is_refused(kind: Any, given: Any, words: str) -> None:
    with pytest.raises(RequestError, match=r".") as error:
        checked("it", kind, given)
    assert str(error.value) == f"it must be {words}."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim:\n  lrr: 1\n", "unknown key 'optim.lrr'. Did you mean 'optim.lr'?"),
        ("lr: 1\n", "unknown key 'lr'. Did you mean 'optim.lr'?"),
        ("optim.lr: 1\nstep: 1\n", "unknown key 'step'. Did you mean 'steps'?"),
        ("zzzzz: 1\n", "unknown key 'zzzzz'."),
        ("optim: {lr: fast}\n", "optim.lr must be a number, not 'fast'."),
        ("seed:\n", "seed must be an integer, not null."),
    ],
)
def test_a_key_or_a_value_that_is_wrong_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    assert refused(file) == f"{file}: {message}"


@pytest.mark.parametrize("content", ["", "- 1\n", "just text\n"])
def test_a_file_without_keys_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    example = "such as the output of `ijepa train --print-config`"
    assert refused(file) == f"{file} must be a YAML mapping of keys to values, {example}."


def test_what_is_not_yaml_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("seed: 1\noptim: [1")
    problem = "expected ',' or ']', but got '<stream end>'"
    assert refused(file) == f"{file} is not valid YAML: {problem} (line 2, column 10)."
    file.write_bytes(b"\xff\xfe\x00")
    assert refused(file).startswith(f"{file} is not valid YAML: ")


def test_a_name_that_is_no_recipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(Path("qqqqqqqqqq")).startswith("No file or recipe 'qqqqqqqqqq'.")


@pytest.mark.parametrize(
    ("name", "known", "words"),
    [
        ("continu", ["continue", "pets"], " Did you mean 'continue'?"),
        ("optim.lrr", ["optim.lr", "optim.clip"], " Did you mean 'optim.lr'?"),
        # Right name, wrong group: the last part decides.
        ("data.patch_size", ["encoder.patch_size", "seed"], " Did you mean 'encoder.patch_size'?"),
        ("zzz", ["pets", "continue"], " Available: pets, continue."),
        ("zzz", [f"key{number}" for number in range(13)], ""),
        ("zzz", [], ""),
    ],
)
def test_the_nearest_name_is_suggested(name: str, known: list[str], words: str) -> None:
    assert did_you_mean(name, known) == words


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("--optim", "", "'--optim' is a group of options. Set one of them, such as '--optim.lr'."),
        ("--optim.lrr", "", "Unknown option '--optim.lrr'. Did you mean '--optim.lr'?"),
        ("--optim.lrr", "a.yaml", "a.yaml: unknown option '--optim.lrr'. Did you mean '--optim.lr'?"),
    ],
)
def test_an_unknown_name_is_told_from_a_group(name: str, file: str, message: str) -> None:
    assert unknown("option", name, ["--optim.lr", "--optim.clip"], file) == message


def test_keys_in_a_message_become_options() -> None:
    message = "data.a (3) must be below data.b. Lower it, or data.ab, in 2 steps."
    assert as_options(message, ["data.a", "data.b"]) == (
        "--data.a (3) must be below --data.b. Lower it, or data.ab, in 2 steps."
    )


def test_flattening_joins_the_names_by_dots() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": [2]}) == {"a.b.c": 1, "a.d": None, "e": [2]}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid(name: str) -> None:
    _, options = parse(["train", "--config", name])
    config, _ = train_config(options)
    assert isinstance(config, TrainConfig)
    values = read_train_config(find_config(name))
    assert values, "a recipe sets something"
    assert {key: flatten(dataclasses.asdict(config))[key] for key in values} == values


def test_the_configuration_of_a_run_is_what_was_saved(tmp_path: Path) -> None:
    config = TrainConfig(steps=7, compile=True)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, min_resolution=None, max_resolution=None)
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    assert load_config(tmp_path) == config
    assert config_of_run(tmp_path) == tmp_path / "config.yaml"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r".") as error:
        load_config(tmp_path)
    assert str(error.value) == f"{tmp_path} is not a run folder: it contains no config.yaml."


CHANGES: list[tuple[dict[str, Any], str, str, str]] = [
    ({"steps": 9}, "steps", "7", "9"),
    ({"encoder.depth": 3}, "encoder.depth", "null", "3"),
    ({"data.min_resolution": 96}, "data.min_resolution", "112", "96"),
    ({"merging.teacher_rate": 0.1}, "merging.teacher_rate", "0.0", "0.1"),
    ({"data.workers": 3, "optim.lr": 0.5}, "optim.lr", "0.001", "0.5"),
]


def changed(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        if group:
            part = dataclasses.replace(getattr(config, group), **{name: value})
            config = dataclasses.replace(config, **{group: part})
        else:
            config = dataclasses.replace(config, **{name: value})
    return config


@pytest.mark.parametrize(("values", "key", "before", "after"), CHANGES)
def test_resuming_refuses_what_would_change_the_run(values: dict[str, Any], key: str, before: str, after: str) -> None:
    saved = TrainConfig(steps=7)
    with pytest.raises(RequestError, match=r".") as error:
        check_resumable(saved, changed(saved, values), Path("runs/a"))
    started = f"runs/a was started with {key} = {before} and cannot continue with {after}."
    more = " from its weights: --init runs/a --run NEW" if key == "steps" else ""
    assert str(error.value) == f"{started} Remove --{key}, or start a new run{more}."


def test_resuming_allows_what_does_not_touch_the_result() -> None:
    values: dict[str, Any] = {
        "data.source": "/elsewhere",
        "data.max_unreadable": 0.5,
        "data.workers": 7,
        "data.cache": "memory",
        "compile": True,
        "activation_checkpointing": True,
        "parallel": "fsdp",
        "checkpoint_every": 3,
        "log_every": 4,
    }
    # Together with CHANGES, the whole list: a key added to it must be thought about here.
    assert set(FREE_ON_RESUME) == set(values)
    saved = TrainConfig()
    for name, value in values.items():
        check_resumable(saved, changed(saved, {name: value}), Path("runs/a"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0."),
        (
            {"compile": True, "parallel": "fsdp"},
            "compile cannot be combined with parallel = fsdp. Set compile to false, or parallel to ddp.",
        ),
        ({"epochs": 0.0}, "epochs must be above 0, not 0.0."),
        ({"epochs": float("nan")}, "epochs must be above 0, not nan."),
        ({"epochs": float("inf")}, "epochs must be finite, not inf."),
        ({"seed": -1}, "seed must be at least 0 and below 2**63, not -1."),
        ({"log_every": 0}, "log_every must be at least 1, not 0."),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, not 0."),
    ],
)
def test_a_value_out_of_range_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        TrainConfig(**values)
    assert str(error.value) == message
