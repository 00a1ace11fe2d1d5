"""The codec for token matrices: neighbouring patches look alike, so few numbers say most of an image. Any thread; nothing blocks.

A cosine transform over the grid of patches, channel by channel, gathers the energy of all tokens in those of low spatial frequency; each
transformed token then gets its own number of bits, as in any picture codec, and is stored as the rotated kind stores a token. Bits follow
one fixed law, so that no images are needed to set it up and codes mean the same on every device.
"""

from __future__ import annotations

import heapq
import math
from typing import List, NamedTuple, Tuple

import numpy as np
import numpy.typing as npt

from latentd.replay.packing import Bytes, FieldTable, pack, packed_bytes
from latentd.replay.quantizers import LIMIT, SCALE, CodecSpec, Quantizer, divisor
from latentd.replay.rotation import Floats, Rotation, lloyd_max

_MOST_BITS = 8
# Mean square error of the best quantizer of b = 0, 1, ... 8 bits for a standard normal value (Max 1960).
_DISTORTION = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000644, 0.000164, 0.0000412)


class Spectrum:
    """The orthonormal cosine transform of a token matrix, whose last n * n tokens are a square grid of patches in reading order.

    leading: tokens before the grid (class token, registers); they stay as they are. The grid is the largest square that fits:
    257 = 1 + 16 * 16, 65 = 1 + 8 * 8.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.side = math.isqrt(tokens)
        self.leading = tokens - self.side**2
        if self.side < 2:
            raise ValueError(f"{tokens} tokens are no grid of patches: kind 'spatial' stores whole token matrices")
        self._cosines = _cosines(self.side)

    def forward(self, latents: Floats) -> Floats:
        """(R, N, D) -> (R, N, D); the energy of each latent is kept."""
        return self._transform(latents, self._cosines)

    def inverse(self, spectra: Floats) -> Floats:
        """Undoes forward."""
        return self._transform(spectra, np.ascontiguousarray(self._cosines.T))

    def _transform(self, latents: Floats, matrix: Floats) -> Floats:
        R, D = len(latents), latents.shape[2]
        n, lead = self.side, self.leading
        out = np.empty_like(latents)
        out[:, :lead] = latents[:, :lead]
        rows = np.matmul(matrix, latents[:, lead:].reshape(R, n, n * D))
        np.matmul(matrix, rows.reshape(R, n, n, D), out=out[:, lead:].reshape(R, n, n, D))
        return out

    def variances(self) -> npt.NDArray[np.float64]:
        """(N,) the law that bits follow: a transformed token's expected energy falls with the square of its spatial frequency.

        1 / (f + 1/2)**2, f in half-waves over the image, as in photographs (Field 1987), and, measured, as in the tokens of a ViT. Tokens
        before the grid are taken for as weighty as the mean of the grid.
        """
        steps = np.arange(self.side, dtype=np.float64)
        frequency = np.sqrt(np.square(steps)[:, None] + np.square(steps)[None, :]).reshape(-1)
        return 1 / np.square(np.concatenate([np.zeros(self.leading), frequency]) + 0.5)


def share_bits(variances: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.int64]:
    """Whole bits, 1 to 8 each and `total` together, that lose the least energy over values of these variances.

    total must lie between one and eight times their number. Each bit goes where it saves most, the first of equals.
    """
    bits = np.ones(len(variances), np.int64)
    gains: List[Tuple[float, int]] = [(-float(value) * (_DISTORTION[1] - _DISTORTION[2]), place) for place, value in enumerate(variances)]
    heapq.heapify(gains)
    for _ in range(total - len(variances)):
        place = heapq.heappop(gains)[1]
        bits[place] += 1
        if bits[place] < _MOST_BITS:
            saved = _DISTORTION[bits[place]] - _DISTORTION[bits[place] + 1]
            heapq.heappush(gains, (-float(variances[place]) * saved, place))
    return bits


class SpatialCodec(Quantizer):
    """Transformed tokens, the ones of most bits first: values of 8 bits, of 7, ... of 1, then an FP16 norm each."""

    _scales = 1

    def __init__(self, spec: CodecSpec, parameters: Floats) -> None:
        super().__init__(spec, parameters)
        self._spectrum = Spectrum(spec.tokens)
        self._rotation = Rotation(spec.width, spec.seed)
        bits = share_bits(self._spectrum.variances(), spec.bits * spec.tokens)
        self._order = np.argsort(-bits, kind="stable")  # (N,) places of the transformed tokens, as they lie in a code
        self._groups = _groups(bits[self._order], spec.width)
        self.code_bytes = self._groups[-1].end + spec.tokens * SCALE.itemsize

    def _encode(self, latent: Floats, code: Bytes) -> None:
        spectrum = self._spectrum.forward(np.clip(latent, -LIMIT, LIMIT)[None])[0]
        rotated = self._rotation.forward(spectrum[self._order])
        size = np.sqrt(np.mean(np.square(rotated), axis=1, keepdims=True))  # (N, 1)
        scale = np.minimum(size, LIMIT).astype(np.float16)
        rotated /= divisor(scale)
        for group in self._groups:
            values = lloyd_max(group.bits).nearest(rotated[group.first : group.last])
            code[group.start : group.end] = pack(values.reshape(1, -1), group.bits)[0]
        code[self._groups[-1].end :] = scale.reshape(-1).astype(SCALE).view(np.uint8)

    def _decode(self, codes: Bytes, latents: Floats) -> None:
        R, D = len(codes), self.spec.width
        scales = self._read_scales(codes)[0]  # (R, N, 1)
        rotated = np.empty_like(latents)
        for group in self._groups:
            values = np.empty((R, group.last - group.first, D), np.float32)
            group.table.read(np.ascontiguousarray(codes[:, group.start : group.end]), values.reshape(R, -1))
            values *= scales[:, group.first : group.last]
            rotated[:, self._order[group.first : group.last]] = values
        spectrum = np.empty_like(latents)
        self._rotation.inverse(rotated.reshape(-1, D), spectrum.reshape(-1, D))
        latents[...] = self._spectrum.inverse(spectrum)


class _Group(NamedTuple):
    """Transformed tokens first..last - 1 of a code, in `bits` bits a value, bytes start..end - 1; table reads them."""

    bits: int
    first: int
    last: int
    start: int
    end: int
    table: FieldTable


def _groups(bits: npt.NDArray[np.int64], width: int) -> List[_Group]:
    """Runs of equal bits, (N,) descending. Each begins at a whole byte."""
    groups: List[_Group] = []
    for value in sorted(set(bits.tolist()), reverse=True):
        first, start = (groups[-1].last, groups[-1].end) if groups else (0, 0)
        last = first + int((bits == value).sum())
        end = start + packed_bytes((last - first) * width, value)
        groups.append(_Group(value, first, last, start, end, FieldTable(lloyd_max(value).levels, value)))
    return groups


def _cosines(size: int) -> Floats:
    """(n, n) the orthonormal cosine transform of type II: row k is the wave of k half-periods."""
    wave, place = np.arange(size)[:, None], np.arange(size)[None, :]
    matrix = np.cos(np.pi * wave * (2 * place + 1) / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.astype(np.float32)
