"""Amounts and lists as people type them: 64MB, 12,11, int4:rotated. Each raises BadParameter that names the option."""

from __future__ import annotations

import re
from typing import Tuple

import typer

from latentd import config

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def bytes_of(text: str, option: str) -> int:
    """64MB is 64,000,000 bytes, 64MiB is 67,108,864."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(found.group(2).upper()) if found else None
    if found is None or unit is None or float(found.group(1)) * unit < 1:
        raise typer.BadParameter(f"{text} is not an amount of memory, such as 64MB, 64MiB or 64000000", param_hint=option)
    return int(float(found.group(1)) * unit)


def numbers_of(text: str, low: int, high: int, option: str) -> Tuple[int, ...]:
    """ "12,11" -> (12, 11)."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() and low <= int(part) <= high for part in parts):
        raise typer.BadParameter(f"{text} is not a list of numbers from {low} to {high}, such as {high},{low}", param_hint=option)
    return tuple(dict.fromkeys(int(part) for part in parts))


def codecs_of(text: str, option: str) -> Tuple[Tuple[str, str], ...]:
    """ "int4:rotated,fp16" -> (("int4", "rotated"), ("fp16", "token")); the kind of a float codec means nothing."""
    choices = {row.key: row.choices or () for row in config.rows()}
    names, kinds = choices["learn.codec"], tuple(dict.fromkeys((*config.FEATURE_KINDS, *config.TOKEN_KINDS)))
    found = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        name, _, kind = part.partition(":")
        if name not in names or (kind and kind not in kinds):
            detail = f"{part} is no codec: give NAME:KIND with {', '.join(names)} and {', '.join(kinds)}"
            raise typer.BadParameter(detail, param_hint=option)
        found.append((name, "token" if name.startswith("fp") else kind or "token"))
    if not found:
        raise typer.BadParameter("name at least one codec, such as int8:token", param_hint=option)
    return tuple(dict.fromkeys(found))
