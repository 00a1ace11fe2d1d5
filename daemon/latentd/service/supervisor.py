"""The daemon's life: lock, listen, build, serve, stop, in that order, and what ends it.

`run` belongs to the main thread and blocks until SIGTERM, SIGINT or the death of the inference thread. Stopping: no new connection,
requests in flight are finished, then the parts end one after the other (learner with its checkpoint, decoders, inference, meters,
journal). SIGHUP reads the configuration again. A service manager that wants to know hears of all of it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
from contextlib import ExitStack, closing, contextmanager
from typing import Callable, Iterator, List, Mapping, Optional

import uvicorn

from latentd.config import Config
from latentd.errors import ConfigError, EngineError
from latentd.service import late_heads, logs, reloading
from latentd.service.app import create_app
from latentd.service.building import build, keep_totals
from latentd.service.listener import Listener, adopt, bind
from latentd.service.notify import Notifier
from latentd.service.parts import Parts
from latentd.service.state_folder import StateFolder
from latentd.service.vitals import Vitals

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 30  # an idle connection is closed after this
FINISH_S = 20  # requests in flight may take so long when the daemon stops
LAST_RESORT_S = 60.0  # after a death: a stop that hangs longer is cut short
TOTALS_EVERY_S = 60.0


class Daemon:
    """One latentd. start() and stop() are what run() does around serving; call them alone to have the parts without HTTP.

    environ: what the service manager told the process when it started it. reload: reads the configuration again, for SIGHUP.
    """

    def __init__(
        self, config: Config, *, environ: Optional[Mapping[str, str]] = None, reload: Optional[Callable[[], Config]] = None
    ) -> None:
        self.config = config
        self._environ = environ or {}
        self._reload = reload
        self._notifier = Notifier()
        self._vitals: Optional[Vitals] = None
        self.loop: Optional[asyncio.AbstractEventLoop] = None  # once it serves
        self.death: Optional[BaseException] = None  # what killed the inference thread
        self._until_stop = ExitStack()
        self._last_resort = threading.Timer(LAST_RESORT_S, os._exit, (1,))
        self._last_resort.daemon = True
        self._server: Optional[HttpServer] = None

    def start(self) -> Parts:
        """Locks the state folder and starts every part. Raises ConfigError, StateInUse, CheckpointError, EngineError, JournalError."""
        with ExitStack() as started:
            folder = StateFolder(self.config.state_dir)
            started.callback(folder.close)
            parts = build(self.config, self._on_death, started)
            self._until_stop = started.pop_all()
        self._folder = folder
        return parts

    def stop(self) -> None:
        """Ends every part, the last started first; the learner saves a checkpoint, the journal its last commands."""
        self._until_stop.close()
        self._last_resort.cancel()

    def run(self) -> None:
        """Serves until told to stop. Raises EngineError when the inference thread died, and whatever start() raises."""
        if threading.current_thread() is threading.main_thread() and not _has_terminal():
            signal.signal(signal.SIGHUP, _too_early)
        logs.set_up(self.config.log.level, self._environ, sys.stderr)
        listener = adopt(self._environ) or bind(self.config.http.bind)
        self._notifier = Notifier.from_environ(self._environ)
        with listener.socket, closing(self._notifier):
            with self._notifier.starting("loading what was taught, and the engine"):
                parts = self.start()
            try:
                gc.collect()
                gc.freeze()  # what lives as long as the process needs no more looking through
                asyncio.run(self._serve(parts, listener))
            finally:
                self._notifier.stopping()
                self.stop()
        log.info("stopped")
        if self.death is not None:
            raise EngineError(f"the inference thread died: {self.death}") from self.death

    async def _serve(self, parts: Parts, listener: Listener) -> None:
        self._server = server = HttpServer(parts, listener, self._folder)
        if self.death is not None:
            return
        self.loop = loop = asyncio.get_running_loop()
        self._vitals = vitals = Vitals(parts, self._notifier)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._leave)
            loop.add_signal_handler(signal.SIGHUP, self._leave if _has_terminal() else self.reload)
        for_ever = (
            parts.readiness.probe_for_ever(),
            _keep_totals_for_ever(parts),
            vitals.watch_for_ever(lambda: server.started),
            late_heads.close_for_ever(lambda: list(server.server_state.connections)),
        )
        tasks = [asyncio.ensure_future(task) for task in for_ever]
        try:
            await server.serve(sockets=[listener.socket])
        finally:
            for task in tasks:
                task.cancel()

    def _leave(self) -> None:
        self._notifier.stopping()
        if self._server is not None:
            self._server.leave()

    def reload(self) -> None:
        """On the event loop: takes on the live keys of the configuration as it is now. A broken one is logged and changes nothing."""
        if self._reload is None or self._vitals is None:
            return
        parts = self._vitals.parts
        if self._vitals.is_ready:
            self._notifier.reloading()
        try:
            found = reloading.merge(self.config, self._reload())
        except ConfigError as cause:
            log.error("the configuration stays as it was: %s (%s)", cause.detail, cause.hint)
        else:
            reloading.tell(found)
            self.config = parts.config = found.config
            parts.restrain(found.config)
            parts.needs_restart = found.needs_restart
            logs.set_level(found.config.log.level)
        if self._vitals.is_ready:
            self._notifier.ready(self._vitals.summary())

    def _on_death(self, death: BaseException) -> None:
        """On the dying inference thread: lets what can still be answered be answered, then the process ends."""
        self.death = death
        self._last_resort.start()
        if self._server is not None:
            self._server.should_exit = True


class HttpServer(uvicorn.Server):
    """uvicorn with our signals, one line when it listens, and the address noted for the command line.

    Slow clients: uvicorn closes an idle connection after KEEP_ALIVE_S, a request body has http.body_timeout_s, and a request head 64 KiB
    and late_heads.HEAD_S. The Edge answers 503 beyond the connection limit, and uvicorn itself a little above.
    """

    def __init__(self, parts: Parts, listener: Listener, folder: StateFolder) -> None:
        settings = uvicorn.Config(
            create_app(parts),
            ws="none",
            lifespan="off",
            workers=1,
            access_log=False,
            log_config=None,
            log_level="warning",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=FINISH_S,
            limit_concurrency=parts.config.http.max_connections + 16,
        )
        super().__init__(settings)
        parts.open_connections = lambda: len(self.server_state.connections)
        self._listener = listener
        self._folder = folder

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The daemon handles signals: uvicorn would raise them again after serving, before the parts are ended."""
        yield

    def leave(self) -> None:
        """The first signal ends the serving gracefully, the second at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: Optional[List[socket.socket]] = None) -> None:
        await super().startup(sockets)
        self._folder.note_address(self._listener.url)
        log.info("listening on %s", self._listener.url)


def _has_terminal() -> bool:
    """Whether somebody started it by hand: then SIGHUP means that the terminal was closed."""
    return os.isatty(0)


def _too_early(number: int, frame: object) -> None:
    """A SIGHUP before the daemon serves: the configuration has just been read."""


async def _keep_totals_for_ever(parts: Parts) -> None:
    """Joules survive a power cut, but for the last minute."""
    while True:
        await asyncio.sleep(TOTALS_EVERY_S)
        keep_totals(parts.journal, parts.ledger)
