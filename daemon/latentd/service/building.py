"""Makes the parts of a daemon from its configuration and starts them, each with the act that ends it.

Runs once, on the main thread; takes seconds.
"""

from __future__ import annotations

import functools
import logging
import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack, suppress
from typing import Any, Callable, Mapping, Optional, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd import headroom
from latentd.config import Config, HttpConfig
from latentd.energy.ledger import EnergyLedger
from latentd.energy.meter_thread import MeterThread
from latentd.engines.choose import Choice, choose
from latentd.engines.enduring import enduring
from latentd.engines.onnx import usable_cores
from latentd.engines.recent import RecentImages
from latentd.engines.stage import StageSpec, stage_spec
from latentd.engines.upgrade import Upgrade
from latentd.errors import ConfigError, LatentdError
from latentd.learning.adapted import Adapted
from latentd.learning.blocks import UpperBlocks
from latentd.learning.learner import Learner, LearnerSettings
from latentd.learning.place import Place
from latentd.learning.restraint import Limits, Restraint, Senses
from latentd.learning.sleep import SleepSettings
from latentd.learning.trainer import Trainer, TrainerSettings
from latentd.replay.journal import Journal
from latentd.replay.latents import LatentCodec
from latentd.replay.limits import JournalLimits
from latentd.service.batcher import Batcher
from latentd.service.bodies import PendingBytes
from latentd.service.memory_plan import MemoryPlan, make_plan
from latentd.service.metrics import Metrics
from latentd.service.parts import Parts
from latentd.service.pipeline import Pipeline
from latentd.service.readiness import Readiness
from latentd.service.storing import latent_codec, origin, tokens_of
from latentd.vision import checkpoints, images
from latentd.vision.probe import probe_images
from latentd.vision.room import PixelRoom

STOP_S = 30.0  # how long one part may take to end
CATCH_UP_S = 30.0  # how long serving waits for what was taught after the last checkpoint
CATCH_UP_POLL_S = 0.2

log = logging.getLogger(__name__)


def build(config: Config, on_death: Callable[[BaseException], None], until_stop: ExitStack) -> Parts:
    """Every part, running. What must be ended is pushed on `until_stop`, so that closing it ends them, the last one first.

    Order: journal (what was taught), ledger, frozen stage and its queue, learner, upgrade of the engine. Raises what they
    raise when they can't start.
    """
    metrics, room_at_start_bytes = Metrics(), _room_bytes()
    backbone = checkpoints.find(config.cache_dir, config.backbone.name)
    spec = stage_spec(config, backbone)
    recent = RecentImages()  # filled only where something can be calibrated on it
    # Before its turn only where latents are measured.
    choice_of = functools.lru_cache(maxsize=1)(lambda: enduring(choose(config, backbone, images=recent.all), config, backbone))
    codec = latent_codec(config, spec, backbone, lambda: choice_of().stage)
    journal = _journal(config, spec, codec, metrics, until_stop)
    ledger, meters = _energy(config, journal, until_stop)
    choice = choice_of()
    capacity = max(config.engine.queue_images, config.http.max_images)
    batcher = Batcher(choice.stage, ledger, metrics, max_batch=config.engine.max_batch, capacity=capacity, on_death=on_death)
    batcher.start()
    until_stop.callback(batcher.stop, STOP_S)
    taught = recent.add if config.engine.precision == "int8" and choice.pending else None
    pipeline = Pipeline(batcher, decoder(config.http, spec.image_size), config.engine.decode_threads, metrics, taught=taught)
    until_stop.callback(pipeline.close)
    engine = (*(pending.name for pending in choice.pending), choice.stage.name)[0]
    plan = make_plan(config, backbone.shape, spec, codec, engine=engine, lanes=choice.stage.lanes)

    def publish(newer: Choice) -> None:
        parts.choice = newer

    def has_answered() -> bool:
        return batcher.last_success_at is not None

    upgrade = Upgrade(choice, batcher.replace, publish, has_answered, lambda: _no_room(config.memory.build_bytes))
    restraint = _restraint(config, plan, ledger, meters, upgrade)
    parts = Parts(
        config=config,
        choice=choice,
        pipeline=pipeline,
        journal=journal,
        learner=_learner(config, backbone, spec, codec, journal, ledger, batcher, metrics, restraint, until_stop),
        ledger=ledger,
        codec=codec,
        metrics=metrics,
        readiness=Readiness(batcher, probe_images(spec.image_size)[0]),
        pending=PendingBytes(max(config.http.max_pending_bytes, config.http.max_body_bytes)),
        temperatures_c=lambda: meters.temperatures_c,
        board=lambda: meters.board,
        battery_charge=lambda: meters.battery_charge,
        memory_plan=plan,
        room_at_start_bytes=room_at_start_bytes,
        restrain=lambda newer: restraint.obey(_limits(newer, plan)),
    )
    until_stop.callback(upgrade.stop, STOP_S)
    upgrade.start()
    return parts


