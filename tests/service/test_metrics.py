from __future__ import annotations

from typing import Dict, List, Optional, Tuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from latentd.energy.board import Board, Clock
from latentd.energy.meters.reading import Reading
from latentd.service.metrics import Metrics
from service.fakes import World, picture

NAMES = {
    "latentd_build_info",
    "latentd_http_requests_total",
    "latentd_http_request_duration_seconds",
    "latentd_stage_duration_seconds",
    "latentd_batch_images",
    "latentd_queue_depth",
    "latentd_queue_capacity",
    "latentd_queue_rejected_total",
    "latentd_learn_samples_total",
    "latentd_learn_lag_seconds",
    "latentd_learn_steps_total",
    "latentd_learn_step_duration_seconds",
    "latentd_learner_state",
    "latentd_replay_slots",
    "latentd_replay_used",
    "latentd_replay_bytes",
    "latentd_replay_doubted",
    "latentd_replay_evictions_total",
    "latentd_version_number",
    "latentd_versions_published_total",
    "latentd_publish_rejected_total",
    "latentd_accuracy_ratio",
    "latentd_accuracy_samples",
    "latentd_drifting_classes",
    "latentd_energy_joules_total",
    "latentd_energy_rail_joules_total",
    "latentd_energy_meter_up",
    "latentd_energy_gap_seconds_total",
    "latentd_temperature_celsius",
    "latentd_journal_fsync_duration_seconds",
    "latentd_state_bytes",
    "latentd_memory_available_bytes",
    "latentd_memory_planned_bytes",
    "latentd_learner_waited_seconds_total",
    "latentd_clock_hertz",
    "latentd_throttled",
    "latentd_power_mode_info",
}


def scraped(world: World) -> str:
    answer = world.call("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return answer.text


def sample_names(text: str) -> set[str]:
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


def test_every_metric_of_the_contract_is_there_under_its_name(world: World) -> None:
    world.learn((picture(), "cat"))
    world.parts.metrics.refused("inference", 1)
    world.parts.metrics.published("learned")
    world.parts.metrics.rejected("holdout")
    world.parts.board = lambda: Board("MODE_15W_6CORE", 6, {"cpu": Clock(1.4e9, 1.4e9)}, None, {"thermal": ("cpu at 1",)}, None)
    names = sample_names(scraped(world))
    documented = {f"{name.rsplit('_total', 1)[0]}_total" if name.endswith("_total") else name for name in NAMES}
    families = {line.split()[2] for line in scraped(world).splitlines() if line.startswith("# TYPE")}
    missing = {name for name in documented if name not in names and name not in families and f"{name}_count" not in names}
    assert missing == set()


def test_there_is_no_metric_beyond_the_contract(world: World) -> None:
    families = {line.split()[2] for line in scraped(world).splitlines() if line.startswith("# TYPE")}
    assert families <= NAMES


def test_routes_are_templates_and_unknown_ones_share_a_label(world: World) -> None:
    for path in ("/v1/samples/s1", "/v1/samples/s2", "/nothing", "/something", "/v1/classes/cat"):
        world.call("GET", path)
    world.call("BREW", "/v1/status")
    world.call("HEAD", "/livez")
    routes: Dict[str, List[str]] = {}
    for family in text_string_to_metric_families(scraped(world)):
        for sample in family.samples:
            if sample.name == "latentd_http_requests_total":
                routes.setdefault(sample.labels["route"], []).append(f"{sample.labels['method']} {sample.labels['code']} {sample.value:g}")
    assert routes["/v1/samples/{sample_id}"] == ["GET 404 2"]
    assert routes["unknown"] == ["GET 404 2"]
    assert routes["/v1/status"] == ["other 405 1"]
    assert routes["/livez"] == ["HEAD 200 1"]
    assert routes["/v1/classes/{name:path}"] == ["GET 405 1"]


def test_class_names_and_sample_ids_never_become_labels(world: World) -> None:
    world.learn((picture(), "secret class"))
    assert "secret" not in scraped(world)


def test_drifting_classes_are_counted_and_not_named(world: World) -> None:
    assert "latentd_drifting_classes 0.0" in scraped(world)
    world.learn((picture(0), "cat"), (picture(1), "dog"))
    assert "latentd_drifting_classes 1.0" in scraped(world)


def test_what_is_unknown_is_left_out_and_never_zero(world: World) -> None:
    text = scraped(world)
    assert 'latentd_accuracy_ratio{kind="prequential"} 0.75' in text
    assert 'latentd_accuracy_ratio{kind="holdout"}' not in text
    assert 'latentd_temperature_celsius{sensor="CPU-therm"} 41.5' in text
    assert "GPU-therm" not in text
    assert "latentd_energy_joules_total{" not in text
    assert 'latentd_energy_meter_up{source="none"} 0.0' in text


@pytest.mark.parametrize(("what", "line"), [(None, None), ((), "0.0"), (("VDD_IN",), "1.0")])
def test_throttling_that_nothing_tells_of_is_left_out(world: World, what: Optional[Tuple[str, ...]], line: Optional[str]) -> None:
    world.parts.board = lambda: Board(throttled={"thermal": (), "over-current": what})
    text = scraped(world)
    assert 'latentd_throttled{cause="thermal"} 0.0' in text
    assert ('latentd_throttled{cause="over-current"}' in text) == (line is not None)
    assert line is None or f'latentd_throttled{{cause="over-current"}} {line}' in text


def test_a_meter_that_fails_is_down_under_its_own_name(world: World) -> None:
    ledger = world.parts.ledger
    ledger.serving("ina3221", "everything", {})
    ledger.add(Reading("ina3221", "measured", 1e6, power_w=5.0))
    ledger.unavailable("the sensor is gone", {})
    assert 'latentd_energy_meter_up{source="ina3221"} 0.0' in scraped(world)
    assert ledger.report().meter.source is None


def test_stages_and_batches_are_timed(world: World) -> None:
    world.classify(picture(0), picture(1))
    text = scraped(world)
    for stage in ("queue", "decode"):
        assert f'latentd_stage_duration_seconds_count{{stage="{stage}"}} 2.0' in text
    assert 'latentd_stage_duration_seconds_count{stage="adaptive"} 1.0' in text
    assert "latentd_batch_images_sum 2.0" in text


def test_the_state_of_the_learner_is_one_hot(world: World) -> None:
    world.learner.state = "failed"
    states = {
        line.split('"')[1]: float(line.split()[-1]) for line in scraped(world).splitlines() if line.startswith("latentd_learner_state{")
    }
    assert [state for state, value in states.items() if value] == ["failed"]


@pytest.mark.parametrize("count", [1, 3])
def test_two_daemons_in_one_process_do_not_share_counters(count: int) -> None:
    one, other = Metrics(), Metrics()
    for _ in range(count):
        one.step(0.01)
    assert f"latentd_learn_steps_total {count}.0".encode() in one.text()
    assert b"latentd_learn_steps_total 0.0" in other.text()
