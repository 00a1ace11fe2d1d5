"""Wake and sleep: what the blocks above the split have learned, the closed-form head on it, and how both come about.

Awake, each new sample is added to the sums of the head at once, through the blocks as they are. Asleep, the blocks go over the replay
memory (latent replay, Pellegrini et al. 2020, on a ViT), and then the sums are made again from what the changed blocks give. Sleep is taken
in small steps and may be broken off or held up at any of them; only its end changes what answers. Owned by the learner thread.

On a GPU the blocks are a copy; without memory there, micro-batches are halved, and where one latent is too much the CPU goes on.
"""

from __future__ import annotations

import logging
from typing import Any, Callable, Dict, Generator, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from latentd.learning.analytic import LinearHead, RidgeSums
from latentd.learning.blocks import RankedBlocks, UpperBlocks
from latentd.learning.evidence import Evidence
from latentd.learning.gate import TEMPERATURES, Opinion
from latentd.learning.place import Place
from latentd.learning.sleep import SleepSettings, rate
from latentd.replay.latents import LatentCodec
from latentd.replay.memory import AWAY, DOUBTED, ReplayMemory
from latentd.trouble import FAILURES, free_cached, in_halves, is_shortage

logger = logging.getLogger(__name__)

Features = NDArray[np.float32]
Result = TypeVar("Result")
Held = Mapping[str, Tuple[int, bytes]]  # sample id -> class, code
_RIVALS_LAST = 64  # samples: solving two heads takes as long as some images
_CLASSIFIER_RATE = 4.0  # of the blocks': it starts from nothing in every sleep


class Dreamt(NamedTuple):
    """What a sleep makes: blocks, the sums and hold-out features that they give, and the ids of stored samples that the sums lack."""

    serving: UpperBlocks
    sums: RidgeSums
    holdout: Dict[str, Features]
    left_out: Set[str]


class Rehearsed(NamedTuple):
    """head: on what the blocks give, which `features` has of codes, (B, F)."""

    head: LinearHead
    features: Callable[[Sequence[bytes]], Features]


