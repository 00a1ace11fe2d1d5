from __future__ import annotations

from pathlib import Path
from typing import List

import pytest

from cli.conftest import Latentd
from latentd.cli import sending
from latentd.cli.client import Client
from latentd.errors import NoAnswer
from service.fakes import World, picture


def taught(world: World) -> List[str]:
    return sorted(f"{record.name} {record.samples}" for record in world.parts.journal.classes())


def test_a_file_is_taught_and_waited_for(asked: Latentd, world: World, folder: Path) -> None:
    ran = asked("learn", "--label", "cat", str(folder / "cat" / "0.png"))
    assert (ran.code, ran.err) == (0, "")
    assert "is learned as cat (s00000001)" in ran.out
    assert taught(world) == ["cat 1"]


def test_no_wait_ends_once_all_is_stored(asked: Latentd, world: World, folder: Path) -> None:
    world.learner.learns = False
    ran = asked("learn", "--no-wait", "--label", "cat", str(folder / "cat"))
    assert ran.code == 0
    assert "Stored safely" in ran.out
    assert taught(world) == ["cat 2"]
    world.learner.finish()


def test_a_folder_teaches_each_of_its_folders_as_a_class(asked: Latentd, world: World, folder: Path) -> None:
    ran = asked("learn", str(folder))
    assert ran.code == 0
    assert taught(world) == ["cat 2", "dog 2"]
    assert "Learned; version 7 answers now." in ran.out


def test_learning_again_says_what_is_known_already(asked: Latentd, world: World, folder: Path) -> None:
    asked("learn", str(folder))
    again = asked("learn", str(folder), "--json")
    assert again.code == 0
    assert again.json["counts"] == {"duplicate": 4}
    assert taught(world) == ["cat 2", "dog 2"]
    one = asked("learn", "--label", "cat", str(folder / "cat" / "0.png"))
    assert "almost the same as one you taught before (s00000001)" in one.out


def test_bad_files_are_told_at_the_end_and_stop_nothing(asked: Latentd, world: World, folder: Path) -> None:
    (folder / "cat" / "text.jpg").write_text("not an image")
    (folder / "dog" / "gone.jpg").symlink_to(folder / "nowhere")
    ran = asked("learn", str(folder), "--json")
    assert ran.code == 1
    assert taught(world) == ["cat 2", "dog 2"]
    results = {Path(result["file"]).name: result for result in ran.json["results"]}
    assert results["text.jpg"]["problem"]["code"] == "unsupported-media-type"
    assert results["gone.jpg"]["problem"]["code"] == "file-unusable"
    assert ran.json["counts"] == {"learned": 4, "problem": 2}
    told = asked("learn", str(folder)).err
    assert "text.jpg: " in told
    assert "gone.jpg: No such file" in told


def test_what_only_the_daemon_refused_is_exit_code_4(asked: Latentd, folder: Path) -> None:
    (folder / "cat" / "text.jpg").write_text("not an image")
    assert asked("learn", str(folder)).code == 4


def test_one_image_that_brings_down_its_batch_is_told_from_the_others(asked: Latentd, world: World, tmp_path: Path) -> None:
    for index, content in enumerate((b"plain text", b"\xff\xd8 broken", b"")):
        (tmp_path / f"{index}.jpg").write_bytes(content)
    ran = asked("learn", "--label", "cat", *(str(tmp_path / f"{index}.jpg") for index in range(3)), "--json")
    assert ran.code == 4
    codes = [result["problem"]["code"] for result in ran.json["results"]]
    assert codes[0] == "unsupported-media-type"
    assert len(set(codes)) > 1
    assert taught(world) == []


def test_a_folder_larger_than_a_request_goes_in_several(asked: Latentd, world: World, tmp_path: Path) -> None:
    for index in range(37):
        (tmp_path / f"{index:02}.png").write_bytes(picture(index))
    ran = asked("learn", "--label", "cat", str(tmp_path), "--json")
    assert ran.code == 0
    assert [Path(result["file"]).name for result in ran.json["results"]] == [f"{index:02}.png" for index in range(37)]
    assert {result["state"] for result in ran.json["results"][-5:]} == {"learned"}
    assert taught(world) == ["cat 37"]


def test_a_daemon_that_stays_full_ends_the_run_with_what_was_done(
    asked: Latentd, world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "PATIENCE_S", 0.0)
    world.learner.lag_samples = 1 << 20
    ran = asked("learn", str(folder), "--json")
    assert ran.code == 4
    assert ran.json["problem"]["code"] == "overloaded"
    assert ran.json["results"] == []


def test_a_daemon_that_goes_away_leaves_a_run_that_can_be_repeated(
    asked: Latentd, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(20):
        (tmp_path / f"{index:02}.png").write_bytes(picture(index))
    post, posts = Client.send, []

    def once(client: Client, method: str, path: str, **request: object) -> object:
        posts.append(path)
        if posts.count("/v1/learn") == 2:
            raise NoAnswer("The connection broke.")
        return post(client, method, path, **request)  # type: ignore[arg-type]

    with monkeypatch.context() as broken:
        broken.setattr(Client, "send", once)
        ran = asked("learn", "--label", "cat", str(tmp_path))
    assert ran.code == 3
    assert "run the same command again" in ran.err
    assert taught(world) == ["cat 16"]
    assert asked("learn", "--label", "cat", str(tmp_path), "--json").json["counts"] == {"duplicate": 16, "learned": 4}


def test_ctrl_c_says_how_far_it_came(asked: Latentd, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **more: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(sending, "_post", interrupted)
    ran = asked("learn", str(folder))
    assert ran.code == 130
    assert "Stopped after 0 of 4 files; run the same command again" in ran.err
    assert "Traceback" not in ran.err


def test_an_empty_folder_is_said_so_and_nothing_is_asked(latentd: Latentd, tmp_path: Path) -> None:
    ran = latentd("learn", str(tmp_path), "--json")
    assert ran.code == 1
    assert "holds no images" in ran.json["problem"]["detail"]


def test_stdin_is_taught(asked: Latentd, world: World) -> None:
    assert asked("learn", "--label", "cat", "-", stdin=picture(3)).code == 0
    assert taught(world) == ["cat 1"]


def test_files_without_a_label_are_a_usage_error(latentd: Latentd, folder: Path) -> None:
    ran = latentd("learn", str(folder / "cat" / "0.png"))
    assert ran.code == 2
    assert "--label" in ran.err


def test_files_passed_over_are_counted(asked: Latentd, folder: Path) -> None:
    (folder / "cat" / "notes.txt").write_text("x")
    assert "1 other files were passed over" in asked("learn", str(folder)).err
