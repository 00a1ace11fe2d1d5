"""How a whole latent is stored: the class tokens that make its features and, where blocks above the split learn, its token matrix, as one
row of bytes. Tokens take many times the bytes of features, so most samples lose theirs after a while: such a code is its features' bytes
alone. A LatentCodec is immutable after construction: any thread may use it, nothing blocks.
"""

from __future__ import annotations

import hashlib
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import numpy as np

from latentd.replay.codec import Codec, CodecSpec, calibrated, codec_spec, open_codec
from latentd.replay.packing import Bytes
from latentd.replay.rotation import Floats


class TokenPool:
    """Patch tokens averaged over squares of neighbours, so that a latent takes fewer bytes and its training step less time.

    lead: tokens before the patches, which stay as they are. side: patches along one side of the image. grid: squares along one side after
    pooling; 0 leaves every token. whole, tokens: how many tokens there are before and after; self.side: squares along one side after.
    Raises ValueError where the grid does not divide the side.
    """

    def __init__(self, lead: int, side: int, grid: int = 0) -> None:
        if grid and side % grid:
            fitting = ", ".join(str(each) for each in range(1, side + 1) if side % each == 0)
            raise ValueError(f"{side} x {side} patches can't be pooled to {grid} x {grid}: {fitting} fit")
        self._lead, self._side, self._grid = lead, side, grid or side
        self.side = self._grid
        self.tokens = lead + self._grid**2
        self.whole = lead + side**2

    def __call__(self, tokens: Floats) -> Floats:
        """(B, N, D) -> (B, self.tokens, D)."""
        if self._grid == self._side:
            return tokens
        B, _, D = tokens.shape
        step = self._side // self._grid
        patches = tokens[:, self._lead :].reshape(B, self._grid, step, self._grid, step, D).mean(axis=(2, 4))  # (B, G, G, D)
        return np.concatenate([tokens[:, : self._lead], patches.reshape(B, -1, D)], axis=1)


class LatentCodec:
    """Latents as codes of `code_bytes` bytes: first the features' bytes, of which there are `features_bytes`, then the tokens'.

    features: codec of the class tokens (m, D). tokens: codec of the token matrix (N, D) after block `split`, as `pool` leaves it; None
    where the head alone learns.
    """

    def __init__(self, features: Codec, tokens: Optional[Codec] = None, pool: Optional[TokenPool] = None) -> None:
        self.features = features
        self.tokens = tokens
        self._pool = pool
        self.features_bytes = features.code_bytes
        self.code_bytes = self.features_bytes + (tokens.code_bytes if tokens else 0)

    def __str__(self) -> str:
        if self.tokens is None:
            return str(self.features.spec)
        return f"{self.features.spec} + {self.tokens.spec} ({self.tokens.spec.tokens} tokens)"

    def pooled(self, tokens: Floats) -> Floats:
        """The tokens of the frozen stage as they are stored but for the rounding, (B, all, D) -> (B, N, D)."""
        return self._pool(tokens) if self._pool else tokens

    def encode(self, features: Floats, tokens: Optional[Floats] = None) -> Bytes:
        """features (B, m * D) and pooled tokens (B, N, D) -> (B, code_bytes) uint8.

        Raises ValueError for another shape, NaN or infinity, and for tokens that are missing or that nobody stores.
        """
        if (tokens is None) != (self.tokens is None):
            raise ValueError(f"{self} stores {'no ' if self.tokens is None else ''}tokens")
        B, spec = len(features), self.features.spec
        if features.shape != (B, spec.tokens * spec.width):
            raise ValueError(f"features have shape (B, {spec.tokens * spec.width}), not {features.shape}")
        codes = self.features.encode(features.reshape(B, spec.tokens, spec.width))
        if tokens is None or self.tokens is None:
            return codes
        if len(tokens) != B:
            raise ValueError(f"{B} latents have features and {len(tokens)} have tokens")
        return np.concatenate([codes, self.tokens.encode(tokens)], axis=1)

    def holds_tokens(self, code: bytes) -> bool:
        """Whether this code has its tokens still."""
        return self.tokens is not None and len(code) == self.code_bytes

    def features_of(self, codes: Sequence[bytes]) -> Floats:
        """B codes, each with its tokens or without -> (B, m * D) float32. Raises ValueError for another length."""
        for code in codes:
            if len(code) not in (self.features_bytes, self.code_bytes):
                raise ValueError(f"a code of {self} has {self.features_bytes} or {self.code_bytes} bytes, not {len(code)}")
        rows = b"".join(code[: self.features_bytes] for code in codes)
        return self.decode_features(np.frombuffer(rows, dtype=np.uint8).reshape(len(codes), self.features_bytes))

    def decode_features(self, codes: Bytes) -> Floats:
        """(B, code_bytes) or (B, features_bytes) -> (B, m * D) float32. Raises ValueError for another length."""
        self._check(codes, (self.features_bytes, self.code_bytes))
        spec = self.features.spec
        return self.features.decode(codes[:, : self.features_bytes]).reshape(len(codes), spec.tokens * spec.width)

    @property
    def basis(self) -> Optional[Floats]:
        """(P, n, n): what rotates tokens back, n channels a matrix. None: they are never rotated."""
        return self.tokens.basis if self.tokens else None

    def decode_tokens(self, codes: Bytes, rotated: bool = False) -> Floats:
        """(B, code_bytes) -> (B, N, D) float32. rotated: in the basis they are rounded in, which is faster. Raises ValueError for another
        length, or where no tokens are stored."""
        self._check(codes, (self.code_bytes,))
        if self.tokens is None:
            raise ValueError(f"{self} stores no tokens")
        stored = codes[:, self.features_bytes :]
        return self.tokens.decode_rotated(stored) if rotated else self.tokens.decode(stored)

    def identity(self) -> Dict[str, Any]:
        """JSON-able facts: codes of two codecs mean the same if, and only if, these are equal."""
        return {**_identity("codec", self.features), **self.tokens_identity()}

    def tokens_identity(self) -> Dict[str, Any]:
        """The part of `identity` that is about tokens: where it alone differs, features can be read on."""
        return _identity("tokens_codec", self.tokens)

    def _check(self, codes: Bytes, lengths: Tuple[int, ...]) -> None:
        if codes.ndim != 2 or codes.shape[1] not in lengths:
            raise ValueError(f"a code of {self} has {self.code_bytes} bytes, not {codes.shape[1:]}")


