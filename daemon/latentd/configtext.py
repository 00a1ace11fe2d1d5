"""The configuration as text: an example file, a file of some keys, and the page of the docs, all made from the table in config.py."""

from __future__ import annotations

from typing import Any, List, Mapping

from latentd.config import Row, plain, rows


def example_toml() -> str:
    """An example file with every key commented out at its default."""
    lines: List[str] = []
    section = ""
    for row in rows():
        name, key = row.key.split(".")
        if name != section:
            lines += ["", f"[{name}]"] if lines else [f"[{name}]"]
            section = name
        lines.append(f"# {row.help}{_limits(row)}")
        lines.append(f"# {key} = {_toml(row.default)}")
    return "\n".join(lines) + "\n"


def as_toml(values: Mapping[str, Any]) -> str:
    """A configuration file of these keys alone, in file order."""
    assert set(values) <= {row.key for row in rows()}, "every key is one of the table"
    lines: List[str] = []
    section = ""
    for row in rows():
        name, key = row.key.split(".")
        if row.key in values:
            if name != section:
                lines += ["", f"[{name}]"] if lines else [f"[{name}]"]
                section = name
            lines.append(f"{key} = {_toml(values[row.key])}")
    return "\n".join([*lines, ""])


def reference_markdown() -> str:
    """docs/configuration.md: every key with default, range and meaning."""
    lines = [
        "# Configuration",
        "",
        "Made from the table in `daemon/latentd/config.py`. Order: defaults, `/etc/latentd/config.toml`, `/etc/latentd/conf.d/*.toml`,",
        "`LATENTD_SECTION__KEY` in the environment, flags. `latentd config show --origin` prints what is in force and where it came from.",
        "",
        "| key | default | range | meaning |",
        "|---|---|---|---|",
    ]
    for row in rows():
        limits = _limits(row).strip(" ()").replace("|", "\\|")
        lines.append(f"| `{row.key}` | `{_toml(row.default)}` | {limits} | {row.help} |")
    return "\n".join(lines) + "\n"


def _limits(row: Row) -> str:
    if row.choices:
        return f" ({' | '.join(row.choices)})"
    span = f"{plain(row.low)} to {plain(row.high)}" if row.low is not None and row.high is not None else ""
    return f" ({' '.join(part for part in (span, row.unit) if part)})" if span or row.unit else ""


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)
