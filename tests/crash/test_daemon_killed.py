"""The whole daemon, killed with SIGKILL right after its answers: the next one knows all of it in its first answer."""

from __future__ import annotations

from typing import Any, Callable, Dict, List

import httpx

MOTIFS = ("discs", "stripes", "rings")
Start = Callable[..., Any]


def known(url: str) -> Dict[str, Any]:
    """What must survive."""
    status = httpx.get(f"{url}/v1/status").json()
    classes = httpx.get(f"{url}/v1/classes").json()["classes"]
    samples = httpx.get(f"{url}/v1/samples?limit=100").json()["samples"]
    return {
        "version": status["version"],
        "counts": [(entry["name"], entry["samples"]) for entry in classes],
        "samples": [(entry["sample_id"], entry["label"], entry["state"]) for entry in samples],
        "prequential": status["accuracy"]["prequential"]["count"],
    }


def decisions(url: str, photos: List[bytes]) -> List[str]:
    files = [("image", (f"{index}.jpg", photo, "image/jpeg")) for index, photo in enumerate(photos)]
    return [result["decision"] for result in httpx.post(f"{url}/v1/classify", files=files, timeout=60).json()["results"]]


def test_a_killed_daemon_knows_everything_in_its_first_answer(daemon_process: Start, photo: Callable[..., bytes]) -> None:
    first = daemon_process()
    for seed in range(4):
        files = [("image", (f"{motif}.jpg", photo(seed, motif=motif), "image/jpeg")) for motif in MOTIFS]
        answer = httpx.post(f"{first.url}/v1/learn", files=files, data={"label": list(MOTIFS)}, headers={"Prefer": "wait=30"}, timeout=60)
        assert [result["state"] for result in answer.json()["results"]] == ["learned"] * 3
    asked = [photo(100 + seed, motif=motif) for seed in range(2) for motif in MOTIFS]
    before, answers = known(first.url), decisions(first.url, asked)
    first.kill()
    second = daemon_process()
    assert known(second.url) == before
    assert decisions(second.url, asked) == answers
    assert before["version"] == 4
    assert before["prequential"] == 12


def test_what_was_acknowledged_but_not_yet_learned_is_learned_before_the_first_answer(
    daemon_process: Start, photo: Callable[..., bytes]
) -> None:
    first = daemon_process()
    answer = httpx.post(
        f"{first.url}/v1/learn?label=disc", content=photo(1, motif="discs"), headers={"Content-Type": "image/jpeg"}, timeout=60
    )
    first.kill()
    assert answer.status_code == 202
    second = daemon_process()
    assert decisions(second.url, [photo(1, motif="discs")]) == ["disc"]
    assert known(second.url)["samples"] == [(answer.json()["results"][0]["sample_id"], "disc", "learned")]
