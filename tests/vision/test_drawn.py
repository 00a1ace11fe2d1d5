"""Drawn images: what stands in for photographs before there are any."""

from __future__ import annotations

import numpy as np

from latentd.vision.drawn import drawn_images


def test_drawn_images_are_the_same_each_time_and_each_another() -> None:
    images = drawn_images(56, 8)
    assert images.shape == (8, 56, 56, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, drawn_images(56, 8))
    np.testing.assert_array_equal(images[:3], drawn_images(56, 3))
    assert len({image.tobytes() for image in images}) == 8


def test_they_have_light_and_dark_and_colour() -> None:
    images = drawn_images(56, 24).astype(float)
    assert images.std(axis=(1, 2, 3)).min() > 10, "none is flat"
    assert np.ptp(images.mean(axis=(1, 2, 3))) > 40, "some are bright and some are dark"
    assert np.abs(images[..., 0] - images[..., 2]).mean() > 15


def test_neighbouring_pixels_resemble_each_other_as_in_photographs() -> None:
    grey = drawn_images(112, 16).mean(axis=-1)
    grey -= grey.mean(axis=(1, 2), keepdims=True)
    beside, apart = ((grey[:, :, :-step] * grey[:, :, step:]).mean() / (grey**2).mean() for step in (1, 40))
    assert beside > 0.6 > apart
