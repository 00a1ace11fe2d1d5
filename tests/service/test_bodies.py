from __future__ import annotations

import asyncio
import base64
from contextlib import AsyncExitStack
from typing import Any, AsyncIterator, Callable, Dict, List, Optional

import pytest
from starlette.requests import ClientDisconnect, Request

from latentd.config import HttpConfig
from latentd.errors import BadRequest, LatentdError, Overloaded, RequestTimeout, TooLarge
from latentd.service.bodies import PendingBytes, Upload, read_small_json, read_upload
from service.fakes import World, assert_problem, picture

LIMITS = HttpConfig(max_body_bytes=2048, max_image_bytes=1024, body_timeout_s=5.0)


def request_of(chunks: List[bytes], content_type: str = "image/png", gone: bool = False, **headers: str) -> Request:
    """A request whose body comes in these pieces; `gone`: the client leaves after them."""
    messages: List[Dict[str, Any]] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    if gone:
        messages.append({"type": "http.disconnect"})
    elif messages:
        messages[-1]["more_body"] = False
    left = iter(messages)
    taken: List[Dict[str, Any]] = []

    async def receive() -> Any:
        message = next(left, None)
        if message is None:
            await asyncio.Event().wait()  # nothing comes any more
        taken.append(message or {})
        return message

    raw = [
        (b"content-type", content_type.encode()),
        *((name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()),
    ]
    request = Request({"type": "http", "method": "POST", "headers": raw, "query_string": b""}, receive)
    request.scope["taken"] = taken
    return request


async def inline(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def read(request: Request, pending: Optional[PendingBytes] = None, limits: HttpConfig = LIMITS) -> Upload:
    async def whole() -> Upload:
        async with read_upload(request, limits, pending or PendingBytes(1 << 20), inline) as upload:
            return upload

    return asyncio.run(whole())


def test_an_announced_length_over_the_limit_is_refused_before_anything_is_read() -> None:
    request = request_of([b"x"], content_length="1000000")
    with pytest.raises(TooLarge):
        read(request)
    assert request.scope["taken"] == []


def test_a_body_of_unknown_length_is_read_no_further_than_the_limit() -> None:
    request = request_of([b"x" * 500] * 1000)
    with pytest.raises(TooLarge):
        read(request)
    assert len(request.scope["taken"]) == 3


def test_the_bytes_of_a_request_count_until_its_images_are_done() -> None:
    pending = PendingBytes(1 << 20)

    async def check() -> None:
        async with read_upload(request_of([b"x" * 300, b"y" * 400]), LIMITS, pending, inline) as upload:
            assert upload.images == [b"x" * 300 + b"y" * 400]
            assert pending.held == 700

    asyncio.run(check())
    assert pending.held == 0


@pytest.mark.parametrize("fails", [request_of([b"x" * 500] * 9), request_of([b"x"], gone=True), request_of([b"{"], "application/json")])
def test_a_failed_request_gives_its_bytes_back(fails: Request) -> None:
    pending = PendingBytes(1 << 20)
    with pytest.raises((LatentdError, ClientDisconnect)):
        read(fails, pending)
    assert pending.held == 0


def test_bodies_that_do_not_fit_into_memory_together_are_overloaded() -> None:
    pending = PendingBytes(1000)

    async def check() -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(read_upload(request_of([b"x" * 900]), LIMITS, pending, inline))
            with pytest.raises(Overloaded):
                await stack.enter_async_context(read_upload(request_of([b"x" * 200]), LIMITS, pending, inline))

    asyncio.run(check())
    assert pending.held == 0


def test_a_body_that_does_not_arrive_in_time_is_given_up() -> None:
    pending = PendingBytes(1000)
    request = request_of([b"only the first byte"])
    request.scope["taken"].clear()

    async def trickle() -> Any:
        if request.scope["taken"]:
            await asyncio.Event().wait()
        request.scope["taken"].append({})
        return {"type": "http.request", "body": b"a", "more_body": True}

    request._receive = trickle
    with pytest.raises(RequestTimeout):
        read(request, pending, HttpConfig(body_timeout_s=0.05))
    assert pending.held == 0


def test_a_client_that_leaves_in_the_middle_of_its_body_is_noticed() -> None:
    with pytest.raises(ClientDisconnect):
        read(request_of([b"half"], gone=True))


def test_a_streamed_body_over_the_limit_is_a_problem_over_http(new_world: Callable[..., World]) -> None:
    world = new_world(max_body_bytes=4096, max_image_bytes=4096)
    sent: List[int] = []

    async def endless() -> AsyncIterator[bytes]:
        for index in range(1000):
            sent.append(index)
            yield b"x" * 1024

    answer = world.call("POST", "/v1/classify", content=endless(), headers={"Content-Type": "image/png"})
    assert_problem(answer, 413, "too-large")
    assert world.parts.pending.held == 0


def test_labels_pair_with_images_in_order_or_one_serves_all(world: World) -> None:
    def labels(**request: Any) -> List[Any]:
        answer = world.call("POST", "/v1/learn", files=[("image", picture(seed)) for seed in range(3)], **request)
        return [result["label"] for result in answer.json()["results"]]

    assert labels(data={"label": ["a", "b", "c"]}) == ["a", "b", "c"]
    assert labels(data={"label": "d"}) == ["d"] * 3
    assert labels(params={"label": "e"}) == ["e"] * 3
    assert labels(params={"label": "f"}, data={"label": "g"}) == ["g"] * 3


def test_in_json_the_query_label_serves_images_without_their_own(world: World) -> None:
    entries = [{"data": base64.b64encode(picture(0)).decode(), "label": "own"}, {"data": base64.b64encode(picture(1)).decode()}]
    answer = world.call("POST", "/v1/learn?label=spare", json={"images": entries})
    assert [result["label"] for result in answer.json()["results"]] == ["own", "spare"]


def test_the_digest_is_of_the_content_and_not_of_its_wrapping() -> None:
    one, same = Upload([b"a", b"b"], ["x", "y"]), Upload([b"a", b"b"], ["x", "y"])
    others = [Upload([b"b", b"a"], ["x", "y"]), Upload([b"a", b"b"], ["y", "x"]), Upload([b"ab"], ["x"]), Upload([b"a", b"b"], ["x", None])]
    assert one.digest() == same.digest()
    assert one.digest() not in {other.digest() for other in others}


@pytest.mark.parametrize(("content", "error"), [(b"{", BadRequest), (b"x" * 70_000, TooLarge)])
def test_small_json_is_bounded_and_checked(content: bytes, error: Any) -> None:
    with pytest.raises(error):
        asyncio.run(read_small_json(request_of([content], "application/json"), LIMITS, PendingBytes(1 << 20)))


def test_small_json_may_be_absent() -> None:
    assert asyncio.run(read_small_json(request_of([b""]), LIMITS, PendingBytes(10))) is None
