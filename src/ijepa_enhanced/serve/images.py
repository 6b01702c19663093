"""Images in the text of a request: data URIs and base64. What names an image elsewhere is refused."""

from __future__ import annotations

import base64
import binascii
import re

from ijepa_enhanced.serve.refusal import Refusal

_HEAD = re.compile(r"data:image/[a-zA-Z0-9.+-]+;base64")
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")
HEAD_LENGTH = 100
"""Characters in which the comma of a data URI must come. Media types of images are shorter."""
SHOWN = 40
"""Most characters of a wrong input that a message repeats."""


def from_data_uri(text: str, param: str) -> bytes:
    """Return the file in `data:image/TYPE;base64,DATA`. Its bytes tell which format it is, not TYPE.

    Args:
        text: what the request has.
        param: where, for messages.

    Raises:
        Refusal: it is not a data URI of an image, or not valid base64.
    """
    head, comma, _ = text[:HEAD_LENGTH].partition(",")
    if comma and _HEAD.fullmatch(head):
        return from_base64(text[len(head) + 1 :], param)
    shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    if text[:5].lower() == "data:":
        problem = f"must start with 'data:image/TYPE;base64,', not '{shown}'"
    elif _SCHEME.match(text):
        problem = f"is a URL, '{shown}', which the service does not fetch. Send the image itself, as a data URI"
    else:
        problem = f"must be an image as a data URI ('data:image/jpeg;base64,...'), not '{shown}'"
    raise Refusal(400, f"{param} {problem}.", param, "invalid_image_url")


def from_base64_or_data_uri(text: str, param: str) -> bytes:
    """Return the file in a data URI or in plain base64; arguments and errors as for `from_data_uri`."""
    if _SCHEME.match(text[:HEAD_LENGTH]):
        return from_data_uri(text, param)
    return from_base64(text, param)


def from_base64(text: str, param: str) -> bytes:
    """Return what base64 stands for; arguments and errors as for `from_data_uri`."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters beyond ASCII
        raise Refusal(400, f"{param} is not valid base64: {error}.", param, "invalid_base64") from error
