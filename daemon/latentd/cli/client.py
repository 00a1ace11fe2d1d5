"""One connection to a running latentd: where it listens, what it refuses, how long to be patient with it.

Runs in the thread of the verb that called; every call blocks until the daemon answered or the time was over. Proxies and other settings of
the environment are ignored: the daemon is on this device, or where --url says.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Type

import httpx

from latentd.config import Config
from latentd.errors import LatentdError, NoAnswer, NotLatentd, Unreachable
from latentd.service.state_folder import ADDRESS_FILE

CONNECT_S = 3.0
ANSWER_S = 120.0
UNIX = "unix:"  # and the path of a socket


class Refused(LatentdError):
    """The daemon answered with a problem document, which is carried as it came."""

    def __init__(self, status: int, problem: Mapping[str, Any], retry_after_s: Optional[int] = None) -> None:
        super().__init__(
            str(problem.get("detail") or problem.get("title")), hint=str(problem.get("hint") or ""), retry_after_s=retry_after_s
        )
        self.status = status
        self.problem = dict(problem)


class Answer(NamedTuple):
    """What the daemon answered, when it did not refuse."""

    status: int
    body: Dict[str, Any]


class Client:
    """Calls one daemon. `sleep` and `clock` (seconds) are only used to wait for a daemon that asks for patience (Retry-After)."""

    def __init__(
        self,
        url: str,
        *,
        transport: Optional[httpx.BaseTransport] = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = url
        self._sleep = sleep
        self._clock = clock
        socket_path = url[len(UNIX) :] if url.startswith(UNIX) else None
        self._http = httpx.Client(
            base_url="http://localhost" if socket_path else url,
            transport=httpx.HTTPTransport(uds=socket_path) if socket_path else transport,
            trust_env=False,
            verify=url.startswith("https:"),
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            headers={"Accept": "application/json, application/problem+json"},
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]) -> None:
        self._http.close()

    def get(self, path: str, **params: Any) -> Dict[str, Any]:
        """The JSON object at `path`; params that are None are left out."""
        return self.send("GET", path, params={key: value for key, value in params.items() if value is not None}).body

    def send(self, method: str, path: str, *, patience_s: float = 0.0, **request: Any) -> Answer:
        """One request. A 503 with Retry-After is waited for and sent again, for `patience_s` seconds in all.

        Raises Refused (a problem document) or Unreachable: nobody answers, somebody else (NotLatentd), or not in time (NoAnswer).
        """
        give_up_at = self._clock() + patience_s
        while True:
            try:
                return self._once(method, path, **request)
            except Refused as refused:
                pause_s = refused.retry_after_s
                if refused.status != 503 or pause_s is None or self._clock() + pause_s > give_up_at:
                    raise
                self._sleep(max(pause_s, 0.1))

    def _once(self, method: str, path: str, **request: Any) -> Answer:
        try:
            response = self._http.request(method, path, **request)
        except (httpx.ConnectError, httpx.ConnectTimeout) as cause:
            raise Unreachable(f"Nothing answers at {self.url}.") from cause
        except httpx.TimeoutException as cause:
            raise NoAnswer(f"No answer from {self.url} within {ANSWER_S:g} seconds.") from cause
        except (httpx.TransportError, httpx.InvalidURL) as cause:
            raise NoAnswer(f"The connection to {self.url} broke: {str(cause).rstrip('.')}.") from cause
        return self._understood(response)

    def _understood(self, response: httpx.Response) -> Answer:
        kind = response.headers.get("content-type", "").split(";")[0]
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict) or (response.is_error and kind != "application/problem+json"):
            raise NotLatentd(f"What answers at {self.url} is not latentd (HTTP {response.status_code}, {kind or 'no content type'}).")
        if response.is_error:
            raise Refused(response.status_code, body, _seconds(response.headers.get("retry-after")))
        return Answer(response.status_code, body)


def address(config: Config) -> str:
    """The URL of the daemon that this configuration describes.

    A configured port is taken as it is. Without one, or with port 0, the note that the running daemon keeps in the state folder counts.
    Raises Unreachable when the port is 0 and there is no note.
    """
    host, _, port = config.http.bind.rpartition(":")
    configured = config.origins.get("http.bind", "default") != "default"
    if not configured or port == "0":
        noted = _noted(config.state_dir / ADDRESS_FILE)
        if noted:
            return noted
    if port == "0":
        raise Unreachable(f"No running latentd has noted its address in {config.state_dir}.")
    return f"http://{host}:{port}"


def _noted(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):  # no daemon uses this state folder, or it is another user's
        return ""


def _seconds(retry_after: Optional[str]) -> Optional[int]:
    return int(retry_after) if retry_after and retry_after.isdigit() else None
