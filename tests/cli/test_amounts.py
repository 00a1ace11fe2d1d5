from __future__ import annotations

import pytest
import typer

from latentd.cli.amounts import bytes_of, codecs_of, numbers_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [("64MB", 64_000_000), ("64MiB", 64 << 20), ("64000000", 64_000_000), ("1.5 GB", 1_500_000_000), ("2kib", 2048), ("7B", 7)],
)
def test_an_amount_of_memory_may_have_a_unit(text: str, expected: int) -> None:
    assert bytes_of(text, "--memory") == expected


@pytest.mark.parametrize("text", ["", "MB", "64 apples", "-5MB", "0", "1e9", "64MBit"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="not an amount"):
        bytes_of(text, "--memory")


def test_numbers_are_taken_once_in_their_order() -> None:
    assert numbers_of("12, 11,12", 1, 12, "--splits") == (12, 11)


@pytest.mark.parametrize("text", ["", ",", "13", "0", "-1", "eleven", "1.5"])
def test_numbers_outside_the_range_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="1 to 12"):
        numbers_of(text, 1, 12, "--splits")


def test_codecs_are_named_with_their_kind() -> None:
    assert codecs_of("int4:rotated, int8,fp16,fp16:rotated", "--codecs") == (("int4", "rotated"), ("int8", "token"), ("fp16", "token"))


@pytest.mark.parametrize("text", ["", "int9:token", "int4:round", "int8:token:x"])
def test_what_is_no_codec_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        codecs_of(text, "--codecs")
