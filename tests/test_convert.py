"""`ijepa convert`: what it writes and says, and what it refuses, word for word."""

import contextlib
import io
import json
import os
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ijepa_enhanced.cli import main
from ijepa_enhanced.encoder import Encoder
from released import IJEPA, LAYOUTS, ijepa_checkpoint, network_of, write


def ijepa(*arguments: str) -> tuple[int, list[str], list[str]]:
    """Exit code, lines of stdout, lines of stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue().splitlines(), err.getvalue().splitlines()


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def released(folder: str = "dino", layout: str = "dinov2", **change: Any) -> Path:
    config, writer = LAYOUTS[layout]
    state, description = writer(network_of(config))
    return write(Path(folder), state, description | change)


def test_a_folder_of_ours_and_a_table_of_facts() -> None:
    (released() / "README.md").write_text("---\nlicense: mit\n---\n")
    code, out, err = ijepa("convert", "dino", "ours", "--json")
    assert (code, err) == (0, [])
    assert out[:-1] == [
        "weights                 dino (transformers dinov2)",
        "license                 mit",
        "parameters              0.0 million",
        "width, depth, heads     48, 2, 2",
        "patch size              8 px",
        "positions               table, bicubic",
        "class token, registers  1, 0",
        "trained resolution      40 px",
        "pooling                 cls",
    ]
    values = json.loads(out[-1])
    assert values["architecture"]["layer_scale"] is True
    assert values["preprocessing"]["pooling"] == "cls"
    assert values["origin"] == {"name": "dino", "layout": "transformers dinov2", "license": "mit", "encoder": None}
    assert values["out"] == "ours"
    images = [np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)]
    expected = Encoder.from_pretrained("dino").embed(images)
    assert torch.equal(Encoder.from_pretrained("ours").embed(images), expected)


@pytest.mark.parametrize("encoder", ["target", "context"])
def test_either_encoder_of_ijepa(encoder: str) -> None:
    networks = {"target": network_of(IJEPA, 0), "context": network_of(IJEPA, 1)}
    torch.save(ijepa_checkpoint(**networks), "IN1K.pth.tar")
    code, out, _ = ijepa("convert", "IN1K.pth.tar", "ours", "--encoder", encoder)
    assert code == 0
    assert [line.split("  ")[-1].strip() for line in out[:3]] == ["IN1K.pth.tar (I-JEPA)", encoder, "cc-by-nc-4.0"]
    loaded = Encoder.from_pretrained("ours").network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in networks[encoder].state_dict().items())


class Malice:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def pickle_with_code() -> None:
    torch.save({"target_encoder": {"weight": torch.zeros(1)}, "args": Malice()}, "evil.pth")


def old_pickle_with_code() -> None:
    Path("evil.pth").write_bytes(pickle.dumps(Malice(), protocol=2))


def bare_pickle_with_code() -> None:
    Path("evil.pth").write_bytes(pickle.dumps(Malice(), protocol=4))


def cut(name: str) -> Callable[[], None]:
    def prepare() -> None:
        released()
        torch.save(ijepa_checkpoint(network_of(IJEPA), network_of(IJEPA)), "IN1K.pth")
        Path(name).write_bytes(Path(name).read_bytes()[:-1000])

    return prepare


def only_config() -> None:
    (released() / "model.safetensors").unlink()


def other_config(values: dict[str, Any]) -> None:
    Path("other").mkdir()
    Path("other/config.json").write_text(json.dumps(values))
    Path("other/model.safetensors").write_bytes(b"")


def old_run() -> None:
    encoder = Path("run/encoder")
    encoder.mkdir(parents=True)
    architecture = {"variant": "Ti", "patch_size": 8, "depth": 4}
    (encoder / "config.json").write_text(json.dumps({"format": 2, "architecture": architecture}))
    (encoder / "model.safetensors").write_bytes(b"")


def words(name: str) -> Callable[[], None]:
    def prepare() -> None:
        Path(name).write_text("no weights")

    return prepare


def ours_with(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[], None]:
    def prepare() -> None:
        from safetensors.torch import load_file, save_file

        Encoder.from_pretrained(released()).save_pretrained("saved")
        state = load_file("saved/model.safetensors")
        change(state)
        save_file(state, "saved/model.safetensors")

    return prepare


REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "a pickle with code in it": (
        pickle_with_code,
        "evil.pth new",
        "evil.pth holds Python objects besides tensors, which could run any code when loaded, so it is not loaded. "
        "Save the tensors alone, for example as safetensors.",
    ),
    "an old pickle with code in it": (
        old_pickle_with_code,
        "evil.pth new",
        "evil.pth holds Python objects besides tensors, which could run any code when loaded, so it is not loaded. "
        "Save the tensors alone, for example as safetensors.",
    ),
    "a pickle of a newer protocol with code in it": (
        bare_pickle_with_code,
        "evil.pth new",
        "evil.pth is damaged or no file of weights.",
    ),
    "another model of transformers": (
        lambda: released("bert", model_type="bert"),
        "bert new",
        "bert cannot be loaded: model_type is 'bert' in config.json, but only ijepa, vit, dinov2, "
        "dinov2_with_registers, dinov3_vit can be loaded.",
    ),
    "another model of timm": (
        lambda: released("resnet", "timm vit", architecture="resnet18"),
        "resnet new",
        "resnet cannot be loaded: The architecture resnet18 of timm cannot be loaded. Those that start with vit, deit "
        "or naflexvit can, except clip, siglip, beit3, rpn, rope, dinov3.",
    ),
    "truncated safetensors": (
        cut("dino/model.safetensors"),
        "dino new",
        "dino/model.safetensors is damaged or no file of weights: Error while deserializing header: incomplete "
        "metadata, file not fully covered",
    ),
    "a truncated checkpoint": (cut("IN1K.pth"), "IN1K.pth new", "IN1K.pth is damaged or no file of weights: "),
    "a file of words": (words("a.pth"), "a.pth new", "a.pth is damaged or no file of weights."),
    "a file of another kind": (
        words("a.onnx"),
        "a.onnx new",
        "a.onnx is no file of weights: these end in .safetensors, .pth, .pt, .bin, .tar.",
    ),
    "a configuration without weights": (
        only_config,
        "dino new",
        "dino contains no weights: it needs model.safetensors, model.safetensors.index.json or pytorch_model.bin.",
    ),
    "a run of an older version": (
        old_run,
        "run new",
        "run/encoder was saved by an older version of ijepa-enhanced. Train the encoder again, or rewrite config.json "
        "as docs/decisions.md describes.",
    ),
    "an index that lists no files": (
        lambda: only_config() or Path("dino/model.safetensors.index.json").write_text('{"weight_map": []}'),
        "dino new",
        "dino/model.safetensors.index.json is damaged or no file of weights: ",
    ),
    "a folder of another library": (
        lambda: other_config({"_class_name": "UNet2DModel"}),
        "other new",
        "other contains no encoder that can be loaded: its config.json is not of transformers or timm, and not of this "
        "version of ijepa-enhanced or an older one (its format is None, not 3).",
    ),
    "a folder of a newer version": (
        lambda: other_config({"format": 4}),
        "other new",
        "other contains no encoder that can be loaded: its config.json is not of transformers or timm, and not of this "
        "version of ijepa-enhanced or an older one (its format is 4, not 3).",
    ),
    "a folder with weights of something else": (
        lambda: other_config({}) or Path("other/config.json").unlink() or released(),
        "dino other",
        "other already contains an encoder. Give another folder as OUT.",
    ),
    "a folder that is not there": (lambda: None, "a/b/c new", "No such file or folder: a/b/c."),
    "a folder in one that is there": (
        lambda: Path("runs").mkdir(),
        "runs/pets new",
        "No such file or folder: runs/pets.",
    ),
    "a folder with weights": (
        lambda: Encoder.from_pretrained(released()).save_pretrained("ours"),
        "dino ours",
        "ours already contains an encoder. Give another folder as OUT.",
    ),
    "the context encoder of other weights": (
        released,
        "dino new --encoder context",
        "dino cannot be loaded: Only checkpoints of I-JEPA's own code have a context encoder.",
    ),
    "a weight too many": (
        ours_with(lambda state: state.update(extra=torch.zeros(1))),
        "saved new",
        "The encoder in saved cannot be loaded: The weights do not fit: unknown: extra.",
    ),
    "a weight too few": (
        ours_with(lambda state: state.pop("prefix")),
        "saved new",
        "The encoder in saved cannot be loaded: The weights do not fit: missing: prefix.",
    ),
}


@pytest.mark.parametrize(("prepare", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_imported_is_refused(prepare: Callable[[], Any], arguments: str, message: str) -> None:
    prepare()
    code, out, err = ijepa("convert", *arguments.split())
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith(f"ijepa: {message}")
    assert len(re.findall(r"\.(?: |$)", err[0])) <= 3
    assert not Path("new").exists()
    assert not Path("executed").exists()


def test_weights_that_are_not_finite_are_refused() -> None:
    config, writer = LAYOUTS["vit"]
    state, description = writer(network_of(config))
    state["layernorm.weight"][3] = torch.nan
    write(Path("vit"), state, description)
    code, _, err = ijepa("convert", "vit", "new")
    assert code == 1
    assert err[0].startswith("ijepa: The weights blocks.norm.weight in vit contain NaN or infinite values")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_a_hub_id_without_a_network_says_so_at_once(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path("cache").absolute()))
    start = time.monotonic()
    assert ijepa("convert", "facebook/dinov2-small", "new") == (
        2,
        [],
        [
            "ijepa: There is no folder facebook/dinov2-small, and the Hugging Face Hub cannot be reached to download a "
            "model of this name. Download its files where there is a network, and give the folder that holds them."
        ],
    )
    assert time.monotonic() - start < 30  # not a speed: it hung for minutes if it tried again and again
