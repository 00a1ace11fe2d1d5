"""The spatial codec: whole bits shared by one fixed law, and less lost where neighbouring patches look alike."""

from __future__ import annotations

import hashlib
from typing import List

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentd.replay.codec import make_codec
from latentd.replay.packing import packed_bytes, unpack
from latentd.replay.rotation import Rotation, lloyd_max
from latentd.replay.spatial import Spectrum, share_bits

Floats = npt.NDArray[np.float32]
GRIDS = [(257, 16, 1), (65, 8, 1), (197, 14, 1), (261, 16, 5), (256, 16, 0), (4, 2, 0), (8, 2, 4)]


def smooth(count: int, side: int, width: int, seed: int = 0) -> Floats:
    """Token matrices of a ViT's kind: patches like their neighbours, a token of its own in front, two channels that are always huge."""
    rng = np.random.default_rng(seed)
    steps = np.arange(side)
    frequency = np.hypot(steps[:, None], steps[None, :])
    waves = np.cos(np.pi * steps[:, None] * (2 * steps[None, :] + 1) / (2 * side))  # (waves, places)
    amplitudes = rng.standard_normal((count, side, side, width)) / (frequency[..., None] + 0.5)
    grid = np.einsum("bijd,ix,jy->bxyd", amplitudes, waves, waves).reshape(count, side * side, width)
    latents = np.concatenate([rng.standard_normal((count, 1, width)), grid], axis=1).astype(np.float32)
    latents[..., 7] += 30
    return latents


def relative_error(name: str, kind: str, latents: Floats) -> float:
    codec = make_codec(name, kind, *latents.shape[1:])
    error = codec.decode(codec.encode(latents)) - latents
    return float(np.square(error).sum() / np.square(latents).sum())


@pytest.mark.parametrize(("tokens", "side", "leading"), GRIDS)
def test_the_grid_is_the_last_square_of_the_tokens(tokens: int, side: int, leading: int) -> None:
    spectrum = Spectrum(tokens)
    assert (spectrum.side, spectrum.leading) == (side, leading)


def test_tokens_that_are_no_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="no grid"):
        make_codec("int4", "spatial", 3, 8)


