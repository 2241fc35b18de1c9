"""What is refused before any weights are loaded."""

from __future__ import annotations

import pytest

from npd.config import PlacementConfig, ScheduleConfig, load_config
from npd.errors import UserError
from npd.placement import Placement, place
from npd.setup import check_engine_place


def placed(lead: float, **options) -> Placement:
    return place(PlacementConfig(**options), ScheduleConfig(lead=lead), gpus=4, cpus=16)


def test_vllm_in_the_trainers_process_needs_it_to_itself(make_tree):
    config = load_config(make_tree(rollout={"engine": "vllm"}))
    two = load_config(make_tree(rollout={"engine": "vllm", "vllm": {"tensor_parallel_size": 2}}))
    check_engine_place(config, placed(0.0, rollout="cuda:0"), 1)
    check_engine_place(two, placed(1.0), 1)  # beside the trainer it may have whatever it wants
    with pytest.raises(UserError, match="2 trainers, 1 GPUs an engine, the first on cuda:0"):
        check_engine_place(config, placed(0.0, rollout="cuda:0"), 2)
    with pytest.raises(UserError, match="1 trainers, 2 GPUs an engine"):
        check_engine_place(two, placed(0.0, rollout="cuda:0"), 1)
    with pytest.raises(UserError, match="the first on cuda:2"):
        check_engine_place(config, placed(0.0, rollout="cuda:2"), 1)


def test_options_of_an_engine_that_is_not_used(make_tree):
    with pytest.raises(UserError, match="engine is transformers"):
        load_config(make_tree(rollout={"vllm": {"seed": 1}}))
    with pytest.raises(UserError, match="temperatures up to 2"):
        load_config(make_tree(rollout={"engine": "vllm", "temperature": 2.5}))
