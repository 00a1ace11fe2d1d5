"""`latentd tune` on a tiny backbone: real engines, real steps, made-up pictures, boxes of milliseconds."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
from PIL import Image

import tiny
from cli.conftest import Latentd, Ran
from latentd import config
from latentd.engines.stage import split_of, stage_spec
from latentd.replay.journal import Journal
from latentd.replay.latents import TokenPool, make_latent_codec
from latentd.replay.limits import JournalLimits
from latentd.replay.memory import slot_bytes
from latentd.replay.records import NewSample
from latentd.service.state_folder import StateFolder
from latentd.vision.checkpoints import Backbone

WIDTH, CLASS_TOKENS = tiny.DINOV2.width, 2
FEATURES = (CLASS_TOKENS, WIDTH)
WAIT_S = 20.0  # nothing here takes that long; it bounds a test that fails
QUICK = ("--box-s", "0.01", "--sleep-s", "0.1", "--token-grids", "0,3", "--splits", "3,2", "--codecs", "int8:token,int3:rotated")


@pytest.fixture
def backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, latentd: Latentd) -> Backbone:
    """Installed, configured, and every part on one thread: threads that wait for each other are slow where tests run side by side."""
    keys = {"STATE__CACHE_DIR": tmp_path / "cache", "BACKBONE__NAME": "tiny", "BACKBONE__IMAGE_SIZE": tiny.SIZE}
    more = {"BACKBONE__CLASS_TOKENS": CLASS_TOKENS, "ENGINE__THREADS": 1, "LEARN__SLEEP_THREADS": 1, "ENERGY__METERS": "rapl"}
    for name, value in {**keys, **more, "LEARN__MINIBATCH": 16, "ENGINE__ORDER": "eager"}.items():
        monkeypatch.setenv(f"LATENTD_{name}", str(value))
    return tiny.backbone(tmp_path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes that any features tell apart, 24 pictures each, and one file that is no picture."""
    dice = np.random.default_rng(0)
    for index, label in enumerate(("dark", "light")):
        folder = tmp_path / "images" / label
        folder.mkdir(parents=True)
        for number in range(24):
            shade = np.clip(dice.normal(60 + 130 * index, 20, (8, 8, 3)), 0, 255)
            file = io.BytesIO()
            Image.fromarray(shade.astype(np.uint8)).resize((tiny.SIZE, tiny.SIZE), Image.Resampling.NEAREST).save(file, "PNG")
            (folder / f"{number}.png").write_bytes(file.getvalue())
    (tmp_path / "images" / "dark" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "images"


def settings() -> config.Config:
    return config.load(os.environ, {}, is_service=False)


def candidates(ran: Ran) -> List[Dict[str, Any]]:
    found: List[Dict[str, Any]] = ran.json["candidates"]
    return found


def test_everything_is_measured_and_the_written_file_is_a_configuration(
    backbone: Backbone, pictures: Path, latentd: Latentd, tmp_path: Path
) -> None:
    file = tmp_path / "conf.d" / "tuned.toml"
    file.parent.mkdir()
    ran = latentd("tune", *QUICK, "--images", str(pictures), "--memory", "8MB", "--write", str(file), "--json")
    assert ran.code == 0, ran.err
    assert "broken.png is left out" in ran.err
    found = candidates(ran)
    assert [(each["split"], each["tokens"], each["codec"]) for each in found] == [
        (split, tokens, codec) for split, tokens in ((3, 0), (2, 37), (2, 10)) for codec in ("int8", "int3")
    ]
    for each in found:
        assert each["latency_s"] > 0
        assert each["step_s"] > 0
        assert each["learning_bytes"] <= 8_000_000
        assert each["accuracy"]["count"] == 12
        assert each["accuracy"]["value"] >= 0.9  # two shades
    chosen = found[ran.json["recommended"]]
    loaded = config.load({}, {}, system=tmp_path, is_service=False)
    learn, below = loaded.learn, chosen["tokens"] > 0
    stored = (learn.token_codec, learn.token_codec_kind) if below else (learn.codec, learn.codec_kind)
    assert stored == (chosen["codec"], chosen["codec_kind"])
    assert learn.token_grid == chosen["token_grid"]
    assert learn.replay_bytes + (learn.token_bytes if below else 0) == chosen["replay_bytes"]
    assert split_of(loaded.backbone.split, 3) == chosen["split"]
    written = {key for key, origin in loaded.origins.items() if origin == str(file)}
    assert written == {key for key, value in config.as_table(loaded).items() if value != default(key)} - {"state.dir", "state.cache_dir"}


def default(key: str) -> Any:
    return next(row.default for row in config.rows() if row.key == key)


def test_bytes_are_what_the_codec_and_the_replay_memory_say(backbone: Backbone, latentd: Latentd) -> None:
    pools = {0: TokenPool(1, 6), 3: TokenPool(1, 6, 3)}
    for each in candidates(latentd("tune", *QUICK, "--json")):
        pool = pools[each["token_grid"]]
        tokens = (pool.tokens, WIDTH) if each["tokens"] else None
        codec = make_latent_codec(each["codec"], each["codec_kind"], FEATURES, tokens, pool=pool)
        assert each["latent_bytes"] == codec.code_bytes
        assert each["slots"] == 1500
        alone, features = slot_bytes(codec.code_bytes), slot_bytes(codec.features_bytes)
        assert each["replay_bytes"] == 1500 * (math.ceil(8 / 7 * alone) + 4 * features if tokens else alone)
        held_bytes = codec.features_bytes + (4 * 2 * WIDTH if tokens else 0)  # one block learns: its class token, and the mean patch
        assert each["holdout_latents"] == 1500 // 9
        assert each["learning_bytes"] == each["fixed_bytes"] + each["replay_bytes"] + each["holdout_latents"] * held_bytes


def test_where_memory_is_short_a_step_takes_one_latent_at_a_time(
    backbone: Backbone, latentd: Latentd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTD_LEARN__MICROBATCH", "8")
    wide = candidates(latentd("tune", *QUICK, "--json"))
    assert {each["microbatch"] for each in wide} == {8}
    ran = latentd("tune", *QUICK, "--memory", "100KB", "--json")
    assert {(each["split"], each["microbatch"]) for each in candidates(ran)} == {(3, 8), (2, 1)}


def test_a_codec_of_patches_is_measured_only_where_patches_are_stored(backbone: Backbone, latentd: Latentd) -> None:
    ran = latentd("tune", *QUICK, "--codecs", "int3:spatial,int8:tensor", "--json")
    assert [(each["split"], each["codec_kind"]) for each in candidates(ran)] == [
        (3, "tensor"),
        (2, "spatial"),
        (2, "spatial"),
    ]


def test_without_images_and_without_a_state_folder_accuracy_is_unknown_with_the_reason(backbone: Backbone, latentd: Latentd) -> None:
    ran = latentd("tune", *QUICK, "--json")
    assert {each["accuracy"] for each in candidates(ran)} == {None}
    assert {each["accuracy_reason"] for each in candidates(ran)} == {ran.json["accuracy_source"]}
    assert "nothing was taught yet" in ran.json["accuracy_source"]
    assert "nothing is known of accuracy" in ran.json["reason"]


def test_without_a_meter_energy_is_unavailable_with_the_reason(
    backbone: Backbone, latentd: Latentd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTD_ENERGY__METERS", "")
    ran = latentd("tune", *QUICK, "--json")
    assert ran.json["energy"]["source"] is None
    assert "no meter is configured" in ran.json["energy"]["reason"]
    assert {each[key] for each in candidates(ran) for key in ("power_w", "image_j", "step_j")} == {None}
    human = latentd("tune", *QUICK, "--splits", "3")
    assert human.code == 0
    assert "Energy unavailable: no meter is configured" in human.err
    assert "Recommended: split 3, int8 token" in human.out
    assert "replay_bytes = " in human.out


def test_a_limit_of_power_is_refused_where_no_meter_reads(backbone: Backbone, latentd: Latentd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTD_ENERGY__METERS", "")
    ran = latentd("tune", *QUICK, "--power-w", "10")
    assert ran.code == 1
    assert "a limit of power can't be kept" in ran.err
    assert "Leave --power-w out" in ran.err


def test_limits_that_nothing_keeps_end_with_the_nearest_candidate_and_no_file(backbone: Backbone, latentd: Latentd, tmp_path: Path) -> None:
    file = tmp_path / "tuned.toml"
    ran = latentd("tune", *QUICK, "--memory", "100KB", "--write", str(file), "--json")
    assert ran.code == 1
    assert "The nearest is split" in ran.err
    assert "the limit is 0.1 MB" in ran.err
    assert not file.exists()
    assert ran.json["recommended"] is None
    assert ran.json["toml"] is None
    assert ran.json["candidates"][ran.json["nearest"]]["outside"]


def test_a_file_that_is_there_is_overwritten_only_when_told(backbone: Backbone, latentd: Latentd, tmp_path: Path) -> None:
    file = tmp_path / "tuned.toml"
    file.write_text("mine")
    ran = latentd("tune", *QUICK, "--write", str(file))
    assert (ran.code, file.read_text()) == (1, "mine")
    assert "--force" in ran.err
    assert latentd("tune", *QUICK, "--splits", "3", "--write", str(file), "--force").code == 0
    assert file.read_text().startswith("# latentd tune: split 3")


def teach(backbone: Backbone, split: int = 0) -> None:
    """Fills the state folder with 12 latents of each of two classes, as a daemon of this split would."""
    chosen = settings()
    spec = stage_spec(chosen, backbone)
    pool = TokenPool(1, 6)
    codec = make_latent_codec("int8", "token", FEATURES, (pool.tokens, WIDTH) if split else None, pool=pool)
    facts = {"backbone_sha256": spec.backbone_sha256, "image_size": spec.image_size, "class_tokens": CLASS_TOKENS, **codec.identity()}
    dice = np.random.default_rng(3)
    journal = Journal(
        chosen.state_dir / "journal.sqlite", codec=codec, feature_width=spec.features_width, limits=JournalLimits(1 << 26, 1.5, 0, 50, 100)
    )
    chosen.state_dir.mkdir(parents=True, exist_ok=True)
    journal.start(WAIT_S)
    journal.put_counters("latents", {**facts, **({"split": split} if split else {})}).result(WAIT_S)
    batch = []
    for number in range(24):
        shift = 3.0 * (number % 2)
        features = (dice.standard_normal((1, CLASS_TOKENS * WIDTH)) + shift).astype(np.float32)
        tokens = (dice.standard_normal((1, pool.tokens, WIDTH)) + shift).astype(np.float32) if split else None
        batch.append(
            NewSample("even" if number % 2 else "odd", codec.encode(features, tokens)[0].tobytes(), features[0], f"{number:032d}" * 2)
        )
    journal.admit(batch).result(WAIT_S)
    journal.close(WAIT_S)


def test_without_images_accuracy_is_asked_on_what_was_taught_at_that_split_only(backbone: Backbone, latentd: Latentd) -> None:
    teach(backbone)
    ran = latentd("tune", *QUICK, "--json")
    known = [each["split"] for each in candidates(ran) if each["accuracy"] is not None]
    assert known == [3, 3]
    assert candidates(ran)[0]["accuracy"]["count"] == 10
    assert "24 of 24 taught latents, stored as int8 token" in ran.json["accuracy_source"]
    assert {each["accuracy_reason"] for each in candidates(ran) if each["split"] == 2} == {
        "the stored latents are of another split or other tokens"
    }


def test_stored_tokens_let_their_split_be_asked_in_every_pooling(backbone: Backbone, latentd: Latentd) -> None:
    teach(backbone, split=2)
    known = [(each["split"], each["tokens"]) for each in candidates(latentd("tune", *QUICK, "--json")) if each["accuracy"] is not None]
    assert set(known) == {(3, 0), (2, 37), (2, 10)}


def test_latents_of_another_backbone_say_nothing(backbone: Backbone, latentd: Latentd, monkeypatch: pytest.MonkeyPatch) -> None:
    teach(backbone)
    monkeypatch.setenv("LATENTD_BACKBONE__CLASS_TOKENS", "1")
    ran = latentd("tune", *QUICK, "--splits", "3", "--json")
    assert ran.code == 0
    assert {each["accuracy"] for each in candidates(ran)} == {None}
    assert "of another kind (other class tokens)" in ran.json["accuracy_source"]


def test_a_running_daemon_keeps_its_state_to_itself(backbone: Backbone, latentd: Latentd) -> None:
    teach(backbone)
    folder = StateFolder(settings().state_dir)
    try:
        ran = latentd("tune", *QUICK, "--splits", "3", "--json")
    finally:
        folder.close()
    assert "stop it, or give --images" in ran.json["accuracy_source"]
    assert "disturbs the figures" in ran.err
    assert {each["accuracy"] for each in candidates(ran)} == {None}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--memory", "many"), "not an amount"),
        (("--splits", "4"), "1 to 3"),
        (("--codecs", "int8:round"), "is no codec"),
        (("--slots", "8"), "learn.minibatch"),
    ],
)
def test_arguments_that_mean_nothing_are_usage_errors(backbone: Backbone, latentd: Latentd, arguments: tuple[str, ...], told: str) -> None:
    ran = latentd("tune", *arguments)
    assert ran.code == 2
    assert told in " ".join(ran.err.replace("│", " ").split())


def test_images_of_one_class_are_refused_with_what_to_do(backbone: Backbone, latentd: Latentd, tmp_path: Path) -> None:
    (tmp_path / "alone" / "cat").mkdir(parents=True)
    (tmp_path / "alone" / "cat" / "1.png").write_bytes(b"x")
    ran = latentd("tune", "--images", str(tmp_path / "alone"))
    assert ran.code == 1
    assert "accuracy needs two" in ran.err
    assert "one folder a class" in ran.err
