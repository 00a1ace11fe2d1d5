from __future__ import annotations

import asyncio
import functools
import threading
from typing import List, Union

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentd.errors import ImageUndecodable, LatentdError, Overloaded, TooLarge
from latentd.service.batcher import EncodedImage, Priority
from latentd.service.pipeline import DecodePool
from service.fakes import SPEC, WAIT_S, World, picture

GOOD, BAD, BROKEN = picture(1), b"no image at all", picture(2)[:50]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.lists(st.sampled_from(["good", "bad", "broken", "refused"]), min_size=1, max_size=16))
def test_every_image_is_answered_in_its_place_whatever_the_others_are(world: World, kinds: List[str]) -> None:
    refused = TooLarge("before it came here")
    images: List[Union[bytes, LatentdError]] = [{"good": GOOD, "bad": BAD, "broken": BROKEN}.get(kind, refused) for kind in kinds]
    outcomes = asyncio.run(world.parts.pipeline.encode(images, Priority.CLASSIFY))
    assert len(outcomes) == len(images)
    for kind, outcome in zip(kinds, outcomes):
        assert isinstance(outcome, EncodedImage) == (kind == "good")
        assert (outcome is refused) == (kind == "refused")
    assert world.parts.batcher.depth == 0


def test_features_belong_to_the_image_they_are_answered_for(world: World) -> None:
    images: List[Union[bytes, LatentdError]] = [picture(seed) for seed in range(12)]
    together = asyncio.run(world.parts.pipeline.encode(images, Priority.CLASSIFY))
    for image, outcome in zip(images, together):
        (alone,) = asyncio.run(world.parts.pipeline.encode([image], Priority.CLASSIFY))
        assert isinstance(outcome, EncodedImage) and isinstance(alone, EncodedImage)
        assert (outcome.features == alone.features).all()
        assert outcome.features.shape == (SPEC.features_width,)


def test_what_is_taught_is_shown_to_who_calibrates_on_it_and_what_is_asked_is_not(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: List[object] = []
    monkeypatch.setattr(world.parts.pipeline, "_taught", shown.append)
    asyncio.run(world.parts.pipeline.encode([GOOD], Priority.CLASSIFY))
    assert shown == []
    asyncio.run(world.parts.pipeline.encode([GOOD, BAD], Priority.LEARN))
    assert len(shown) == 1


def test_a_bug_in_the_decoder_fails_its_image_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = world.parts.pipeline._decode

    def buggy(data: bytes) -> object:
        if data == BAD:
            raise ZeroDivisionError("a bug")
        return decode(data)

    monkeypatch.setattr(world.parts.pipeline, "_decode", buggy)
    good, bad = asyncio.run(world.parts.pipeline.encode([GOOD, BAD], Priority.CLASSIFY))
    assert isinstance(good, EncodedImage)
    assert isinstance(bad, LatentdError) and bad.http_status == 500


def test_images_that_do_not_fit_are_refused_before_any_is_decoded(world: World) -> None:
    world.parts.batcher.reserve(world.parts.batcher.capacity - 1, Priority.CLASSIFY)
    with pytest.raises(Overloaded):
        asyncio.run(world.parts.pipeline.encode([GOOD, GOOD], Priority.CLASSIFY))
    assert world.stage.batches == []


def test_cancelling_drops_images_that_wait(world: World) -> None:
    async def cancel() -> None:
        world.stage.gate.clear()
        running = asyncio.ensure_future(world.parts.pipeline.encode([GOOD], Priority.CLASSIFY))
        await asyncio.get_running_loop().run_in_executor(None, world.stage.entered.wait, WAIT_S)
        waiting = asyncio.ensure_future(world.parts.pipeline.encode([GOOD] * 5, Priority.CLASSIFY))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        world.stage.gate.set()
        await running
        await world.parts.pipeline.encode([GOOD], Priority.LEARN)

    asyncio.run(cancel())
    assert world.stage.batches == [1, 1]
    assert world.parts.batcher.depth == 0


def test_in_pool_hands_over_results_and_errors(world: World) -> None:
    def fail() -> None:
        raise ImageUndecodable("as expected")

    assert asyncio.run(world.parts.pipeline.in_pool(pow, 2, 5)) == 32
    with pytest.raises(ImageUndecodable):
        asyncio.run(world.parts.pipeline.in_pool(fail))


def test_the_pool_takes_classify_before_learn_and_keeps_the_order_within_each() -> None:
    pool = DecodePool(1)
    gate, began = threading.Event(), threading.Event()
    done: List[str] = []
    pool.submit(Priority.CLASSIFY, began.set)
    pool.submit(Priority.CLASSIFY, lambda: gate.wait(WAIT_S))
    assert began.wait(WAIT_S)
    for name in ("learn 1", "learn 2", "classify 1", "classify 2"):
        priority = Priority.LEARN if name.startswith("learn") else Priority.CLASSIFY
        pool.submit(priority, functools.partial(done.append, name))
    gate.set()
    pool.close()
    assert done == ["classify 1", "classify 2", "learn 1", "learn 2"]
