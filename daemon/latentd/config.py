"""Configuration: one frozen object, from one table, with the origin of every value.

The dataclass fields below are the table: type, default, unit, range and help of every key live here and nowhere else; `config show`, the
docs page and the example file are made from them (configtext.py). Order: defaults < /etc/latentd/config.toml < conf.d/*.toml <
LATENTD_SECTION__KEY < flags. Nobody else reads the environment later.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

from latentd.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SYSTEM_CONFIG = Path("/etc/latentd")
FEATURE_KINDS = ("tensor", "token", "rotated", "scattered")
TOKEN_KINDS = ("token", "rotated", "spatial")  # those that need no calibration


def setting(
    default: Any,
    help: str,
    unit: str = "",
    low: Optional[float] = None,
    high: Optional[float] = None,
    choices: Optional[Tuple[str, ...]] = None,
) -> Any:
    """One row of the table: a dataclass field that carries its own documentation and limits."""
    return field(default=default, metadata={"help": help, "unit": unit, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class HttpConfig:
    bind: str = setting("127.0.0.1:8420", "address and port to listen on; port 0 takes a free one; only loopback addresses are accepted")
    allowed_hosts: Tuple[str, ...] = setting((), "further names that the Host header may carry, besides the loopback ones")
    max_body_bytes: int = setting(64 << 20, "largest request body", "bytes", 1 << 10, 1 << 30)
    max_images: int = setting(16, "images in one request", "images", 1, 256)
    max_image_bytes: int = setting(20 << 20, "largest encoded image", "bytes", 1 << 10, 1 << 30)
    max_pixels: int = setting(64_000_000, "largest decoded image, 65,535 on a side; checked in the header", "pixels", 1, 1_000_000_000)
    max_frames: int = setting(1, "frames in one image file; animated files have more", "frames", 1, 1000)
    max_label_chars: int = setting(100, "longest label", "characters", 1, 1000)
    max_pending_bytes: int = setting(256 << 20, "request bodies held in memory, all together; more get 503", "bytes", 1 << 20, 1 << 36)
    body_timeout_s: float = setting(60.0, "longest time that one request body may take to arrive; then 408", "seconds", 0.1, 3600.0)
    max_connections: int = setting(256, "open connections; one more gets 503", "connections", 1, 65536)


@dataclass(frozen=True)
class StateConfig:
    dir: str = setting("", "state folder; empty: the unit's, /var/lib/latentd for root, $XDG_STATE_HOME/latentd for a plain user")
    cache_dir: str = setting(
        "", "cache folder (weights, graphs, TensorRT plans); empty: the unit's, /var/cache/latentd, or $XDG_CACHE_HOME/latentd"
    )
    journal_bytes: int = setting(
        512 << 20, "budget of the journal on disk; the oldest forgotten and evicted records go first", "bytes", 1 << 20, 1 << 40
    )
    keep_versions: int = setting(3, "versions kept on disk", "versions", 2, 1000)


@dataclass(frozen=True)
class BackboneConfig:
    name: str = setting("dinov2-vits14-focus", "backbone in the cache: see `latentd backbone list`")
    split: int = setting(
        -1,
        "last frozen block, counted from 1; 0: the whole depth, only the head learns; -1: the depth less 1, the last block learns too",
        "blocks",
        -64,
        64,
    )
    class_tokens: int = setting(4, "class tokens of the last blocks that make the feature vector", "blocks", 1, 24)
    image_size: int = setting(224, "side of the square that images are resized to", "pixels", 16, 1024)


@dataclass(frozen=True)
class EngineConfig:
    order: Tuple[str, ...] = setting(
        ("tensorrt", "onnxruntime", "eager"), "engines to try, best first; the first that passes the gate serves"
    )
    providers: Tuple[str, ...] = setting(
        ("CUDAExecutionProvider", "CPUExecutionProvider"), "ONNX Runtime providers to try, best first; falling back says so in /v1/status"
    )
    precision: str = setting(
        "float",
        "int8: a frozen stage with its linear layers in INT8 goes before the float one of the same engine, where it passes its gate",
        choices=("float", "int8"),
    )
    int8_min_cosine: float = setting(
        0.998,
        "the gate of INT8: least cosine of its tokens with PyTorch's on probe images, and the mean on taught ones for a TensorRT plan; "
        "random errors of 0.998 cost under half a point on Objects-50",
        "",
        0.0,
        1.0,
    )
    tensorrt_precision: str = setting(
        "fp16", "precision of the TensorRT plan; norms and softmax stay in fp32; fp32 follows where fp16 fails", choices=("fp16", "fp32")
    )
    tensorrt_workspace_bytes: int = setting(512 << 20, "device memory that a TensorRT kernel may use for itself", "bytes", 1 << 20, 1 << 38)
    cuda_memory_bytes: int = setting(1 << 30, "device memory that ONNX Runtime may hold on CUDA", "bytes", 64 << 20, 1 << 38)
    build_timeout_s: float = setting(3600.0, "longest time that building a TensorRT plan may take; 0: any", "seconds", 0.0, 86400.0)
    threads: int = setting(0, "CPU threads of the frozen stage; 0: one a core", "threads", 0, 256)
    max_batch: int = setting(8, "images that one run of the frozen stage takes at most", "images", 1, 256)
    min_cosine: float = setting(0.999, "the gate: least cosine with eager PyTorch on probe images", "", 0.0, 1.0)
    queue_images: int = setting(256, "images that may wait for the frozen stage; more get 503", "images", 16, 65536)
    decode_threads: int = setting(2, "threads that decode images", "threads", 1, 64)


@dataclass(frozen=True)
class LearnConfig:
    codec: str = setting(
        "int8",
        "how features are stored",
        choices=("fp32", "fp16", "int8", "int7", "int6", "int5", "int4", "int3", "int2"),
    )
    codec_kind: str = setting(
        "token",
        "quantizer: one range for all (tensor), one a class token (token), rotated (Hadamard + Lloyd-Max), or scattered (rotated, errors "
        "of similar features independent); tokens have learn.token_codec_kind",
        choices=FEATURE_KINDS,
    )
    replay_bytes: int = setting(48 << 20, "budget of the replay memory", "bytes", 1 << 14, 1 << 36)
    token_codec: str = setting(
        "int2",
        "split below the depth: how tokens are stored",
        choices=("fp32", "fp16", "int8", "int7", "int6", "int5", "int4", "int3", "int2"),
    )
    token_codec_kind: str = setting(
        "spatial", "their quantizer: one range a token (token), rotated, or spatial (across patches too)", choices=TOKEN_KINDS
    )
    token_bytes: int = setting(
        48 << 20, "budget of samples with their tokens, the hold-out's among them, beside the replay memory", "bytes", 1 << 14, 1 << 36
    )
    holdout_every: int = setting(
        10, "one taught sample in this many, per class, is kept out of training to measure accuracy; 0: none", "samples", 0, 1000
    )
    holdout_per_class: int = setting(50, "hold-out samples of one class at most", "samples", 1, 10_000)
    duplicate_cosine: float = setting(
        0.9995, "an image nearer than this to a taught one of the same label is a duplicate; above 1: off", "", 0.5, 2.0
    )
    max_lag_samples: int = setting(4096, "samples that may wait for the learner; more get 503", "samples", 16, 1 << 20)
    token_grid: int = setting(
        0,
        "split below the depth: patch tokens are averaged to this many squares a side before they are stored; 0: all are kept",
        "",
        0,
        128,
    )
    sleep_first: int = setting(500, "split below the depth: the blocks learn first after this many samples", "samples", 2, 1 << 20)
    sleep_growth: float = setting(
        1.0, "and again whenever what was learned has grown by this share; larger: less time and energy, later answers", "", 0.01, 100.0
    )
    sleep_epochs: float = setting(
        4.0, "how often the blocks go over the samples with tokens each time; 0: they never learn", "epochs", 0.0, 100.0
    )
    sleep_minibatch: int = setting(16, "of them, in one training step of the blocks", "latents", 1, 4096)
    sleep_rank: int = setting(16, "rank of the change that the blocks learn for each of their matrices", "", 1, 1024)
    sleep_rate: float = setting(5e-4, "AdamW's learning rate for that change", "", 1e-7, 1.0)
    device: str = setting(
        "auto",
        "where the head and the blocks learn, and the blocks answer; auto: on CUDA where torch has it",
        choices=("auto", "cpu", "cuda"),
    )
    sleep_threads: int = setting(0, "CPU threads while the blocks learn; 0: one a core", "threads", 0, 256)
    microbatch: int = setting(
        0,
        "latents of a mini-batch that go through the blocks at once: fewer need less memory; 0: 16 where one block learns, 4 where more do",
        "latents",
        0,
        1024,
    )
    minibatch: int = setting(128, "latents in one training step of the head, new and replayed together", "latents", 8, 4096)
    epochs: float = setting(4.0, "how often the learner goes over each new sample", "epochs", 0.0, 100.0)
    learning_rate: float = setting(1e-3, "AdamW's learning rate for the trained head", "", 1e-6, 1.0)
    label_smoothing: float = setting(0.1, "label smoothing of the trained head", "", 0.0, 0.9)
    checkpoint_s: float = setting(30.0, "longest time between two checkpoints of the learner while it learns", "seconds", 0.0, 3600.0)
    unknown_rate: float = setting(0.0, "share of right answers that may be refused as unknown, say 0.01; 0: none is", "", 0.0, 0.5)
    doubt_nats: float = setting(
        30.0,
        "a taught label is doubted, and not learned from, where another class is so much likelier to heads that never saw it; 0: none is",
        "nats",
        0.0,
        1e6,
    )
    seed: int = setting(0, "seed of every random choice", "", 0, 2**31 - 1)


@dataclass(frozen=True)
class EnergyConfig:
    meters: Tuple[str, ...] = setting(
        ("ina3221", "tegrastats", "nvml", "rapl"), "meters to try, in this order; the first that reads serves"
    )
    period_s: float = setting(0.2, "time between two readings of the total", "seconds", 0.05, 60.0)
    gap_s: float = setting(2.0, "a longer time between two readings is counted as a gap, not bridged", "seconds", 0.1, 600.0)
    budget_w: float = setting(0.0, "the learner waits while the meter shows more power than this; 0: no budget", "watts", 0.0, 1000.0)
    max_temperature_c: float = setting(
        0.0,
        "the learner waits while any zone is warmer; 0: than 85 on a board, on a PC than 5 below its hot or critical trip; 150: never",
        "degrees Celsius",
        0.0,
        150.0,
    )
    battery_wh: float = setting(
        0.0, "capacity of the battery that feeds the board, for an estimate of the hours left; 0: none", "watt-hours", 0.0, 100_000.0
    )


@dataclass(frozen=True)
class MemoryConfig:
    reserve_bytes: int = setting(
        384 << 20, "available memory left to all else, an eighth of the machine at most: below it the learner waits", "bytes", 0, 1 << 40
    )
    build_bytes: int = setting(
        2400 << 20, "memory that must be available before a TensorRT plan is built; until then the next engine serves", "bytes", 0, 1 << 40
    )


@dataclass(frozen=True)
class LogConfig:
    level: str = setting("info", "least severe level that is logged", choices=("debug", "info", "warning", "error"))


@dataclass(frozen=True)
class Config:
    """The effective configuration; immutable. `origins` says where each key's value came from."""

    http: HttpConfig = field(default_factory=HttpConfig)
    state: StateConfig = field(default_factory=StateConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    learn: LearnConfig = field(default_factory=LearnConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    log: LogConfig = field(default_factory=LogConfig)
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def state_dir(self) -> Path:
        return Path(self.state.dir)

    @property
    def cache_dir(self) -> Path:
        return Path(self.state.cache_dir)


class Row(NamedTuple):
    """One key of the table, as `config show` and the docs print it."""

    key: str
    default: Any
    unit: str
    low: Optional[float]
    high: Optional[float]
    choices: Optional[Tuple[str, ...]]
    help: str


SECTIONS: Dict[str, Type[Any]] = {
    "http": HttpConfig,
    "state": StateConfig,
    "backbone": BackboneConfig,
    "engine": EngineConfig,
    "learn": LearnConfig,
    "energy": EnergyConfig,
    "memory": MemoryConfig,
    "log": LogConfig,
}


def rows() -> Iterator[Row]:
    """Every key of the table, in file order."""
    for section, kind in SECTIONS.items():
        for item in dataclasses.fields(kind):
            meta = item.metadata
            yield Row(f"{section}.{item.name}", item.default, meta["unit"], meta["low"], meta["high"], meta["choices"], meta["help"])


def load(
    environ: Mapping[str, str],
    flags: Mapping[str, Any],
    *,
    system: Path = SYSTEM_CONFIG,
    is_service: Optional[bool] = None,
) -> Config:
    """The configuration from every source, checked.

    flags: key -> value, None meaning not given. system: folder of config.toml and conf.d. is_service: use the /var folders; None: when
    root. Raises ConfigError that names the key, the source and the nearest known key.
    """
    table = {row.key: row for row in rows()}
    values: Dict[str, Any] = {}
    origins: Dict[str, str] = {}
    for origin, found in _sources(environ, flags, system):
        for key, raw in found.items():
            if key not in table:
                raise ConfigError(f"unknown key {key} in {origin}", hint=_nearest(key, list(table)))
            values[key] = _checked(table[key], raw, origin)
            origins[key] = origin
    service = os.geteuid() == 0 if is_service is None else is_service
    for key, path in _default_folders(environ, service).items():
        if not values.get(key):
            values[key] = path
            origins[key] = "default"
    sections = {
        name: kind(**{item.name: values[f"{name}.{item.name}"] for item in dataclasses.fields(kind) if f"{name}.{item.name}" in values})
        for name, kind in SECTIONS.items()
    }
    return Config(**sections, origins={key: origins.get(key, "default") for key in table})


def as_table(config: Config) -> Dict[str, Any]:
    """key -> effective value, in file order."""
    return {row.key: getattr(getattr(config, row.key.split(".")[0]), row.key.split(".")[1]) for row in rows()}


def plain(number: float) -> str:
    """The number without a fraction that says nothing."""
    return str(int(number)) if number == int(number) else f"{number:g}"


def _sources(environ: Mapping[str, str], flags: Mapping[str, Any], system: Path) -> Iterator[Tuple[str, Dict[str, Any]]]:
    for path in [system / "config.toml", *sorted((system / "conf.d").glob("*.toml"))]:
        if path.is_file():
            yield str(path), _flatten(path)
    prefix = "LATENTD_"
    named = {k: v for k, v in environ.items() if k.startswith(prefix) and "__" in k}
    for name, value in sorted(named.items()):
        yield f"environment variable {name}", {name[len(prefix) :].lower().replace("__", "."): value}
    for key, value in flags.items():
        if value is not None:
            yield "command line", {key: value}


def _flatten(path: Path) -> Dict[str, Any]:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as cause:
        raise ConfigError(f"{path} can't be read: {cause}", hint="Mend the file; `latentd config show` prints a valid one.") from cause
    flat: Dict[str, Any] = {}
    for section, content in data.items():
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: {section} stands outside a section", hint=_nearest(section, list(SECTIONS)))
        flat.update({f"{section}.{key}": value for key, value in content.items()})
    return flat


def _nearest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    return f"Did you mean {close[0]}?" if close else "`latentd config show` prints every key."


def _checked(row: Row, raw: Any, origin: str) -> Any:
    """The value in the type of its default, inside its range."""
    value = _converted(row, raw, origin)
    wrong = ""
    if row.choices and value not in row.choices:
        wrong = f"must be one of {', '.join(row.choices)}"
    elif (
        isinstance(value, (int, float)) and row.low is not None and not (row.low <= value <= (row.high if row.high is not None else value))
    ):
        wrong = f"must be {plain(row.low)} to {plain(row.high or value)} {row.unit}".rstrip()
    if wrong:
        raise ConfigError(f"{row.key} = {value!r} ({origin}) {wrong}", hint=row.help)
    return value


def _converted(row: Row, raw: Any, origin: str) -> Any:
    kind = type(row.default)
    try:
        if kind is tuple:
            parts = raw.split(",") if isinstance(raw, str) else list(raw)
            return tuple(str(part).strip() for part in parts if str(part).strip())
        if isinstance(raw, bool) or (kind is int and isinstance(raw, float)):
            raise ValueError(f"{raw!r} is not {kind.__name__}")
        return kind(raw)
    except (TypeError, ValueError) as cause:
        raise ConfigError(f"{row.key} = {raw!r} ({origin}) is not a {kind.__name__}", hint=row.help) from cause


def _default_folders(environ: Mapping[str, str], service: bool) -> Dict[str, str]:
    """The folders that systemd made for the unit (StateDirectory=, CacheDirectory=), else those of the kind of user."""
    home = Path(environ.get("HOME", "~")).expanduser()
    state = Path(environ.get("XDG_STATE_HOME") or home / ".local" / "state") / "latentd"
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache") / "latentd"
    plain = {"state.dir": str(state), "state.cache_dir": str(cache)}
    usual = {"state.dir": "/var/lib/latentd", "state.cache_dir": "/var/cache/latentd"} if service else plain
    made = {"state.dir": environ.get("STATE_DIRECTORY", ""), "state.cache_dir": environ.get("CACHE_DIRECTORY", "")}
    return {key: made[key].split(":")[0] or usual[key] for key in usual}
