"""What every request passes before the application sees it: who may ask, how much, and for how long."""

from __future__ import annotations

import asyncio
import hmac
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ijepa_enhanced.serve.config import Limits
from ijepa_enhanced.serve.metrics import LEFT, Metrics
from ijepa_enhanced.serve.refusal import Refusal, busy

OPEN = ("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/page/")
"""Paths that need no token: they tell nothing about images, and the page asks for the token itself."""
BODIES = 16
"""Bodies of the largest size that may be in memory at once."""
DISCARDED = 2**26
"""Most bytes of a refused body that are read and thrown away, so that a client that is still sending sees why."""
HEADERS = {
    # The page loads nothing from elsewhere, and no other page may show it. Pictures are made by its script.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Access:
    """Who may use a service."""

    token: str | None = None
    """What clients must send as `Authorization: Bearer TOKEN`. None: nothing."""
    origins: tuple[str, ...] = ()
    """Origins of other web pages that may use it."""
    hosts: frozenset[str] | None = None
    """Names that clients may call it by. None: any."""

    def check(self, path: str, headers: Headers) -> None:
        """Check a request.

        Raises:
            Refusal: it is not allowed.
        """
        host = headers.get("host", "")
        # A page of another site can have its own name point to this machine (DNS rebinding).
        if self.hosts is not None and urlsplit(f"//{host}").hostname not in self.hosts:
            raise Refusal(403, f"The service does not answer to the host name '{host}'. Use localhost.")
        origin = headers.get("origin")
        # Browsers send simple requests to other sites without asking first.
        if origin is not None and origin not in self.origins and urlsplit(origin).netloc != host:
            raise Refusal(403, f"Pages of {origin} may not use this service.")
        if self.token is None or path == "/" or any(path.startswith(each) for each in OPEN[1:]):
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), self.token.encode()):
            what = "is wrong" if given else "is missing"
            message = f"The token {what}. Send it in the header 'Authorization: Bearer TOKEN'."
            raise Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


class Guard:
    """ASGI middleware that checks access, reads the body within limits, and ends what takes too long or has left.

    Args:
        app: what it guards.
        limits: of a request.
        access: who may ask.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, limits: Limits, access: Access, metrics: Metrics) -> None:
        self.app = app
        self.limits = limits
        self.access = access
        self.metrics = metrics
        self.held = 0
        """Bytes of all bodies in memory."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, statuses = time.perf_counter(), [LEFT]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._handle(scope, receive, answer, statuses)
        finally:
            path = getattr(scope.get("route"), "path", "other")  # a path that is no route could be anything
            self.metrics.count_request(path, statuses[-1], time.perf_counter() - start)

    async def _handle(self, scope: Scope, receive: Receive, send: Send, statuses: list[int]) -> None:
        """Answer a request; `statuses` has more than one entry once the answer has started."""
        deadline = asyncio.get_running_loop().time() + self.limits.timeout
        body = bytearray()
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    if not await self._read(scope, receive, body):
                        return
            except TimeoutError:
                raise Refusal(408, f"The body did not arrive within {self.limits.timeout:g} s.") from None
            if not await self._run(scope, receive, send, bytes(body), deadline) and len(statuses) == 1:
                raise Refusal(503, f"The request took longer than {self.limits.timeout:g} s.", code="timeout")
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)
        finally:
            self.held -= len(body)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> bool:
        """Read the body of a request that is allowed. Return False if the client has left.

        Raises:
            Refusal: the request is not allowed, or its body is too large.
        """
        headers = Headers(scope=scope)
        try:
            self.access.check(scope["path"], headers)
            length = headers.get("content-length", "0")
            if length.isdecimal() and int(length) > self.limits.max_bytes:
                raise self._too_large()
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return False
                chunk, more = message.get("body", b""), message.get("more_body", False)
                if len(body) + len(chunk) > self.limits.max_bytes:
                    raise self._too_large()
                if self.held + len(chunk) > BODIES * self.limits.max_bytes:
                    raise busy(1)
                self.held += len(chunk)
                body += chunk
        except Refusal:
            if "expect" not in headers:
                await discard(receive)
            raise
        return True

    async def _run(self, scope: Scope, receive: Receive, send: Send, body: bytes, deadline: float) -> bool:
        """Let the application answer; return False if it took too long. If the client leaves, the work is cancelled."""
        unread = [body]

        async def replay() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        work = asyncio.ensure_future(self.app(scope, replay, send))
        gone = asyncio.ensure_future(receive())  # nothing but a disconnection can follow the body
        try:
            left = deadline - asyncio.get_running_loop().time()
            await asyncio.wait({work, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            in_time = work.done() or gone.done()
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
        await asyncio.wait({work})
        if not work.cancelled():
            work.result()  # raises what it raised
        return in_time

    def _too_large(self) -> Refusal:
        return Refusal(413, f"The body has more than {self.limits.max_bytes:,} bytes.", code="request_too_large")


async def discard(receive: Receive) -> None:
    """Read the rest of a body, up to `DISCARDED` bytes."""
    left = DISCARDED
    while left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        if not message.get("more_body", False):
            return
