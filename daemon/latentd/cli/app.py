"""The command line: every verb under its name, and the process's entry.

Exit codes: 0 ok; 1 failed; 2 usage; 3 no daemon reached; 4 the daemon refused; 130 Ctrl-C.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import NoReturn, Optional, Sequence

import typer

from latentd import __version__
from latentd.cli import backbone, classes, configuration, samples, service
from latentd.cli.classify import classify
from latentd.cli.doctor import doctor
from latentd.cli.learn import learn
from latentd.cli.prune import prune
from latentd.cli.reports import accuracy, energy, memory
from latentd.cli.serve import serve
from latentd.cli.status import status
from latentd.cli.tune import tune

app = typer.Typer(
    help="Ask what images show, and teach it: a thin client of the daemon on this device, and the daemon itself (serve).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for verb in (serve, status, doctor, classify, learn, samples.label, samples.forget, accuracy, energy, memory, tune, prune):
    app.command()(verb)
app.add_typer(samples.app, name="samples")
app.add_typer(classes.app, name="classes")
app.add_typer(backbone.app, name="backbone")
app.add_typer(configuration.app, name="config")
app.add_typer(service.app, name="service")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"latentd {__version__}")
        raise typer.Exit()


@app.callback()
def latentd(version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version.")) -> None:
    """Ask what images show, and teach it: a thin client of the daemon on this device, and the daemon itself (serve)."""


def main(arguments: Optional[Sequence[str]] = None) -> NoReturn:
    """Runs the command line (sys.argv, unless told) and ends the process with its exit code."""
    if isinstance(sys.stdout, TextIOWrapper):  # a caller may have put another stream there
        sys.stdout.reconfigure(errors="backslashreplace")
    app(args=arguments, prog_name="latentd")
    raise SystemExit(0)
