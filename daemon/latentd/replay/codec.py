"""Codecs: latents as rows of bytes and back. A Codec is immutable after construction: any thread may use it, nothing blocks.

Kinds of quantizer, all packed without a wasted bit (8, 7, ... 2 bits a value, then the scales):

  tensor   one affine range for everything, calibrated beforehand: the signed form of QLR-CL's quantizer (Ravaglia et al. 2021)
  token    one affine range a token, stored as two FP16 numbers
  rotated  random signs, block Hadamard, Lloyd-Max levels, one FP16 norm a token; less error per bit than the others where a few channels
           are huge, as in every ViT (TurboQuant 2025). Given calibration latents it stores the difference from their mean: no more bytes
           a latent, and less error by the share of the energy that all latents have in common.
  scattered  rotated with signs of each latent's own, so that what rounding does to many similar latents averages out; calibrated like
           rotated, and in the daemon always: on drawn images
  spatial  for the token matrix of an image: rotated, after a cosine transform over the grid of patches that gives more bits to what
           neighbours have in common; 2 bits a value on average lose about what 3 rotated bits lose

fp32 and fp16 are stored as they are. Every codec but fp32 clips at +-65504, FP16's range.
"""

from __future__ import annotations

from typing import Dict, List, Optional, Protocol, Tuple, Type

import numpy as np

from latentd.replay.packing import Bytes
from latentd.replay.quantizers import LIMIT, ArrayCodec, FloatCodec, RotatedCodec, ScatteredCodec, TensorCodec, TokenCodec
from latentd.replay.quantizers import CodecSpec as CodecSpec
from latentd.replay.rotation import Floats
from latentd.replay.spatial import SpatialCodec


class Codec(Protocol):
    """Latents of one shape (N, D) as codes of one length, and back.

    A latent's code does not depend on the others in its batch. parameters: what calibration gave, to be stored with the spec: shape (2,)
    (low, high) for tensor, (N, D) (the mean latent) for a rotated or scattered codec that was calibrated, (0,) otherwise. code_bytes: exact
    bytes of one latent, all values packed together, then the scales. basis: (P, n, n), P * n = D: what rotates the tokens of
    decode_rotated back, n channels a matrix; None where they are not rotated.
    """

    spec: CodecSpec
    parameters: Floats
    code_bytes: int
    basis: Optional[Floats]

    def encode(self, latents: Floats) -> Bytes:
        """(B, N, D) float32 -> (B, code_bytes) uint8. Raises ValueError for another shape, NaN or infinity."""

    def decode(self, codes: Bytes) -> Floats:
        """(B, code_bytes) uint8 -> (B, N, D) float32. Raises ValueError for another length."""

    def decode_rotated(self, codes: Bytes) -> Floats:
        """The same but for the rotation, which costs as much as the rest: `basis` undoes it."""


_KINDS: Dict[str, Type[ArrayCodec]] = {
    "float": FloatCodec,
    "tensor": TensorCodec,
    "token": TokenCodec,
    "rotated": RotatedCodec,
    "scattered": ScatteredCodec,
    "spatial": SpatialCodec,
}
KINDS = ("tensor", "token", "rotated", "scattered", "spatial")
_CENTRED = ("rotated", "scattered")
_SEEDED = ("rotated", "scattered", "spatial")
_NAMES = ("fp32", "fp16", "int8", "int7", "int6", "int5", "int4", "int3", "int2")


def codec_spec(name: str, kind: str, tokens: int, width: int, seed: int = 0) -> CodecSpec:
    """The spec of a codec for latents of shape (tokens, width); fp32 and fp16 ignore kind and seed. Raises ValueError for unknown ones."""
    if name not in _NAMES or kind not in KINDS:
        raise ValueError(f"unknown codec {name!r} of kind {kind!r}: names are {', '.join(_NAMES)}; kinds are {', '.join(KINDS)}")
    if name.startswith("fp"):
        kind = "float"
    return CodecSpec(name, kind, tokens, width, seed if kind in _SEEDED else 0)


def make_codec(name: str, kind: str, tokens: int, width: int, seed: int = 0, calibration: Optional[Floats] = None) -> Codec:
    """A new codec for latents of shape (tokens, width), calibrated on `calibration` as `calibrated` says.

    Raises ValueError where an argument is unknown, or calibration is missing, empty, not finite or constant.
    """
    spec = codec_spec(name, kind, tokens, width, seed)
    return open_codec(spec, calibrated(spec, calibration))


def open_codec(spec: CodecSpec, parameters: Floats) -> Codec:
    """The codec that make_codec once gave, from its stored spec and parameters."""
    if spec.tokens < 1 or spec.width < 1:
        raise ValueError(f"a latent has at least one token and one channel, not {(spec.tokens, spec.width)}")
    shapes: Dict[str, List[Tuple[int, ...]]] = {"tensor": [(2,)], **{kind: [(0,), (spec.tokens, spec.width)] for kind in _CENTRED}}
    fitting = shapes.get(spec.kind, [(0,)])
    if parameters.shape not in fitting:
        raise ValueError(f"the parameters of a {spec.kind} codec have shape {' or '.join(map(str, fitting))}, not {parameters.shape}")
    return _KINDS[spec.kind](spec, np.ascontiguousarray(parameters, dtype=np.float32))


def calibrated(spec: CodecSpec, latents: Optional[Floats] = None) -> Floats:
    """The parameters of a new codec.

    latents: (M, N, D) of the kind to be stored. Needed by kind "tensor" (their least and greatest value is the range), used by "rotated"
    and "scattered" (their mean is subtracted), ignored by the others. Raises ValueError where they are missing, empty, not finite or
    constant.
    """
    if spec.kind not in ("tensor", *_CENTRED) or (spec.kind in _CENTRED and latents is None):
        return np.empty(0, np.float32)
    if latents is None:
        raise ValueError("a codec of kind 'tensor' has no default range: give it calibration latents, or use kind 'token' or 'rotated'")
    if latents.size == 0 or latents.shape[1:] != (spec.tokens, spec.width) or not np.isfinite(latents).all():
        wanted = f"(M, {spec.tokens}, {spec.width})"
        raise ValueError(
            f"calibration needs at least one finite latent, shape {wanted}; these have shape {latents.shape} or NaN or infinity"
        )
    if spec.kind in _CENTRED:
        mean: Floats = np.clip(latents.mean(axis=0, dtype=np.float64), -LIMIT, LIMIT).astype(np.float32)
        return mean
    low, high = (float(np.clip(value, -LIMIT, LIMIT)) for value in (latents.min(), latents.max()))
    if not low < high:
        raise ValueError("calibration latents are all the same number: no range can be read from them")
    return np.array([low, high], np.float32)
