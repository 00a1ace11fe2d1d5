"""The daemon's life with its real journal, ledger and learner, around a frozen stage without a model."""

from __future__ import annotations

import logging
import socket
import threading
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional

import httpx
import numpy as np
import pytest

from latentd.cli.client import Client
from latentd.config import Config, EnergyConfig, HttpConfig, LearnConfig, LogConfig, MemoryConfig, StateConfig
from latentd.engines.choose import Attempt, Choice
from latentd.errors import ConfigError, EngineError, StateInUse
from latentd.replay.records import NewSample
from latentd.service import building, late_heads, supervisor
from latentd.service.listener import Listener
from latentd.service.parts import Parts
from latentd.service.supervisor import Daemon
from latentd.service.vitals import Vitals
from latentd.vision import checkpoints
from latentd.vision.probe import probe_images
from service.fakes import BACKBONE, SPEC, WAIT_S, FakeStage, World, picture
from service.test_vitals import Told


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> List[FakeStage]:
    """Every frozen stage that a daemon opened; none needs weights."""
    made: List[FakeStage] = []

    def choose(config: Config, backbone: Any, images: Any) -> Choice:
        made.append(FakeStage())
        return Choice(made[-1], (Attempt("fake", "serving", "the only one", 1.0),))

    monkeypatch.setattr(checkpoints, "find", lambda cache_dir, name: BACKBONE)
    monkeypatch.setattr(building, "stage_spec", lambda config, backbone: SPEC)
    monkeypatch.setattr(building, "choose", choose)
    return made


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(
        http=HttpConfig(bind="127.0.0.1:0"),
        state=StateConfig(dir=str(tmp_path / "state"), cache_dir=str(tmp_path / "cache")),
        energy=EnergyConfig(meters=("rapl",), max_temperature_c=150.0),
        memory=MemoryConfig(reserve_bytes=0),
        learn=LearnConfig(holdout_every=0),
    )


class Running:
    """A daemon whose run() is in a thread of its own."""

    def __init__(self, config: Config, environ: Optional[Mapping[str, str]] = None) -> None:
        self.daemon = Daemon(config, environ=environ)
        self.config = config
        self.error: Optional[BaseException] = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        address = config.state_dir / "address"
        while not address.exists() and self._thread.is_alive():
            threading.Event().wait(0.005)
        self.url = address.read_text().strip() if address.exists() else ""

    def _run(self) -> None:
        try:
            self.daemon.run()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def end(self) -> None:
        assert self.daemon._server is not None
        self.daemon._server.leave()
        self.join()

    def hang_up(self) -> None:
        """SIGHUP, from another thread: the daemon's own reload, on its event loop."""
        done = threading.Event()
        loop = self.daemon.loop
        assert loop is not None

        def reload() -> None:
            self.daemon.reload()
            done.set()

        loop.call_soon_threadsafe(reload)
        assert done.wait(WAIT_S)

    def join(self) -> None:
        self._thread.join(2 * WAIT_S)
        assert not self._thread.is_alive(), "the daemon did not end"

    def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        return httpx.request(method, self.url + path, trust_env=False, timeout=WAIT_S, **request)


@pytest.fixture
def running(stages: List[FakeStage]) -> Any:
    made: List[Running] = []

    def start(config: Config) -> Running:
        made.append(Running(config))
        return made[-1]

    yield start
    for daemon in made:
        if daemon._thread.is_alive():
            daemon.end()


Start = Callable[[Config], Running]


def teach(daemon: Running, seed: int, label: str) -> Dict[str, Any]:
    answer = daemon.call(
        "POST", "/v1/learn", params={"label": label}, content=picture(seed), headers={"Content-Type": "image/png", "Prefer": "wait=5"}
    )
    assert answer.status_code == 200, answer.text
    found: Dict[str, Any] = answer.json()["results"][0]
    return found


def test_what_was_taught_is_known_at_once_and_after_a_restart(running: Start, config: Config, stages: List[FakeStage]) -> None:
    first = running(config)
    for seed, label in enumerate(["cat", "dog", "cat", "dog"]):
        assert teach(first, seed, label)["state"] == "learned"
    answers = [
        first.call("POST", "/v1/classify", files=[("image", picture(seed))]).json()["results"][0]["predictions"] for seed in range(4)
    ]
    assert {prediction["label"] for prediction in answers[0]} == {"cat", "dog"}
    first.end()
    assert first.error is None
    assert stages[0].closed

    second = running(config)
    again = [second.call("POST", "/v1/classify", files=[("image", picture(seed))]).json()["results"][0]["predictions"] for seed in range(4)]
    assert again == answers
    assert [entry["name"] for entry in second.call("GET", "/v1/classes").json()["classes"]] == ["cat", "dog"]