def decoder(http: HttpConfig, size: int) -> Callable[[bytes], NDArray[np.uint8]]:
    """For all threads of the decode pool: bytes to (size, size, 3) pixels, of no more pixels at once than one image may have."""
    limits = images.ImageLimits(http.max_image_bytes, http.max_pixels, http.max_frames)
    return functools.partial(images.decode, size=size, limits=limits, room=PixelRoom(http.max_pixels))


def _room_bytes() -> Optional[int]:
    """What is available, and what this process holds already; later, what it holds of a GPU's memory may be neither."""
    available, resident = headroom.read().available_bytes, headroom.resident_bytes()
    return None if available is None or resident is None else available + resident


def _no_room(needed_bytes: int) -> Optional[str]:
    """Why no engine can be built now: with little memory a build fails, or takes slower kernels for good."""
    available, _, bounded_by = headroom.read()
    if available is None or available >= needed_bytes:
        return None
    return f"{bounded_by} has {available >> 20} MiB of memory available, building takes {needed_bytes >> 20} (memory.build_bytes)"


def _restraint(config: Config, plan: MemoryPlan, ledger: EnergyLedger, meters: MeterThread, upgrade: Upgrade) -> Restraint:
    """What holds the learner back on this device."""
    senses = Senses(
        power_w=lambda: ledger.power_w,
        temperatures_c=lambda: meters.temperatures_c,
        limits_c=lambda: meters.limits_c,
        throttled=lambda: meters.board.held_back,
        headroom=headroom.read,
        building=lambda: upgrade.building,
    )
    return Restraint(_limits(config, plan), senses)


def _limits(config: Config, plan: MemoryPlan) -> Limits:
    return Limits(config.energy.budget_w, config.energy.max_temperature_c, config.memory.reserve_bytes, plan.needs_bytes())


def _journal(config: Config, spec: StageSpec, codec: LatentCodec, metrics: Metrics, until_stop: ExitStack) -> Journal:
    limits = JournalLimits(
        budget_bytes=config.state.journal_bytes,
        duplicate_cosine=config.learn.duplicate_cosine,
        holdout_every=config.learn.holdout_every,
        holdout_per_class=config.learn.holdout_per_class,
        max_label_chars=config.http.max_label_chars,
        seed=config.learn.seed,
    )
    path = config.state_dir / "journal.sqlite"
    journal = Journal(path, codec=codec, feature_width=spec.features_width, limits=limits, observe_fsync=metrics.fsync)
    until_stop.callback(journal.close, STOP_S)
    journal.start()
    _require_same_latents(journal, config, spec, codec)
    return journal


def _require_same_latents(journal: Journal, config: Config, spec: StageSpec, codec: LatentCodec) -> None:
    """Features of another backbone or codec mean nothing here: refuses to mix them. Raises ConfigError. Tokens of another split or codec
    are dropped: what the floor knows does not hang on them."""
    tokens = tokens_of(spec, codec)
    mine = {**origin(spec), **codec.identity(), **tokens}
    theirs = journal.counters("latents").result(STOP_S)
    if not theirs or journal.status().head_seq == 0:
        journal.put_counters("latents", mine).result(STOP_S)
        return
    # State folders that name no shape hold class tokens, stored without calibration.
    theirs.setdefault("codec_shape", [theirs.get("class_tokens"), spec.width])
    changed = {key: f"{key} was {theirs.get(key)}, now {value}" for key, value in mine.items() if theirs.get(key) != value}
    if changed and not set(changed) - set(tokens):
        log.warning("the blocks above the split begin anew, on what is taught from now on: %s", "; ".join(changed.values()))
        while journal.drop_tokens().result(STOP_S):  # gigabytes of them may take longer than one command has time
            pass
        journal.put_counters("latents", mine).result(STOP_S)
        return
    if changed:
        raise ConfigError(
            f"what was taught in {config.state_dir} can't be used with this configuration: {'; '.join(changed.values())}",
            hint=f"Set it back{_features_as(theirs) if 'codec' in changed else ''}, or start with an empty state folder (--state-dir) and "
            "teach again.",
        )


