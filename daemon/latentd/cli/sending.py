"""Sending image files in batches that fit the daemon's limits, and pairing every file with what became of it.

Blocks on disk and on the daemon, in the verb's thread; at most one batch is in memory.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple, Union

from latentd.cli.client import Answer, Client, Refused
from latentd.cli.pictures import Outcome, Picture, failed, read
from latentd.cli.terminal import FAILED, OK, REFUSED
from latentd.errors import LatentdError

PATIENCE_S = 120.0  # how long a daemon that says "later" (503, Retry-After) is asked again
SHOWN_PROBLEMS = 20
FRAME_BYTES = 1024  # what multipart adds to one image and its label, at most
ONE_BY_ONE = (413, 415, 422)  # refusals that one image can bring upon its whole batch


class Limits(NamedTuple):
    """What one request may carry."""

    images: int
    image_bytes: int
    body_bytes: int


class Sent(NamedTuple):
    """One answered batch: every file of it with its outcome, in order; `answer` holds what the daemon said of the batch as a whole."""

    outcomes: List[Outcome]
    answer: Dict[str, Any]


Loaded = Tuple[Picture, Union[bytes, Outcome]]


def limits(client: Client) -> Limits:
    """The daemon's limits; also the first proof that it is there."""
    found = client.get("/v1/info")["limits"]
    return Limits(found["max_images"], found["max_image_bytes"], found["max_body_bytes"])


def send(client: Client, path: str, pictures: Sequence[Picture], most: Limits, last: Dict[str, str], **params: Any) -> Iterator[Sent]:
    """POSTs the pictures to `path`, batch by batch, in order. `last`: headers of the last batch only. params: the query."""
    batches = _batches(pictures, most)
    sent = 0
    for batch in batches:
        sent += len(batch)
        yield _send(client, path, batch, last if sent == len(pictures) else {}, params)


def _batches(pictures: Sequence[Picture], most: Limits) -> Iterator[List[Loaded]]:
    batch: List[Loaded] = []
    size = 0
    for picture in pictures:
        content = _load(picture, most)
        added = FRAME_BYTES + (len(content) if isinstance(content, bytes) else 0)
        if batch and (len(batch) == most.images or size + added > most.body_bytes):
            yield batch
            batch, size = [], 0
        batch.append((picture, content))
        size += added
    if batch:
        yield batch


def _load(picture: Picture, most: Limits) -> Union[bytes, Outcome]:
    try:
        return read(picture.path, min(most.image_bytes, most.body_bytes - FRAME_BYTES))
    except LatentdError as error:
        return failed(picture, error)


def _send(client: Client, path: str, batch: Sequence[Loaded], headers: Dict[str, str], params: Dict[str, Any]) -> Sent:
    ready = [(picture, content) for picture, content in batch if isinstance(content, bytes)]
    sent = _deliver(client, path, ready, headers, params) if ready else Sent([], {})
    delivered = iter(sent.outcomes)
    return Sent([content if isinstance(content, Outcome) else next(delivered) for _, content in batch], sent.answer)


def _deliver(client: Client, path: str, group: Sequence[Tuple[Picture, bytes]], headers: Dict[str, str], params: Dict[str, Any]) -> Sent:
    """The group's outcomes in order. A refusal of the whole group for one image's sake is cleared up by sending the images singly."""
    try:
        answer = _post(client, path, group, headers, params).body
    except Refused as refused:
        if refused.status not in ONE_BY_ONE:
            raise
        if len(group) == 1:
            return Sent([Outcome(group[0][0], {"problem": refused.problem})], {})
        singly = [_deliver(client, path, [item], headers, params) for item in group]
        return Sent([outcome for sent in singly for outcome in sent.outcomes], singly[-1].answer)
    return Sent([Outcome(picture, result) for (picture, _), result in zip(group, answer["results"])], answer)


def _post(client: Client, path: str, group: Sequence[Tuple[Picture, bytes]], headers: Dict[str, str], params: Dict[str, Any]) -> Answer:
    files = [("image", ("image", content, "application/octet-stream")) for _, content in group]
    labels = {"label": [picture.label for picture, _ in group]} if group[0][0].label is not None else {}
    return client.send("POST", path, files=files, data=labels, headers=headers, params=params, patience_s=PATIENCE_S)


def outcome_code(outcomes: Sequence[Outcome]) -> int:
    """0 all files were used; 1 some could not be read here; 4 the daemon refused some."""
    problems = [outcome for outcome in outcomes if "problem" in outcome.result]
    if not problems:
        return OK
    return FAILED if any(outcome.local for outcome in problems) else REFUSED


def problem_lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A line for each file that was not used, up to a number that can be read."""
    problems = [outcome for outcome in outcomes if "problem" in outcome.result]
    for picture, result, local in problems[:SHOWN_PROBLEMS]:
        detail = result["problem"].get("detail") or result["problem"].get("title")
        yield detail if local else f"{picture.path}: {detail}"
    if len(problems) > SHOWN_PROBLEMS:
        yield f"... and {len(problems) - SHOWN_PROBLEMS} more; --json lists them all."
