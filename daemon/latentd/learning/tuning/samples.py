"""The taught samples that accuracy is asked of: images that pass the frozen stage again, or the latents in a state folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Protocol, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.engines.stage import FrozenStage, StageSpec
from latentd.errors import JournalError
from latentd.learning.tuning.trial import divide, spans, thinned
from latentd.replay.latents import LatentCodec
from latentd.replay.packing import Bytes
from latentd.replay.taught import read_codes, read_taught, stored_codec

Tokens = NDArray[np.float16]


class Latents(NamedTuple):
    """features (M, m * D) float32; tokens (M, N, D), in FP16 to halve their memory (the finest codec that tuning is for is coarser); None
    where there are none."""

    features: NDArray[np.float32]
    tokens: Optional[Tokens]


class Samples(Protocol):
    """class_ids: (M,). source: where they come from, in words."""

    @property
    def class_ids(self) -> NDArray[np.int64]: ...

    @property
    def source(self) -> str: ...

    def latents(self, stage: FrozenStage, with_tokens: bool, max_batch: int) -> Optional[Latents]:
        """Of all samples, for the stage's split; None where these samples can't give them."""
        ...


@dataclass(frozen=True)
class Images:
    """Decoded images (M, S, S, 3) with their classes."""

    pixels: NDArray[np.uint8]
    class_ids: NDArray[np.int64]
    source: str

    def latents(self, stage: FrozenStage, with_tokens: bool, max_batch: int) -> Latents:
        spec, count = stage.spec, len(self.pixels)
        features = np.empty((count, spec.features_width), np.float32)
        tokens = np.empty((count, spec.tokens, spec.width), np.float16) if with_tokens else None
        for span in spans(count, max_batch):
            found = stage.encode(self.pixels[span], tokens=with_tokens)
            features[span] = found.features
            if tokens is not None and found.tokens is not None:
                tokens[span] = _halves(found.tokens)
        return Latents(features, tokens)


@dataclass(frozen=True)
class Stored:
    """Latents of a state folder. They say something of the split and the tokens under which they were stored, and of no other."""

    codes: Bytes
    codec: LatentCodec
    class_ids: NDArray[np.int64]
    source: str
    split: int

    def latents(self, stage: FrozenStage, with_tokens: bool, max_batch: int) -> Optional[Latents]:
        if not with_tokens:
            return Latents(self.codec.decode_features(self.codes), None)
        if self.codec.tokens is None or stage.spec.split != self.split or self.codes.shape[1] != self.codec.code_bytes:
            return None
        spec = self.codec.tokens.spec
        tokens = np.empty((len(self.codes), spec.tokens, spec.width), np.float16)
        for span in spans(len(self.codes), max_batch):
            tokens[span] = _halves(self.codec.decode_tokens(self.codes[span]))
        return Latents(self.codec.decode_features(self.codes), tokens)


def stored(path: Path, spec: StageSpec, most: int) -> Stored:
    """At most `most` samples of the journal at `path`, evenly over the classes.

    Raises JournalError, with the reason, where there is no journal, nothing in it, or latents that this configuration can't use.
    """
    if not path.is_file():
        raise JournalError(f"nothing was taught yet: there is no {path}")
    taught = read_taught(path)
    if not taught.seqs:
        raise JournalError(f"{path} keeps no labelled latent")
    changed = _changed(taught.latents, spec)
    codec = stored_codec(taught.latents)
    if changed or codec is None or codec.features.spec.width * codec.features.spec.tokens != spec.features_width:
        raise JournalError(f"the latents in {path} are of another kind ({', '.join(changed) or 'unknown codec'})")
    whole = np.flatnonzero(taught.lengths == codec.code_bytes)  # the others have lost their tokens
    among = whole if divide(taught.class_ids[whole]).classes > 1 else np.arange(len(taught.seqs))
    chosen = among[thinned(taught.class_ids[among], most)]
    codes = read_codes(path, [taught.seqs[place] for place in chosen])
    source = f"{len(chosen)} of {len(taught.seqs)} taught latents, stored as {codec}"
    return Stored(codes, codec, taught.class_ids[chosen], source, int(taught.latents.get("split") or spec.split))


def _changed(facts: Any, spec: StageSpec) -> List[str]:
    """What of the facts differs from the stage that is asked for."""
    mine: Dict[str, Tuple[str, object]] = {
        "backbone_sha256": ("another backbone", spec.backbone_sha256),
        "image_size": ("another image size", spec.image_size),
        "class_tokens": ("other class tokens", spec.class_tokens),
    }
    return [words for key, (words, value) in mine.items() if facts.get(key) != value]


def _halves(tokens: NDArray[np.float32]) -> Tokens:
    limit = float(np.finfo(np.float16).max)
    return np.clip(tokens, -limit, limit).astype(np.float16)
