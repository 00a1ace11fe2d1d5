"""Fixtures of the service's tests: a daemon without a model, reached through its application or through a real socket."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from latentd.service.listener import bind
from latentd.service.state_folder import StateFolder
from latentd.service.supervisor import HttpServer
from service.fakes import WAIT_S, World, make_world

MakeWorld = Callable[..., World]


@pytest.fixture
def new_world(tmp_path: Path) -> Iterator[MakeWorld]:
    """new_world(config=…, max_images=…) -> a World; keywords are keys of the http section."""
    with ExitStack() as stack:
        yield lambda config=None, **http: make_world(tmp_path, stack.callback, config, **http)


@pytest.fixture
def world(new_world: MakeWorld) -> World:
    return new_world()


class Served:
    """A world behind a real uvicorn server in a thread."""

    def __init__(self, world: World, folder: StateFolder) -> None:
        self.world = world
        self.listener = bind("127.0.0.1:0")
        self.url = self.listener.url
        self._up = threading.Event()
        self.server = HttpServer(world.parts, self.listener, folder)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._up.wait(WAIT_S), "the server did not start"

    def connect(self) -> socket.socket:
        made = socket.create_connection(self.listener_address, WAIT_S)
        made.settimeout(WAIT_S)
        return made

    @property
    def listener_address(self) -> Any:
        host, port = self.url[len("http://") :].rsplit(":", 1)
        return host, int(port)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "the server did not stop"

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        startup = self.server.startup

        async def started(sockets: Any = None) -> None:
            await startup(sockets)
            self._up.set()

        self.server.startup = started  # type: ignore[method-assign]
        await self.server.serve(sockets=[self.listener.socket])


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[World], Served]]:
    """serve(world) -> the world behind a real server."""
    running = []
    folder = StateFolder(tmp_path / "state")

    def start(world: World) -> Served:
        running.append(Served(world, folder))
        return running[-1]

    yield start
    for served in running:
        served.stop()
    folder.close()
