"""The memory plan: its figures are those of the arrays and modules that are made later, and the docs show the code's own table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from engines.test_export import exported
from latentd.config import BackboneConfig, Config, LearnConfig, MemoryConfig
from latentd.engines.int8 import calibrated
from latentd.engines.quantize_cpu import static
from latentd.learning.analytic import RidgeSums
from latentd.learning.blocks import RankedBlocks, UpperBlocks, parameter_bytes
from latentd.learning.sleep import SleepSettings
from latentd.service import memory_plan
from latentd.service.memory_plan import CLASSES, DINOV2_SMALL, NX_BYTES, MemoryPlan, Part
from tiny import DINOV2, pixels, vit

DOCS = Path(__file__).resolve().parents[2] / "docs" / "memory.md"


def planned(plan: MemoryPlan) -> dict[str, int]:
    return {part.name: part.planned_bytes for part in plan.parts}


@pytest.mark.parametrize("split", [1, 2])
def test_blocks_take_what_the_modules_take(split: int) -> None:
    base = UpperBlocks(DINOV2, split)
    ranked = RankedBlocks(base, 3, 0)
    learned = sum(parameter.numel() * 4 for _, parameter in ranked.learned())
    assert memory_plan.upper_bytes(DINOV2, split) == parameter_bytes([base])
    blocks = RankedBlocks(base, 1, seed=0)
    blocks(torch.ones(1, 5, DINOV2.width)).sum().backward()
    assert memory_plan.room_bytes(DINOV2, split) == blocks.room_bytes()
    assert memory_plan.learned_bytes(DINOV2, split, 3) == learned


def kept_bytes(blocks: RankedBlocks, latents: int) -> int:
    """What autograd keeps of a pass through the blocks, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in blocks.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        answer = blocks(torch.ones(latents, 257, DINOV2_SMALL.width))
    assert answer.requires_grad
    return sum(kept.values())


def test_a_latent_in_the_last_block_takes_what_autograd_keeps_of_it() -> None:
    blocks = RankedBlocks(UpperBlocks(DINOV2_SMALL, DINOV2_SMALL.depth - 1), 16, seed=0)
    kept_bytes(blocks, 1)  # widens the matrices, which stay
    two_more = kept_bytes(blocks, 4) - kept_bytes(blocks, 2)
    assert 2 * memory_plan.class_token_bytes(DINOV2_SMALL, 257) == pytest.approx(two_more, rel=0.05)


@pytest.mark.parametrize(("split", "told", "at_once"), [(11, 0, 16), (10, 0, 4), (9, 0, 4), (11, 2, 2), (9, 32, 32)])
def test_as_many_latents_at_once_as_pay(split: int, told: int, at_once: int) -> None:
    def activations(microbatch: int) -> int:
        config = Config(backbone=BackboneConfig(split=split), learn=LearnConfig(microbatch=microbatch))
        return planned(memory_plan.plan_for(config, DINOV2_SMALL, "onnxruntime-cpu"))["activations"]

    assert activations(told) == activations(at_once)
    assert SleepSettings.of(LearnConfig(microbatch=told), DINOV2_SMALL.depth - split).microbatch == at_once


def test_the_frozen_stage_takes_what_the_module_takes() -> None:
    assert memory_plan.weights_bytes(DINOV2, 0, DINOV2.depth) == sum(parameter.numel() * 4 for parameter in vit().parameters())


def test_sums_take_what_the_arrays_take() -> None:
    sums = RidgeSums(24)
    sums.add(np.ones((CLASSES, 24), np.float32), range(CLASSES))
    assert memory_plan.sums_bytes(24) == sums.gram.nbytes + sums.sums.nbytes + sums._block.nbytes


