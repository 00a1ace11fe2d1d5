"""A daemon whose split lies below the depth: it answers at once, learns its blocks in its sleep, and knows it all after a restart."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List

import httpx
import numpy as np
import pytest

import tiny
from latentd.config import Config
from latentd.energy import board
from latentd.errors import ConfigError
from latentd.learning import gate, jury, learner
from latentd.replay.taught import read_taught
from latentd.service.parts import Parts
from latentd.service.supervisor import Daemon
from service.fakes import WAIT_S, picture

KINDS = ("striped", "dotted")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(board, "read", lambda root: board.Board())  # a machine that throttles would let nobody sleep
    tiny.backbone(tmp_path)
    return settings(tmp_path)


def settings(folder: Path, **flags: Any) -> Config:
    usual = {
        "backbone__split": 1,
        "engine__order": "eager",
        "http__bind": "127.0.0.1:0",
        "energy__meters": "rapl",
        "learn__token_codec": "int4",
        "learn__token_codec_kind": "rotated",
        "learn__token_grid": 3,
        "learn__sleep_first": 8,
        "learn__sleep_epochs": 0.5,
        "learn__sleep_rank": 2,
        "learn__holdout_every": 2,
        "learn__sleep_threads": 1,
    }
    return tiny.settings(folder, **{**usual, **flags})


class Running:
    """A daemon around the tiny backbone, in a thread of its own."""

    def __init__(self, config: Config) -> None:
        self.daemon = Daemon(config)
        self.parts: List[Parts] = []
        start = self.daemon.start
        self.daemon.start = lambda: self.parts.append(start()) or self.parts[-1]  # type: ignore[method-assign, func-returns-value]
        self._thread = threading.Thread(target=self.daemon.run, daemon=True)
        self._thread.start()
        address = config.state_dir / "address"
        while not address.exists() and self._thread.is_alive():
            threading.Event().wait(0.005)
        self.url = address.read_text().strip()

    def post(self, path: str, seed: int, **request: Any) -> Dict[str, Any]:
        headers = {"Content-Type": "image/png", "Prefer": "wait=10"}
        answer = httpx.post(self.url + path, content=picture(seed), headers=headers, trust_env=False, timeout=WAIT_S, **request)
        assert answer.status_code == 200, answer.text
        found: Dict[str, Any] = answer.json()
        return found

    def get(self, path: str) -> Dict[str, Any]:
        found: Dict[str, Any] = httpx.get(self.url + path, trust_env=False, timeout=WAIT_S).json()
        return found

    def wait_for_sleep(self, sleeps: int) -> None:
        while self.get("/v1/status")["version"] < sleeps:
            threading.Event().wait(0.01)

    def end(self) -> None:
        assert self.daemon._server is not None
        self.daemon._server.leave()
        self._thread.join(2 * WAIT_S)
        assert not self._thread.is_alive(), "the daemon did not end"


@pytest.fixture
def running() -> Iterator[Any]:
    made: List[Running] = []

    def start(config: Config) -> Running:
        made.append(Running(config))
        return made[-1]

    yield start
    for daemon in made:
        if daemon._thread.is_alive():
            daemon.end()


def teach(daemon: Running, count: int, first: int = 0) -> None:
    for seed in range(first, first + count):
        assert daemon.post("/v1/learn", seed, params={"label": KINDS[seed % 2]})["results"][0]["state"] == "learned"


def test_it_learns_awake_and_asleep_and_knows_it_after_a_restart(running: Any, config: Config) -> None:
    daemon = running(config)
    teach(daemon, 24)
    daemon.wait_for_sleep(25)  # 24 requests and one sleep
    adapted = daemon.parts[0].learner
    assert adapted.status().state in {"sleeping", "idle", "learning", "yielding"}
    before = [daemon.post("/v1/classify", seed)["results"][0]["predictions"] for seed in range(4)]
    version = daemon.get("/v1/status")["version"]
    daemon.end()

    again = running(config)
    after = [again.post("/v1/classify", seed)["results"][0]["predictions"] for seed in range(4)]
    assert again.get("/v1/status")["version"] >= version
    for one, other in zip(before, after):
        assert [prediction["label"] for prediction in one] == [prediction["label"] for prediction in other]
        np.testing.assert_allclose(
            [prediction["probability"] for prediction in one], [prediction["probability"] for prediction in other], atol=0.02
        )


def test_a_sleep_hurries_no_snapshot(running: Any, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner, "PUBLISH_SHARE", 1e-9)  # the next snapshot that nobody waits for comes in weeks
    daemon = running(config)
    teach(daemon, 2)
    daemon.post("/v1/learn", 99, params={"label": KINDS[0]})
    for seed in range(2, 24):
        asked = {"Content-Type": "image/png"}  # and does not wait for the learner
        answer = httpx.post(
            daemon.url + "/v1/learn", params={"label": KINDS[seed % 2]}, content=picture(seed), headers=asked, trust_env=False
        )
        answer.raise_for_status()
    teach(daemon, 1, first=24)  # somebody waits: there is a snapshot
    daemon.wait_for_sleep(27)  # 26 requests and one sleep
    counted = httpx.get(daemon.url + "/metrics", trust_env=False).text
    assert 'latentd_versions_published_total{cause="learned"} 4.0' in counted


def test_the_memory_says_how_tokens_are_stored(running: Any, config: Config) -> None:
    daemon = running(config)
    assert daemon.get("/v1/memory")["codec"] == "int8 token + int4 rotated (10 tokens)"


@pytest.mark.parametrize("changes", [{"backbone__split": 2}, {"backbone__split": 0}, {"learn__token_codec": "int8"}], ids=str)
def test_with_another_split_or_codec_of_tokens_the_blocks_begin_anew_and_the_floor_knows_all(
    running: Any, config: Config, tmp_path: Path, changes: Dict[str, Any]
) -> None:
    daemon = running(config)
    teach(daemon, 24)
    daemon.wait_for_sleep(25)
    daemon.end()
    for now in (settings(tmp_path, **changes), config):  # there and back
        daemon = running(now)
        found = read_taught(now.state_dir / "journal.sqlite")
        assert len(found.seqs) == 24, "nothing that was taught is lost"
        assert set(found.lengths.tolist()) == {daemon.parts[0].codec.features_bytes}
        memory = daemon.get("/v1/memory")
        assert memory["used"] == 12
        assert (memory["tokens"] or {"used": 0})["used"] == 0
        answer = daemon.post("/v1/classify", 1)["results"][0]
        assert {prediction["label"] for prediction in answer["predictions"]} == set(KINDS)
        daemon.end()


def test_a_grid_that_does_not_fit_the_patches_stops_the_start_and_names_those_that_do(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1, 2, 3, 6 fit"):
        Daemon(settings(tmp_path, learn__token_grid=4)).start()


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that lets blocks in that are no better."""
    for module in (gate, jury):
        monkeypatch.setattr(module, "MIN_HOLDOUT", 1)
    monkeypatch.setattr(gate, "HOLDOUT_Z", float("-inf"))
    monkeypatch.setattr(gate, "CHANCE_Z", float("-inf"))
    monkeypatch.setattr(gate, "MAX_NEGATIVE_FLIPS", 1.0)


