"""The quantizers behind the codecs: values into packed bits and back. Immutable after construction: any thread, nothing blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Callable, Optional

import numpy as np
import numpy.typing as npt

from latentd.replay.packing import Bytes, FieldTable, pack, packed_bytes
from latentd.replay.rotation import Floats, Rotation, lloyd_max, random_signs

LIMIT = float(np.finfo(np.float16).max)
# Decoding works on so many values at a time: one ViT-S latent. Its temporaries then stay in a core's L2 cache.
_CHUNK_VALUES = 1 << 17
SCALE = np.dtype("<f2")
_STRETCHES = 256


@dataclass(frozen=True)
class CodecSpec:
    """What one needs to know, besides the parameters, to read a code: equal specs and parameters read each other's codes.

    name: fp32, fp16, int8 ... int2. kind: float or one of codec.KINDS. tokens, width: N, D of a latent. seed: of the rotation.
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


class ArrayCodec(ABC):
    """What all kinds share: checks, and the walk over a batch. Each sets code_bytes."""

    code_bytes: int
    basis: Optional[Floats] = None

    def __init__(self, spec: CodecSpec, parameters: Floats) -> None:
        self.spec = spec
        self.parameters = parameters

    def encode(self, latents: Floats) -> Bytes:
        spec = self.spec
        if latents.shape[1:] != (spec.tokens, spec.width):
            raise ValueError(f"this codec stores latents of shape {(spec.tokens, spec.width)}, not {latents.shape[1:]}")
        codes = np.empty((len(latents), self.code_bytes), np.uint8)
        # One by one, so that every matrix product has the same shape and a code the same bits in every batch.
        for latent, code in zip(latents, codes):
            if not np.isfinite(latent).all():
                raise ValueError("a latent with NaN or infinity can't be stored: check the frozen stage before encoding")
            self._encode(np.ascontiguousarray(latent, dtype=np.float32), code)
        return codes

    def decode(self, codes: Bytes) -> Floats:
        return self._walk(codes, self._decode)

    def decode_rotated(self, codes: Bytes) -> Floats:
        return self.decode(codes)

    def _walk(self, codes: Bytes, decode: Callable[[Bytes, Floats], None]) -> Floats:
        spec = self.spec
        if codes.ndim != 2 or codes.shape[1] != self.code_bytes:
            raise ValueError(f"a code of {spec} has {self.code_bytes} bytes, not {codes.shape[1:]}")
        latents = np.empty((len(codes), spec.tokens, spec.width), np.float32)
        chunk = max(1, _CHUNK_VALUES // (spec.tokens * spec.width))
        for start in range(0, len(codes), chunk):
            decode(np.ascontiguousarray(codes[start : start + chunk]), latents[start : start + chunk])
        return latents

    @abstractmethod
    def _encode(self, latent: Floats, code: Bytes) -> None:
        """Finite latent (N, D) into code (code_bytes,)."""

    @abstractmethod
    def _decode(self, codes: Bytes, latents: Floats) -> None:
        """codes (R, code_bytes) into latents (R, N, D); both contiguous."""


class FloatCodec(ArrayCodec):
    """fp32 or fp16, little-endian, as they are."""

    def __init__(self, spec: CodecSpec, parameters: Floats) -> None:
        super().__init__(spec, parameters)
        self._type = np.dtype("<f4" if spec.name == "fp32" else "<f2")
        self.code_bytes = spec.tokens * spec.width * self._type.itemsize

    def _encode(self, latent: Floats, code: Bytes) -> None:
        values = latent if self._type.itemsize == 4 else np.clip(latent, -LIMIT, LIMIT)
        code[...] = values.astype(self._type).reshape(-1).view(np.uint8)

    def _decode(self, codes: Bytes, latents: Floats) -> None:
        latents[...] = codes.view(self._type).reshape(latents.shape)


class Quantizer(ArrayCodec):
    """Shared by the packed kinds: values first, `_scales` FP16 numbers a token behind them."""

    _scales = 0

    def __init__(self, spec: CodecSpec, parameters: Floats) -> None:
        super().__init__(spec, parameters)
        self.code_bytes = packed_bytes(spec.tokens * spec.width, spec.bits) + spec.tokens * self._scales * SCALE.itemsize

    def _write(self, code: Bytes, values: npt.NDArray[np.integer], *scales: npt.NDArray[np.float16]) -> None:
        body = len(code) - self.spec.tokens * self._scales * SCALE.itemsize
        code[:body] = pack(values.astype(np.uint8).reshape(1, -1), self.spec.bits)[0]
        if scales:
            code[body:] = np.concatenate([scale.reshape(-1) for scale in scales]).astype(SCALE).view(np.uint8)

    def _read_scales(self, codes: Bytes) -> Floats:
        """(R, code_bytes) -> (scales, R, N, 1)."""
        N = self.spec.tokens
        tail = np.ascontiguousarray(codes[:, codes.shape[1] - N * self._scales * SCALE.itemsize :]).view(SCALE)
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


class TensorCodec(Quantizer):
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


class TokenCodec(Quantizer):
    """One range a token: its least value, rounded down, and the step, rounded up, so that no value of the token is clipped."""

    _scales = 2

    def __init__(self, spec: CodecSpec, parameters: Floats) -> None:
        super().__init__(spec, parameters)
        self._top = (1 << spec.bits) - 1
        self._table = FieldTable(np.arange(1 << spec.bits, dtype=np.float32), spec.bits) if spec.bits < 8 else None

    def _encode(self, latent: Floats, code: Bytes) -> None:
        tokens = np.clip(latent, -LIMIT, LIMIT)
        low = _half(tokens.min(axis=1, keepdims=True), -np.inf)  # (N, 1)
        offsets = tokens - low.astype(np.float32)
        step = _half(offsets.max(axis=1, keepdims=True) / np.float32(self._top), np.inf)
        places = np.rint(offsets / divisor(step))
        self._write(code, np.minimum(places, self._top).astype(np.uint8), low, step)

    def _decode(self, codes: Bytes, latents: Floats) -> None:
        low, step = self._read_scales(codes)
        self._read_values(codes, self._table, latents)
        latents *= step
        latents += low


class CentredCodec(Quantizer):
    """What is rotated: each value at the nearest Lloyd-Max level, in units of its token's root mean square, after the mean of the
    calibration, if there was one, is subtracted.
    """

    _scales = 1

    def __init__(self, spec: CodecSpec, parameters: Floats) -> None:
        super().__init__(spec, parameters)
        self._rotation = Rotation(spec.width, spec.seed)
        self._levels = lloyd_max(spec.bits)
        self._table = FieldTable(self._levels.levels, spec.bits)

    def _without_mean(self, latent: Floats) -> Floats:
        tokens = np.clip(latent, -LIMIT, LIMIT)
        return np.clip(tokens - self.parameters, -LIMIT, LIMIT) if self.parameters.size else tokens

    def _add_mean(self, latents: Floats) -> None:
        if self.parameters.size:
            latents += self.parameters

    def _write_rotated(self, code: Bytes, rotated: Floats, scale: npt.NDArray[np.float16]) -> None:
        """rotated: (N, D); scale: (N, 1)."""
        self._write(code, self._levels.nearest(rotated / divisor(scale)), scale)

    def _read_rotated(self, codes: Bytes, like: Floats) -> Floats:
        rotated = np.empty_like(like)
        self._read_values(codes, self._table, rotated)
        rotated *= self._read_scales(codes)[0]
        return rotated


def _root_mean_square(tokens: Floats) -> npt.NDArray[np.float16]:
    """(N, D) -> (N, 1)."""
    size = np.sqrt(np.mean(np.square(tokens), axis=1, keepdims=True))
    scale: npt.NDArray[np.float16] = np.minimum(size, LIMIT).astype(SCALE)
    return scale


class RotatedCodec(CentredCodec):
    """Rotated tokens in units of their root mean square, each value at the nearest Lloyd-Max level."""

    def _encode(self, latent: Floats, code: Bytes) -> None:
        rotated = self._rotation.forward(self._without_mean(latent))
        self._write_rotated(code, rotated, _root_mean_square(rotated))

    def _decode(self, codes: Bytes, latents: Floats) -> None:
        D = self.spec.width
        self._rotation.inverse(self._read_rotated(codes, latents).reshape(-1, D), latents.reshape(-1, D))
        self._add_mean(latents)


class ScatteredCodec(CentredCodec):
    """As rotated, but each latent has signs of its own: a stretch of one long row, that begins where the latent's scales say.

    Frames of one video are nearly the same numbers, and under the same rotation they are rounded the same way: what is wrong with one is
    wrong with all, and with the mean of their class. Under signs of their own their errors are independent, and means and covariances
    average them away (dither, Roberts 1962; Schuchman 1964). Where the stretch begins is the sum of all FP16 scales as integers, modulo
    `_STRETCHES`: as good as random for anything but equal latents, and no byte more.
    """

    def __init__(self, spec: CodecSpec, parameters: Floats) -> None:
        super().__init__(spec, parameters)
        row = random_signs(spec.width + _STRETCHES - 1, spec.seed)
        self._stretches = np.lib.stride_tricks.as_strided(row, (_STRETCHES, spec.width), row.strides * 2, writeable=False)

    def _encode(self, latent: Floats, code: Bytes) -> None:
        tokens = self._without_mean(latent)
        scale = _root_mean_square(tokens)  # which no rotation changes
        rotated = np.empty_like(tokens)
        self._rotation.transform(tokens * self._signs(scale.reshape(1, -1)), rotated)
        self._write_rotated(code, rotated, scale)

    def _decode(self, codes: Bytes, latents: Floats) -> None:
        N, D = self.spec.tokens, self.spec.width
        self._rotation.transform(self._read_rotated(codes, latents).reshape(-1, D), latents.reshape(-1, D))
        tails = np.ascontiguousarray(codes[:, codes.shape[1] - N * SCALE.itemsize :]).view(SCALE)
        latents *= self._signs(tails)[:, None]
        self._add_mean(latents)

    def _signs(self, scales: npt.NDArray[np.float16]) -> Floats:
        """Of latents with these scales (R, N): (R, D)."""
        starts = scales.view("<u2").sum(axis=1, dtype=np.int64) % _STRETCHES
        signs: Floats = self._stretches[starts]
        return signs


def _half(values: Floats, towards: float) -> npt.NDArray[np.float16]:
    """The nearest FP16 numbers not on the wrong side: not above the values for towards = -inf, not below them for +inf."""
    halves = values.astype(np.float16)
    missed = halves.astype(np.float32) > values if towards < 0 else halves.astype(np.float32) < values
    return np.nextafter(halves, np.float16(towards), out=halves, where=missed)


def divisor(scale: npt.NDArray[np.float16]) -> Floats:
    """The scale to divide by; 1 where it is 0, because then every value is 0 already."""
    by: Floats = scale.astype(np.float32)
    by[by == 0] = 1
    return by
