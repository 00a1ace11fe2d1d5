"""The configuration: order of the sources, ranges, and errors that name the key, the source and the nearest key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Dict

import pytest

from latentd import config, configtext
from latentd.errors import ConfigError

DOCS = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"


def load(system: Path, environ: Dict[str, str], **flags: object) -> config.Config:
    return config.load(environ, {key.replace("__", "."): value for key, value in flags.items()}, system=system, is_service=False)


def test_each_source_overrides_the_one_before_and_the_origin_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[learn]\nepochs = 1.0\nseed = 1\nminibatch = 16\n")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "10-site.toml").write_text("[learn]\nseed = 2\nminibatch = 32\n")
    found = load(tmp_path, {"HOME": "/h", "LATENTD_LEARN__MINIBATCH": "64", "LATENTD_LOG__LEVEL": "error"}, log__level="debug")
    assert (found.learn.epochs, found.learn.seed, found.learn.minibatch, found.log.level) == (1.0, 2, 64, "debug")
    assert found.origins["learn.epochs"] == str(tmp_path / "config.toml")
    assert found.origins["learn.seed"] == str(tmp_path / "conf.d" / "10-site.toml")
    assert found.origins["learn.minibatch"] == "environment variable LATENTD_LEARN__MINIBATCH"
    assert found.origins["log.level"] == "command line"
    assert found.origins["learn.codec"] == "default"


def test_a_flag_that_was_not_given_overrides_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, {"HOME": "/h"}, http__bind=None).http.bind == config.HttpConfig().bind


@pytest.mark.parametrize(
    ("environ", "said", "hint"),
    [
        ({"LATENTD_LEARN__EPOCH": "1"}, "unknown key learn.epoch", "learn.epochs"),
        ({"LATENTD_LEARN__EPOCHS": "many"}, "learn.epochs = 'many'", "goes over"),
        ({"LATENTD_LEARN__MINIBATCH": "1"}, "must be 8 to 4096 latents", "training step"),
        ({"LATENTD_LEARN__CODEC": "int9"}, "must be one of fp32", "features are stored"),
        ({"LATENTD_HTTP__MAX_IMAGES": "1.5"}, "is not a int", "images in one request"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_key_and_remedy(tmp_path: Path, environ: Dict[str, str], said: str, hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, {"HOME": "/h", **environ})
    assert said in refused.value.detail
    assert hint in refused.value.hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[lern]\nseed = 1\n", "unknown key lern.seed"),
        ("seed = 1\n", "outside a section"),
        ("[learn\n", "can't be read"),
        ("[learn]\nseed = true\n", "is not a int"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_file(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, {"HOME": "/h"})
    assert said in refused.value.detail
    assert "config.toml" in refused.value.detail


def test_a_plain_user_gets_xdg_folders_and_a_service_var(tmp_path: Path) -> None:
    user = load(tmp_path, {"HOME": "/h", "XDG_CACHE_HOME": "/x"})
    assert (user.state.dir, user.state.cache_dir) == ("/h/.local/state/latentd", "/x/latentd")
    service = config.load({}, {}, system=tmp_path, is_service=True)
    assert (service.state.dir, service.state.cache_dir) == ("/var/lib/latentd", "/var/cache/latentd")


def test_the_folders_that_systemd_made_are_taken_unless_the_configuration_names_others(tmp_path: Path) -> None:
    environ = {"HOME": "/h", "STATE_DIRECTORY": "/var/lib/private/latentd:/var/lib/b", "CACHE_DIRECTORY": "/var/cache/latentd"}
    unit = load(tmp_path, environ)
    assert (unit.state.dir, unit.state.cache_dir) == ("/var/lib/private/latentd", "/var/cache/latentd")
    (tmp_path / "config.toml").write_text('[state]\ndir = "/mnt/nvme/latentd"\n')
    assert load(tmp_path, environ).state.dir == "/mnt/nvme/latentd"


def test_the_example_file_uncommented_is_the_default_configuration(tmp_path: Path) -> None:
    lines = [
        line[2:] if line.startswith("# ") and " = " in line and line[2].islower() else line
        for line in configtext.example_toml().splitlines()
    ]
    kept = [line for line in lines if line.startswith("[") or (" = " in line and not line.startswith("#"))]
    (tmp_path / "config.toml").write_text("\n".join(kept))
    assert {line.strip("[]") for line in kept if line.startswith("[")} == set(config.SECTIONS)
    found = load(tmp_path, {"HOME": "/h"})
    assert dataclasses.replace(found, state=config.StateConfig()) == dataclasses.replace(config.Config(), state=config.StateConfig())


def test_the_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.Config().http.bind = "0.0.0.0:1"  # type: ignore[misc]


def test_every_default_lies_inside_its_own_range() -> None:
    for row in config.rows():
        assert row.help
        if row.choices:
            assert row.default in row.choices
        elif row.low is not None:
            assert row.low <= row.default <= row.high, row.key


def test_the_docs_page_is_made_from_the_table() -> None:
    assert DOCS.read_text(encoding="utf-8") == configtext.reference_markdown(), "write reference_markdown() to docs/configuration.md"


def test_keys_written_as_toml_are_read_back_as_they_were(tmp_path: Path) -> None:
    values = {
        "learn.codec": "int4",
        "backbone.split": 10,
        "learn.replay_bytes": 123456,
        "engine.order": ("eager",),
        "learn.learning_rate": 0.5,
    }
    text = configtext.as_toml(values)
    (tmp_path / "config.toml").write_text(text)
    loaded = config.load({}, {}, system=tmp_path, is_service=False)
    assert {key: value for key, value in config.as_table(loaded).items() if loaded.origins[key] != "default"} == values
    assert text.startswith("[backbone]\nsplit = 10\n\n[engine]")
    assert configtext.as_toml({}) == ""
