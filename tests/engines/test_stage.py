"""The spec that a configuration asks of a backbone, and the pixels that every engine takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tiny
from latentd.engines.stage import planar, stage_spec
from latentd.errors import ConfigError


def test_split_zero_means_the_whole_depth_and_a_negative_one_so_many_blocks_less(tmp_path: Path) -> None:
    backbone = tiny.backbone(tmp_path)
    assert [stage_spec(tiny.settings(tmp_path, backbone__split=split), backbone).split for split in (-1, -2, 2)] == [2, 1, 2]
    assert stage_spec(tiny.settings(tmp_path), backbone).split == 2, "shipped: the last block learns"
    spec = stage_spec(tiny.settings(tmp_path, backbone__split=0), backbone)
    assert (spec.split, spec.class_tokens, spec.image_size, spec.width, spec.tokens) == (3, 2, 24, 128, 37)
    assert spec.features_width == 256
    assert spec.backbone_sha256 == backbone.sha256
    assert stage_spec(tiny.settings(tmp_path, backbone__split=1), backbone).split == 1


@pytest.mark.parametrize(("key", "least"), [("split", -2), ("class_tokens", 1)])
def test_more_blocks_than_the_backbone_has_is_a_configuration_error(tmp_path: Path, key: str, least: int) -> None:
    backbone = tiny.backbone(tmp_path)
    with pytest.raises(ConfigError, match=f"backbone.{key} = 4, but tiny has 3 blocks") as refused:
        stage_spec(tiny.settings(tmp_path, **{f"backbone__{key}": 4}), backbone)
    assert f"Set backbone.{key} to {least} to 3." in refused.value.hint


def test_an_image_size_that_patches_do_not_fill_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a multiple of this backbone's patch of 4"):
        stage_spec(tiny.settings(tmp_path, backbone__image_size=30), tiny.backbone(tmp_path))


def test_planar_pixels_keep_their_values_and_change_their_order() -> None:
    pixels = tiny.pixels(2)
    planes = planar(pixels)
    assert planes.shape == (2, 3, 24, 24)
    assert planes.dtype == np.float32
    assert planes.flags.c_contiguous
    assert planes[1, 2, 5, 7] == pixels[1, 5, 7, 2]
    assert np.array_equal(planes.transpose(0, 2, 3, 1), pixels)
