"""`latentd prune`, end to end on a tiny backbone, and everything that stops it early."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny
from cli.conftest import Latentd
from latentd.cli import heads
from latentd.errors import FileUnusable
from latentd.vision import checkpoints, prune


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three classes of noise with a colour of their own, eight images each."""
    for channel, name in enumerate(("blue", "green", "red")):
        (tmp_path / "taught" / name).mkdir(parents=True)
        for index, noise in enumerate(tiny.pixels(8, seed=channel)):
            noise = noise // 2
            noise[..., channel] += 100
            Image.fromarray(noise).save(tmp_path / "taught" / name / f"{index}.png")
    return tmp_path / "taught"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, latentd: Latentd) -> checkpoints.Backbone:
    """A tiny backbone that the configuration names, and no meter. After `latentd`, which clears the names."""
    values = {
        "STATE__CACHE_DIR": tmp_path / "cache",
        "BACKBONE__NAME": "tiny",
        "BACKBONE__IMAGE_SIZE": tiny.SIZE,
        "BACKBONE__CLASS_TOKENS": 2,
        "ENERGY__METERS": "",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"LATENTD_{name}", str(value))
    return tiny.backbone(tmp_path)


def test_a_pruned_backbone_is_made_compared_and_served_by_name(
    latentd: Latentd, base: checkpoints.Backbone, images: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "heads.png"
    ran = latentd("prune", str(images), "--share", "0.34", "--max-cost", "100", "--picture", str(picture), "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    assert (found["base"], found["name"], len(found["removed"])) == ("tiny", "tiny-pruned-33", 2)
    assert found["images"] == {"shown": 12, "held": 12}
    assert (found["score"], found["repaired"], found["epochs"]) == ("residual", True, 2.0)
    before, after = found["compared"]
    assert (sum(before["heads"]), sum(after["heads"])) == (6, 4)
    assert "cosine with eager PyTorch" in after["gate"]
    assert before["latency_s"] > 0
    assert (after["energy_j"], after["energy_reason"]) == (None, "no meter is configured (energy.meters is empty)")
    with Image.open(picture) as drawn:
        assert drawn.size[1] > 3 * 36
    pruned = checkpoints.find(tmp_path / "cache", "tiny-pruned-33")
    assert list(pruned.shape.heads) == after["heads"]
    assert {each["name"] for each in latentd("backbone", "list", "--json").json["backbones"]} == {"tiny", "tiny-pruned-33"}


def test_people_see_the_heads_the_comparison_and_what_to_do_next(latentd: Latentd, base: checkpoints.Backbone, images: Path) -> None:
    ran = latentd("prune", str(images), "--share", "0.34", "--max-cost", "100", "--score", "entropy", "--name", "small")
    assert ran.code == 0, ran.err
    assert "block  3" in ran.out
    assert 'name = "small"' in ran.out
    assert "empty state folder" in ran.out
    assert "unavailable: no meter is configured" in ran.out
    assert ran.out.count("x ") >= 2
    again = latentd("prune", str(images), "--name", "small")
    assert again.code == 1
    assert "there is already a backbone small" in again.err


def test_where_every_step_costs_too_much_nothing_is_made(
    latentd: Latentd, base: checkpoints.Backbone, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentd.learning import pruning

    accuracies = iter([100.0, 90.0])
    asked = pruning._Rounds._ask
    monkeypatch.setattr(pruning._Rounds, "_ask", lambda self, vit: (asked(self, vit)[0], next(accuracies)))
    ran = latentd("prune", str(images))
    assert ran.code == 1
    assert "Nothing was pruned: without 1 heads accuracy falls by 10.00 points" in ran.out
    assert [each.name for each in checkpoints.installed(tmp_path / "cache")] == ["tiny"]


def test_an_unknown_score_is_a_mistake_of_usage(latentd: Latentd, base: checkpoints.Backbone, images: Path) -> None:
    ran = latentd("prune", str(images), "--score", "weight")
    assert ran.code == 2
    assert "weight is no score" in ran.err


def test_a_folder_that_can_not_be_judged_by_is_refused_with_the_reason(latentd: Latentd, base: checkpoints.Backbone, images: Path) -> None:
    for name in ("green", "red"):
        for path in list((images / name).iterdir())[3:]:
            path.unlink()
    ran = latentd("prune", str(images))
    assert ran.code == 1
    assert "Each class needs 4 images, better many more; too few has green (3), red (3)" in ran.err
    for name in ("green", "red"):
        for path in (images / name).iterdir():
            path.unlink()
    assert "holds one class only, blue" in latentd("prune", str(images)).err
    for path in (images / "blue").iterdir():
        path.unlink()
    assert "holds no images" in latentd("prune", str(images)).err
    assert latentd("prune", str(images / "absent")).code == 1


def test_a_file_that_is_no_image_is_named_and_left_out(latentd: Latentd, base: checkpoints.Backbone, images: Path) -> None:
    (images / "red" / "0.png").write_bytes(b"nothing")
    ran = latentd("prune", str(images), "--share", "0.17", "--max-cost", "100")
    assert ran.code == 0, ran.err
    assert f"{os.sep}red{os.sep}0.png" in ran.err
    assert "Scored on 12 images, asked on 11 others" in ran.out


def test_the_backbone_must_be_there(latentd: Latentd, base: checkpoints.Backbone, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTD_BACKBONE__NAME", "absent")
    ran = latentd("prune", str(images), "--json")
    assert (ran.code, ran.json["problem"]["code"]) == (1, "checkpoint-invalid")


def test_a_backbone_with_one_head_a_block_can_not_be_pruned(
    latentd: Latentd, base: checkpoints.Backbone, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thin = prune.without_heads(checkpoints.read_weights(base), base.shape, [(0, 0), (1, 0), (2, 0)])
    prune.install(tmp_path / "cache", base, thin, [(0, 0), (1, 0), (2, 0)], "thin")
    monkeypatch.setenv("LATENTD_BACKBONE__NAME", "thin")
    ran = latentd("prune", str(images))
    assert ran.code == 1
    assert "every block of thin has one head left" in ran.err


class TestThePictureOfTheHeads:
    WORTH = ((0.1, 10.0), (0.2,))

    def test_shades_are_places_in_the_order_of_worth(self) -> None:
        assert heads.shades(self.WORTH) == [[0.0, 1.0], [0.5]]
        assert heads.shades([[1.0, 1.0]]) == [[0.0, 0.0]]

    def test_removed_heads_are_crossed_out(self) -> None:
        lines = heads.drawn(self.WORTH, {(0, 0)}).plain.splitlines()
        assert [line.split(maxsplit=2)[2] for line in lines[1:]] == ["x ██", "▒▒"]

    def test_the_file_shows_worth_as_darkness(self, tmp_path: Path) -> None:
        heads.save(self.WORTH, set(), tmp_path / "heads.png")
        with Image.open(tmp_path / "heads.png") as image:
            pixels = np.asarray(image).astype(int)
        first, second = pixels[40, 50].sum(), pixels[40, 90].sum()
        assert second < first < 3 * 255

    def test_a_file_that_can_not_be_written_is_an_error(self, tmp_path: Path) -> None:
        for path in (tmp_path / "absent" / "heads.png", tmp_path / "heads.nothing"):
            with pytest.raises(FileUnusable):
                heads.save(self.WORTH, set(), path)
