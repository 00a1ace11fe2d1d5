from __future__ import annotations

from typing import Any, Dict, List, Optional

import pytest

from latentd.service.schemas import ClassEntry, ClassesAnswer, Sample, SamplesPage
from service.fakes import World, assert_problem, picture


def teach(world: World, *labels: str) -> List[str]:
    """Ids of pictures taught under these labels."""
    answer = world.learn(*((picture(seed), label) for seed, label in enumerate(labels)), headers={"Prefer": "wait=5"})
    return [result["sample_id"] for result in answer.json()["results"]]


def test_a_sample_has_the_documented_shape(world: World) -> None:
    (sample_id,) = teach(world, "cat")
    sample = Sample.model_validate(world.call("GET", f"/v1/samples/{sample_id}").json())
    assert (sample.label, sample.state, len(sample.sha256)) == ("cat", "learned", 64)
    assert sample.taught_at.endswith("Z")


def test_pages_join_to_the_whole_list_oldest_first(world: World) -> None:
    ids = teach(world, *"abcdefg")
    found: List[str] = []
    cursor: Optional[str] = None
    for _ in range(4):
        params = {"limit": "2", **({"cursor": cursor} if cursor else {})}
        page = SamplesPage.model_validate(world.call("GET", "/v1/samples", params=params).json())
        found += [sample.sample_id for sample in page.samples]
        cursor = page.next
    assert (found, cursor) == (ids, None)


def test_samples_can_be_chosen_by_label_and_state(world: World) -> None:
    ids = teach(world, "cat", "dog", "cat")
    world.call("DELETE", f"/v1/samples/{ids[0]}")

    def chosen(**params: str) -> List[str]:
        return [sample["sample_id"] for sample in world.call("GET", "/v1/samples", params=params).json()["samples"]]

    assert chosen(label="cat", state="learned") == [ids[2]]
    assert chosen(state="forgotten") == [ids[0]]
    assert chosen(label="bird") == []


def test_doubted_samples_can_be_listed_page_by_page(world: World) -> None:
    ids = teach(world, *"abcde")
    world.learner.doubted = (ids[0], ids[2], ids[3])

    def page(**params: str) -> SamplesPage:
        return SamplesPage.model_validate(world.call("GET", "/v1/samples", params={"doubted": "true", **params}).json())

    first = page(limit="2")
    assert ([sample.sample_id for sample in first.samples], first.next) == ([ids[0], ids[2]], ids[2])
    second = page(limit="2", cursor=ids[2])
    assert ([sample.sample_id for sample in second.samples], second.next) == ([ids[3]], None)
    assert [sample.sample_id for sample in page(label="c").samples] == [ids[2]]
    everything = SamplesPage.model_validate(world.call("GET", "/v1/samples").json()).samples
    assert [sample.doubted for sample in everything] == [True, False, True, True, False]
    assert world.call("GET", "/v1/memory").json()["doubted"] == 3
    assert "latentd_replay_doubted 3.0" in world.call("GET", "/metrics").text


def test_a_page_of_doubted_samples_is_one_command_of_the_journal_and_skips_what_is_gone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = teach(world, *"abcd")
    world.learner.doubted = (ids[0], "s00000777", ids[3])
    commands: List[Any] = []
    submit = world.parts.journal._submit

    def noted(command: Any) -> Any:
        commands.append(command)
        return submit(command)

    monkeypatch.setattr(world.parts.journal, "_submit", noted)
    answer = world.call("GET", "/v1/samples", params={"doubted": "true", "limit": "1000"})
    page = SamplesPage.model_validate(answer.json())
    assert ([sample.sample_id for sample in page.samples], page.next, len(commands)) == ([ids[0], ids[3]], None, 1)


@pytest.mark.parametrize(("doubted", "heard"), [(True, 1), (False, 0)])
def test_the_label_a_sample_has_already_reaches_the_learner_only_where_it_is_doubted(world: World, doubted: bool, heard: int) -> None:
    (sample_id,) = teach(world, "cat")
    world.learner.doubted = (sample_id,) if doubted else ()
    before = world.parts.journal.status().head_seq
    answer = world.call("PUT", f"/v1/samples/{sample_id}/label", json={"label": "cat"})
    assert (answer.status_code, Sample.model_validate(answer.json()).label) == (202, "cat")
    assert world.parts.journal.status().head_seq - before == heard
    assert [entry["samples"] for entry in world.call("GET", "/v1/classes").json()["classes"]] == [1]


def test_vouching_again_before_the_learner_has_heard_of_it_changes_nothing(world: World) -> None:
    (sample_id,) = teach(world, "cat")
    world.learner.doubted = (sample_id,)
    before = world.parts.journal.status().head_seq
    answers = [world.call("PUT", f"/v1/samples/{sample_id}/label", json={"label": "cat"}) for _ in range(3)]
    assert [(answer.status_code, answer.json()["state"]) for answer in answers] == [(202, "queued")] * 3
    assert world.parts.journal.status().head_seq - before == 1


