"""The codecs: exact sizes, errors as small as theory says, and codes that mean the same everywhere."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from latentd.replay.codec import Codec, CodecSpec, make_codec, open_codec

Floats = npt.NDArray[np.float32]

KINDS = ["tensor", "token", "rotated", "scattered", "spatial"]
INTS = [f"int{bits}" for bits in range(8, 1, -1)]
# Mean square error of the best quantizer of a standard normal value (Max 1960; from 6 bits on the same integral, taken numerically).
LLOYD_MAX_MSE = {2: 0.1175, 3: 0.0345, 4: 0.00950, 5: 0.00251, 6: 0.000644, 7: 0.0001636, 8: 0.0000412}


def gaussian(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def spiky(count: int, tokens: int = 8, width: int = 384) -> Floats:
    """Like a ViT's residual stream: small values, two channels that are always huge."""
    latents = gaussian(count, tokens, width) * np.float32(0.2)
    latents[..., 7] += 6.4
    latents[..., 200] -= 1.8
    return latents


def relative_error(codec: Codec, latents: Floats) -> float:
    error = codec.decode(codec.encode(latents)) - latents
    return float(np.square(error).sum() / np.square(latents).sum())


# --- sizes ---


@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize(("kind", "scales"), [("tensor", 0), ("token", 2), ("rotated", 1), ("scattered", 1)])
@pytest.mark.parametrize(("tokens", "width"), [(4, 384), (3, 5), (1, 1), (7, 12)])
def test_a_code_costs_its_bits_and_its_scales_and_not_one_byte_more(name: str, kind: str, scales: int, tokens: int, width: int) -> None:
    latents = gaussian(3, tokens, width)
    codec = make_codec(name, kind, tokens, width, calibration=latents if kind == "tensor" else None)
    bits = int(name[3:])
    expected = -(-tokens * width * bits // 8) + 2 * scales * tokens
    assert codec.code_bytes == expected
    assert codec.encode(latents).shape == (3, expected)


def test_plain_floats_cost_four_and_two_bytes_a_value() -> None:
    assert make_codec("fp32", "token", 257, 384).code_bytes == 394_752
    assert make_codec("fp16", "token", 257, 384).code_bytes == 197_376


def test_an_empty_batch_has_an_empty_code() -> None:
    codec = make_codec("int3", "rotated", 4, 384)
    codes = codec.encode(np.empty((0, 4, 384), np.float32))
    assert codes.shape == (0, codec.code_bytes)
    assert codec.decode(codes).shape == (0, 4, 384)


# --- errors ---


@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize("kind", ["rotated", "scattered"])
def test_a_rotated_gaussian_loses_what_the_best_quantizer_loses(name: str, kind: str) -> None:
    codec = make_codec(name, kind, 64, 384)
    error = relative_error(codec, gaussian(16, 64, 384))
    assert error == pytest.approx(LLOYD_MAX_MSE[codec.spec.bits], rel=0.025)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("limit", [6.0, 12.0])
def test_a_calibrated_range_loses_a_twelfth_of_a_step_squared(bits: int, limit: float) -> None:
    latents = np.random.default_rng(1).uniform(-limit, limit, (32, 16, 384)).astype(np.float32)
    codec = make_codec(
        f"int{bits}", "tensor", 16, 384, calibration=np.array([-limit, limit], np.float32).repeat(16 * 192).reshape(1, 16, 384)
    )
    error = codec.decode(codec.encode(latents)) - latents
    step = 2 * limit / (2**bits - 1)
    assert float(np.square(error).mean()) == pytest.approx(step * step / 12, rel=0.015)


def test_a_calibrated_range_clips_what_lies_outside() -> None:
    codec = make_codec("int8", "tensor", 1, 4, calibration=np.array([[[-1, 0, 0.5, 3]]], np.float32))
    back = codec.decode(codec.encode(np.array([[[-9, -1, 3, 1e30]]], np.float32)))
    np.testing.assert_allclose(back, [[[-1, -1, 3, 3]]], atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_rotation_beats_a_range_where_a_few_channels_are_huge(bits: int) -> None:
    latents = spiky(16)
    rotated = relative_error(make_codec(f"int{bits}", "rotated", 8, 384), latents)
    ranged = relative_error(make_codec(f"int{bits}", "token", 8, 384), latents)
    assert rotated < ranged / 2


def test_a_calibrated_rotation_stores_the_difference_from_the_mean() -> None:
    latents = spiky(64)
    plain = make_codec("int3", "rotated", 8, 384)
    centred = make_codec("int3", "rotated", 8, 384, calibration=latents[:32])
    assert centred.code_bytes == plain.code_bytes
    assert relative_error(centred, latents[32:]) < relative_error(plain, latents[32:]) / 3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_wrong_with_similar_latents_averages_out(bits: int) -> None:
    """Frames of one video: a twentieth of their energy differs. Independent errors leave 1 / 64 of their energy in the mean of 64."""
    frames = gaussian(1, 4, 384) + 0.2 * gaussian(64, 4, 384, seed=1)

    def left(kind: str) -> float:
        codec = make_codec(f"int{bits}", kind, 4, 384)
        wrong = codec.decode(codec.encode(frames)) - frames
        own = frames * np.sum(wrong * frames) / np.sum(np.square(frames))  # what levels at the mean of their cells take from every latent
        return float(np.square((wrong - own).mean(axis=0)).mean() / np.square(wrong - own).mean())

    assert left("scattered") < 2 / 64 < left("rotated") / 3


def test_latents_with_other_scales_get_other_signs() -> None:
    codec = make_codec("int8", "scattered", 1, 384)
    latents = gaussian(1, 1, 384) * np.linspace(1, 1.1, 40, dtype=np.float32)[:, None, None]
    codes = codec.encode(latents)
    assert len({code.tobytes() for code in codes[:, :-2]}) > 30


@given(
    latents=hnp.arrays(np.float32, (2, 3, 8), elements=st.floats(-60_000, 60_000, width=32)),
    bits=st.integers(2, 8),
)
@settings(max_examples=200, deadline=None)
def test_a_token_scale_is_never_off_by_more_than_half_its_step(latents: Floats, bits: int) -> None:
    codec = make_codec(f"int{bits}", "token", 3, 8)
    error = np.abs(codec.decode(codec.encode(latents)) - latents).max(axis=2)
    low, high = latents.min(axis=2), latents.max(axis=2)
    # FP16 rounds the least value down and the step up: by one part in 1024 each, or by its smallest number.
    step = (high - low + np.abs(low) / 1024 + 1e-7) / (2**bits - 1) * (1 + 1 / 512) + 1e-7
    assert (error <= step / 2 * (1 + 1e-4) + np.abs(latents).max() * 1e-6).all()


def test_a_token_far_from_zero_keeps_its_small_differences() -> None:
    """FP16 numbers near 1000 are 0.5 apart: the stored least value must lie below the token, not above it."""
    latents = 1000.3 + 0.01 * gaussian(4, 2, 64)
    codec = make_codec("int8", "token", 2, 64)
    assert np.abs(codec.decode(codec.encode(latents)) - latents).max() < 0.002


@pytest.mark.parametrize("name", ["fp32", "fp16", *INTS])
@pytest.mark.parametrize("kind", ["token", "rotated", "scattered"])
def test_zero_and_constant_tokens_survive(name: str, kind: str) -> None:
    codec = make_codec(name, kind, 2, 384)
    assert (codec.decode(codec.encode(np.zeros((1, 2, 384), np.float32))) == 0).all()
    constant = np.full((1, 2, 384), 0.3, np.float32)
    assert relative_error(codec, constant) < 0.5


@pytest.mark.parametrize(
    ("name", "kind"), [("fp16", "token"), ("int8", "token"), ("int8", "rotated"), ("int8", "scattered"), ("int2", "token")]
)
def test_huge_values_are_clipped_at_the_range_of_fp16(name: str, kind: str) -> None:
    latents = np.full((1, 2, 8), 1e38, np.float32)
    latents[0, 0, 0] = -1e38
    back = make_codec(name, kind, 2, 8).decode(make_codec(name, kind, 2, 8).encode(latents))
    assert np.isfinite(back).all()
    assert back[0, 0, 0] < -30_000
    assert back[0, 1].min() > 50_000
    assert np.abs(back).max() < 200_000


def test_fp32_gives_back_every_bit() -> None:
    latents = gaussian(3, 4, 6) * np.float32(1e30)
    codec = make_codec("fp32", "rotated", 4, 6)
    np.testing.assert_array_equal(codec.decode(codec.encode(latents)), latents)


def test_fp16_gives_back_every_bit_of_a_half() -> None:
    latents = gaussian(3, 4, 6).astype(np.float16).astype(np.float32)
    codec = make_codec("fp16", "tensor", 4, 6)
    np.testing.assert_array_equal(codec.decode(codec.encode(latents)), latents)


# --- the same everywhere ---


@pytest.mark.parametrize("name", ["fp32", "fp16", *INTS])
@pytest.mark.parametrize("kind", KINDS)
def test_a_code_does_not_depend_on_its_neighbours_in_the_batch(name: str, kind: str) -> None:
    latents = spiky(5)
    codec = make_codec(name, kind, 8, 384, calibration=latents)
    together = codec.encode(latents)
    np.testing.assert_array_equal(together, np.concatenate([codec.encode(latents[i : i + 1]) for i in range(5)]))
    alone = np.concatenate([codec.decode(code[None]) for code in together])
    np.testing.assert_allclose(codec.decode(together), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_in_chunks_equals_decoding_one_by_one(kind: str) -> None:
    latents = gaussian(300, 4, 192)  # two chunks
    codec = make_codec("int5", kind, 4, 192, calibration=latents)
    codes = codec.encode(latents)
    np.testing.assert_allclose(codec.decode(codes), np.concatenate([codec.decode(code[None]) for code in codes]), rtol=1e-5, atol=1e-5)


def test_codes_decode_from_any_memory_layout() -> None:
    codec = make_codec("int3", "token", 4, 6)
    codes = codec.encode(gaussian(6, 4, 6))
    np.testing.assert_array_equal(codec.decode(np.asfortranarray(codes)), codec.decode(codes))
    np.testing.assert_array_equal(codec.decode(codes[::2]), codec.decode(codes)[::2])
    np.testing.assert_array_equal(codec.encode(np.asfortranarray(gaussian(6, 4, 6))), codes)


@pytest.mark.parametrize("name", ["int8", "int3"])
@pytest.mark.parametrize("kind", KINDS)
def test_spec_and_parameters_reopen_a_codec(name: str, kind: str) -> None:
    latents = spiky(4)
    made = make_codec(name, kind, 8, 384, seed=5, calibration=latents)
    opened = open_codec(made.spec, made.parameters)
    assert opened.spec == made.spec
    np.testing.assert_array_equal(opened.encode(latents), made.encode(latents))
    np.testing.assert_array_equal(opened.decode(made.encode(latents)), made.decode(made.encode(latents)))


def test_codes_written_today_can_be_read_by_every_later_version() -> None:
    """Small integers and powers of two make every step exact, so these bytes are the same on every platform."""
    latents = (np.arange(2 * 2 * 64, dtype=np.float32).reshape(2, 2, 64) * 7 % 16) - 4
    digests = {}
    for kind in ("tensor", "token", "rotated", "scattered"):
        codec = make_codec("int3", kind, 2, 64, seed=9, calibration=latents if kind == "tensor" else None)
        digests[kind] = hashlib.sha256(codec.encode(latents).tobytes()).hexdigest()[:16]
    assert digests == {
        "tensor": "f8f1db40ce9ac635",
        "token": "1ce82354ef4ababb",
        "rotated": "6aef33478c43af1c",
        "scattered": "3780e1ffb17b6cb7",
    }


def test_another_seed_is_another_rotation() -> None:
    latents = gaussian(1, 4, 64)
    one, other = (make_codec("int4", "rotated", 4, 64, seed=seed) for seed in (1, 2))
    assert one.spec != other.spec
    assert not np.array_equal(one.encode(latents), other.encode(latents))


def test_plain_floats_have_one_spec_whatever_the_kind() -> None:
    assert make_codec("fp16", "tensor", 4, 8, seed=3).spec == make_codec("fp16", "rotated", 4, 8).spec == CodecSpec("fp16", "float", 4, 8)
    assert str(CodecSpec("fp16", "float", 4, 8)) == "fp16"
    assert str(CodecSpec("int3", "rotated", 4, 8)) == "int3 rotated"


# --- refusals ---


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "int2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_poisoned_latent_is_refused(name: str, kind: str, poison: float) -> None:
    latents = gaussian(2, 5, 8)
    codec = make_codec(name, kind, 5, 8, calibration=latents)
    latents[1, 2, 5] = poison
    with pytest.raises(ValueError, match="NaN or infinity"):
        codec.encode(latents)


def test_a_latent_or_code_of_another_shape_is_refused() -> None:
    codec = make_codec("int4", "token", 3, 8)
    with pytest.raises(ValueError, match=r"latents of shape \(3, 8\), not \(8, 3\)"):
        codec.encode(gaussian(2, 8, 3))
    with pytest.raises(ValueError, match="24 bytes"):
        codec.decode(np.zeros((1, 23), np.uint8))


def test_a_range_for_everything_must_be_calibrated() -> None:
    with pytest.raises(ValueError, match="no default range"):
        make_codec("int8", "tensor", 3, 8)


@pytest.mark.parametrize(
    "calibration",
    [np.empty((0, 3, 8)), np.zeros((2, 8, 3)), np.full((2, 3, 8), np.nan), np.full((2, 3, 8), 4.0)],
    ids=["empty", "shape", "nan", "constant"],
)
def test_useless_calibration_is_refused(calibration: Floats) -> None:
    with pytest.raises(ValueError, match="calibration"):
        make_codec("int8", "tensor", 3, 8, calibration=calibration.astype(np.float32))


@pytest.mark.parametrize(("name", "kind"), [("int9", "token"), ("int1", "token"), ("bf16", "token"), ("int8", "channel")])
def test_an_unknown_codec_is_refused(name: str, kind: str) -> None:
    with pytest.raises(ValueError, match="unknown codec"):
        make_codec(name, kind, 3, 8)


def test_parameters_of_another_codec_are_refused() -> None:
    with pytest.raises(ValueError, match="parameters of a tensor codec"):
        open_codec(CodecSpec("int8", "tensor", 3, 8), np.empty(0, np.float32))
    with pytest.raises(ValueError, match="at least one token"):
        open_codec(CodecSpec("int8", "token", 0, 8), np.empty(0, np.float32))
