"""The codec of a configuration: what is stored, in which kind, and calibrated before the first image is taught."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, List

import numpy as np
import pytest
from numpy.typing import NDArray

from latentd.config import FEATURE_KINDS, TOKEN_KINDS, BackboneConfig, Config, LearnConfig, StateConfig
from latentd.engines.stage import Encoded, StageSpec, split_of
from latentd.errors import ConfigError
from latentd.replay.journal import Journal
from latentd.replay.latents import LatentCodec, make_latent_codec
from latentd.replay.records import NewSample
from latentd.service.storing import latent_codec, origin, tokens_of
from latentd.vision.checkpoints import Backbone
from lessons import WAIT_S, limits
from tiny import DINOV2, SIZE

SPEC = StageSpec("tiny", "f" * 64, image_size=SIZE, split=2, class_tokens=2, width=128, tokens=37)
BACKBONE = Backbone("tiny", Path("nowhere"), "f" * 64, DINOV2, "")


class Probed:
    """A frozen stage that gives random latents, wider with every image; counts what it was asked."""

    name, spec, lanes = "probed", SPEC, 1

    def __init__(self) -> None:
        self.asked: List[bool] = []

    def encode(self, pixels: NDArray[np.uint8], tokens: bool = False, shared: bool = False) -> Encoded:
        self.asked.append(tokens)
        rng = np.random.default_rng(0)
        features = rng.standard_normal((len(pixels), SPEC.features_width), dtype=np.float32)
        return Encoded(features, 9 * rng.standard_normal((len(pixels), SPEC.tokens, SPEC.width), dtype=np.float32) if tokens else None)

    def close(self) -> None:
        """Nothing is open."""


def settings(folder: Path, split: int = 2, **learn: Any) -> Config:
    return Config(state=StateConfig(dir=str(folder)), backbone=BackboneConfig(split=split), learn=LearnConfig(**learn))


def made(config: Config, stage: Probed) -> LatentCodec:
    return latent_codec(config, replace(SPEC, split=split_of(config.backbone.split, DINOV2.depth)), BACKBONE, lambda: stage)


def teach(config: Config, codec: LatentCodec) -> None:
    """Leaves a journal with one image behind."""
    journal = Journal(config.state_dir / "journal.sqlite", codec=codec, feature_width=SPEC.features_width, limits=limits())
    journal.start(WAIT_S)
    features = np.ones(SPEC.features_width, np.float32)
    tokens = np.ones((1, codec.tokens.spec.tokens, SPEC.width), np.float32) if codec.tokens else None
    journal.admit([NewSample("cat", codec.encode(features[None], tokens)[0].tobytes(), features, "0" * 64)]).result(WAIT_S)
    journal.close(WAIT_S)


@pytest.mark.parametrize("kind", TOKEN_KINDS)
@pytest.mark.parametrize(("grid", "tokens"), [(0, 37), (3, 10)])
def test_every_kind_stores_whole_and_pooled_tokens(tmp_path: Path, kind: str, grid: int, tokens: int) -> None:
    stage = Probed()
    codec = made(settings(tmp_path, token_codec="int4", token_codec_kind=kind, token_grid=grid), stage)
    assert str(codec) == f"int8 token + int4 {kind} ({tokens} tokens)"
    matrices = np.random.default_rng(1).standard_normal((2, tokens, SPEC.width), dtype=np.float32)
    codes = codec.encode(np.zeros((2, SPEC.features_width), np.float32), matrices)
    assert np.abs(codec.decode_tokens(codes) - matrices).mean() < 0.3
    assert stage.asked == []


@pytest.mark.parametrize("kind", FEATURE_KINDS)
def test_features_are_stored_alike_with_tokens_and_without(tmp_path: Path, kind: str) -> None:
    below, head = (made(settings(tmp_path / str(split), split, codec="int4", codec_kind=kind), Probed()) for split in (2, 0))
    assert str(below) == f"int4 {kind} + int2 spatial (37 tokens)"
    assert below.features.spec == head.features.spec
    np.testing.assert_array_equal(below.features.parameters, head.features.parameters)


def test_a_single_patch_has_no_neighbours_to_be_stored_with(tmp_path: Path) -> None:
    assert str(made(settings(tmp_path, token_grid=1), Probed())) == "int8 token + int2 rotated (2 tokens)"


@pytest.mark.parametrize("split", [0, 3])
def test_the_head_alone_stores_no_tokens(tmp_path: Path, split: int) -> None:
    stage = Probed()
    codec = made(settings(tmp_path, split, codec_kind="tensor"), stage)
    assert str(codec) == "int8 tensor"
    assert stage.asked == [False]
    features = stage.encode(np.zeros((4, SIZE, SIZE, 3), np.uint8)).features
    assert codec.features.parameters.tolist() == [features.min(), features.max()]


def test_a_calibration_outlives_a_restart_and_its_loss_is_an_error(tmp_path: Path) -> None:
    config = settings(tmp_path, codec_kind="tensor")
    first = made(config, Probed())
    teach(config, first)
    again = Probed()
    assert made(config, again).identity() == first.identity()
    assert again.asked == []
    (tmp_path / "calibration.safetensors").unlink()
    with pytest.raises(ConfigError, match="can't be read without its calibration"):
        made(config, Probed())


def test_a_calibration_is_of_features_whatever_the_split(tmp_path: Path) -> None:
    config = settings(tmp_path, split=2, codec_kind="tensor")
    teach(config, made(config, Probed()))
    again = Probed()
    made(settings(tmp_path, split=1, codec_kind="tensor"), again)
    assert again.asked == []


def test_a_grid_that_does_not_fit_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"learn\.token_grid = 4.*1, 2, 3, 6 fit"):
        made(settings(tmp_path, token_grid=4), Probed())


def test_latents_with_tokens_are_of_one_split() -> None:
    assert origin(SPEC) == origin(replace(SPEC, split=1))
    whole = make_latent_codec("int8", "token", (2, 8), (5, 8))
    assert tokens_of(SPEC, whole) != tokens_of(replace(SPEC, split=1), whole)
    head = make_latent_codec("int8", "token", (2, 8))
    assert tokens_of(SPEC, head) == tokens_of(replace(SPEC, split=1), head)


def test_the_scattered_kind_stores_differences_from_the_mean_of_drawn_images(tmp_path: Path) -> None:
    config, stage = settings(tmp_path, 0, codec="int4", codec_kind="scattered"), Probed()
    codec = made(config, stage)
    drawn = stage.encode(np.zeros((8, SIZE, SIZE, 3), np.uint8)).features  # what it gives for any eight
    np.testing.assert_allclose(codec.features.parameters.reshape(-1), drawn.mean(axis=0), atol=1e-6)
    teach(config, codec)
    again = Probed()
    assert made(config, again).identity() == codec.identity()
    assert again.asked == [], "measured once"


def test_a_lost_calibration_of_what_was_taught_is_an_error_that_says_so(tmp_path: Path) -> None:
    config = settings(tmp_path, 0, codec="int4", codec_kind="scattered")
    teach(config, made(config, Probed()))
    (config.state_dir / "calibration.safetensors").unlink()
    with pytest.raises(ConfigError, match="can't be read without its calibration"):
        made(config, Probed())
