"""`ijepa serve`."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from pathlib import Path

from ijepa_enhanced.commands.options import ServeOptions
from ijepa_enhanced.commands.setup import print_json
from ijepa_enhanced.devices import best_device
from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.errors import RequestError

logger = logging.getLogger(__name__)

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names of this machine to itself."""
ANY = ("0.0.0.0", "::")
"""Not an address that a browser can open: the service listens on all addresses of this machine."""


def run(options: ServeOptions) -> int:
    """Serve an encoder until the process is told to end.

    Raises:
        UserError: the request is wrong, or the encoder or the gallery cannot be read.
    """
    try:
        from ijepa_enhanced.serve.app import Service, make_app
        from ijepa_enhanced.serve.engine import Engine
        from ijepa_enhanced.serve.gallery import Gallery
        from ijepa_enhanced.serve.guard import Access
        from ijepa_enhanced.serve.metrics import Metrics
        from ijepa_enhanced.serve.server import listen, serve
    except ModuleNotFoundError as error:
        raise RequestError(
            f"`ijepa serve` requires {error.name}. Install it with: pip install 'ijepa-enhanced[serve]'"
        ) from error
    token = read_token(options.token_file)
    with listen(options.host, options.port) as listening:  # before the weights are loaded, which takes long
        host, port = listening.getsockname()[:2]
        if host in ANY:
            host = socket.gethostname()
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        local = options.host in LOOPBACK
        if not local and token is None:
            logger.warning("Anybody who can reach %s can use the service. Use --token-file.", url)
        encoder = Encoder.from_pretrained(options.weights).to(best_device())
        gallery = None if options.gallery is None else Gallery(Path(options.gallery), encoder)
        metrics = Metrics()
        engine = Engine(encoder, options.limits(), metrics.count_pack)
        service = Service(engine, metrics, name_of(options.weights), gallery, created=int(time.time()))
        # A token keeps pages of other sites out, whatever they call this machine.
        access = Access(token, options.cors, frozenset(LOOPBACK) if local and token is None else None)

        def ready() -> None:
            print(url)
            print_json(options, {"url": url})
            sys.stdout.flush()  # a pipe would keep it

        serve(make_app(service, access), service, listening, ready)
    return 0


def name_of(weights: str) -> str:
    """Return what clients call an encoder: a Hub id, or the name of its folder or file."""
    return Path(os.path.abspath(weights)).name if os.path.exists(weights) else weights


def read_token(file: str | None) -> str | None:
    """Return the token in a file.

    Raises:
        RequestError: it cannot be read, or is no token.
    """
    if file is None:
        return None
    try:
        token = Path(file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
        raise RequestError(f"--token-file {file} cannot be read: {reason}.") from error
    if not token or not token.isprintable() or " " in token:
        raise RequestError(f"--token-file {file} must contain one line with a token without spaces.")
    return token
