"""Sharing an encoder: `push_to_hub` and loading by id, against a Hub in this process."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from hub_server import READER, WRITER, Hub, running
from ijepa_enhanced.cli import main
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import EncoderError, RequestError
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.preprocessing import Origin, Preprocessing
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.start import load_start

# huggingface_hub uploads large files with an argument that its HTTP client deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

IMAGES = [np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)]


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub, with an empty cache, and a token that may write to the models of `me`."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with running() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        yield server


def tiny(origin: Origin | None = None, seed: int = 0) -> Encoder:
    encoder = Encoder.random(EncoderConfig("Ti", 8, 1, max_grid=8).architecture, Preprocessing(48), seed)
    encoder.origin = origin
    return encoder


def test_an_encoder_comes_back_from_the_hub_as_it_went_there(hub: Hub) -> None:
    encoder = tiny(Origin("facebook/dinov2-small", "transformers dinov2", "apache-2.0"))
    url = encoder.push_to_hub("me/pets")
    assert re.fullmatch(rf"{hub.endpoint}/me/pets/commit/\w{{40}}", url)
    assert sorted(hub.head("me/pets")) == ["README.md", "config.json", "model.safetensors"]
    assert not hub.invalid_cards
    assert hub.private == set()
    loaded = Encoder.from_pretrained("me/pets")
    assert torch.equal(loaded.embed(IMAGES), encoder.embed(IMAGES))
    assert (loaded.config, loaded.preprocessing, loaded.origin) == (
        encoder.config,
        encoder.preprocessing,
        encoder.origin,
    )
    # Without a network, from the cache.
    hub.shutdown()
    hub.server_close()
    assert torch.equal(Encoder.from_pretrained("me/pets").embed(IMAGES), encoder.embed(IMAGES))


def test_a_private_repository_under_your_own_name(hub: Hub) -> None:
    tiny().push_to_hub("pets", private=True)
    assert hub.private == {"me/pets"}
    assert 'Encoder.from_pretrained("me/pets")' in hub.head("me/pets")["README.md"].decode()


def test_what_is_trained_from_a_model_on_the_hub_names_it(hub: Hub) -> None:
    hub.commit("me/pets")
    tiny().push_to_hub("me/pets")
    config = TrainConfig(init="me/pets")
    assert load_start(config, Path("run"), resume=False).origin == Origin("me/pets", "ijepa-enhanced")
    licensed = hub.head("me/pets")["README.md"].replace(b"---\n", b"---\nlicense: mit\n", 1)
    hub.commit("me/pets", README__md=licensed)
    assert load_start(config, Path("run"), resume=False).origin == Origin("me/pets", "ijepa-enhanced", "mit")
    Encoder.from_pretrained("me/pets").save_pretrained("copy")
    config = TrainConfig(init="copy")
    assert load_start(config, Path("run"), resume=False).origin == Origin("copy", "ijepa-enhanced", "mit")


def test_a_revision_is_a_commit_of_its_own(hub: Hub) -> None:
    first = tiny(seed=0).push_to_hub("me/pets").rpartition("/")[2]
    tiny(seed=1).push_to_hub("me/pets")
    for name, seed in ((f"me/pets@{first}", 0), ("me/pets", 1)):
        assert torch.equal(Encoder.from_pretrained(name).embed(IMAGES), tiny(seed=seed).embed(IMAGES))


def test_an_edited_card_on_the_hub_is_kept_and_another_one_is_not(hub: Hub) -> None:
    tiny().push_to_hub("me/pets")
    tiny(Origin("a", "b", "mit")).push_to_hub("me/pets")
    assert b"license: mit" in hub.head("me/pets")["README.md"]
    assert sorted(hub.head("me/pets")) == ["README.md", "config.json", "model.safetensors"]
    words = b"---\nlicense: cc-by-4.0\n---\nCats and dogs.\n"
    hub.commit("me/pets", README__md=words)
    tiny(seed=1).push_to_hub("me/pets")
    assert hub.head("me/pets")["README.md"] == words
    # It comes along with the encoder, and what is changed in it goes back.
    loaded = Encoder.from_pretrained("me/pets")
    assert torch.equal(loaded.embed(IMAGES), tiny(seed=1).embed(IMAGES))
    loaded.save_pretrained("copy")
    assert Path("copy/README.md").read_bytes() == words
    Path("copy/README.md").write_bytes(words + b"More dogs.\n")
    Encoder.from_pretrained("copy").push_to_hub("me/pets")
    assert hub.head("me/pets")["README.md"] == words + b"More dogs.\n"


def test_a_card_that_cannot_be_read_is_not_overwritten(hub: Hub) -> None:
    """Without the card, nobody knows whether it was edited."""
    tiny().push_to_hub("me/pets")
    words = b"---\nlicense: cc-by-4.0\n---\nCats and dogs.\n"
    hub.commit("me/pets", README__md=words)
    hub.closed["me/pets"] = "Forbidden"
    with pytest.raises(RequestError, match="Your token may not write to me/pets"):
        tiny(seed=1).push_to_hub("me/pets")
    assert hub.head("me/pets")["README.md"] == words


def test_a_download_that_breaks_off_says_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny().push_to_hub("me/pets")
    hub.breaks = True
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between its attempts
    with pytest.raises(EncoderError, match=r"^me/pets cannot be downloaded from the Hugging Face Hub: .*closed.*\.$"):
        Encoder.from_pretrained("me/pets")


def test_only_safetensors_are_downloaded(hub: Hub) -> None:
    hub.commit("me/old", config__json=b'{"model_type": "vit"}', pytorch_model__bin=b"")
    with pytest.raises(EncoderError, match=r"^No safetensors file of me/old was found on the Hugging Face Hub, and we"):
        Encoder.from_pretrained("me/old")
    assert not any("pytorch_model" in request for request in hub.seen)


def offline(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


PUSHES: dict[str, tuple[Callable[[Hub, pytest.MonkeyPatch], None], str, str]] = {
    "no network": (
        offline,
        "me/pets",
        "The Hugging Face Hub cannot be reached, so me/pets was not uploaded. Save the encoder with `save_pretrained`, "
        "and upload its folder later with `hf upload`.",
    ),
    "not logged in": (
        lambda hub, patch: patch.delenv("HF_TOKEN"),
        "me/pets",
        "You are not logged in to the Hugging Face Hub, so me/pets cannot be uploaded. Run `hf auth login`, or set "
        "HF_TOKEN to a token with write access.",
    ),
    "a token that may only read": (
        lambda hub, patch: patch.setenv("HF_TOKEN", READER),
        "me/pets",
        "Your token may not write to me/pets. Use a token with write access to it, or a name of your own.",
    ),
    "the model of another": (
        lambda hub, patch: hub.commit("you/pets") and None,
        "you/pets",
        "Your token may not write to you/pets. Use a token with write access to it, or a name of your own.",
    ),
    "not an id": (lambda hub, patch: None, "runs/my pets", "runs/my pets cannot be uploaded: "),
}


@pytest.mark.parametrize(("prepare", "name", "message"), PUSHES.values(), ids=PUSHES)
def test_what_cannot_be_uploaded_says_so_in_a_sentence(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[Hub, pytest.MonkeyPatch], None],
    name: str,
    message: str,
) -> None:
    prepare(hub, monkeypatch)
    with pytest.raises(RequestError) as error:
        tiny().push_to_hub(name)
    assert str(error.value).startswith(message)
    assert len(re.findall(r"\.(?: |$)", str(error.value))) <= 2
    assert not any(request.startswith("PUT") for request in hub.seen)


def test_an_upload_that_breaks_off_says_so_and_changes_nothing(hub: Hub) -> None:
    tiny().push_to_hub("me/pets")
    before = hub.head("me/pets")
    hub.full = True
    with pytest.raises(RequestError, match=r"^me/pets cannot be uploaded: Client error '413 .*'\.$"):
        tiny(seed=1).push_to_hub("me/pets")
    assert hub.head("me/pets") == before


def hidden(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.private.add("me/pets")
    patch.delenv("HF_TOKEN")


LOADS: dict[str, tuple[Callable[[Hub, pytest.MonkeyPatch], None], str, str]] = {
    "no such model": (
        lambda hub, patch: None,
        "me/nothing",
        "There is no folder me/nothing, and no model of this name on the Hugging Face Hub that you may read. If it is "
        "private, log in with `hf auth login`.",
    ),
    "a private model": (
        hidden,
        "me/pets",
        "There is no folder me/pets, and no model of this name on the Hugging Face Hub that you may read. If it is "
        "private, log in with `hf auth login`.",
    ),
    "a token for other models": (
        lambda hub, patch: hub.closed.update({"me/pets": "Forbidden"}),
        "me/pets",
        "me/pets cannot be downloaded from the Hugging Face Hub: 403 Forbidden: Forbidden.",
    ),
    "a gated model": (
        lambda hub, patch: hub.closed.update({"me/pets": "GatedRepo"}),
        "me/pets",
        "You may not download me/pets yet. Accept its license at https://huggingface.co/me/pets and log in with `hf "
        "auth login`.",
    ),
    "no such revision": (
        lambda hub, patch: None,
        "me/pets@v2",
        "The model me/pets on the Hugging Face Hub has no revision 'v2'.",
    ),
}


@pytest.mark.parametrize(("prepare", "name", "message"), LOADS.values(), ids=LOADS)
def test_what_cannot_be_downloaded_says_so_in_a_sentence(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    prepare: Callable[[Hub, pytest.MonkeyPatch], None],
    name: str,
    message: str,
) -> None:
    tiny().push_to_hub("me/pets")
    prepare(hub, monkeypatch)
    with pytest.raises(EncoderError) as error:
        Encoder.from_pretrained(name)
    assert str(error.value) == message
    capsys.readouterr()  # the progress bar of the upload
    assert main(["convert", name, "new"]) == 2
    assert capsys.readouterr().err == f"ijepa: {message}\n"
