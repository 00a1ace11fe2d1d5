"""The whole program on a small source: what is run, what is written, and the errors a user sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict

import pytest

import nicv2
import nicv2_report
import nicv2_run
import nicv2_stress
import streams
from courses import SmallSource
from latentd import config
from methods import registry

Program = Callable[..., Dict[str, Any]]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    """program(*flags) runs nicv2.py in this process on clouds and gives its JSON; the other files lie beside it."""
    monkeypatch.setattr(streams, "open_objects50", lambda *_: SmallSource())
    monkeypatch.setattr(nicv2_stress, "AWAY", 2)
    monkeypatch.setattr(nicv2_stress, "NEVER", 2)
    monkeypatch.setattr(registry, "GRIDS", {"slda": registry.GRIDS["slda"][:2], "ridge": registry.GRIDS["ridge"][:2]})
    monkeypatch.setenv("LATENTD_ENERGY__METERS", "")

    def run(*flags: str) -> Dict[str, Any]:
        assert nicv2.main([*flags, "--workers", "1", "--out", str(tmp_path / "result.json")]) == 0
        found: Dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
        return found

    return run


def test_every_method_is_run_over_the_orders_and_written_down(program: Program, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = ["naive", "slda", "latentd", "joint-discriminant"]
    result = program("--orders", "0", "1", "--methods", *names)
    assert list(result["methods"]) == names
    assert [run["order"] for run in result["methods"]["slda"]["runs"]] == [0, 1]
    assert result["methods"]["slda"]["accuracy"]["mean"] > result["methods"]["naive"]["accuracy"]["mean"]
    assert result["asked_sessions"] == [3] and not result["validation"]
    text = (tmp_path / "result.md").read_text()
    assert all(registry.TITLES[name] in text for name in names)
    assert "No joules: no meter is configured" in text
    for name in ("stream", "memory"):
        assert (tmp_path / f"nicv2-391-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_choosing_asks_the_validation_sessions_and_marks_the_best(program: Program, tmp_path: Path) -> None:
    result = program("--choose", "--orders", "0", "--methods", "slda", "ridge")
    assert result["validation"] and result["asked_sessions"] == [5]
    assert [row["changes"] for row in result["choices"]["slda"]] == registry.GRIDS["slda"]
    assert "methods" not in result
    assert (tmp_path / "result.md").read_text().count("**") == 2 * 2


def test_codecs_and_stress_ask_the_validation_sessions_unless_told_otherwise(program: Program, tmp_path: Path) -> None:
    result = program("--codecs", "--stress", "--orders", "0")
    assert result["validation"] and "methods" not in result
    assert len(result["codecs"]) == 50
    assert [row["name"] for row in result["stress"]] == list(nicv2_stress.NAMES)
    assert "against fp32" in (tmp_path / "result.md").read_text()
    assert program("--stress", "--test-sessions", "--orders", "0")["asked_sessions"] == [3]


def test_the_closed_form_alone_needs_no_rule_about_memory(program: Program, tmp_path: Path) -> None:
    result = program("--codecs", "--closed-form", "--orders", "0")
    assert len(result["codecs"]) == 25 and {row["rule"] for row in result["codecs"]} == {"equal count"}
    assert all(row["trained_head_weight"] == 0 for row in result["codecs"])
    assert "closed-form head" in (tmp_path / "result.md").read_text()
    some = program("--codecs", "--closed-form", "--kinds", "scattered", "--orders", "0")
    assert [row["kind"] for row in some["codecs"]] == ["float"] + ["scattered"] * 6


def test_the_closed_form_is_a_choice_of_the_codec_table(program: Program) -> None:
    with pytest.raises(SystemExit):
        program("--closed-form", "--orders", "0")


def test_runs_in_workers_equal_runs_in_this_process(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = program("--orders", "0", "1", "--methods", "slda")
    settings = config.load({}, {"energy.meters": ""})
    calls = [nicv2.Call("", nicv2_run.run, (nicv2_run.Job("slda", order),)) for order in (0, 1)]
    found = nicv2._perform(calls, SmallSource(), settings, workers=2)
    assert [run["accuracy"] for run in found] == [run["accuracy"] for run in alone["methods"]["slda"]["runs"]]


def test_missing_lists_of_core50_are_told_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nicv2.main(["--core50", str(tmp_path), "--filelists", str(tmp_path), "--orders", "0", "--protocol", "79"]) == 2
    told = capsys.readouterr().out.replace("\n", "")
    assert "train_batch_00_filelist.txt" in told and "train_batch_30_filelist.txt" in told and "and 40 more" in told


def test_core50_without_its_lists_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        nicv2.main(["--core50", "somewhere"])
    assert "--core50 and --filelists belong together" in capsys.readouterr().err


def test_a_quick_run_says_that_it_is_no_result(program: Program, tmp_path: Path) -> None:
    assert program("--quick", "--methods", "nearest-mean")["orders"] == [0]
    assert "no result" in (tmp_path / "result.md").read_text()


def test_a_band_is_over_the_lessons_that_all_orders_have() -> None:
    runs = [{"curve": {"lessons": [1, 2, 3], "accuracy": [10, 20, 30]}}, {"curve": {"lessons": [1, 3], "accuracy": [20, 50]}}]
    assert nicv2_report.band(runs) == {"lessons": [1, 3], "mean": [15.0, 40.0], "std": [5.0, 10.0]}
    assert nicv2_report.band([{"curve": {"lessons": [3], "accuracy": [1]}}]) is None