def test_the_head_alone_has_no_blocks_and_no_cuda_on_a_cpu() -> None:
    plan = memory_plan.plan_for(Config(backbone=BackboneConfig(split=0)), DINOV2_SMALL, "onnxruntime-cpu")
    found = planned(plan)
    assert not {"CUDA", "blocks that learn", "activations", "building a plan", "samples with tokens"} & set(found)
    assert found["replay memory"] == LearnConfig().replay_bytes
    assert found["sums"] == memory_plan.sums_bytes(4 * 384)
    assert plan.needs_bytes()["sleep"] == 0


def test_a_plan_of_half_precision_has_half_the_weights() -> None:
    whole, half = (planned(memory_plan.plan_for(Config(), DINOV2_SMALL, name)) for name in ("tensorrt-fp32", "tensorrt-fp16"))
    assert half["engine: weights"] * 2 == whole["engine: weights"]


@pytest.mark.parametrize("split", [2, DINOV2.depth])
def test_int8_takes_what_its_graph_holds(tmp_path: Path, split: int) -> None:
    graph = exported(tmp_path, DINOV2, split=split).read_bytes()
    model = onnx.load_from_string(static(graph, calibrated(graph, pixels(1)), tokens=False))
    held = sum(onnx.numpy_helper.to_array(each).nbytes for each in model.graph.initializer)
    assert memory_plan.int8_bytes(DINOV2) == pytest.approx(held, rel=0.1)
    assert memory_plan.int8_bytes(DINOV2) < 0.4 * memory_plan.weights_bytes(DINOV2, 0, DINOV2.depth)


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_int8_on_the_cpu_runs_one_image_a_lane_and_lanes_have_a_session_more(lanes: int) -> None:
    found = planned(memory_plan.plan_for(Config(), DINOV2_SMALL, "onnxruntime-cpu-int8-static", lanes))
    whole = planned(memory_plan.plan_for(Config(), DINOV2_SMALL, "onnxruntime-cpu", lanes))
    assert found["engine: weights"] == memory_plan.int8_bytes(DINOV2_SMALL) * min(lanes, 2)
    assert found["engine: activations"] * Config().engine.max_batch == whole["engine: activations"] * lanes


def test_a_smaller_micro_batch_needs_less_while_it_sleeps() -> None:
    config = Config(backbone=BackboneConfig(split=9))
    needs = [
        memory_plan.plan_for(replace(config, learn=LearnConfig(microbatch=count)), DINOV2_SMALL, "onnxruntime-cpu").needs_bytes()["sleep"]
        for count in (16, 8)
    ]
    assert needs[0] > 1.8 * needs[1]


def test_of_learning_sleeping_and_building_only_the_largest_counts() -> None:
    parts = [Part("a", 100, "always", "counted"), Part("b", 7, "requests", "limit"), Part("c", 20, "learning", "counted")]
    parts += [Part("d", 30, "sleeping", "counted"), Part("e", 25, "sleeping", "counted"), Part("f", 50, "building", "estimate")]
    plan = MemoryPlan((*parts, Part("g", 1000, "system", "limit")))
    assert (plan.planned_bytes, plan.reserve_bytes) == (162, 1000)
    assert plan.needs_bytes() == {"learn": 20, "sleep": 55}


def test_the_defaults_fit_into_a_xavier_nx_even_while_a_plan_is_built() -> None:
    for plan in memory_plan.documented().values():
        assert plan.planned_bytes + plan.reserve_bytes < NX_BYTES


def test_what_is_left_to_the_system_is_not_latentds() -> None:
    more = Config(memory=MemoryConfig(reserve_bytes=1 << 30))
    plans = [memory_plan.plan_for(config, DINOV2_SMALL, "eager-cpu") for config in (Config(), more)]
    assert plans[0].planned_bytes == plans[1].planned_bytes
    assert plans[1].reserve_bytes == 1 << 30


def test_the_docs_show_the_codes_own_figures() -> None:
    table = memory_plan.table(memory_plan.documented())
    assert table in DOCS.read_text(encoding="utf-8"), "write memory_plan.table(…) into docs/memory.md"