@pytest.mark.parametrize("params", [{"limit": "0"}, {"limit": "1001"}, {"limit": "x"}, {"cursor": "../../etc"}, {"state": "happy"}])
def test_list_parameters_out_of_range_are_problems(world: World, params: Dict[str, str]) -> None:
    assert_problem(world.call("GET", "/v1/samples", params=params), 422, "unprocessable")


@pytest.mark.parametrize("sample_id", ["s99999999", "nonsense", "s1%2F..", "s\u0663"])
def test_a_sample_that_is_not_there_is_a_problem(world: World, sample_id: str) -> None:
    code = "not-found" if "/" in sample_id or "%2F" in sample_id else "sample-not-found"
    assert_problem(world.call("GET", f"/v1/samples/{sample_id}"), 404, code)


def test_a_correction_moves_the_sample_to_another_class(world: World) -> None:
    (sample_id,) = teach(world, "cat")
    answer = world.call("PUT", f"/v1/samples/{sample_id}/label", json={"label": "dog"})
    assert (answer.status_code, Sample.model_validate(answer.json()).label) == (202, "dog")
    assert {entry["name"]: entry["samples"] for entry in world.call("GET", "/v1/classes").json()["classes"]} == {"cat": 0, "dog": 1}


@pytest.mark.parametrize("body", [{"label": ""}, {"label": 5}, {}, [], None, {"label": "a\x00"}])
def test_a_correction_without_a_usable_label_is_refused(world: World, body: Any) -> None:
    (sample_id,) = teach(world, "cat")
    assert_problem(world.call("PUT", f"/v1/samples/{sample_id}/label", json=body), 422, "label-invalid")


def test_a_correction_of_the_wrong_type_or_size_is_refused(world: World) -> None:
    (sample_id,) = teach(world, "cat")
    url = f"/v1/samples/{sample_id}/label"
    assert_problem(world.call("PUT", url, content=b"dog", headers={"Content-Type": "text/plain"}), 415, "unsupported-media-type")
    assert_problem(world.call("PUT", url, content=b"{", headers={"Content-Type": "application/json"}), 400, "bad-request")
    assert_problem(world.call("PUT", url, json={"label": "x" * 100_000}), 413, "too-large")


def test_a_forgotten_sample_is_gone_from_its_class(world: World) -> None:
    ids = teach(world, "cat", "cat")
    answer = world.call("DELETE", f"/v1/samples/{ids[0]}")
    assert (answer.status_code, answer.json()["state"]) == (202, "forgotten")
    assert world.call("GET", "/v1/classes").json()["classes"][0]["samples"] == 1


def test_classes_are_listed_with_counts_and_accuracy(world: World) -> None:
    teach(world, "cat", "cat", "dog")
    classes = ClassesAnswer.model_validate(world.call("GET", "/v1/classes").json()).classes
    assert [(entry.name, entry.samples, entry.stored) for entry in classes] == [("cat", 2, 2), ("dog", 1, 1)]
    assert classes[0].prequential is not None and classes[0].prequential.value == 0.5
    assert classes[0].holdout_accuracy is not None and classes[0].holdout_accuracy.value is None


def test_a_class_is_created_once_and_found_again(world: World) -> None:
    assert [world.call("PUT", "/v1/classes/cat").status_code for _ in range(2)] == [201, 200]
    assert ClassEntry.model_validate(world.call("PUT", "/v1/classes/cat", json={}).json()).name == "cat"


def test_a_class_can_be_renamed_but_not_onto_another(world: World) -> None:
    teach(world, "cat", "dog")
    assert world.call("PUT", "/v1/classes/cat", json={"rename_to": "kitten"}).json()["name"] == "kitten"
    assert_problem(world.call("PUT", "/v1/classes/kitten", json={"rename_to": "dog"}), 409, "conflict")
    assert_problem(world.call("PUT", "/v1/classes/cat", json={"rename_to": "tiger"}), 404, "class-not-found")
    assert_problem(world.call("PUT", "/v1/classes/dog", json={"rename_to": ""}), 422, "label-invalid")
    assert_problem(world.call("PUT", "/v1/classes/dog", json={"rename_to": 1}), 422, "label-invalid")


@pytest.mark.parametrize("name", ["a%2Fb", "caf%C3%A9", "two%20words", "100%25"])
def test_names_with_any_printable_character_work_in_the_path(world: World, name: str) -> None:
    assert world.call("PUT", f"/v1/classes/{name}").status_code == 201
    assert world.call("DELETE", f"/v1/classes/{name}").status_code == 202
    assert_problem(world.call("DELETE", f"/v1/classes/{name}"), 404, "class-not-found")


@pytest.mark.parametrize("name", ["%00", "a%1Bb", "x" * 101, "unknown"])
def test_a_class_needs_a_usable_name(world: World, name: str) -> None:
    assert_problem(world.call("PUT", f"/v1/classes/{name}"), 422, "label-invalid")


def test_forgetting_a_class_forgets_its_samples(world: World) -> None:
    ids = teach(world, "cat", "dog")
    assert world.call("DELETE", "/v1/classes/cat").status_code == 202
    assert world.call("GET", f"/v1/samples/{ids[0]}").json()["state"] == "forgotten"
    assert [entry["name"] for entry in world.call("GET", "/v1/classes").json()["classes"]] == ["dog"]