def _features_as(latents: Mapping[str, Any]) -> str:
    """What to set back, for a file from when learn.codec said how tokens are stored."""
    name, kind = [*str(latents.get("codec")).split(" "), "token"][:2]
    tokens = "; of tokens it is learn.token_codec and learn.token_codec_kind" if latents.get("tokens_codec") else ""
    return f' to learn.codec = "{name}" and learn.codec_kind = "{kind}", which say how features are stored{tokens}'


def _energy(config: Config, journal: Journal, until_stop: ExitStack) -> Tuple[EnergyLedger, MeterThread]:
    """The ledger goes on from the totals of the run before, and leaves its own."""
    carried = journal.counters("energy").result(STOP_S)
    ledger = EnergyLedger(period_s=config.energy.period_s, gap_s=config.energy.gap_s, carried=carried)
    meters = MeterThread.from_config(config.energy, ledger)
    until_stop.callback(keep_totals, journal, ledger)
    meters.start()
    until_stop.callback(meters.stop)
    return ledger, meters


def keep_totals(journal: Journal, ledger: EnergyLedger) -> None:
    """Writes the joules counted so far where the next run finds them; a journal that fails says so itself."""
    journal.put_counters("energy", ledger.totals())


def _learner(
    config: Config,
    backbone: checkpoints.Backbone,
    spec: StageSpec,
    codec: LatentCodec,
    journal: Journal,
    ledger: EnergyLedger,
    batcher: Batcher,
    metrics: Metrics,
    restraint: Restraint,
    until_stop: ExitStack,
) -> Learner:
    learn = config.learn
    training = TrainerSettings.of(learn)
    adapted = _adapted(config, backbone, spec, codec)
    settings = LearnerSettings(
        config.state_dir / "versions",
        learn.checkpoint_s,
        config.state.keep_versions,
        str(codec),
        learn.replay_bytes,
        learn.sleep_threads or usable_cores(),
    )

    def make_trainer() -> Trainer:
        place = Place.of(learn.device)
        return Trainer(codec, spec.features_width, training, adapted(place), place)

    learner = Learner(
        journal,
        make_trainer,
        settings,
        observer=metrics,
        busy=batcher.busy,
        working=batcher.working,
        activity=lambda samples: ledger.activity("learn", samples=samples),
        restraint=restraint,
    )
    until_stop.callback(learner.stop, STOP_S)
    learner.start()
    _catch_up(journal, learner)
    return learner


def _adapted(config: Config, backbone: checkpoints.Backbone, spec: StageSpec, codec: LatentCodec) -> Callable[[Place], Optional[Adapted]]:
    """Makes the blocks that learn, untrained, where tokens are stored for them; the pretrained blocks are read once."""
    if codec.tokens is None or config.learn.sleep_epochs <= 0:
        return lambda place: None
    base, settings = UpperBlocks.load(backbone, spec.split), SleepSettings.of(config.learn, backbone.shape.depth - spec.split)
    return lambda place: Adapted(base, codec, settings, place)


def _catch_up(journal: Journal, learner: Learner) -> None:
    """What was acknowledged before a crash takes part in the first answer; a learner that is down, slow or waiting must not keep serving
    down.
    """
    learned = learner.learned(journal.status().head_seq)
    deadline = time.monotonic() + CATCH_UP_S
    while not learned.done() and time.monotonic() < deadline:
        with suppress(LatentdError, FutureTimeoutError):
            learned.result(CATCH_UP_POLL_S)
        if learner.status().state == "waiting":  # not before: a snapshot that nobody had waited for is made now
            break
    if not learned.done() or learned.exception() is not None:
        log.warning("serving starts %d samples behind what was taught; the learner goes on", learner.status().lag_samples)