def test_it_says_where_it_listens_in_one_line_and_becomes_ready(running: Start, config: Config, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    daemon = running(config)
    while daemon.call("GET", "/readyz").status_code != 200:
        threading.Event().wait(0.01)
    daemon.end()
    lines = [record.getMessage() for record in caplog.records if "listening" in record.getMessage()]
    assert lines == [f"listening on {daemon.url}"]
    assert not (config.state_dir / "address").exists()


def test_two_daemons_never_share_a_state_folder(running: Start, config: Config) -> None:
    running(config)
    with pytest.raises(StateInUse, match="process"):
        Daemon(config).start()


def test_an_address_that_others_can_reach_is_refused_before_anything_starts(config: Config, stages: List[FakeStage]) -> None:
    with pytest.raises(ConfigError, match="other machines"):
        Daemon(replace(config, http=HttpConfig(bind="0.0.0.0:0"))).run()
    assert stages == []


def test_the_death_of_the_inference_thread_ends_the_daemon_with_an_error(running: Start, config: Config, stages: List[FakeStage]) -> None:
    daemon = running(config)
    stages[0].error = SystemError("the device is gone")
    for _ in range(3):
        daemon_answer = daemon.call("POST", "/v1/classify", files=[("image", picture())])
        assert (daemon_answer.status_code, daemon_answer.json()["code"]) == (503, "engine-failed")
    daemon.join()
    assert isinstance(daemon.error, EngineError)
    assert "inference thread died" in daemon.error.detail
    assert daemon.daemon._last_resort.finished.is_set(), "the process would be cut short although it ended by itself"
    assert stages[0].closed


def test_a_start_that_fails_leaves_nothing_running_and_the_folder_free(
    config: Config, stages: List[FakeStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Choice:
        raise EngineError("no engine can serve")

    with monkeypatch.context() as patch:
        patch.setattr(building, "choose", broken)
        with pytest.raises(EngineError):
            Daemon(config).start()
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"journal", "meter", "inference", "learner"}
    daemon = Daemon(config)
    daemon.start()
    daemon.stop()


def test_latents_of_another_backbone_are_never_mixed_in(config: Config, stages: List[FakeStage], monkeypatch: pytest.MonkeyPatch) -> None:
    first = Daemon(config)
    admit(first.start())
    first.stop()
    monkeypatch.setattr(building, "stage_spec", lambda config, backbone: replace(SPEC, backbone_sha256="0" * 64))
    with pytest.raises(ConfigError, match="backbone_sha256 was ffff") as refused:
        Daemon(config).start()
    assert "--state-dir" in refused.value.hint


def test_a_state_folder_without_anything_taught_takes_any_codec(config: Config, stages: List[FakeStage]) -> None:
    for kind in ("token", "rotated", "tensor"):
        daemon = Daemon(with_codec(config, kind))
        parts = daemon.start()
        assert parts.learner.memory().codec == f"int8 {kind}"
        if kind == "tensor":
            admit(parts)
        daemon.stop()
    with pytest.raises(ConfigError, match="codec was int8 tensor, now int8 token"):
        Daemon(with_codec(config, "token")).start()


def test_a_codec_that_needs_calibration_gets_it_from_probe_images_once(config: Config, stages: List[FakeStage]) -> None:
    first = Daemon(with_codec(config, "tensor"))
    parts = first.start()
    features = stages[0].encode(probe_images(SPEC.image_size)).features
    assert parts.codec.features.parameters.tolist() == [features.min(), features.max()]
    admit(parts)
    first.stop()
    assert len(stages) == 1, "the stage that serves is the one that measures"
    second = Daemon(with_codec(config, "tensor"))
    again = second.start()
    assert again.codec.identity() == parts.codec.identity()
    assert stages[1].batches == [], "a calibration that is there is read, not measured"
    second.stop()
    (config.state_dir / "calibration.safetensors").unlink()
    with pytest.raises(ConfigError, match="calibration"):
        Daemon(with_codec(config, "tensor")).start()


def test_a_codec_across_patches_is_a_configuration_error_where_the_head_alone_learns(config: Config, stages: List[FakeStage]) -> None:
    with pytest.raises(ConfigError, match="codec_kind"):
        Daemon(with_codec(config, "spatial")).start()


def with_codec(config: Config, kind: str) -> Config:
    return replace(config, learn=replace(config.learn, codec_kind=kind))


def admit(parts: Parts) -> None:
    """Admits one image that nobody saw, and waits until it is durable."""
    features = np.random.default_rng(0).random(SPEC.features_width, dtype=np.float32)
    parts.journal.admit([NewSample("cat", parts.codec.encode(features[None])[0].tobytes(), features, "0" * 64)]).result(WAIT_S)


def test_joules_counted_by_the_run_before_are_carried_on(config: Config, stages: List[FakeStage]) -> None:
    first = Daemon(config)
    parts = first.start()
    parts.ledger.unavailable("so that an interval is closed")
    with parts.ledger.activity("classify", images=5):
        pass
    parts.ledger.unavailable("so that an interval is closed")
    first.stop()
    second = Daemon(config)
    carried = second.start().ledger.report().activities["classify"].count
    second.stop()
    assert carried == 5


def test_a_reload_changes_the_live_keys_while_it_serves(running: Start, config: Config, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    wanted: List[Config] = []
    daemon = running(config)
    daemon.daemon._reload = lambda: wanted[-1]
    changed = replace(config, learn=replace(config.learn, max_lag_samples=77, seed=5), log=LogConfig("warning"))

    def reload() -> Dict[str, Any]:
        daemon.hang_up()
        found: Dict[str, Any] = daemon.call("GET", "/v1/status").json()
        return found

    wanted.append(changed)
    assert reload()["needs_restart"] == ["learn.seed"]
    assert daemon.call("GET", "/v1/status").json()["queues"]["learner"]["capacity"] == 77
    assert daemon.call("GET", "/v1/info").json()["config"]["learn.seed"]["value"] == 0
    wanted.append(config)
    found = reload()
    assert (found["needs_restart"], found["queues"]["learner"]["capacity"]) == ([], config.learn.max_lag_samples)


def test_a_broken_configuration_keeps_the_old_one(running: Start, config: Config, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Config:
        raise ConfigError("unknown key lern.seed in config.toml", hint="Did you mean learn.seed?")

    daemon = running(config)
    daemon.daemon._reload = broken
    daemon.hang_up()
    assert daemon.call("GET", "/livez").status_code == 200
    assert "unknown key lern.seed in config.toml (Did you mean learn.seed?)" in caplog.text
    assert daemon.daemon.config == config


def test_who_never_ends_a_request_head_is_cut_off_and_nobody_else_is(
    running: Start, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(late_heads, "HEAD_S", 1.0)
    daemon = running(config)
    host, port = daemon.url[7:].split(":")
    address = (host, int(port))
    image = picture(0)
    head = (
        f"POST /v1/classify HTTP/1.1\r\nHost: {daemon.url[7:]}\r\nContent-Type: image/png\r\nContent-Length: {len(image)}\r\n\r\n".encode()
    )
    with ExitStack() as open_ones, caplog.at_level(logging.INFO, "latentd"):

        def connected(sent: bytes) -> socket.socket:
            connection: socket.socket = open_ones.enter_context(socket.create_connection(address, WAIT_S))
            connection.sendall(sent)
            return connection

        whole, again = connected(head + image[:-1]), connected(head + image)
        assert again.recv(1 << 16).startswith(b"HTTP/1.1 200")
        again.sendall(head[:20])  # of its second request
        silent, dripping = connected(b""), connected(b"P")
        stop = threading.Event()
        dripper = threading.Thread(target=_drip, args=(dripping, stop))
        dripper.start()
        for late in (silent, dripping, again):
            _await_end(late)
        stop.set()
        dripper.join(WAIT_S)
        whole.sendall(image[-1:])
        assert whole.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert "no whole request head" in caplog.text


def _drip(connection: socket.socket, stop: threading.Event) -> None:
    """A head of many lines, a byte at a time."""
    with suppress(OSError):
        while not stop.wait(0.02):
            connection.sendall(b"a")


def _await_end(connection: socket.socket) -> None:
    """Until the server closes it; TimeoutError where it does not."""
    with suppress(ConnectionResetError):
        while connection.recv(1 << 16):
            pass


def test_the_service_manager_hears_of_the_whole_life(
    config: Config, stages: List[FakeStage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(WAIT_S)
        daemon = Running(config, {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "300000"})
        heard: List[str] = []
        while heard.count("WATCHDOG=1") < 3:
            heard += manager.recv(4096).decode().split("\n")
        daemon.end()
        while "STOPPING=1" not in heard:
            heard += manager.recv(4096).decode().split("\n")
    words = [line.split("=")[0] for line in heard]
    assert words[:2] == ["STATUS", "EXTEND_TIMEOUT_USEC"]
    assert words.index("READY") < words.index("WATCHDOG") < words.index("STOPPING")


def test_a_socket_that_systemd_opened_is_served(
    config: Config, stages: List[FakeStage], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "latentd.sock"
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(path))
    unix.listen()
    monkeypatch.setattr(supervisor, "adopt", lambda environ: Listener(unix, f"unix:{path}"))
    daemon = Running(config)
    assert daemon.url == f"unix:{path}"
    with Client(daemon.url) as client:
        assert client.get("/livez") == {"status": "ok"}
    daemon.end()
    assert daemon.error is None


def test_a_reload_before_the_first_answer_does_not_make_it_ready(config: Config, world: World) -> None:
    daemon, told = Daemon(config, reload=lambda: config), Told()
    daemon._notifier, daemon._vitals = told, Vitals(world.parts, told)
    daemon.reload()
    assert told.sent == []
    daemon._vitals.is_ready = True
    daemon.reload()
    assert told.sent[0] == "RELOADING=1"
    assert "READY=1" in told.sent
