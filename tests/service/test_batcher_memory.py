"""An engine that runs out of memory: the batch is halved, every image is answered, and later batches are no larger."""

from __future__ import annotations

from typing import List

import numpy as np
import pytest
from numpy.typing import NDArray

from latentd.energy.ledger import EnergyLedger
from latentd.engines.stage import Encoded
from latentd.errors import EngineError
from latentd.service.batcher import Batcher, Priority
from latentd.service.metrics import Metrics
from service.fakes import SIZE, WAIT_S, FakeStage


class SmallStage(FakeStage):
    """Has memory for `most` images at once."""

    most = 2
    words = "CUDA out of memory. Tried to allocate 2.00 GiB"

    def encode(self, pixels: NDArray[np.uint8], tokens: bool = False, shared: bool = False) -> Encoded:
        answer = super().encode(pixels, tokens, shared)
        if len(pixels) > self.most:
            raise EngineError(f"the engine failed on {len(pixels)} images: {self.words}")
        return answer


def answered(stage: SmallStage, images: int) -> List[object]:
    """What becomes of so many images that come at once, and of as many after them."""
    deaths: List[BaseException] = []
    batcher = Batcher(stage, EnergyLedger(), Metrics(), max_batch=8, capacity=32, on_death=deaths.append)
    tickets = batcher.reserve(images, Priority.CLASSIFY, True)
    for number, ticket in enumerate(tickets):
        batcher.enqueue(ticket, np.full((SIZE, SIZE, 3), number, np.uint8))
    batcher.start()
    found = [ticket.future.exception(WAIT_S) or ticket.future.result() for ticket in tickets]
    batcher.stop(WAIT_S)
    assert deaths == []
    return [batcher.max_batch, *found]


@pytest.mark.parametrize(("most", "sizes", "left"), [(2, [7, 4, 2, 2, 3, 2, 1], 2), (1, [7, 4, 2, 1, 1, 2, 1, 1, 3, 2, 1, 1, 1], 1)])
def test_a_batch_is_halved_until_it_fits_and_images_keep_their_order(most: int, sizes: List[int], left: int) -> None:
    stage = SmallStage()
    stage.most = most
    batch, *found = answered(stage, 7)
    assert (stage.batches, batch) == (sizes, left)
    for number, image in enumerate(found):
        np.testing.assert_allclose(image.features, number / 255.0)  # type: ignore[attr-defined]
        np.testing.assert_allclose(image.tokens, number / 255.0)  # type: ignore[attr-defined]


def test_other_failures_are_not_tried_again() -> None:
    stage = SmallStage()
    stage.words = "an illegal memory access was encountered"
    batch, *found = answered(stage, 3)
    assert (stage.batches, batch) == ([3], 8)
    assert all(isinstance(each, EngineError) for each in found)


def test_one_image_that_does_not_fit_alone_fails_alone() -> None:
    stage = SmallStage()
    stage.most = 0
    batch, *found = answered(stage, 1)
    assert (stage.batches, batch) == ([1], 8)
    assert isinstance(found[0], EngineError)
