from __future__ import annotations

from typing import Any

import pytest

from npd.config import PlacementConfig, ScheduleConfig
from npd.errors import UserError
from npd.generations.workers import visible_gpus
from npd.placement import Placement, WorkerDevices, assign_devices, cores


def placed(gpus: int = 0, cpus: int = 16, processes: int = 1, lead: float = 1.0, **options: Any) -> Placement:
    return assign_devices(PlacementConfig(**options), ScheduleConfig(lead=lead), processes=processes, gpus=gpus, cpus=cpus)


def cuda(*numbers: int) -> list[str]:
    return [f"cuda:{n}" for n in numbers]


def test_two_cores_share_the_work():
    p = placed(cpus=2)
    assert (p.train, p.workers, p.turns, p.lead, p.why) == (["cpu"], [WorkerDevices("cpu", "cpu")], False, 1.0, "")
    assert (p.train_threads, p.rollout_threads, p.teacher_threads) == (1, 1, 1)
    assert not p.shared_gpu


def test_one_core_takes_turns():
    p = placed(cpus=1)
    assert (p.workers, p.turns, p.lead) == ([], True, 0.0)
    assert "one CPU core" in p.why
    assert not p.shared_gpu
    assert p.train_threads is p.rollout_threads is None


def test_one_gpu_is_shared_in_turns():
    p = placed(gpus=1)
    assert (p.train, p.workers, p.turns, p.lead, p.shared_gpu) == (cuda(0), [], True, 0.0, True)
    assert (p.rollout, p.teacher) == ("cuda:0", "cuda:0")
    assert "share cuda:0" in p.why


def test_turns_that_were_asked_for_need_no_reason():
    for gpus in (0, 1, 2):
        p = placed(gpus=gpus, lead=0.0)
        assert (p.turns, p.lead, p.workers, p.why) == (True, 0.0, [], "")


@pytest.mark.parametrize("gpus", [2, 8])
def test_every_other_gpu_generates(gpus):
    p = placed(gpus=gpus, cpus=32, lead=2.5)
    assert (p.train, p.turns, p.lead, p.why, p.shared_gpu) == (cuda(0), False, 2.5, "", False)
    assert p.workers == [WorkerDevices(device, device) for device in cuda(*range(1, gpus))]
    assert p.train_threads is None
    assert p.rollout_threads == p.teacher_threads == 32 // (gpus - 1)


def test_a_producer_of_this_machine_is_not_named():
    with pytest.raises(UserError, match=r"names the producer 'workers', .* Name devices, or leave it auto"):
        placed(gpus=0, rollout="workers")


def test_data_parallel_training_on_some_gpus_leaves_the_others():
    p = placed(gpus=4, processes=2)
    assert (p.train, p.turns) == (cuda(0, 1), False)
    assert [worker.rollout for worker in p.workers] == cuda(2, 3)


def test_data_parallel_training_on_all_gpus_takes_turns():
    p = placed(gpus=4, processes=4)
    assert (p.train, p.workers, p.turns, p.lead, p.shared_gpu) == (cuda(0, 1, 2, 3), [], True, 0.0, False)
    assert "cuda:0" in p.why


def test_devices_as_told():
    p = placed(gpus=4, train="cuda:3", rollout=cuda(0, 1), teacher="cuda:2")
    assert (p.train, p.workers) == (cuda(3), [WorkerDevices("cuda:0", "cuda:2"), WorkerDevices("cuda:1", "cuda:2")])
    p = placed(gpus=4, train="cuda:3", rollout=cuda(0, 1), teacher=["cuda:2", "cpu"])
    assert p.workers == [WorkerDevices("cuda:0", "cuda:2"), WorkerDevices("cuda:1", "cpu")]
    p = placed(gpus=2, train="cuda:1")
    assert [worker.rollout for worker in p.workers] == cuda(0)
    p = placed(gpus=1, rollout="cpu")
    assert (p.workers, p.turns, p.train_threads) == ([WorkerDevices("cpu", "cpu")], False, None)
    p = placed(gpus=2, train="cpu", cpus=8)
    assert ([worker.rollout for worker in p.workers], p.train_threads, p.rollout_threads) == (cuda(0, 1), 4, 2)


@pytest.mark.parametrize("options", [{"teacher": "cuda:0"}, {"rollout": "cuda:0"}, {"rollout": cuda(1, 0)}])
def test_any_use_of_the_training_gpu_means_turns(options):
    p = placed(gpus=2, **options)
    assert (p.turns, p.lead, p.workers, p.shared_gpu) == (True, 0.0, [], True)
    assert "cuda:0" in p.why


@pytest.mark.parametrize("gpus", [0, 1, 2])
@pytest.mark.parametrize("lead", [0.0, 1.0])
def test_generations_made_elsewhere_need_nothing_here(gpus, lead):
    p = placed(gpus=gpus, cpus=1, lead=lead, rollout="external")
    assert (p.workers, p.turns, p.lead, p.why, p.shared_gpu) == ([], False, lead, "", False)
    assert p.train_threads is None


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"train": "gpu"}, "placement.train"),
        ({"train": "cuda"}, "placement.train"),
        ({"train": cuda(0, 1)}, "placement.train"),
        ({"rollout": "cuda:2"}, "placement.rollout"),
        ({"rollout": ["cuda:1", "mps"]}, "placement.rollout"),
        ({"rollout": ["external"]}, "placement.rollout: external"),
        ({"teacher": "cuda:-1"}, "placement.teacher"),
        ({"teacher": cuda(0, 1), "rollout": "cuda:1"}, "placement.teacher"),
        ({"train": "cuda:0", "processes": 2}, "placement.train"),
    ],
)
def test_what_does_not_fit_is_named(options, name):
    with pytest.raises(UserError, match=name):
        placed(gpus=2, **options)


