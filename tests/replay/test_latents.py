"""Whole latents as codes: features and tokens side by side, and two codecs that differ never mistaken for one."""

from __future__ import annotations

import json
from typing import Any, Dict

import numpy as np
import numpy.typing as npt
import pytest

from latentd.replay.codec import CodecSpec, calibrated, make_codec
from latentd.replay.latents import LatentCodec, make_latent_codec

FEATURES, TOKENS = (4, 16), (9, 16)


def gaussian(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_features_alone_are_stored_as_the_plain_codec_stores_them() -> None:
    codec, plain = make_latent_codec("int6", "rotated", FEATURES, seed=3), make_codec("int6", "rotated", *FEATURES, 3)
    features = gaussian(5, 64)
    codes = codec.encode(features)
    assert codes.shape == (5, codec.code_bytes)
    np.testing.assert_array_equal(codes, plain.encode(features.reshape(5, *FEATURES)))
    np.testing.assert_array_equal(codec.decode_features(codes), plain.decode(codes).reshape(5, 64))


@pytest.mark.parametrize(
    ("name", "kind"), [("fp32", "token"), ("int8", "token"), ("int4", "rotated"), ("int3", "rotated"), ("int2", "spatial")]
)
def test_features_and_tokens_come_back_from_one_code(name: str, kind: str) -> None:
    codec = make_latent_codec(name, kind, FEATURES, TOKENS, seed=1)
    features, tokens = gaussian(5, 64), gaussian(5, *TOKENS, seed=1)
    codes = codec.encode(features, tokens)
    tokens_codec = make_codec(name, kind, *TOKENS, 1)
    assert codes.shape == (5, codec.code_bytes)
    assert codec.code_bytes == codec.features.code_bytes + tokens_codec.code_bytes
    np.testing.assert_array_equal(codec.decode_tokens(codes), tokens_codec.decode(tokens_codec.encode(tokens)))
    assert np.abs(codec.decode_features(codes) - features).max() < 0.02
    assert codec.decode_features(codes).shape == (5, 64)


def test_tokens_in_few_bits_leave_the_features_precise() -> None:
    assert str(make_latent_codec("int2", "rotated", FEATURES, TOKENS).features.spec) == "int8 token"
    assert str(make_latent_codec("fp16", "token", FEATURES, TOKENS).features.spec) == "fp16"
    assert str(make_latent_codec("int2", "rotated", FEATURES).features.spec) == "int2 rotated"


def test_a_codec_across_patches_is_refused_where_no_patches_are_kept() -> None:
    with pytest.raises(ValueError, match="tokens of patches"):
        make_latent_codec("int4", "spatial", FEATURES)
    assert str(make_latent_codec("fp16", "spatial", FEATURES)) == "fp16"


def test_a_codec_says_what_it_is() -> None:
    assert str(make_latent_codec("int8", "token", FEATURES)) == "int8 token"
    assert str(make_latent_codec("int4", "rotated", FEATURES, TOKENS)) == "int8 token + int4 rotated (9 tokens)"
    assert str(make_latent_codec("fp32", "token", FEATURES, TOKENS)) == "fp32 + fp32 (9 tokens)"


def test_calibration_goes_to_the_tokens_where_they_are_kept() -> None:
    tokens = gaussian(8, *TOKENS)
    codec = make_latent_codec("int8", "tensor", FEATURES, TOKENS, parameters=lambda spec: calibrated(spec, tokens))
    assert codec.tokens is not None
    assert codec.tokens.parameters.tolist() == [tokens.min(), tokens.max()]
    features = gaussian(8, *FEATURES)
    alone = make_latent_codec("int8", "tensor", FEATURES, parameters=lambda spec: calibrated(spec, features))
    assert alone.features.parameters.tolist() == [features.min(), features.max()]


def test_an_empty_batch_has_an_empty_code() -> None:
    codec = make_latent_codec("int3", "rotated", FEATURES, TOKENS)
    codes = codec.encode(np.empty((0, 64), np.float32), np.empty((0, *TOKENS), np.float32))
    assert codes.shape == (0, codec.code_bytes)
    assert codec.decode_features(codes).shape == (0, 64)
    assert codec.decode_tokens(codes).shape == (0, *TOKENS)


@pytest.mark.parametrize("with_tokens", [False, True], ids=["features alone", "features and tokens"])
def test_what_does_not_fit_is_refused(with_tokens: bool) -> None:
    codec = make_latent_codec("int8", "token", FEATURES, TOKENS if with_tokens else None)
    tokens = gaussian(2, *TOKENS) if with_tokens else None
    with pytest.raises(ValueError, match="features have shape"):
        codec.encode(gaussian(2, 63), tokens)
    with pytest.raises(ValueError, match="tokens"):
        codec.encode(gaussian(2, 64), None if with_tokens else gaussian(2, *TOKENS))
    for decode in (codec.decode_features, codec.decode_tokens):
        with pytest.raises(ValueError, match="bytes, not"):
            decode(np.zeros((2, codec.code_bytes + 1), np.uint8))
    if with_tokens:
        with pytest.raises(ValueError, match="3 have tokens"):
            codec.encode(gaussian(2, 64), gaussian(3, *TOKENS))
    else:
        with pytest.raises(ValueError, match="stores no tokens"):
            codec.decode_tokens(np.zeros((2, codec.code_bytes), np.uint8))


# --- identity ---

USUAL: Dict[str, Any] = {"name": "int4", "kind": "rotated", "features": FEATURES, "tokens": TOKENS, "seed": 0}


def on_tokens(spec: CodecSpec) -> npt.NDArray[np.float32]:
    return calibrated(spec, gaussian(4, *TOKENS))


def identity(**changes: Any) -> Dict[str, Any]:
    return make_latent_codec(**{**USUAL, **changes}).identity()


def test_codecs_made_alike_have_one_identity_even_over_json() -> None:
    assert json.loads(json.dumps(identity())) == identity()
    assert json.loads(json.dumps(identity(parameters=on_tokens))) == identity(parameters=on_tokens)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "int3"},
        {"name": "fp32"},
        {"kind": "token"},
        {"kind": "spatial"},
        {"features": (3, 16)},
        {"tokens": (10, 16)},
        {"tokens": None},
        {"seed": 1},
        {"parameters": on_tokens},
    ],
    ids=lambda change: next(iter(change)),
)
def test_codecs_that_differ_have_different_identities(change: Dict[str, Any]) -> None:
    assert identity(**change) != identity()


def test_parameters_that_differ_in_one_bit_make_another_identity() -> None:
    one = make_codec("int8", "tensor", *FEATURES, calibration=np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, *FEATURES))
    latents = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, *FEATURES)
    latents.flat[-1] = np.nextafter(np.float32(1), np.float32(2))
    other = make_codec("int8", "tensor", *FEATURES, calibration=latents)
    assert LatentCodec(one).identity() != LatentCodec(other).identity()
