"""What every HTTP request passes first, in plain ASGI: an id, the API key, a bounded body, and a line in the log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from anybits.serve.responses import error

logger = logging.getLogger("anybits.serve.access")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN_PATHS = {"/", "/health"}
"""Reachable without the API key: the page asks for the key itself, and a load balancer has none."""

BODY_SECONDS = 30.0
"""A client that takes longer to send its body is cut off."""


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Gone(Exception):
    """The client left before its body was complete."""


class Gate:
    """ASGI middleware; answers 401, 408 and 413 itself, and 500 without a traceback when the application fails.

    Requests that a stopping server no longer waits for get 503.
    """

    def __init__(self, app: App, api_key: str | None, max_body_bytes: int) -> None:
        self._app, self._max_body = app, max_body_bytes
        self._key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one HTTP request; other kinds of connection pass untouched."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        identifier = _request_id(headers.get(b"x-request-id", b""))
        scope["anybits.request_id"] = identifier
        started, status = time.monotonic(), 0

        async def with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", identifier.encode())]
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            body = await self._read(headers, receive)
            await self._app(scope, _replay(body, receive), with_id)
        except _Refused as refused:
            await _answer(with_id, refused.status, str(refused))
        except _Gone:
            pass
        except asyncio.CancelledError:  # only by a server that stops and has waited long enough
            logger.warning("%s was cut off: the server is stopping", identifier)
            if not status:
                await _answer(with_id, 503, "the server is stopping and could not finish this request: ask again")
        except Exception:
            logger.exception("%s failed", identifier)
            if not status:
                await _answer(with_id, 500, f"internal error; the server's log has it under {identifier}")
        finally:
            passed = 1000 * (time.monotonic() - started)
            logger.info("%s %s %s %s %.0f ms", identifier, scope["method"], scope["path"], status or "gone", passed)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._key is None or path in OPEN_PATHS:
            return
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._key):
            raise _Refused(401, "the API key is missing or wrong: send the header Authorization: Bearer KEY")

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        refused = _Refused(413, f"the body is larger than {self._max_body} bytes")
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_body:
            raise refused
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    parts.append(message.get("body", b""))
                    more = message.get("more_body", False)
                    if sum(map(len, parts)) > self._max_body:
                        raise refused
        except TimeoutError:
            raise _Refused(408, f"the body did not arrive within {BODY_SECONDS:.0f} s") from None
        return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body that was read, and then whatever else the client does."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _answer(send: Send, status: int, message: str) -> None:
    body = json.dumps(error(message, status)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _request_id(given: bytes) -> str:
    """Return the client's own id when it is harmless in a log, else a new one."""
    return given.decode() if re.fullmatch(rb"[A-Za-z0-9._-]{1,64}", given) else f"req-{uuid.uuid4().hex}"
