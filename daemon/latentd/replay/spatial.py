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
        out = np.empty_like(latents)
        self._transform(latents, np.broadcast_to(self._cosines, (self.side, self.side, self.side)), self._cosines, out)
        return out

    def inverse(self, spectra: Floats, scales: Floats, out: Floats) -> None:
        """Undoes forward on transformed tokens (R, N, D) times scales (R, N, 1), into out (R, N, D), which must not overlap."""
        R, n, back = len(spectra), self.side, np.ascontiguousarray(self._cosines.T)
        by_place = scales[:, self.leading :].reshape(R, n, 1, n)
        self._transform(spectra, back * by_place, back, out)
        out[:, : self.leading] *= scales[:, : self.leading]

    def _transform(self, latents: Floats, rows: Floats, columns: Floats, out: Floats) -> None:
        """rows: (n, n, n) or (R, n, n, n), a matrix for each row of the grid; columns: (n, n), one for every column."""
        R, _, D = latents.shape
        n, lead = self.side, self.leading
        out[:, :lead] = latents[:, :lead]
        # Row by row and column by column, with the grid turned in between: BLAS is faster on many matrices that stay in the cache than on
        # one that is n * D wide, and on lines that don't lie a power of two apart.
        turned = np.empty((R, n, n, D), np.float32)  # (R, column, row, D)
        np.matmul(rows, latents[:, lead:].reshape(R, n, n, D), out=turned.transpose(0, 2, 1, 3))
        np.matmul(columns, turned, out=out[:, lead:].reshape(R, n, n, D).transpose(0, 2, 1, 3))

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
        self.basis = self._rotation.basis()
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

    def decode_rotated(self, codes: Bytes) -> Floats:
        return self._walk(codes, self._decode_rotated)

    def _decode_rotated(self, codes: Bytes, latents: Floats) -> None:
        """Scales wait for the cosine transform, where they cost nothing: it doesn't mind the order."""
        R, N, _ = latents.shape
        scales, spectra, levels = np.empty((R, N, 1), np.float32), np.empty_like(latents), np.empty_like(latents)
        scales[:, self._order] = self._read_scales(codes)[0]
        for group in self._groups:
            packed = np.ascontiguousarray(codes[:, group.start : group.end])
            group.table.read(packed, levels[:, group.first : group.last].reshape(R, -1))
        spectra[:, self._order] = levels
        self._spectrum.inverse(spectra, scales, latents)

    def _decode(self, codes: Bytes, latents: Floats) -> None:
        rotated = np.empty_like(latents)
        self._decode_rotated(codes, rotated)
        self._rotation.inverse(rotated.reshape(-1, self.spec.width), latents.reshape(-1, self.spec.width))


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
