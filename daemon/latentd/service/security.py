"""The outer edge of every request: who may ask, its id, its headers, and the last border for bugs.

Pure ASGI, on the event loop. Without tokens, the listener is safe only because of these checks: a web page in the user's browser can reach
loopback too, under another name (DNS rebinding: the Host check) or across origins (the Origin and Sec-Fetch-Site checks).
"""

from __future__ import annotations

import functools
import ipaddress
import re
import secrets
import time
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentd.errors import Forbidden, LatentdError, Overloaded
from latentd.service import problems

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS: List[Tuple[bytes, bytes]] = [
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode("ascii")),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::\d{1,5})?")
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


CLIENT_GONE = 499  # the status that counts a request whose client left before the answer

Observe = Callable[[Scope, int, float], None]


class Edge:
    """Refuses requests from elsewhere and over the connection limit; gives each an id; answers HEAD as GET; turns bugs into a 500.

    allowed_hosts: names that Host may carry besides loopback ones. open_connections: how many the server holds now, this one included.
    observe: called once a request, with its scope, the status and the seconds it took.
    """

    def __init__(
        self,
        app: ASGIApp,
        allowed_hosts: Sequence[str],
        max_connections: int,
        open_connections: Callable[[], int],
        observe: Observe,
    ) -> None:
        self.app = app
        self._allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self._max_connections = max_connections
        self._open_connections = open_connections
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = _headers(scope)
        scope["request_id"] = _request_id(headers.get(b"x-request-id"))
        answer = _Answer(scope, send)
        refusal = self._refusal(scope["method"], headers)
        if refusal is not None:
            await problems.answer(refusal, scope["request_id"])(scope, receive, answer.send)
        else:
            await _bordered(self.app, scope, receive, answer)
        self._observe(scope, answer.status, time.perf_counter() - began)

    def _refusal(self, method: str, headers: Dict[bytes, bytes]) -> Optional[LatentdError]:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if not (is_loopback_name(host) or _name(host) in self._allowed_hosts):
            return Forbidden(
                f"The Host header {host[:100]!r} is not one of this device's names.",
                hint="Call latentd by 127.0.0.1 or localhost, or add the name to http.allowed_hosts.",
            )
        if _cross_origin(method, headers, host):
            return Forbidden("Requests from other web sites are refused.")
        if self._open_connections() > self._max_connections:
            return Overloaded(f"More than {self._max_connections} connections are open.")
        return None


class _Answer:
    """The send channel of one request: adds the headers, drops the body of HEAD, remembers the status."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self._id = scope["request_id"].encode("ascii")
        self._bodyless = scope["method"] == "HEAD"
        self.status = CLIENT_GONE  # until the answer begins

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            own = message.setdefault("headers", [])
            present = {name.lower() for name, _ in own}
            message["headers"] = [*own, *(pair for pair in SECURITY_HEADERS if pair[0] not in present), (b"x-request-id", self._id)]
        elif self._bodyless and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await self._send(message)


async def _bordered(app: ASGIApp, scope: Scope, receive: Receive, answer: _Answer) -> None:
    """Runs the application. HEAD is served as GET in a copy of the scope: the server goes by its own to frame the answer."""
    inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
    try:
        await app(inner, receive, answer.send)
    except ClientDisconnect:
        pass  # nobody is left to answer
    except Exception as error:  # the border of a request: whatever it is, it is answered as a bug, and the next request is served
        if answer.status != CLIENT_GONE:
            raise
        bug = problems.unexpected(error, scope["request_id"])
        await problems.answer(bug, scope["request_id"])(scope, receive, answer.send)
    finally:
        if inner is not scope:
            scope["route"] = inner.get("route")


def _headers(scope: Scope) -> Dict[bytes, bytes]:
    """The headers by lower-case name; a repeated one is joined, so that two Host headers match nothing."""
    found: Dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        found[name] = found[name] + b", " + value if name in found else value
    return found


def _request_id(given: Optional[bytes]) -> str:
    text = given.decode("latin-1") if given else ""
    return text if _SANE_ID.fullmatch(text) else secrets.token_hex(8)


def _name(host: str) -> str:
    """The name in a Host header, without its port and without the brackets of IPv6; empty when it is no host at all."""
    found = _HOST.fullmatch(host)
    return (found.group(1) or found.group(2)) if found else ""


@functools.lru_cache(maxsize=64)
def is_loopback_name(host: str) -> bool:
    """Whether a Host header (lower case) names this machine's loopback."""
    name = _name(host)
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _cross_origin(method: str, headers: Dict[bytes, bytes], host: str) -> bool:
    """Whether a browser says that another site caused the request. Following a link is allowed: its answer stays unreadable there."""
    origin = headers.get(b"origin")
    if origin is not None:
        return not re.fullmatch(r"https?://" + re.escape(host), origin.decode("latin-1").lower())
    if headers.get(b"sec-fetch-site", b"none") in (b"none", b"same-origin"):
        return False
    followed_link = headers.get(b"sec-fetch-mode") == b"navigate" and headers.get(b"sec-fetch-dest") == b"document"
    return not (followed_link and method in ("GET", "HEAD"))
