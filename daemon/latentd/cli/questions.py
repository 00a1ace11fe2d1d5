"""What `latentd tune` asks accuracy on: images in a folder, or the latents that the state folder keeps."""

from __future__ import annotations

from pathlib import Path
from typing import List, NamedTuple, Optional

import numpy as np
from numpy.typing import NDArray

from latentd.cli.pictures import find_by_class, read
from latentd.cli.terminal import note, plain
from latentd.config import Config
from latentd.engines.stage import stage_spec
from latentd.errors import FileUnusable, JournalError, LatentdError
from latentd.learning.tuning.samples import Images, Samples, stored
from latentd.learning.tuning.trial import thinned
from latentd.service.state_folder import holder
from latentd.vision.checkpoints import Backbone
from latentd.vision.images import ImageLimits, decode

JOURNAL = "journal.sqlite"


class Asked(NamedTuple):
    """What accuracy is asked on, and the same in words; samples None: the words say why it is not asked."""

    samples: Optional[Samples]
    source: str


def images_in(folder: Path, settings: Config, most: int) -> Asked:
    """At most `most` images of the folder, evenly over its classes; one that can't be used is named and left out.

    Raises FileUnusable where there are not two classes.
    """
    found = find_by_class(str(folder))
    labels = sorted({picture.label or "" for picture in found.pictures})
    if len(labels) < 2:
        hint = "Give a folder that holds one folder a class, with JPEG, PNG, WebP or BMP files in them."
        raise FileUnusable(f"{plain(folder)} holds images of {len(labels)} classes; accuracy needs two.", hint=hint)
    ids = np.array([labels.index(picture.label or "") for picture in found.pictures], dtype=np.int64)
    size = settings.backbone.image_size
    limits = ImageLimits(settings.http.max_image_bytes, settings.http.max_pixels, settings.http.max_frames)
    pixels: List[NDArray[np.uint8]] = []
    kept: List[int] = []
    for place in thinned(ids, most).tolist():
        path = found.pictures[place].path
        try:
            pixels.append(decode(read(path, limits.max_bytes), size, limits))
        except LatentdError as error:
            note(f"{plain(path)} is left out: {error.detail}")
        else:
            kept.append(int(ids[place]))
    source = f"{len(kept)} of {len(found.pictures)} images of {len(labels)} classes in {plain(folder)}"
    stack = np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)
    return Asked(Images(stack, np.array(kept, dtype=np.int64), source), source)


def taught(settings: Config, backbone: Backbone, most: int) -> Asked:
    """At most `most` latents that the state folder keeps, unless a daemon works on it."""
    process = holder(settings.state_dir)
    if process is not None:
        note(f"The daemon on {settings.state_dir} (process {process}) works beside this and disturbs the figures.")
        return Asked(None, f"process {process} uses the state folder; stop it, or give --images")
    try:
        samples = stored(settings.state_dir / JOURNAL, stage_spec(settings, backbone), most)
    except JournalError as cause:
        return Asked(None, f"{cause.detail}; give --images to ask it")
    return Asked(samples, samples.source)