def make_latent_codec(
    name: str,
    kind: str,
    features: Tuple[int, int],
    tokens: Optional[Tuple[int, int]] = None,
    seed: int = 0,
    parameters: Callable[[CodecSpec], Floats] = calibrated,
    pool: Optional[TokenPool] = None,
    features_as: Optional[Tuple[str, str]] = None,
) -> LatentCodec:
    """A codec for latents whose features have shape (m, D) and whose tokens, if any are kept, (N, D).

    name, kind and seed are codec_spec's, and mean the tokens where they are kept. features_as: name and kind for the features beside
    tokens; None: a float beside floats, else int8 token. parameters: gives what a codec of this spec is calibrated with. Raises ValueError
    for an unknown name or kind, and for one that needs calibration or a grid of patches where there is none.
    """
    beside = features_as or (name if name.startswith("fp") else "int8", "token")
    own_name, own_kind = (name, kind) if tokens is None else beside
    if own_kind == "spatial" and not own_name.startswith("fp"):
        raise ValueError("kind 'spatial' is for the tokens of patches, not for features")
    own = _codec(codec_spec(own_name, own_kind, *features, seed), parameters)
    if tokens is None:
        return LatentCodec(own)
    return LatentCodec(own, _codec(codec_spec(name, kind, *tokens, seed), parameters), pool)


def _codec(spec: CodecSpec, parameters: Callable[[CodecSpec], Floats] = calibrated) -> Codec:
    return open_codec(spec, parameters(spec))


def _identity(prefix: str, codec: Optional[Codec]) -> Dict[str, Any]:
    if codec is None:
        return dict.fromkeys((prefix, f"{prefix}_seed", f"{prefix}_shape", f"{prefix}_parameters"))
    spec, parameters = codec.spec, codec.parameters.astype("<f4")
    return {
        prefix: str(spec),
        f"{prefix}_seed": spec.seed,
        f"{prefix}_shape": [spec.tokens, spec.width],
        f"{prefix}_parameters": hashlib.sha256(parameters.tobytes()).hexdigest() if parameters.size else None,
    }
