"""`latentd serve`: the daemon in the foreground. The only verb that loads the service, and with it torch."""

from __future__ import annotations

import faulthandler
import os
from pathlib import Path
from typing import Optional

import typer

from latentd import config
from latentd.cli.configuration import FOLDER, chosen
from latentd.cli.terminal import verb

BIND = typer.Option(None, help="Address and port to listen on; port 0 takes a free one.", show_default="127.0.0.1:8420")
STATE_DIR = typer.Option(None, help="Folder of what was taught.", show_default="from the configuration")
CACHE_DIR = typer.Option(None, help="Folder of weights and compiled graphs.", show_default="from the configuration")
LOG_LEVEL = typer.Option(None, help="debug, info, warning or error.", show_default="info")


@verb
def serve(
    bind: Optional[str] = BIND,
    state_dir: Optional[str] = STATE_DIR,
    cache_dir: Optional[str] = CACHE_DIR,
    folder: Optional[Path] = FOLDER,
    log_level: Optional[str] = LOG_LEVEL,
) -> None:
    """Run the daemon in the foreground until SIGTERM or Ctrl-C."""
    flags = {"http.bind": bind, "state.dir": state_dir, "state.cache_dir": cache_dir, "log.level": log_level}
    environ, system = dict(os.environ), chosen(folder)

    def load() -> config.Config:
        return config.load(environ, flags, system=system)

    settings = load()
    # Before numpy is imported: its products are small, and threads that wait for each other take cores from the frozen stage.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from latentd.service.supervisor import Daemon  # here, because it takes seconds and no other verb needs it

    faulthandler.enable()  # where every thread was, when a watchdog's SIGABRT ends a process that is stuck
    Daemon(settings, environ=environ, reload=load).run()
