"""The replay memory: who stays in a fixed number of bytes. Owned by the learner thread; nothing blocks; one thread at a time.

Who stays is decided by a class-balanced reservoir (Chrysakis and Moens, "Online continual learning from imbalanced data", ICML 2020):
while there is room everybody stays; then a sample of a small class takes the place of one of the largest class, and a sample of a class
that has its share replaces one of its own with the odds of a reservoir, so that each class keeps a uniform sample of all it was taught.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Deque, Dict, Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from latentd.errors import ConfigError
from latentd.replay.packing import Bytes
from latentd.replay.sorted_table import SortedTable

Labels = npt.NDArray[np.int64]

_ID_BYTES = 16
_MAX_CLASS = 1 << 31
_ORDER_BYTES = 8  # the order by class, kept between two draws, is one integer a slot
PLAIN, DOUBTED, VOUCHED, AWAY = 0, 1, 2, 3  # what is thought of a sample's label; VOUCHED: somebody said it twice; AWAY: asked, not drawn
_GONE = 4096  # doubted samples given up that are remembered, until their latents are surely off the disk


class Chunk(NamedTuple):
    """Some of the memory: ids of B samples, codes (B, code_bytes), class_ids and standing (B,)."""

    ids: Tuple[str, ...]
    codes: Bytes
    class_ids: Labels
    standing: npt.NDArray[np.int8]


class ReplayMemory:
    """A bounded set of (id, class, code). No id is there twice, and used_bytes never passes the budget. What a code means is the codec's
    business: here it is a row of bytes.

    Codes lie in one array that is reserved whole at the start: the operating system hands out its pages as they are first written, so
    memory grows with use, and no growth ever copies. Used slots are the first ones. Everything the memory keeps is counted: codes, ids,
    classes, the order by class; what a call returns is the caller's. Who stays and what is drawn depend on the seed and the order of calls,
    nothing else.
    """

    def __init__(self, codec: str, code_bytes: int, budget_bytes: int, seed: int, key: str = "learn.replay_bytes") -> None:
        """codec: the name of what makes codes of code_bytes bytes, and key: of what sets the budget, for messages.

        Raises ConfigError where the budget holds not one latent, or is more than the machine can reserve.
        """
        self.codec = codec
        self.code_bytes = code_bytes
        self.budget_bytes = budget_bytes
        self.evictions = 0
        self._rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
        self._drawable: Optional[Tuple[npt.NDArray[np.intp], Labels]] = None
        self._gone: Deque[str] = deque(maxlen=_GONE)
        self._changes = 0
        self._samples, self._classes = _tables(0)
        needed = slot_bytes(code_bytes)
        self.slots = min(budget_bytes // needed, _MAX_CLASS - 1)
        if self.slots < 1:
            hint = f"Set {key} to {needed} or more, or store latents in fewer bits."
            raise ConfigError(f"the replay memory of {budget_bytes} bytes holds no latent: one takes {needed} as {codec}", hint=hint)
        self._reserve(key)

    def _reserve(self, key: str) -> None:
        try:
            self._samples, self._classes = _tables(self.slots)
            self._codes = np.empty((self.slots, self.code_bytes), np.uint8)
        except MemoryError as cause:
            raise ConfigError(f"a replay memory of {self.budget_bytes} bytes can't be reserved", hint=f"Lower {key}.") from cause

    @property
    def used(self) -> int:
        """Samples stored; slots is how many fit."""
        return self._samples.count

    @property
    def drawable(self) -> int:
        """Samples stored that `draw` may give."""
        return len(self._by_class()[0])

    @property
    def used_bytes(self) -> int:
        a_sample = self.code_bytes + self._samples.row_bytes + _ORDER_BYTES
        return self.used * a_sample + self._classes.count * self._classes.row_bytes

    def __contains__(self, sample_id: str) -> bool:
        return self._samples.find(_key(sample_id))[1]

    def ids(self) -> Tuple[str, ...]:
        """Every id, ascending."""
        return tuple(key.decode() for key in self._samples.keys.tolist())

    def counts(self) -> Dict[int, int]:
        """Class id -> samples stored, for the classes that have any."""
        return dict(zip(self._classes.keys.tolist(), self._classes["stored"].tolist()))

    def seen(self) -> Dict[int, int]:
        """Class id -> samples admitted so far and not removed since, kept or not; for the classes that have any stored."""
        return dict(zip(self._classes.keys.tolist(), self._classes["seen"].tolist()))

    # --- who stays ---

    def admit(self, sample_id: str, class_id: int, code: bytes) -> Optional[str]:
        """Offer a sample; returns the id that is not in the memory because of it: None, another one's, or its own (it was not kept).

        sample_id: 1 to 16 ASCII characters. code: as the codec made it. Raises ValueError for an id that is there already, or a code of
        another length.
        """
        key = _key(sample_id)
        if len(code) != self.code_bytes:
            raise ValueError(f"a code of {self.codec} has {self.code_bytes} bytes, not {len(code)}")
        _check_class(class_id)
        if self._samples.find(key)[1]:
            raise ValueError(f"{sample_id} is in the replay memory already")
        evicted, gained = None, 1
        if self.used == self.slots:
            self.evictions += 1
            loser = self._loser(class_id)
            if loser is None:
                self._count(class_id, stored=0, seen=1)
                return sample_id
            evicted = self._samples.keys[loser].decode()
            giving = int(self._samples["class_id"][loser])
            if self._samples["standing"][loser] == DOUBTED:
                self._gone.append(evicted)
            self._vacate(loser)
            if giving == class_id:
                gained = 0  # not minus one and plus one: a class would lose its row, and with it what it has seen
            else:
                self._count(giving, stored=-1, seen=0)
        self._codes[self.used] = np.frombuffer(code, np.uint8)
        self._samples.insert(self._samples.find(key)[0], key, class_id=class_id, slot=self.used, standing=PLAIN)
        self._count(class_id, stored=gained, seen=1)
        return evicted

    def _loser(self, class_id: int) -> Optional[int]:
        """Place of the sample that makes room for one of this class; None: the new one itself.

        A class has its share when it is the largest, or one short of it after losing samples. The paper says "has ever been the largest";
        that would also stop a class from growing that lost nothing to others, or whose samples somebody removed or relabelled.
        """
        stored = self._classes["stored"]
        largest = int(stored.max())
        place, known = self._classes.find(class_id)
        mine, seen = (int(stored[place]), int(self._classes["seen"][place])) if known else (0, 0)
        if known and (mine == largest or (mine == largest - 1 and seen > mine)):
            if self._rng.random() * (seen + 1) >= mine:
                return None
            giving = class_id
        else:
            giving = int(self._rng.choice(self._classes.keys[stored == largest]))
        return int(self._rng.choice(np.flatnonzero(self._samples["class_id"] == giving)))

    def remove(self, sample_id: str) -> bool:
        """Forget a sample, as if never seen; False where it is not stored."""
        place, found = self._samples.find(_key(sample_id))
        if found:
            class_id = int(self._samples["class_id"][place])
            self._vacate(place)
            self._count(class_id, stored=-1, seen=-1)
        return found

    def relabel(self, sample_id: str, class_id: int) -> bool:
        """Move a sample to another class; False where it is not stored."""
        _check_class(class_id)
        place, found = self._samples.find(_key(sample_id))
        if found and self._samples["class_id"][place] != class_id:
            self._count(int(self._samples["class_id"][place]), stored=-1, seen=-1)
            self._samples["class_id"][place] = class_id
            self._count(class_id, stored=1, seen=1)
        return found

    def remove_class(self, class_id: int) -> Tuple[str, ...]:
        """Forget every sample of a class; their ids, ascending."""
        keys = self._samples.keys[self._samples["class_id"] == class_id].tolist()
        ids = tuple(key.decode() for key in keys)
        for sample_id in ids:
            self.remove(sample_id)
        return ids

    def _vacate(self, place: int) -> None:
        """Delete the sample at this place, counts apart; the last used slot moves into the gap."""
        slot, last = int(self._samples["slot"][place]), self.used - 1
        if slot != last:
            self._codes[slot] = self._codes[last]
            self._samples["slot"][self._samples["slot"] == last] = slot
        self._samples.delete(place)

    def _count(self, class_id: int, stored: int, seen: int) -> None:
        """Change the counts of a class; a class without samples has no row."""
        self._drawable = None
        self._changes += 1
        place, known = self._classes.find(class_id)
        if not known:
            self._classes.insert(place, class_id, stored=0, seen=0)
        self._classes["stored"][place] += stored
        self._classes["seen"][place] += seen
        if self._classes["stored"][place] == 0:
            self._classes.delete(place)

    # --- what is thought of a label ---

    def standing(self, sample_id: str) -> int:
        """That of a doubted sample outlives its place in the memory for a while; PLAIN for any other that is not stored."""
        place, found = self._samples.find(_key(sample_id))
        if found:
            return int(self._samples["standing"][place])
        return DOUBTED if sample_id in self._gone else PLAIN

    def judge(self, sample_id: str, standing: int) -> None:
        """Change what is thought of a sample's label; a DOUBTED one, or one that is AWAY, is not drawn. No restart remembers AWAY."""
        place, found = self._samples.find(_key(sample_id))
        if found:
            self._samples["standing"][place] = standing
            self._drawable = None
        elif sample_id in self._gone:
            self._gone.remove(sample_id)

    def ids_of(self, standing: int) -> Tuple[str, ...]:
        """Those stored, ascending."""
        return tuple(key.decode() for key in self._samples.keys[self._samples["standing"] == standing].tolist())

    def doubted(self, class_id: int) -> int:
        """How many stored samples of a class are."""
        return int(np.count_nonzero((self._samples["class_id"] == class_id) & (self._samples["standing"] == DOUBTED)))

    # --- what the learner reads ---

    def draw(self, count: int, rng: np.random.Generator) -> Tuple[Bytes, Labels]:
        """A class-balanced replay batch: codes (count, code_bytes) and class ids (count,), ordered by class.

        Every class gets count / C places, a random choice of classes one more; inside a class samples are drawn uniformly. A sample comes
        twice only where its class has fewer samples than places, and then none comes n + 1 times before all came n times. Doubted samples
        do not come. Empty arrays where nothing can be drawn.
        """
        order, sizes = self._by_class()
        places = np.full(len(sizes), count // max(1, len(sizes)))
        places[rng.permutation(len(sizes))[: count - int(places.sum())]] += 1
        drawn = np.repeat(order, _times_drawn(sizes, places, rng))
        return self._gathered(drawn), self._samples["class_id"][drawn].astype(np.int64)

    def get(self, ids: Sequence[str]) -> Bytes:
        """The codes of these samples, (len(ids), code_bytes), in their order. Raises KeyError for an id that is not stored."""
        places = [self._samples.find(_key(sample_id)) for sample_id in ids]
        missing = [sample_id for sample_id, (_, found) in zip(ids, places) if not found]
        if missing:
            raise KeyError(f"not in the replay memory: {', '.join(missing)}")
        return self._gathered(np.array([place for place, _ in places], np.intp))

    def class_of(self, sample_id: str) -> int:
        """Raises KeyError for an id that is not stored."""
        place, found = self._samples.find(_key(sample_id))
        if not found:
            raise KeyError(f"not in the replay memory: {sample_id}")
        return int(self._samples["class_id"][place])

    def after(self, sample_id: str, count: int) -> Chunk:
        """Up to `count` samples with ids beyond this one ("": from the first), ascending: a walk that changes in between can't break."""
        start = int(np.searchsorted(self._samples.keys, np.asarray(sample_id.encode(), self._samples.keys.dtype), side="right"))
        return self._chunk(np.arange(start, min(start + count, self.used)))

    def all(self, chunk: int = 64) -> Iterator[Chunk]:
        """Everything in ascending order of id, `chunk` samples at a time. The memory must not change meanwhile (RuntimeError)."""
        before = self._changes
        for start in range(0, self.used, chunk):
            if self._changes != before:
                raise RuntimeError("the replay memory changed while it was read")
            yield self._chunk(np.arange(start, min(start + chunk, self.used)))

    def _chunk(self, places: npt.NDArray[np.intp]) -> Chunk:
        ids = tuple(key.decode() for key in self._samples.keys[places].tolist())
        class_ids = self._samples["class_id"][places].astype(np.int64)
        return Chunk(ids, self._gathered(places), class_ids, self._samples["standing"][places].copy())

    def _gathered(self, places: npt.NDArray[np.intp]) -> Bytes:
        codes: Bytes = np.take(self._codes, self._samples["slot"][places], axis=0)
        return codes

    def _by_class(self) -> Tuple[npt.NDArray[np.intp], Labels]:
        """Places of what may be drawn, ordered by class, and the size of each class that has any."""
        if self._drawable is None:
            class_ids = self._samples["class_id"]
            # Sixteen bits sort several times faster (radix), and hold any class id that a device will see.
            short = self._classes.count > 0 and int(self._classes.keys[-1]) < 1 << 15
            order = np.argsort(class_ids.astype(np.int16) if short else class_ids, kind="stable")
            order = order[~np.isin(self._samples["standing"][order], (DOUBTED, AWAY))]
            self._drawable = order, np.unique(class_ids[order], return_counts=True)[1].astype(np.int64)
        return self._drawable

    # --- over a restart ---

    def state(self) -> Dict[str, Any]:
        """What a restart needs besides the samples: JSON-able."""
        seen = {str(class_id): count for class_id, count in self.seen().items()}
        standing = {"doubted": self.ids_of(DOUBTED), "vouched": self.ids_of(VOUCHED), "gone": tuple(self._gone)}
        return {"seen": seen, "evictions": self.evictions, "rng": self._rng.bit_generator.state, **standing}

    def restore(self, state: Mapping[str, Any], samples: Iterable[Tuple[str, int, bytes]]) -> Tuple[str, ...]:
        """Fill an empty memory with (id, class, code) in any order, and go on as if there had been no restart.

        Returns the ids that no longer fit, where the budget is smaller than it was: the reservoir chose who stays.
        """
        evicted = [self.admit(*sample) for sample in samples]
        for place, class_id in enumerate(self._classes.keys.tolist()):
            now = int(self._classes["seen"][place])
            self._classes["seen"][place] = max(now, int(state["seen"].get(str(class_id), 0)))
        for name, standing in (("doubted", DOUBTED), ("vouched", VOUCHED)):
            for sample_id in state.get(name, ()):  # an older version doubted nothing
                self.judge(sample_id, standing)
        self._gone.extend(state.get("gone", ()))
        self._gone.extend(sample_id for sample_id in state.get("doubted", ()) if sample_id not in self)  # a smaller budget
        self.evictions += int(state["evictions"])
        self._rng.bit_generator.state = state["rng"]
        return tuple(sample_id for sample_id in evicted if sample_id is not None)


def slot_bytes(code_bytes: int) -> int:
    """What one latent of code_bytes bytes takes of the budget. In the worst case every slot is the only one of its class."""
    samples, classes = _tables(0)
    return code_bytes + samples.row_bytes + classes.row_bytes + _ORDER_BYTES


def _tables(slots: int) -> Tuple[SortedTable, SortedTable]:
    """Samples by id, and classes by id."""
    return SortedTable(slots, f"S{_ID_BYTES}", class_id="i4", slot="i4", standing="i1"), SortedTable(slots, "i4", stored="i4", seen="i8")


def _key(sample_id: str) -> bytes:
    if not 0 < len(sample_id) <= _ID_BYTES or not sample_id.isascii() or "\0" in sample_id:
        raise ValueError(f"a sample id has 1 to {_ID_BYTES} ASCII characters, not {sample_id!r}")
    return sample_id.encode()


def _check_class(class_id: int) -> None:
    if not 0 <= class_id < _MAX_CLASS:
        raise ValueError(f"a class id is a number from 0 to {_MAX_CLASS - 1}, not {class_id}")


def _times_drawn(sizes: Labels, places: Labels, rng: np.random.Generator) -> Labels:
    """How often each of sum(sizes) members, class by class, is drawn to fill the places (C,) of its class."""
    rest = places % sizes
    # Leaving out few is drawing few: at most half of a class is picked, so that repeats are rare and soon drawn again.
    picked_out = rest > sizes - rest
    owner = np.repeat(np.arange(len(sizes)), np.where(picked_out, sizes - rest, rest))
    starts = np.cumsum(sizes) - sizes
    picks = starts[owner] + rng.integers(sizes[owner])
    while True:
        first = np.unique(picks, return_index=True)[1]
        if len(first) == len(picks):
            break
        again = np.ones(len(picks), np.bool_)
        again[first] = False
        picks[again] = starts[owner[again]] + rng.integers(sizes[owner[again]])
    times = np.repeat(places // sizes + picked_out, sizes)
    times[picks] += np.where(picked_out[owner], -1, 1)
    return times
