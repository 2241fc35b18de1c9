"""What is refused before any weights are loaded."""

from __future__ import annotations

import pytest
import torch

from npd.config import PlacementConfig, ScheduleConfig, load_config
from npd.errors import UserError
from npd.placement import Placement, assign_devices, check_engine, resolve_placement
from npd.preflight import DISTILL, prepare

pytestmark = pytest.mark.usefixtures("vllm_is_there")


def placed(lead: float, size: int = 1, **options) -> Placement:
    return assign_devices(
        PlacementConfig(**options), ScheduleConfig(lead=lead), gpus=4, cpus=16, engine_gpus=size, engine_first=True
    )


def test_the_engine_is_wanted_where_generations_are_made(make_tree, monkeypatch):
    monkeypatch.setattr("npd.rollout.vllm.VllmEngine.lacks", classmethod(lambda cls, config: "vllm is missing."))
    with pytest.raises(UserError, match="vllm is missing"):
        prepare(load_config(make_tree(rollout={"engine": "vllm"})), "distill")
    elsewhere = load_config(make_tree(rollout={"engine": "vllm"}, placement={"rollout": "external"}))
    notes = prepare(elsewhere, "distill").notes
    assert "Not needed in this environment, but where generations are made (external): vllm is missing." in notes
    # Options are looked at all the same.
    with pytest.raises(UserError, match="temperatures up to 2"):
        prepare(
            load_config(make_tree(rollout={"engine": "vllm", "temperature": 2.5}, placement={"rollout": "external"})),
            "distill",
        )


def test_a_ray_cluster_of_this_machine_has_this_environment(make_tree, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr("npd.rollout.vllm.VllmEngine.lacks", classmethod(lambda cls, config: "vllm is missing."))
    tree = make_tree(rollout={"engine": "vllm"}, placement={"rollout": "ray"})
    with pytest.raises(UserError, match="vllm is missing"):
        prepare(load_config(tree), "distill")
    there = make_tree(rollout={"engine": "vllm"}, placement={"rollout": "ray", "ray": {"address": "head:6379"}})
    assert any("(ray): vllm is missing." in note for note in prepare(load_config(there), "distill").notes)


def test_vllm_in_the_trainers_process_needs_it_to_itself(make_tree):
    config = load_config(make_tree(rollout={"engine": "vllm"}))
    two = load_config(make_tree(rollout={"engine": "vllm", "vllm": {"tensor_parallel_size": 2}}))
    check_engine(config, placed(0.0), 1, trains=True)
    check_engine(two, placed(1.0, 2), 1, trains=True)  # beside the trainer it may have whatever it wants
    check_engine(two, placed(0.0, 2), 1, trains=False)  # as it may where nobody trains
    with pytest.raises(UserError, match="2 trainers, 1 GPUs an engine, the first on cuda:0"):
        check_engine(
            config, assign_devices(PlacementConfig(), ScheduleConfig(lead=0.0), processes=2, gpus=2, cpus=4), 2, trains=True
        )
    with pytest.raises(UserError, match="1 trainers, 2 GPUs an engine"):
        check_engine(two, placed(0.0, 2), 1, trains=True)
    with pytest.raises(UserError, match="the first on cuda:2"):
        check_engine(config, placed(0.0, rollout="cuda:2"), 1, trains=True)


def test_vllm_on_the_cpu_of_a_machine_with_gpus(make_tree, monkeypatch):
    config = load_config(make_tree(rollout={"engine": "vllm"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for lead in (0.0, 1.0):
        with pytest.raises(UserError, match="takes a GPU where there is one"):
            check_engine(config, placed(lead, rollout="cpu", train="cuda:0"), 1, trains=True)


def test_commands_that_do_not_roll_out_need_no_gpus_for_it(make_tree):
    """`npd eval` and `npd sft` on a machine too small for the engine."""
    config = load_config(make_tree(rollout={"engine": "vllm", "vllm": {"tensor_parallel_size": 2}}))
    assert resolve_placement(config, take_turns=True, generates=False).rollout == "cpu"
    with pytest.raises(UserError, match="asks for 2 GPUs an engine"):
        resolve_placement(config, take_turns=True)


def test_options_of_an_engine_that_is_not_used(make_tree):
    with pytest.raises(UserError, match="engine is transformers"):
        load_config(make_tree(rollout={"vllm": {"seed": 1}}))
    with pytest.raises(UserError, match="temperatures up to 2"):
        prepare(load_config(make_tree(rollout={"engine": "vllm", "temperature": 2.5})), "distill")


def test_a_machine_without_a_compiler_is_told_before_anything_is_loaded(make_tree, monkeypatch):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    prepare(load_config(make_tree()), "distill")
    with pytest.raises(UserError, match=r"training.compile is true, but .*No working C\+\+ compiler.*set training.compile"):
        prepare(load_config(make_tree(training={"compile": True})), "distill")


@pytest.mark.parametrize(("loss", "noted"), [
    ({}, False), ({"divergence": "reverse_kl"}, True), ({"divergence": "reverse_kl", "top_k_mass": "tail"}, False),
    ({"divergence": "skewed_forward_kl"}, False), ({"divergence": "jensen_shannon", "options": {"beta": 0.2}}, True),
    ({"divergence": "reverse_kl", "kd_weight": 0.0}, False),
])  # fmt: skip
def test_a_divergence_that_takes_the_rest_for_impossible_is_noted(make_tree, loss, noted):
    setup = prepare(load_config(make_tree(loss=loss)), DISTILL)
    assert any("takes for impossible" in note for note in setup.notes) is noted