def predictions(daemon: Running, seed: int) -> Dict[str, float]:
    found = daemon.post("/v1/classify", seed)["results"][0]["predictions"]
    return {prediction["label"]: prediction["probability"] for prediction in found}


def test_blocks_that_take_part_answer_over_http_before_a_restart_and_after_and_leave_with_what_they_learned(
    running: Any, config: Config, lenient: None
) -> None:
    daemon = running(config)
    teach(daemon, 24)
    daemon.wait_for_sleep(25)
    snapshot = daemon.parts[0].learner.snapshot
    assert snapshot.wants_tokens
    assert daemon.get("/v1/learner")["gate"]["reason"].startswith("takes part")
    before = [predictions(daemon, seed) for seed in range(6)]
    for found in before:
        assert set(found) == set(KINDS)
        assert sum(found.values()) == pytest.approx(1.0)
    taught = daemon.post("/v1/learn", 24, params={"label": KINDS[0]})["results"][0]
    assert taught["state"] == "learned", "the blocks have answered it and learned it"
    before = [predictions(daemon, seed) for seed in range(6)]
    daemon.end()

    again = running(config)
    assert again.parts[0].learner.snapshot.wants_tokens
    for seed, found in enumerate(before):
        now = predictions(again, seed)
        assert [now[kind] for kind in KINDS] == pytest.approx([found[kind] for kind in KINDS], abs=1e-4)
    learned = next(sample["sample_id"] for sample in again.get("/v1/samples")["samples"] if not sample["holdout"])
    assert httpx.delete(f"{again.url}/v1/samples/{learned}", trust_env=False, timeout=WAIT_S).status_code < 300
    while again.parts[0].learner.snapshot.wants_tokens:
        threading.Event().wait(0.005)
    assert set(predictions(again, 0)) == set(KINDS)
