"""Check of the address: free, latentd's own, or somebody else's."""

from __future__ import annotations

from typing import Callable

from latentd.cli.client import Client, address
from latentd.cli.doctor.machine import BROKEN, OK, Finding
from latentd.config import Config
from latentd.errors import ConfigError, LatentdError, NotLatentd, Unreachable


def ask(url: str) -> None:
    """Returns where a latentd answers; raises Unreachable or NotLatentd."""
    with Client(url) as client:
        client.get("/livez")


def port(config: Config, asked: Callable[[str], None] = ask) -> Finding:
    try:
        url = address(config)
        asked(url)
    except NotLatentd as other:
        return Finding("port", BROKEN, other.detail, "Stop what listens there, or choose another address in http.bind")
    except Unreachable:
        return _free(config)
    except LatentdError as busy:
        return Finding("port", OK, f"latentd listens at {url}, and says: {busy.detail}")
    return Finding("port", OK, f"latentd answers at {url}")


def _free(config: Config) -> Finding:
    from latentd.service.listener import bind  # and with it FastAPI: not for the verbs that only ask the daemon

    try:
        bind(config.http.bind).socket.close()
    except ConfigError as cause:
        return Finding("port", BROKEN, cause.detail, cause.hint)
    return Finding("port", OK, f"{config.http.bind} is free; latentd is not running")
