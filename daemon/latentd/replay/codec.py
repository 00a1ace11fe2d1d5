"""Codecs: latents as rows of bytes and back. A Codec is immutable after construction: any thread may use it, nothing blocks.

Kinds of quantizer, all packed without a wasted bit (8, 7, ... 2 bits a value, then the scales):

  tensor   one affine range for everything, calibrated beforehand: the signed form of QLR-CL's quantizer (Ravaglia et al. 2021)
  token    one affine range a token, stored as two FP16 numbers
  rotated  random signs, block Hadamard, Lloyd-Max levels, one FP16 norm a token; less error per bit than the others where a few channels
           are huge, as in every ViT (TurboQuant 2025). Given calibration latents it stores the difference from their mean: no more bytes
           a latent, and less error by the share of the energy that all latents have in common.

fp32 and fp16 are stored as they are. Every codec but fp32 clips at +-65504, FP16's range.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Dict, List, Optional, Protocol, Tuple, Type

import numpy as np
import numpy.typing as npt

from latentd.replay.packing import Bytes, FieldTable, pack, packed_bytes
from latentd.replay.rotation import Floats, Rotation, lloyd_max

_LIMIT = float(np.finfo(np.float16).max)
# Decoding works on so many values at a time: one ViT-S latent. Its temporaries then stay in a core's L2 cache.
_CHUNK_VALUES = 1 << 17
_SCALE = np.dtype("<f2")


@dataclass(frozen=True)
class CodecSpec:
    """What one needs to know, besides the parameters, to read a code: equal specs and parameters read each other's codes.

    name: fp32, fp16, int8 ... int2. kind: float, tensor, token, rotated. tokens, width: N, D of a latent. seed: of the rotation.
    """

    name: str
    kind: str
    tokens: int
    width: int
    seed: int = 0

    @property
    def bits(self) -> int:
        """Bits a value, scales not counted."""
        return int(self.name.lstrip("intfp"))

    def __str__(self) -> str:
        return self.name if self.kind == "float" else f"{self.name} {self.kind}"


class Codec(Protocol):
    """Latents of one shape (N, D) as codes of one length, and back.

    A latent's code does not depend on the others in its batch. parameters: what calibration gave, to be stored with the spec: shape (2,)
    (low, high) for tensor, (N, D) (the mean latent) for a calibrated rotated codec, (0,) otherwise.
    """

    spec: CodecSpec
    parameters: Floats

    def code_bytes(self, tokens: int, width: int) -> int:
        """Exact bytes of one latent of (tokens, width): all values packed together, then the scales."""

    def encode(self, latents: Floats) -> Bytes:
        """(B, N, D) float32 -> (B, code_bytes) uint8. Raises ValueError for another shape, NaN or infinity."""

    def decode(self, codes: Bytes) -> Floats:
        """(B, code_bytes) uint8 -> (B, N, D) float32. Raises ValueError for another length."""


class _ArrayCodec(ABC):
    """What all kinds share: checks, and the walk over a batch."""

    def __init__(self, spec: CodecSpec, parameters: Floats) -> None:
        self.spec = spec
        self.parameters = parameters

    @abstractmethod
    def code_bytes(self, tokens: int, width: int) -> int: ...

    def encode(self, latents: Floats) -> Bytes:
        spec = self.spec
        if latents.shape[1:] != (spec.tokens, spec.width):
            raise ValueError(f"this codec stores latents of shape {(spec.tokens, spec.width)}, not {latents.shape[1:]}")
        codes = np.empty((len(latents), self.code_bytes(spec.tokens, spec.width)), np.uint8)
        # One by one, so that every matrix product has the same shape and a code the same bits in every batch.
        for latent, code in zip(latents, codes):
            if not np.isfinite(latent).all():
                raise ValueError("a latent with NaN or infinity can't be stored: check the frozen stage before encoding")
            self._encode(np.ascontiguousarray(latent, dtype=np.float32), code)
        return codes

    def decode(self, codes: Bytes) -> Floats:
        spec = self.spec
        if codes.ndim != 2 or codes.shape[1] != self.code_bytes(spec.tokens, spec.width):
            raise ValueError(f"a code of {spec} has {self.code_bytes(spec.tokens, spec.width)} bytes, not {codes.shape[1:]}")
        latents = np.empty((len(codes), spec.tokens, spec.width), np.float32)
        chunk = max(1, _CHUNK_VALUES // (spec.tokens * spec.width))
        for start in range(0, len(codes), chunk):
            self._decode(np.ascontiguousarray(codes[start : start + chunk]), latents[start : start + chunk])
        return latents

    @abstractmethod
    def _encode(self, latent: Floats, code: Bytes) -> None:
        """Finite latent (N, D) into code (code_bytes,)."""

    @abstractmethod
    def _decode(self, codes: Bytes, latents: Floats) -> None:
        """codes (R, code_bytes) into latents (R, N, D); both contiguous."""


class FloatCodec(_ArrayCodec):
    """fp32 or fp16, little-endian, as they are."""

    def __init__(self, spec: CodecSpec, parameters: Floats) -> None:
        super().__init__(spec, parameters)
        self._type = np.dtype("<f4" if spec.name == "fp32" else "<f2")

    def code_bytes(self, tokens: int, width: int) -> int:
        return tokens * width * self._type.itemsize

    def _encode(self, latent: Floats, code: Bytes) -> None:
        values = latent if self._type.itemsize == 4 else np.clip(latent, -_LIMIT, _LIMIT)
        code[...] = values.astype(self._type).reshape(-1).view(np.uint8)

    def _decode(self, codes: Bytes, latents: Floats) -> None:
        latents[...] = codes.view(self._type).reshape(latents.shape)


class _Quantizer(_ArrayCodec):
    """Shared by the packed kinds: values first, `_scales` FP16 numbers a token behind them."""

    _scales = 0

    def code_bytes(self, tokens: int, width: int) -> int:
        return packed_bytes(tokens * width, self.spec.bits) + tokens * self._scales * _SCALE.itemsize

    def _write(self, code: Bytes, values: npt.NDArray[np.integer], *scales: npt.NDArray[np.float16]) -> None:
        body = len(code) - self.spec.tokens * self._scales * _SCALE.itemsize
        code[:body] = pack(values.astype(np.uint8).reshape(1, -1), self.spec.bits)[0]
        if scales:
            code[body:] = np.concatenate([scale.reshape(-1) for scale in scales]).astype(_SCALE).view(np.uint8)

    def _read_scales(self, codes: Bytes) -> Floats:
        """(R, code_bytes) -> (scales, R, N, 1)."""
        N = self.spec.tokens
        tail = np.ascontiguousarray(codes[:, codes.shape[1] - N * self._scales * _SCALE.itemsize :]).view(_SCALE)
        return tail.astype(np.float32).reshape(len(codes), self._scales, N, 1).transpose(1, 0, 2, 3)

    def _read_values(self, codes: Bytes, table: Optional[FieldTable], out: Floats) -> None:
        """Values of codes (R, code_bytes) as levels of the table into out (R, N, D); no table: the plain numbers of 8 bits."""
        R = len(codes)
        flat = out.reshape(R, -1)
        packed = codes[:, : packed_bytes(flat.shape[1], self.spec.bits)]
        if table is None:
            flat[...] = packed
        else:
            table.read(np.ascontiguousarray(packed), flat)


class TensorCodec(_Quantizer):
    """One calibrated range [low, high] for all values; what lies outside is clipped."""

    def __init__(self, spec: CodecSpec, parameters: Floats) -> None:
        super().__init__(spec, parameters)
        self._low, self._high = np.float32(parameters[0]), np.float32(parameters[1])
        self._step = (self._high - self._low) / np.float32((1 << spec.bits) - 1)
        levels = self._low + self._step * np.arange(1 << spec.bits, dtype=np.float32)
        self._table = FieldTable(levels, spec.bits) if spec.bits < 8 else None

    def _encode(self, latent: Floats, code: Bytes) -> None:
        inside = np.clip(latent, self._low, self._high)
        self._write(code, np.rint((inside - self._low) / self._step).astype(np.uint8))

    def _decode(self, codes: Bytes, latents: Floats) -> None:
        self._read_values(codes, self._table, latents)
        if self._table is None:
            latents *= self._step
            latents += self._low


class TokenCodec(_Quantizer):
    """One range a token: its least value, rounded down, and the step, rounded up, so that no value of the token is clipped."""

    _scales = 2

    def __init__(self, spec: CodecSpec, parameters: Floats) -> None:
        super().__init__(spec, parameters)
        self._top = (1 << spec.bits) - 1
        self._table = FieldTable(np.arange(1 << spec.bits, dtype=np.float32), spec.bits) if spec.bits < 8 else None

    def _encode(self, latent: Floats, code: Bytes) -> None:
        tokens = np.clip(latent, -_LIMIT, _LIMIT)
        low = _half(tokens.min(axis=1, keepdims=True), -np.inf)  # (N, 1)
        offsets = tokens - low.astype(np.float32)
        step = _half(offsets.max(axis=1, keepdims=True) / np.float32(self._top), np.inf)
        places = np.rint(offsets / _divisor(step))
        self._write(code, np.minimum(places, self._top).astype(np.uint8), low, step)

    def _decode(self, codes: Bytes, latents: Floats) -> None:
        low, step = self._read_scales(codes)
        self._read_values(codes, self._table, latents)
        latents *= step
        latents += low


class RotatedCodec(_Quantizer):
    """Rotated tokens in units of their root mean square, each value at the nearest Lloyd-Max level."""

    _scales = 1

    def __init__(self, spec: CodecSpec, parameters: Floats) -> None:
        super().__init__(spec, parameters)
        self._rotation = Rotation(spec.width, spec.seed)
        self._levels = lloyd_max(spec.bits)
        self._table = FieldTable(self._levels.levels, spec.bits)

    def _encode(self, latent: Floats, code: Bytes) -> None:
        tokens = np.clip(latent, -_LIMIT, _LIMIT)
        if self.parameters.size:
            tokens = np.clip(tokens - self.parameters, -_LIMIT, _LIMIT)
        rotated = self._rotation.forward(tokens)
        size = np.sqrt(np.mean(np.square(rotated), axis=1, keepdims=True))  # (N, 1)
        scale = np.minimum(size, _LIMIT).astype(np.float16)
        self._write(code, self._levels.nearest(rotated / _divisor(scale)), scale)

    def _decode(self, codes: Bytes, latents: Floats) -> None:
        rotated = np.empty_like(latents)
        self._read_values(codes, self._table, rotated)
        rotated *= self._read_scales(codes)[0]
        D = self.spec.width
        self._rotation.inverse(rotated.reshape(-1, D), latents.reshape(-1, D))
        if self.parameters.size:
            latents += self.parameters


_KINDS: Dict[str, Type[_ArrayCodec]] = {"float": FloatCodec, "tensor": TensorCodec, "token": TokenCodec, "rotated": RotatedCodec}
_NAMES = ("fp32", "fp16", "int8", "int7", "int6", "int5", "int4", "int3", "int2")


def make_codec(name: str, kind: str, tokens: int, width: int, seed: int = 0, calibration: Optional[Floats] = None) -> Codec:
    """A new codec for latents of shape (tokens, width).

    calibration: (M, tokens, width) latents of the kind to be stored. Needed by kind "tensor" (their least and greatest value is the range),
    used by "rotated" (their mean is subtracted), ignored by "token"; fp32 and fp16 ignore kind, seed and calibration.
    Raises ValueError where an argument is unknown, or calibration is missing, empty, not finite or constant.
    """
    if name not in _NAMES or kind not in ("tensor", "token", "rotated"):
        raise ValueError(f"unknown codec {name!r} of kind {kind!r}: names are {', '.join(_NAMES)}; kinds are tensor, token, rotated")
    if name.startswith("fp"):
        kind = "float"
    spec = CodecSpec(name, kind, tokens, width, seed if kind == "rotated" else 0)
    return open_codec(spec, _calibrated(spec, calibration))


def open_codec(spec: CodecSpec, parameters: Floats) -> Codec:
    """The codec that make_codec once gave, from its stored spec and parameters."""
    if spec.tokens < 1 or spec.width < 1:
        raise ValueError(f"a latent has at least one token and one channel, not {(spec.tokens, spec.width)}")
    shapes: Dict[str, List[Tuple[int, ...]]] = {"tensor": [(2,)], "rotated": [(0,), (spec.tokens, spec.width)]}
    fitting = shapes.get(spec.kind, [(0,)])
    if parameters.shape not in fitting:
        raise ValueError(f"the parameters of a {spec.kind} codec have shape {' or '.join(map(str, fitting))}, not {parameters.shape}")
    return _KINDS[spec.kind](spec, np.ascontiguousarray(parameters, dtype=np.float32))


def _calibrated(spec: CodecSpec, calibration: Optional[Floats]) -> Floats:
    if spec.kind not in ("tensor", "rotated") or (spec.kind == "rotated" and calibration is None):
        return np.empty(0, np.float32)
    if calibration is None:
        raise ValueError("a codec of kind 'tensor' has no default range: give it calibration latents, or use kind 'token' or 'rotated'")
    if calibration.size == 0 or calibration.shape[1:] != (spec.tokens, spec.width) or not np.isfinite(calibration).all():
        wanted = f"(M, {spec.tokens}, {spec.width})"
        raise ValueError(
            f"calibration needs at least one finite latent, shape {wanted}; these have shape {calibration.shape} or NaN or infinity"
        )
    if spec.kind == "rotated":
        mean: Floats = np.clip(calibration.mean(axis=0, dtype=np.float64), -_LIMIT, _LIMIT).astype(np.float32)
        return mean
    low, high = (float(np.clip(value, -_LIMIT, _LIMIT)) for value in (calibration.min(), calibration.max()))
    if not low < high:
        raise ValueError("calibration latents are all the same number: no range can be read from them")
    return np.array([low, high], np.float32)


def _half(values: Floats, towards: float) -> npt.NDArray[np.float16]:
    """The nearest FP16 numbers not on the wrong side: not above the values for towards = -inf, not below them for +inf."""
    halves = values.astype(np.float16)
    missed = halves.astype(np.float32) > values if towards < 0 else halves.astype(np.float32) < values
    return np.nextafter(halves, np.float16(towards), out=halves, where=missed)


def _divisor(scale: npt.NDArray[np.float16]) -> Floats:
    """The scale to divide by; 1 where it is 0, because then every value is 0 already."""
    divisor: Floats = scale.astype(np.float32)
    divisor[divisor == 0] = 1
    return divisor
