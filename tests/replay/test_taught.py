from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from latentd.errors import JournalError
from latentd.replay.codec import make_codec
from latentd.replay.latents import LatentCodec, make_latent_codec
from latentd.replay.taught import read_codes, read_taught, stored_codec
from lessons import CODEC, TOKENS, WAIT_S, WIDTH, features, running_journal, sample


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed journal: two cats, two dogs of which one is forgotten, a picture without a label, and a cat that was taken for a dog."""
    with running_journal(tmp_path) as journal:
        journal.put_counters("latents", {"image_size": 24, **CODEC.identity()}).result(WAIT_S)
        taught = [sample("cat", 1), sample("dog", 1), sample("cat", 2), sample("dog", 2), sample(None, 3, shows="owl")]
        ids = [record.sample_id for record in journal.admit([*taught, sample("dog", 9, shows="cat")]).result(WAIT_S)]
        journal.forget(ids[3]).result(WAIT_S)
        journal.relabel(ids[5], "cat").result(WAIT_S)
    return tmp_path / "journal.sqlite"


def test_what_is_kept_is_read_with_its_class_of_now(path: Path) -> None:
    taught = read_taught(path)
    assert taught.seqs == (1, 2, 3, 6)
    assert taught.class_ids.tolist() == [0, 1, 0, 0]
    assert taught.latents["image_size"] == 24


def test_the_codes_come_in_the_order_that_was_asked_for(path: Path) -> None:
    found = CODEC.decode_features(read_codes(path, [3, 1]))
    expected = CODEC.decode_features(CODEC.encode(np.stack([features("cat", 2), features("cat", 1)])))
    np.testing.assert_array_equal(found, expected)


def test_reading_changes_no_byte_of_the_file(path: Path) -> None:
    before = path.read_bytes()
    read_codes(path, read_taught(path).seqs)
    assert path.read_bytes() == before


def test_a_missing_latent_or_file_is_an_error_that_names_the_file(path: Path) -> None:
    with pytest.raises(JournalError, match=r"journal\.sqlite"):
        read_codes(path, [1, 77])
    with pytest.raises(JournalError, match="nowhere"):
        read_taught(path.parent / "nowhere")


def test_a_file_that_is_no_journal_is_told_as_one_that_cannot_be_read(tmp_path: Path) -> None:
    wrong = tmp_path / "journal.sqlite"
    wrong.write_bytes(b"not a database, and long enough to be taken for one" * 40)
    with pytest.raises(JournalError, match="can't be read"):
        read_taught(wrong)
    wrong.unlink()
    sqlite3.connect(wrong).close()
    with pytest.raises(JournalError, match="no such table"):
        read_taught(wrong)


@pytest.mark.parametrize(
    "codec",
    [
        CODEC,
        make_latent_codec("fp16", "token", (TOKENS, WIDTH)),
        make_latent_codec("int3", "rotated", (TOKENS, WIDTH), (5, WIDTH), seed=7),
    ],
    ids=str,
)
def test_the_codec_of_a_state_folder_is_made_again_from_its_facts(codec: LatentCodec) -> None:
    found = stored_codec(codec.identity())
    assert found is not None
    assert found.identity() == codec.identity()
    assert found.code_bytes == codec.code_bytes


def test_a_codec_that_its_facts_do_not_describe_is_unknown() -> None:
    calibrated = make_codec(
        "int8", "tensor", TOKENS, WIDTH, calibration=np.arange(TOKENS * WIDTH, dtype=np.float32).reshape(1, TOKENS, WIDTH)
    )
    assert stored_codec({}) is None
    assert stored_codec(LatentCodec(calibrated).identity()) is None
    assert stored_codec(LatentCodec(CODEC.features, calibrated).identity()) is None
    assert stored_codec({**CODEC.identity(), "codec": "int1 token"}) is None