def test_a_machine_without_gpus_says_so():
    with pytest.raises(UserError, match=r"placement\.train names cuda:0, but this machine has no GPUs"):
        placed(train="cuda:0")


def test_threads_as_told():
    p = placed(cpus=8, train_threads=6)
    assert (p.train_threads, p.rollout_threads, p.teacher_threads) == (6, 2, 2)
    p = placed(cpus=8, train_threads=8)
    assert (p.train_threads, p.rollout_threads) == (8, 1)
    p = placed(cpus=8, rollout_threads=3, teacher_threads=5)
    assert (p.train_threads, p.rollout_threads, p.teacher_threads) == (4, 3, 5)
    p = placed(cpus=9, rollout=["cpu", "cpu"])
    assert (p.train_threads, p.rollout_threads) == (5, 2)
    assert placed(lead=0.0, train_threads=2).train_threads is None  # nothing runs beside the trainer


def test_threads_fit_the_cores():
    for cpus in range(2, 20):
        p = placed(cpus=cpus)
        assert p.train_threads
        assert p.rollout_threads
        assert p.train_threads + p.rollout_threads * len(p.workers) == cpus


def test_this_machine():
    assert cores() >= 1
    assert assign_devices(PlacementConfig(train="cpu", rollout="cpu", teacher="cpu"), ScheduleConfig()).train == ["cpu"]


def test_processes_cannot_choose_their_gpus():
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        assign_devices(PlacementConfig(train=["cuda:2", "cuda:3"]), ScheduleConfig(), processes=2, gpus=4, cpus=8)
    with pytest.raises(UserError, match="has 2 GPUs"):
        assign_devices(PlacementConfig(), ScheduleConfig(), processes=4, gpus=2, cpus=8)


def test_generation_zero_has_all_cores():
    """The trainer waits for it."""
    placed = assign_devices(PlacementConfig(), ScheduleConfig(), gpus=0, cpus=8)
    assert (placed.train_threads, placed.rollout_threads, placed.first_threads) == (4, 4, 8)


@pytest.mark.parametrize(
    ("gpus", "engines"),
    [(3, [("cuda:1", "cuda:2")]), (8, [("cuda:1", "cuda:2"), ("cuda:3", "cuda:4"), ("cuda:5", "cuda:6")])],
)
def test_an_engine_may_take_several_gpus(gpus, engines):
    p = assign_devices(PlacementConfig(), ScheduleConfig(), gpus=gpus, cpus=16, engine_gpus=2)
    assert p.workers == [WorkerDevices(first, first, (second,)) for first, second in engines]
    assert p.workers[0].gpus == ["cuda:1", "cuda:2"]


def test_gpus_named_for_engines_are_grouped_in_order():
    config = PlacementConfig(rollout=["cuda:2", "cuda:0", "cuda:3", "cuda:4"], train="cuda:1", teacher="cuda:5")
    p = assign_devices(config, ScheduleConfig(), gpus=6, cpus=16, engine_gpus=2)
    assert p.workers == [WorkerDevices("cuda:2", "cuda:5", ("cuda:0",)), WorkerDevices("cuda:3", "cuda:5", ("cuda:4",))]
    assert p.workers[0].gpus == ["cuda:2", "cuda:0", "cuda:5"]


def test_a_trainer_on_a_further_gpu_of_an_engine_takes_turns_with_it():
    p = assign_devices(PlacementConfig(rollout=["cuda:1", "cuda:0"]), ScheduleConfig(), gpus=2, cpus=16, engine_gpus=2)
    assert p.turns
    assert "share cuda:0" in p.why


def test_too_few_gpus_for_an_engine():
    with pytest.raises(UserError, match="asks for 2 GPUs an engine, but only 1 of 2 are there"):
        assign_devices(PlacementConfig(), ScheduleConfig(), gpus=2, cpus=16, engine_gpus=2)
    with pytest.raises(UserError, match="name a multiple"):
        assign_devices(
            PlacementConfig(rollout=["cuda:1", "cuda:2", "cuda:3"]), ScheduleConfig(), gpus=4, cpus=16, engine_gpus=2
        )


def test_an_engine_in_the_trainers_process_has_the_first_gpu():
    in_turns = assign_devices(PlacementConfig(), ScheduleConfig(lead=0.0), gpus=2, cpus=16, engine_first=True)
    assert (in_turns.rollout, in_turns.shared_gpu) == ("cuda:0", True)
    beside = assign_devices(PlacementConfig(), ScheduleConfig(), gpus=2, cpus=16, engine_first=True)
    assert beside.workers == [WorkerDevices("cuda:1", "cuda:1")]


@pytest.mark.parametrize(
    ("mine", "devices", "theirs"),
    [
        (None, ["cuda:2", "cuda:0"], "2,0"),
        ("", ["cuda:1"], "1"),
        ("4,5,7", ["cuda:2", "cuda:0"], "7,4"),
        ("GPU-a,GPU-b", ["cuda:1"], "GPU-b"),
    ],
)
def test_a_job_sees_the_gpus_that_it_uses(monkeypatch, mine, devices, theirs):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if mine is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mine)
    assert visible_gpus(devices) == {"CUDA_VISIBLE_DEVICES": theirs}
    assert visible_gpus([]) == {}
