from __future__ import annotations

from pathlib import Path

from cli.conftest import Latentd
from service.fakes import World, picture


def test_a_file_is_answered_with_its_most_probable_labels(asked: Latentd, folder: Path) -> None:
    ran = asked("classify", str(folder / "cat" / "0.png"), "--top-k", "2")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].endswith("0.png  cat")
    assert lines[1].split() == ["cat", "50.0", "%", "##########"]
    assert len(lines) == 3


def test_json_is_one_object_with_a_result_a_file(asked: Latentd, folder: Path) -> None:
    found = asked("classify", str(folder), "--json").json
    assert (found["version"], found["engine"]) == (7, "fake")
    assert [result["decision"] for result in found["results"]] == ["cat"] * 4
    assert found["results"][0]["file"] == str(folder / "cat" / "0.png")


def test_stdin_is_classified(asked: Latentd) -> None:
    ran = asked("classify", "-", stdin=picture(1))
    assert ran.code == 0
    assert ran.out.startswith("stdin  cat")


def test_a_file_that_is_no_image_stops_no_other(asked: Latentd, folder: Path) -> None:
    (folder / "cat" / "bad.jpg").write_text("text")
    ran = asked("classify", str(folder))
    assert ran.code == 4
    assert ran.out.count("  cat\n") == 4
    assert "bad.jpg: " in ran.err


def test_a_file_that_is_absent_is_exit_code_1(asked: Latentd, folder: Path) -> None:
    ran = asked("classify", str(folder / "absent.jpg"), str(folder / "cat" / "0.png"), "--json")
    assert ran.code == 1
    assert [sorted(result)[0] for result in ran.json["results"]] == ["file", "decision"]


def test_before_anything_was_taught_it_says_how_to_begin(asked: Latentd, world: World) -> None:
    world.learner.snapshot.labels = ()
    ran = asked("classify", "-", stdin=picture(1))
    assert ran.code == 0
    assert ran.out == "stdin  unknown\n"
    assert "latentd learn" in ran.err


def test_a_label_that_looks_like_markup_is_printed_as_it_is(asked: Latentd, world: World) -> None:
    world.learner.snapshot.labels = ("[red]x[/red]", ":smile:")
    out = asked("classify", "-", stdin=picture(1)).out
    assert "[red]x[/red]" in out
    assert ":smile:" in out


def test_a_folder_without_images_is_said_so(latentd: Latentd, tmp_path: Path) -> None:
    assert latentd("classify", str(tmp_path)).code == 1
