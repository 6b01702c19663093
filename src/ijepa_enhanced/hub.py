"""The Hugging Face Hub: models down and up, with errors in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ijepa_enhanced.errors import EncoderError, RequestError, first_sentence

DOWNLOADED = ["config.json", "*.safetensors", "*.safetensors.index.json", "preprocessor_config.json", "README.md"]
"""What is downloaded; README.md has the license."""
TIMEOUT = 5.0
"""Seconds to wait for the Hub's first answer."""


def download(name: str) -> Path:
    """Return the folder with the files of a model on the Hub, downloading those that are not cached.

    Args:
        name: its id, perhaps with a revision: `NAME/MODEL@REVISION`.

    Raises:
        EncoderError: it cannot be downloaded, or has no weights in safetensors files.
    """
    from huggingface_hub import errors, snapshot_download

    model, _, revision = name.partition("@")
    try:
        found = snapshot_download(model, revision=revision or None, allow_patterns=DOWNLOADED, etag_timeout=TIMEOUT)
    except errors.GatedRepoError as error:
        reason = (
            f"You may not download {model} yet. Accept its license at https://huggingface.co/{model} and log in with "
            "`hf auth login`."
        )
        raise EncoderError(reason) from error
    except errors.RepositoryNotFoundError as error:
        reason = (
            f"There is no folder {name}, and no model of this name on the Hugging Face Hub that you may read. If it is "
            "private, log in with `hf auth login`."
        )
        raise EncoderError(reason) from error
    except errors.RevisionNotFoundError as error:
        raise EncoderError(f"The model {model} on the Hugging Face Hub has no revision '{revision}'.") from error
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:  # type: ignore[attr-defined]
        answer = error.__cause__ if isinstance(error.__cause__, errors.HfHubHTTPError) else error
        if isinstance(answer, errors.LocalEntryNotFoundError):  # the Hub has not answered
            reason = (
                f"There is no folder {name}, and the Hugging Face Hub cannot be reached to download a model of this "
                "name. Download its files where there is a network, and give the folder that holds them."
            )
            raise EncoderError(reason) from error
        reason = f"{name} cannot be downloaded from the Hugging Face Hub: {first_sentence(answer)}"
        raise EncoderError(reason) from error
    if not any(Path(found).glob("*.safetensors")):
        raise EncoderError(
            f"No safetensors file of {name} was found on the Hugging Face Hub, and weights in other formats are not "
            "downloaded from it."
        )
    return Path(found)


def create(name: str, private: bool | None) -> str:
    """Create the repository of a model on the Hub unless it exists, and return its id; see `Encoder.push_to_hub`."""
    from huggingface_hub import HfApi

    with explaining(name):
        return HfApi().create_repo(name, private=private, exist_ok=True).repo_id


def fetch_card(name: str, folder: Path) -> None:
    """Download the README.md of a model on the Hub into a folder, if it has one.

    Raises:
        RequestError: it cannot be downloaded.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RemoteEntryNotFoundError

    # Only an answer of the Hub says that there is no card. Without an answer, writing a card might replace an existing
    # one.
    with explaining(name), suppress(RemoteEntryNotFoundError):
        HfApi().hf_hub_download(name, "README.md", local_dir=folder)


def upload(folder: Path, name: str) -> str:
    """Upload the files of an encoder folder to a repository on the Hub, and return the URL of the commit.

    Raises:
        RequestError: they cannot be uploaded.
    """
    from huggingface_hub import HfApi

    with explaining(name):
        commit = HfApi().upload_folder(repo_id=name, folder_path=folder)
    return commit.commit_url


@contextmanager
def explaining(name: str) -> Iterator[None]:
    """Turn the errors of an upload to a repository into sentences.

    Raises:
        RequestError: there was one.
    """
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
    )

    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        # huggingface_hub wraps errors of downloads and of uploads of large files.
        wrapped = isinstance(error, (RuntimeError, LocalEntryNotFoundError))
        cause = error.__cause__ if wrapped and error.__cause__ else error
        answer = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if answer == 401:
            reason = (
                f"You are not logged in to the Hugging Face Hub, so {name} cannot be uploaded. Run `hf auth login`, or "
                "set HF_TOKEN to a token with write access."
            )
        elif answer == 403:
            reason = f"Your token may not write to {name}. Use a token with write access to it, or a name of your own."
        elif answer or not isinstance(cause, (HTTPError, ConnectionError)):
            reason = f"{name} cannot be uploaded: {first_sentence(cause)}"
        else:
            reason = (
                f"The Hugging Face Hub cannot be reached, so {name} was not uploaded. Save the encoder with "
                "`save_pretrained`, and upload its folder later with `hf upload`."
            )
        raise RequestError(reason) from error
