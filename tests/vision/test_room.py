"""Room for pixels that are decoded: who fits comes in, who does not waits for its turn."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest

from latentd.vision.room import PixelRoom

WAIT_S = 10.0


class Visitor(threading.Thread):
    """Takes room for an image and stays until it is told to leave."""

    def __init__(self, room: PixelRoom, pixels: int) -> None:
        super().__init__(daemon=True)
        self._room, self._pixels = room, pixels
        self.inside, self.leave = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        with self._room.take(self._pixels):
            self.inside.set()
            assert self.leave.wait(WAIT_S)


def test_images_that_fit_together_come_in_together() -> None:
    room = PixelRoom(100)
    with ExitStack() as held:
        for pixels in (50, 30, 20):
            held.enter_context(room.take(pixels))


@pytest.mark.parametrize(("inside", "outside"), [(60, 41), (101, 1)])  # 101: larger than the room, so it is there alone
def test_one_that_does_not_fit_beside_another_waits_until_that_is_done(inside: int, outside: int) -> None:
    room = PixelRoom(100)
    with room.take(inside):
        second = Visitor(room, outside)
        assert not second.inside.wait(0.05)
    assert second.inside.wait(WAIT_S)
    second.leave.set()


def test_a_large_image_that_waits_is_not_overtaken_by_small_ones() -> None:
    room = PixelRoom(100)
    with room.take(60):
        large = Visitor(room, 100)
        while not room._turn.locked():
            assert large.is_alive()
        small = Visitor(room, 10)
        assert not small.inside.wait(0.05)
    assert large.inside.wait(WAIT_S)
    assert not small.inside.is_set()
    large.leave.set()
    assert small.inside.wait(WAIT_S)
    small.leave.set()


def test_a_decoder_that_breaks_gives_its_room_back() -> None:
    room = PixelRoom(100)
    try:
        with room.take(100):
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    with room.take(100):
        pass
