from __future__ import annotations

import asyncio

from latentd.service.readiness import FRESH_S, PROBE_EVERY_S, Readiness
from service.fakes import World, assert_problem, picture


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def with_clock(world: World) -> Clock:
    """Replaces the clock of the batcher and of the readiness."""
    clock = Clock()
    world.parts.batcher._clock = clock
    world.parts.readiness._clock = clock
    return clock


def probe(world: World) -> None:
    asyncio.run(world.parts.readiness.probe())


def test_it_is_not_ready_before_an_image_passed_the_engine(world: World) -> None:
    answer = world.call("GET", "/readyz")
    assert_problem(answer, 503, "not-ready")
    assert answer.headers["retry-after"] == "1"
    assert world.call("GET", "/livez").json() == {"status": "ok"}


def test_a_probe_through_the_real_engine_makes_it_ready_for_a_minute(world: World) -> None:
    clock = with_clock(world)
    probe(world)
    assert world.stage.batches == [1]
    assert world.call("GET", "/readyz").json() == {"status": "ready"}
    clock.now_s += FRESH_S - 0.1
    assert world.call("GET", "/readyz").status_code == 200
    clock.now_s += 0.2
    problem = assert_problem(world.call("GET", "/readyz"), 503, "not-ready")
    assert "60 seconds" in problem["detail"]


def test_traffic_is_proof_enough(world: World) -> None:
    clock = with_clock(world)
    world.classify(picture())
    clock.now_s += 10
    assert world.call("GET", "/readyz").status_code == 200


def test_an_engine_that_fails_the_probe_says_why(world: World) -> None:
    world.stage.error = RuntimeError("device lost")
    probe(world)
    assert "device lost" in assert_problem(world.call("GET", "/readyz"), 503, "not-ready")["detail"]
    world.stage.error = None
    probe(world)
    assert world.call("GET", "/readyz").status_code == 200


def test_a_failed_learner_does_not_make_it_unready(world: World) -> None:
    probe(world)
    world.learner.state = "failed"
    assert world.call("GET", "/readyz").status_code == 200


def test_probes_are_sent_only_while_nothing_else_proves_the_engine(world: World) -> None:
    clock = with_clock(world)
    rounds = iter([0.0, PROBE_EVERY_S + 1, 1.0])

    async def next_round(_: float) -> None:
        step = next(rounds, None)
        if step is None:
            raise asyncio.CancelledError
        clock.now_s += step

    async def run() -> None:
        readiness: Readiness = world.parts.readiness
        sleep, asyncio.sleep = asyncio.sleep, next_round  # type: ignore[assignment]
        try:
            await readiness.probe_for_ever()
        except asyncio.CancelledError:
            pass
        finally:
            asyncio.sleep = sleep

    asyncio.run(run())
    assert world.stage.batches == [1, 1]