@pytest.mark.parametrize("tokens", [257, 65, 8])
def test_the_transform_keeps_energy_and_comes_back(tokens: int) -> None:
    latents = np.random.default_rng(0).standard_normal((3, tokens, 12), dtype=np.float32)
    spectrum = Spectrum(tokens)
    spectra = spectrum.forward(latents)
    np.testing.assert_allclose(np.square(spectra).sum((1, 2)), np.square(latents).sum((1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(spectra[:, : spectrum.leading], latents[:, : spectrum.leading])
    scales = np.random.default_rng(1).uniform(0.5, 2, (3, tokens, 1)).astype(np.float32)
    back = np.empty_like(latents)
    spectrum.inverse(spectra / scales, scales, back)
    np.testing.assert_allclose(back, latents, atol=1e-5)


def test_what_all_patches_share_becomes_one_token() -> None:
    latents = np.ones((1, 65, 4), np.float32)
    spectra = Spectrum(65).forward(latents)
    np.testing.assert_allclose(spectra[0, 1], 8.0, rtol=1e-6)
    np.testing.assert_allclose(spectra[0, 2:], 0.0, atol=1e-5)


# --- bits ---


@given(variances=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), mean=st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_every_bit_is_shared_out_and_more_energy_never_gets_fewer(variances: List[float], mean: int) -> None:
    bits = share_bits(np.array(variances), mean * len(variances))
    assert bits.sum() == mean * len(variances)
    assert bits.min() >= 1
    assert bits.max() <= 8
    order = np.argsort(variances, kind="stable")
    assert (np.diff(bits[order][np.diff(np.array(variances)[order], prepend=0.0) > 0]) >= 0).all()


def test_moving_any_bit_loses_energy() -> None:
    loss = np.array([1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000644, 0.000164, 0.0000412])
    variances = Spectrum(65).variances()
    bits = share_bits(variances, 3 * 65)
    best = (variances * loss[bits]).sum()
    for giving in np.flatnonzero(bits > 1):
        for taking in np.flatnonzero(bits < 8):
            moved = bits.copy()
            moved[giving] -= 1
            moved[taking] += 1
            assert (variances * loss[moved]).sum() >= best * (1 - 1e-12)


@pytest.mark.parametrize("bits", [8, 7, 6, 5, 4, 3, 2])
@pytest.mark.parametrize("tokens", [257, 65, 8])
def test_a_code_costs_its_bits_and_a_norm_a_token_and_not_one_byte_more(bits: int, tokens: int) -> None:
    codec = make_codec(f"int{bits}", "spatial", tokens, 384)
    assert codec.code_bytes == tokens * 384 * bits // 8 + 2 * tokens
    codes = codec.encode(np.zeros((2, tokens, 384), np.float32))
    assert codes.shape == (2, codec.code_bytes)
    assert not codec.decode(codes).any()


def test_a_width_that_fills_no_whole_bytes_costs_less_than_one_byte_a_depth() -> None:
    codec = make_codec("int3", "spatial", 17, 5)
    assert 0 <= codec.code_bytes - 17 * 5 * 3 / 8 - 34 < 8
    latents = np.random.default_rng(0).standard_normal((2, 17, 5), dtype=np.float32)
    assert np.square(codec.decode(codec.encode(latents)) - latents).mean() < 0.2


@pytest.mark.parametrize(("tokens", "width"), [(257, 384), (65, 192), (17, 40), (17, 12), (5, 5)])
@pytest.mark.parametrize("bits", [6, 4, 3, 2])
def test_reading_several_at_a_time_gives_what_reading_one_by_one_gives(bits: int, tokens: int, width: int) -> None:
    """The levels, the scale, the rotation and the cosines, each by its own definition."""
    codec = make_codec(f"int{bits}", "spatial", tokens, width, seed=5)
    latents = np.random.default_rng(0).standard_normal((3, tokens, width), dtype=np.float32)
    codes = codec.encode(latents)
    shared = share_bits(Spectrum(tokens).variances(), bits * tokens)
    rotation, start = Rotation(width, 5), 0
    spectra = np.zeros((3, tokens, width), np.float32)
    for value in range(8, 0, -1):
        (places,) = np.nonzero(shared == value)
        end = start + packed_bytes(len(places) * width, value)
        levels = lloyd_max(value).levels[unpack(codes[:, start:end], value, len(places) * width)]
        spectra[:, places] = levels.reshape(3, len(places), width)
        start = end
    order = np.argsort(-shared, kind="stable")
    scales = np.empty((3, tokens), np.float32)
    scales[:, order] = np.ascontiguousarray(codes[:, start:]).view("<f2")
    turned = np.empty_like(spectra)
    rotation.inverse((spectra * scales[..., None]).reshape(-1, width), turned.reshape(-1, width))
    expected = np.empty_like(turned)
    Spectrum(tokens).inverse(turned, np.ones((3, tokens, 1), np.float32), expected)
    np.testing.assert_allclose(codec.decode(codes), expected, atol=2e-5)
    assert codec.basis is not None
    blocks = codec.decode_rotated(codes).reshape(3, tokens, *codec.basis.shape[:2])
    rotated_back = np.einsum("btpi,pij->btpj", blocks, codec.basis).reshape(expected.shape)
    np.testing.assert_allclose(rotated_back, expected, atol=2e-5)


# --- errors ---


@pytest.mark.parametrize("side", [16, 8])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_loses_no_more_than_the_rotated_kind_does_with_one_bit_more(bits: int, side: int) -> None:
    latents = smooth(8, side, 64)
    assert relative_error(f"int{bits}", "spatial", latents) < 1.1 * relative_error(f"int{bits + 1}", "rotated", latents)


def test_the_class_token_is_kept_far_better_than_a_patch() -> None:
    latents = smooth(16, 16, 384)
    codec = make_codec("int2", "spatial", 257, 384)
    error = np.square(codec.decode(codec.encode(latents)) - latents).sum(2)
    share = error.sum(0) / np.square(latents).sum((0, 2))
    assert share[0] < 0.001 < share[1:].mean()


def test_even_without_neighbours_alike_it_is_usable() -> None:
    latents = np.random.default_rng(0).standard_normal((4, 65, 384), dtype=np.float32)
    assert relative_error("int4", "spatial", latents) < 0.05


# --- the same everywhere ---


def test_bits_are_shared_the_same_on_every_platform() -> None:
    shared = [share_bits(Spectrum(tokens).variances(), bits * tokens) for tokens in (257, 197, 65) for bits in (2, 3, 4, 5, 6)]
    assert hashlib.sha256(np.concatenate(shared).astype("<i8").tobytes()).hexdigest()[:16] == "77c2fc65207b49e7"


def test_codes_written_today_can_be_read_by_every_later_version() -> None:
    codec = make_codec("int2", "spatial", 5, 8, seed=9)
    codes = np.arange(codec.code_bytes, dtype=np.uint8)[None] * 37
    codes[0, -10:] = np.array([1, 2, 0.5, 4, 1], "<f2").view(np.uint8)
    expected = [[2.4175, 0.0, -0.98708, -0.70788], [1.79044, -1.58752, 0.24918, 0.4521], [-2.72308, 2.926, -0.44492, -0.242]]
    np.testing.assert_allclose(codec.decode(codes)[0, [0, 1, 4], :4], expected, atol=1e-4)