class Adapted:
    """The blocks, their head's sums, and the features that they give for the hold-out. blocks: what learns; serving: what answers.

    Invariant: sums and hold-out features were made by `serving` and by nothing else.
    """

    def __init__(self, base: UpperBlocks, codec: LatentCodec, settings: SleepSettings, place: Optional[Place] = None) -> None:
        self._place = place or Place()
        self._on_host = base
        self._base = self._place.taking(base)
        self._codec = codec
        self._basis = codec.basis  # of the tokens as they are decoded here
        self._settings = settings
        self.microbatch = settings.microbatch  # halved where memory does not suffice for as many
        self.sleeps = 0
        self.learned_at = 0  # samples that had been learned when the last sleep began
        self.bare = 0  # samples that were learned without tokens, which no sleep can ever go over: they make none due
        self.serving: Optional[UpperBlocks] = None
        self._life = 0  # a sleep that began in an earlier one is void
        self.blocks = RankedBlocks(base, settings.rank, settings.seed)  # for the CPU, should a GPU have no room for its own
        self.blocks = self._fresh()
        self._sums = RidgeSums(base.features_width)
        self._holdout: Dict[str, Features] = {}
        self._left_out: Set[str] = set()  # stored, but not in the sums: doubted when those were made
        self.evidence = Evidence()
        self._rivals: Optional[Tuple[LinearHead, LinearHead]] = None
        self._rivals_at = 0

    # --- awake --------------------------------------------------------------------------------------------------------

    def learn(self, codes: Sequence[bytes], class_ids: Sequence[int], floor_features: Features, request: int) -> None:
        """Adds new samples of one request to the head, through the blocks as they are, once both heads have answered them.

        floor_features: (B, F) of the same samples, as the floor reads them.
        """
        if self.serving is None or not codes:
            return
        features = self._features(self.serving, codes)
        if self._rivals is not None:
            floor, own = self._rivals
            self.evidence.record(request, class_ids, (floor, floor_features), (own, features))
        self._sums.add(features, class_ids)

    def wants_rivals(self) -> bool:
        """Whether the heads that answer before learning know too little of what was learned since."""
        return self.serving is not None and (self._rivals is None or self._sums.count >= self._rivals_at + _RIVALS_LAST)

    def set_rivals(self, floor: LinearHead) -> None:
        """Lets this floor and the head as it is now answer what comes next before it is learned."""
        if self.serving is not None:
            self._rivals, self._rivals_at = (floor, self.head()), self._sums.count

    def hold_out(self, sample_id: str, code: bytes) -> None:
        if self.serving is not None:
            self._holdout[sample_id] = self._features(self.serving, [code])[0]

    def hold_no_more(self, sample_ids: Sequence[str]) -> None:
        """Drops what it keeps of hold-out samples that are forgotten, or have lost their tokens."""
        for sample_id in sample_ids:
            self._holdout.pop(sample_id, None)

    def leave_out(self, sample_ids: Set[str]) -> None:
        """Notes new samples that are not to be learned."""
        self._left_out |= sample_ids

    def move(self, sample_id: str, code: bytes, was: int, class_id: int) -> None:
        """Gives one sample another class; a sleep that runs now has seen the old one, and ends."""
        self._life += 1
        if self.serving is not None and sample_id not in self._left_out:
            self._sums.move(self._features(self.serving, [code]), was, class_id)

    def forget(self) -> None:
        """Undoes all that was learned: some of it came from a sample that must not have been seen. The next sleep learns the rest again."""
        self._life += 1
        self.serving, self.learned_at = None, 0
        self.blocks = self._fresh()
        self._sums, self._holdout, self._left_out = RidgeSums(self._base.features_width), {}, set()
        self.evidence, self._rivals = Evidence(), None

    # --- asleep -------------------------------------------------------------------------------------------------------

    def is_due(self, learned: int, memory: ReplayMemory, most: Optional[int] = None) -> bool:
        """Whether enough has been learned since the last sleep. learned: samples so far. most: that are kept, with tokens or without."""
        slots = memory.slots if most is None else min(memory.slots, most)
        if memory.used < min(self._settings.first, slots) or len(memory.counts()) < 2:
            return False
        return learned - self.learned_at >= max(self._settings.first, self._settings.growth * self.learned_at)

    def sleep(self, memory: ReplayMemory, held: Held, learned: int) -> Iterator[int]:
        """One sleep; yields between its steps. The memory and the hold-out may change meanwhile."""
        dreamt = yield from self._dream(memory, held, (self._settings.seed, self.sleeps, learned))
        if dreamt is not None:
            self.serving, self._sums, self._holdout, self._left_out = dreamt
            self._rivals, self.learned_at = None, learned
            self.sleeps += 1

    def rehearse(self, memory: ReplayMemory, learned: int, fold: int) -> Generator[int, None, Optional[Rehearsed]]:
        """A sleep that changes nothing but says what would have come of it; None where something came that voids it."""
        dreamt = yield from self._dream(memory, {}, (self._settings.seed, self.sleeps, learned, 1 + fold))
        if dreamt is None:
            return None
        blocks, head = dreamt.serving, dreamt.sums.solve()
        return Rehearsed(head, lambda codes: self._features(blocks, codes))

    def _dream(self, memory: ReplayMemory, held: Held, seed: Sequence[int]) -> Generator[int, None, Optional[Dreamt]]:
        queue = self._place.queue  # which it may leave
        try:
            return (yield from self._dreamt(memory, held, seed))
        finally:
            self.blocks.rest()
            queue.free()

    def _dreamt(self, memory: ReplayMemory, held: Held, seed: Sequence[int]) -> Generator[int, None, Optional[Dreamt]]:
        """Fresh blocks, trained on what the memory gives, and the sums that they give."""
        self.blocks = self._fresh()  # not what the last sleep left: the few classes that came first would weigh on all that follows
        life, self.microbatch = self._life, self._settings.microbatch
        for step in self._train(memory, np.random.Generator(np.random.PCG64(list(seed)))):
            yield step
            if life != self._life:
                return None
        dreamt = Dreamt(self._frozen(), RidgeSums(self._base.features_width), {}, set())
        for step in self._refit(*dreamt, memory, held):
            yield step
            if life != self._life:
                return None
        for sample_id in list(dreamt.holdout):
            if sample_id not in held or not self._codec.holds_tokens(held[sample_id][1]):
                del dreamt.holdout[sample_id]  # forgotten, or trimmed, after the walk had come by
        return dreamt

    def steps(self, memory: ReplayMemory) -> int:
        """Mini-batches of one sleep."""
        return max(1, round(self._settings.epochs * memory.drawable / self._settings.minibatch))

    def _train(self, memory: ReplayMemory, rng: np.random.Generator) -> Iterator[int]:
        class_ids = sorted(memory.counts())
        column = {class_id: index for index, class_id in enumerate(class_ids)}
        classifier = nn.Linear(self._base.features_width, len(class_ids))
        nn.init.zeros_(classifier.weight)
        nn.init.zeros_(classifier.bias)
        self._tried(lambda: classifier.to(self._place.queue.device))
        learned = [parameter for _, parameter in self.blocks.learned()]
        full = self._settings.learning_rate
        groups: List[Dict[str, Any]] = [{"params": learned}, {"params": list(classifier.parameters()), "lr": _CLASSIFIER_RATE * full}]
        optimizer = torch.optim.AdamW(groups, lr=full, weight_decay=0.01)
        optimizer.zero_grad(set_to_none=True)  # what a sleep that was broken off has left
        steps = self.steps(memory)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
        for step in range(steps):
            codes, drawn = memory.draw(self._settings.minibatch, rng)
            known = np.isin(drawn, class_ids)  # a class that came in this sleep waits for the next
            codes, target = codes[known], np.array([column[int(class_id)] for class_id in drawn[known]], np.int64)
            for _ in self._gradient(classifier, optimizer, codes, target):
                yield step
            self._tried(optimizer.step)
            schedule.step()
            optimizer.zero_grad(set_to_none=True)

    def _gradient(
        self, classifier: nn.Linear, optimizer: torch.optim.Optimizer, codes: NDArray[np.uint8], target: NDArray[np.int64]
    ) -> Iterator[int]:
        """The gradient of one mini-batch; yields before each micro-batch. Where memory is out it begins again with half as many."""
        start = 0
        while start < len(codes):
            yield start
            end = start + self.microbatch
            if self._fits(classifier, codes[start:end], target[start:end], len(codes)):
                start = end
            else:  # some parameters have a share of the gradient, others do not
                optimizer.zero_grad(set_to_none=True)
                start = 0

    def _fits(self, classifier: nn.Linear, codes: NDArray[np.uint8], target: NDArray[np.int64], of: int) -> bool:
        """Adds the gradient of one micro-batch. False where memory does not suffice for it: the next one is smaller, or on the CPU."""
        try:
            self._accumulate(classifier, codes, target, of)
            return True
        except FAILURES as error:
            if len(codes) == 1 and self._place.leaves(error):
                self._go_on_host()  # which voids this sleep
            elif len(codes) == 1 or not is_shortage(error):
                raise
            else:
                self.microbatch = len(codes) // 2
                logger.warning("memory was out in a training step; from now on it takes %d latents at a time", self.microbatch)
        free_cached()  # here, not above: an exception that is being handled keeps every activation of the failed step
        return False

    def _accumulate(self, classifier: nn.Linear, codes: NDArray[np.uint8], target: NDArray[np.int64], of: int) -> None:
        """The gradient of one micro-batch, as its share of a mini-batch of `of` latents."""
        queue = self._place.queue
        latents, basis = self._decoded(codes), self._basis
        with queue.work():
            tokens, classes = queue.upload(latents), queue.upload(target)  # (b, N, D), (b,)
            scores = classifier(self.blocks(tokens, None if basis is None else queue.upload(basis)))  # (b, C)
            loss = functional.cross_entropy(scores, classes, label_smoothing=self._settings.label_smoothing, reduction="sum")
            (loss / of).backward()  # type: ignore[no-untyped-call]

    def _refit(
        self, blocks: UpperBlocks, sums: RidgeSums, holdout: Dict[str, Features], left_out: Set[str], memory: ReplayMemory, held: Held
    ) -> Iterator[int]:
        """Fills sums and hold-out features through these blocks; what comes while it runs has a later id, and is walked over as well.

        left_out: gets the ids of stored samples that the sums do not get: doubted ones, and old ones that got their label while it ran.
        """
        last = ""
        walked: Set[str] = set()
        while True:
            chunk = memory.after(last, self.microbatch)
            missing = [sample_id for sample_id, (_, code) in held.items() if sample_id not in holdout and self._codec.holds_tokens(code)][
                : self.microbatch
            ]
            if not chunk.ids and not missing:
                left_out |= set(memory.ids()) - walked
                return
            walked |= set(chunk.ids)
            if chunk.ids:
                sure = ~np.isin(chunk.standing, (DOUBTED, AWAY))
                left_out |= {chunk.ids[row] for row in np.flatnonzero(~sure)}
                if sure.any():
                    sums.add(self._through(blocks, chunk.codes[sure]), chunk.class_ids[sure].tolist())
                last = chunk.ids[-1]
            if missing:
                found = self._features(blocks, [held[sample_id][1] for sample_id in missing])
                holdout.update(zip(missing, found))
            yield 0

    def _features(self, blocks: UpperBlocks, codes: Sequence[bytes]) -> Features:
        """(B, F), as many at a time as a training step takes."""
        packed = np.frombuffer(b"".join(codes), np.uint8).reshape(len(codes), -1)
        at_once = self.microbatch
        return np.concatenate([self._through(blocks, packed[start : start + at_once]) for start in range(0, len(codes), at_once)])

    # --- where ---------------------------------------------------------------------------------------------------------

    def _through(self, blocks: UpperBlocks, codes: NDArray[np.uint8]) -> Features:
        """What these blocks give; fewer at once, and in the end on the CPU, where the device has no memory for it."""
        tokens, queue = self._decoded(codes), self._place.queue
        if next(blocks.parameters()).device.type != queue.device.type:  # the place has changed since the caller got them
            return self._hosted(blocks).features(tokens, basis=self._basis)
        parts = self._tried(lambda: in_halves(lambda rows: blocks.features(rows, queue, self._basis), tokens))
        if parts is None:
            return self._hosted(blocks).features(tokens, basis=self._basis)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _decoded(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The tokens, (B, N, D), in the basis that the blocks are told of."""
        return self._codec.decode_tokens(codes, rotated=self._basis is not None)

    def _fresh(self) -> RankedBlocks:
        def make() -> RankedBlocks:
            return RankedBlocks(self._base, self._settings.rank, self._settings.seed)

        return self._tried(make) or make()

    def _frozen(self) -> UpperBlocks:
        """A copy for answering, complete: other threads read it from streams of their own."""
        return self._tried(self.blocks.frozen) or self.blocks.frozen()

    def _tried(self, work: Callable[[], Result]) -> Optional[Result]:
        """What `work` gives. None where a GPU has no memory for it: the CPU goes on, and a sleep that runs now is void."""
        try:
            with self._place.queue.work():
                return work()
        except FAILURES as error:
            if not self._place.leaves(error):
                raise
        self._go_on_host()
        return None

    def _go_on_host(self) -> None:
        """The same blocks on the CPU, after the place has changed. A sleep that runs now is void; what answers elsewhere stays whole."""
        self._life += 1
        self._base = self._on_host
        self.blocks = self._hosted(self.blocks)
        if self.serving is not None:
            self.serving = self._hosted(self.serving).frozen()
        free_cached()

    def _hosted(self, blocks: UpperBlocks) -> RankedBlocks:
        assert isinstance(blocks, RankedBlocks), "only blocks that learn are anywhere else"
        twin = RankedBlocks(self._on_host, self._settings.rank, self._settings.seed)
        twin.restore(blocks.state())
        return twin

    def sums_bytes(self) -> int:
        return self._sums.gram.nbytes + self._sums.sums.nbytes

    # --- answering ----------------------------------------------------------------------------------------------------

    def head(self) -> LinearHead:
        """The closed-form head on what the serving blocks give."""
        return self._sums.solve()

    def answers(self, sample_id: str) -> bool:
        """Whether it has an opinion of this hold-out sample: those whose tokens are gone it never saw."""
        return sample_id in self._holdout

    def opinion(self, head: LinearHead, held: Sequence[str]) -> Opinion:
        """What that head says of these hold-out samples."""
        width = self._base.features_width
        rows = np.stack([self._holdout[sample_id] for sample_id in held]) if held else np.zeros((0, width), np.float32)
        return Opinion(head.class_ids, rows @ head.weight + head.bias, TEMPERATURES)

    # --- checkpoint ---------------------------------------------------------------------------------------------------

    def state(self) -> Tuple[Dict[str, NDArray[Any]], Dict[str, Any]]:
        """Arrays and JSON-able facts that `restore` takes back; a sleep that runs now is not in them."""
        facts: Dict[str, Any] = {"sleeps": self.sleeps, "learned_at": self.learned_at, "serves": self.serving is not None}
        facts["bare"] = self.bare
        facts["left_out"] = sorted(self._left_out)
        facts["of"] = self._identity()
        if not isinstance(self.serving, RankedBlocks):
            return {}, facts
        arrays: Dict[str, NDArray[Any]] = {f"adapted.{name}": value for name, value in self.serving.state().items()}
        arrays.update({f"adapted.{name}": value for name, value in {**self._sums.state(), **self.evidence.state()}.items()})
        return arrays, facts

    def restore(self, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any], held: Held) -> bool:
        """Takes back what `state` gave. False: it was made by other blocks, of other tokens, or before versions said of which."""
        if facts.get("of") != self._identity():
            logger.info("the blocks begin anew: what they had learned was of another split, codec or rank, or of an older version")
            return False
        self.sleeps, self.learned_at, self.bare = int(facts["sleeps"]), int(facts["learned_at"]), int(facts.get("bare", 0))
        if not facts["serves"]:
            return True
        own = {name[len("adapted.") :]: value for name, value in arrays.items() if name.startswith("adapted.")}
        self._tried(lambda: self.blocks.restore(own))
        if not self._place.queue.is_cuda:  # it may just have taken over
            self.blocks.restore(own)
        self.serving = self._frozen()
        self._sums.restore(own)
        self._left_out = set(facts.get("left_out", ()))  # an older version doubted nothing
        self.evidence.restore(own)
        whole = {sample_id: code for sample_id, (_, code) in held.items() if self._codec.holds_tokens(code)}
        if whole:
            self._holdout.update(zip(whole, self._features(self.serving, list(whole.values()))))
        return True

    def _identity(self) -> Dict[str, Any]:
        """What its numbers are of: so many blocks, a change of this rank, tokens stored in this way."""
        return {"features": self._base.features_width, "rank": self._settings.rank, **self._codec.tokens_identity()}
