"""A state folder under another configuration than it was taught under: what is read on, what is dropped, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from latentd.config import Config
from latentd.errors import ConfigError
from latentd.replay.journal import Journal
from latentd.replay.latents import LatentCodec, make_latent_codec
from latentd.replay.records import NewSample
from latentd.service.building import _require_same_latents
from latentd.service.storing import origin, tokens_of
from lessons import WAIT_S, limits
from service.fakes import SPEC
from sleepers import CODEC, POOL, D, code, latent

BELOW = replace(SPEC, split=1, class_tokens=2, width=D, tokens=POOL.tokens)
FEATURES, TOKENS = (2, D), (POOL.tokens, D)
OTHER_TOKENS = make_latent_codec("int2", "spatial", FEATURES, TOKENS, pool=POOL, features_as=("int8", "token"))
OTHER_FEATURES = make_latent_codec("int8", "token", FEATURES, TOKENS, pool=POOL, features_as=("int4", "rotated"))


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """Three samples with tokens, and under which facts."""
    made = Journal(tmp_path / "journal.sqlite", codec=CODEC, feature_width=2 * D, limits=limits())
    made.start(WAIT_S)
    opened(made, CODEC)
    for seq in range(1, 4):
        made.admit([NewSample("cat", code(0, seq), latent(0, seq)[0], f"{seq:064x}")]).result(WAIT_S)
    yield made
    made.close(WAIT_S)


def opened(journal: Journal, codec: LatentCodec, split: int = 1) -> None:
    _require_same_latents(journal, Config(), replace(BELOW, split=split), codec)


def lengths(journal: Journal) -> List[int]:
    return [len(entry.code or b"") for entry in journal.entries(0, 100).result(WAIT_S)]


def noted(journal: Journal) -> Dict[str, Any]:
    return journal.counters("latents").result(WAIT_S)


def test_the_same_configuration_changes_nothing(journal: Journal) -> None:
    opened(journal, CODEC)
    assert lengths(journal) == [CODEC.code_bytes] * 3


@pytest.mark.parametrize(
    ("codec", "split"), [(OTHER_TOKENS, 1), (CODEC, 2), (LatentCodec(CODEC.features), 3)], ids=["codec", "split", "head"]
)
def test_another_split_or_codec_of_tokens_drops_them_once_and_is_noted(
    journal: Journal, codec: LatentCodec, split: int, caplog: pytest.LogCaptureFixture
) -> None:
    opened(journal, codec, split)
    assert lengths(journal) == [CODEC.features_bytes] * 3
    assert tokens_of(replace(BELOW, split=split), codec).items() <= json.loads(json.dumps(noted(journal))).items()
    assert "begin anew" in caplog.text
    caplog.clear()
    opened(journal, codec, split)
    assert not caplog.records


def test_a_crash_between_dropping_tokens_and_noting_it_is_made_good_by_the_next_start(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as crash:
        crash.setattr(journal, "put_counters", pytest.fail)
        with pytest.raises(pytest.fail.Exception):
            opened(journal, CODEC, split=2)
    opened(journal, CODEC, split=2)
    assert lengths(journal) == [CODEC.features_bytes] * 3
    assert noted(journal)["split"] == 2


def test_what_the_head_alone_was_taught_by_an_older_daemon_is_read_on(journal: Journal) -> None:
    """It named no split, and no codec of tokens."""
    head = LatentCodec(CODEC.features)
    older = {
        key: value for key, value in {**origin(BELOW), **head.identity()}.items() if not key.startswith("tokens_") or value is not None
    }
    while journal.drop_tokens().result(WAIT_S):
        pass
    journal.put_counters("latents", older).result(WAIT_S)
    opened(journal, CODEC)
    assert lengths(journal) == [CODEC.features_bytes] * 3
    assert noted(journal)["split"] == 1


def test_another_codec_of_features_is_refused_with_the_keys_that_read_it_and_nothing_is_dropped(journal: Journal) -> None:
    """As where an older daemon took learn.codec for tokens, and stored features as int8 token beside them."""
    with pytest.raises(ConfigError, match="codec was int8 token, now int4 rotated") as refused:
        opened(journal, OTHER_FEATURES)
    assert 'learn.codec = "int8" and learn.codec_kind = "token"' in refused.value.hint
    assert "learn.token_codec" in refused.value.hint
    assert lengths(journal) == [CODEC.code_bytes] * 3
