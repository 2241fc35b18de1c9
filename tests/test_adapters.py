"""Models with adapters: merged, gone on with, trained afresh on merged weights, and written so that peft loads them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from conftest import save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import npd
from npd.config import ModelConfig, StudentConfig, load_config
from npd.errors import UserError
from npd.models import check_adapter, load_model, load_model_config, with_adapters
from npd.models import save_model as write_model
from npd.models.reading import base_model
from npd.preflight import DISTILL, prepare
from npd.store import Store, sha256
from npd.train.trainer import Trainer

EXAMPLES = Path(__file__).parent.parent / "examples"
IDS = torch.arange(4, 20)[None]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def save_adapter(path: Path, base: Path, **options: Any) -> Path:
    """An adapter that does something, as peft writes it."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    kinds: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]} | options
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **kinds))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    wrapped.save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("adapters") / "base", seed=2, tied=False)


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory, base_dir) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapters") / "adapter", base_dir)


def by_peft(base: Path, adapter: Path) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)))


def logits(model: Any) -> torch.Tensor:
    """In float64, so that what differs is the weights, and not how a processor sums up."""
    if not isinstance(model, torch.nn.Module):
        model = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(input_ids=IDS).logits


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_and_its_adapter_are_what_peft_makes_of_them(tmp_path, base_dir, kind):
    """Merged, as a teacher or a student that merges has it; and gone on with, where that can be."""
    adapter = save_adapter(tmp_path / "a", base_dir, **KINDS[kind])
    known = load_model_config(ModelConfig(model=str(base_dir)))
    theirs = by_peft(base_dir, adapter)
    for config in (
        ModelConfig(model=str(base_dir), adapter=str(adapter)),
        StudentConfig(model=str(base_dir), adapter=str(adapter), adapter_mode="merge"),
    ):
        assert check_adapter(config, known) == []
        model = load_model(config, trained=isinstance(config, StudentConfig))
        close(logits(model), theirs)
        assert not hasattr(model, "peft_config")
        assert (logits(base_dir) - theirs).abs().max() > 0.01
    goes_on = StudentConfig(model=str(base_dir), adapter=str(adapter))
    if kind == "modules to save":
        with pytest.raises(UserError, match=r"has modules_to_save, and training does not .*adapter_mode: merge"):
            check_adapter(goes_on, known)
        return
    check_adapter(goes_on, known)
    student: Any = with_adapters(load_model(goes_on, trained=True), goes_on)
    close(logits(student), theirs)
    assert {name.split(".")[-2] for name, p in student.named_parameters() if p.requires_grad} == {"default"}
    write_model(student, npd.models.load_tokenizer(goes_on), tmp_path / "merged")
    close(logits(tmp_path / "merged"), theirs)
    close(by_peft(base_dir, tmp_path / "merged/adapter"), theirs)


def spoilt(adapter: Path, kind: str) -> None:
    """Make an adapter one that must be refused."""
    file, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    options = json.loads(file.read_text())
    if kind == "pickle":
        torch.save(load_file(weights), adapter / "adapter_model.bin")
        weights.unlink()
    elif kind == "none":
        file.unlink()
    elif kind == "shape":
        save_file({name: value[..., :-1].contiguous() for name, value in load_file(weights).items()}, weights)
    elif kind == "missing":
        save_file(dict(list(load_file(weights).items())[2:]), weights)
    elif kind == "infinite":
        tensors = load_file(weights)
        next(iter(tensors.values())).fill_(float("inf"))
        save_file(tensors, weights)
    else:
        new: dict[str, Any] = {"kind": {"peft_type": "LOHA"}, "modules": {"target_modules": ["c_attn"]}}
        new |= {"begun": {"init_lora_weights": "pissa"}, "biases": {"lora_bias": True}}
        new |= {"layers": {"layer_replication": [[0, 1], [0, 2]]}, "slow": {"target_modules": r"(\w*\.?)*x!"}}
        file.write_text(json.dumps(options | new[kind]))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickle", r"pickled file \(adapter_model.bin\), which npd does not load"),
        ("none", r"holds no adapter \(no adapter_config.json\)"),
        ("shape", r"does not belong on .*: 12 of its tensors are missing, left over or of another shape"),
        ("missing", r"does not belong on .*: 2 of its tensors .*lora_A.weight is missing"),
        ("kind", "is a LOHA adapter; npd takes LoRA adapters"),
        ("modules", "cannot be put on .*c_attn"),
        ("begun", "init_lora_weights 'pissa', which changes the weights below it"),
        ("layers", "has layer_replication, which npd does not know"),
        ("biases", "has lora_bias, which npd does not know"),
        ("slow", r"The adapter's pattern .* takes more than"),
    ],
)
def test_an_adapter_that_does_not_belong_is_refused_at_the_start(tmp_path, make_tree, base_dir, kind, message):
    adapter = save_adapter(tmp_path / "a", base_dir)
    spoilt(adapter, kind)
    for sections in (
        {"student": {"model": str(base_dir), "adapter": str(adapter)}},
        {"teacher": {"model": str(base_dir), "adapter": str(adapter)}},
    ):
        with pytest.raises(UserError, match=message):
            prepare(load_config(make_tree(**sections)), DISTILL)


def test_values_that_are_not_finite_are_refused(tmp_path, base_dir):
    adapter = save_adapter(tmp_path / "a", base_dir)
    spoilt(adapter, "infinite")
    config = StudentConfig(model=str(base_dir), adapter=str(adapter))
    with pytest.raises(UserError, match=r"is damaged: .* has values that are not finite"):
        with_adapters(load_model(config, trained=True), config)
    with pytest.raises(UserError, match="cannot be put on"):
        load_model(ModelConfig(model=str(base_dir), adapter=str(adapter)))


@pytest.mark.parametrize(
    ("lora", "differs"),
    [
        ({"r": 4, "alpha": 8, "target_modules": ["down_proj", "q_proj", "v_proj"], "dropout": 0.1}, None),
        ({"r": 8, "alpha": 8, "target_modules": ["down_proj", "q_proj", "v_proj"]}, "r or target_modules differ"),
        ({"r": 4, "alpha": 8}, "r or target_modules differ"),
        ({"r": 4, "alpha": 16, "target_modules": ["down_proj", "q_proj", "v_proj"]}, "alpha differ"),
    ],
)
def test_what_is_gone_on_with_has_the_shape_that_is_asked_for(base_dir, adapter_dir, lora, differs):
    config = StudentConfig(model=str(base_dir), adapter=str(adapter_dir), lora=lora)
    known = load_model_config(config)
    if differs is not None:
        with pytest.raises(UserError, match=rf"student.lora describes another adapter .*{differs}.*adapter_mode: merge"):
            check_adapter(config, known)
        return
    assert check_adapter(config, known) == []
    student: Any = with_adapters(load_model(config, trained=True), config)
    assert student.peft_config["default"].lora_dropout == 0.1


SHORT: dict[str, Any] = {"training": {"batch_tokens": 64, "learning_rate": 1e-2}, "schedule": {"passes": 1}}


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_training_goes_on_with_an_adapter_bit_for_bit(make_tree, tmp_path, base_dir, monkeypatch, kind):
    adapter = save_adapter(tmp_path / "a", base_dir, **KINDS[kind])
    sections = SHORT | {"student": {"model": str(base_dir), "adapter": str(adapter)}, "teacher": {"model": str(base_dir)}}
    tree = make_tree("stopped", **sections)
    whole = npd.distill(make_tree("whole", **sections))
    real = Trainer.step

    def step(self, samples, rows, tokens, step, progress):
        if step == whole.steps - 1:
            raise KeyboardInterrupt
        return real(self, samples, rows, tokens, step, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            npd.distill(tree)
    again = npd.distill(tree)
    assert sha256(again.student / "model.safetensors") == sha256(whole.student / "model.safetensors")
    start = by_peft(base_dir, adapter)
    close(logits(whole.run_dir / "policy/v000000"), start)
    written = whole.run_dir / "adapter"
    close(by_peft(base_dir, written), logits(whole.student))
    assert (logits(whole.student) - start).abs().max() > 1e-2
    options = json.loads((written / "adapter_config.json").read_text())
    assert (options["base_model_name_or_path"], options["inference_mode"]) == (str(base_dir), True)
    close(logits(peft.AutoPeftModelForCausalLM.from_pretrained(written)), logits(whole.student))
    # The teacher is the base, by itself.
    part = Store(whole.run_dir).read_part(1, 0).to_pylist()[0]
    alone = AutoModelForCausalLM.from_pretrained(base_dir)
    with torch.no_grad():
        read: Any = alone(torch.tensor([part["prompt_ids"] + part["response_ids"]])).logits
    found = read[0, len(part["prompt_ids"]) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(part["response_ids"])[:, None])
    assert part["teacher_nll"] == pytest.approx(-float(found.mean()), abs=1e-5)


def test_the_base_is_there_once_for_student_and_teacher(make_tree, base_dir, adapter_dir):
    from npd.generations.models import Models
    from npd.run import Run

    student = {"model": str(base_dir), "adapter": str(adapter_dir)}
    with Run(load_config(make_tree(student=student, teacher={"model": str(base_dir)})), DISTILL) as run:
        kept: Models = run.shop.pipeline.models
        config = run.config.student
        begun = with_adapters(load_model(config, trained=True), config)
        run.store.publish(0, lambda path: write_model(begun, run.setup.tokens.tokenizer, path), 0)
        teacher: Any = kept.teacher(None)
        model = kept.student(0)
        assert teacher.model() is model
        close(logits(model), by_peft(base_dir, adapter_dir))
        with teacher.reading():
            close(logits(model), logits(base_dir))
        close(logits(model), by_peft(base_dir, adapter_dir))


def test_a_fresh_adapter_on_merged_weights(make_tree, base_dir, adapter_dir, tmp_path):
    student = {"model": str(base_dir), "adapter": str(adapter_dir), "adapter_mode": "merge", "lora": {"r": 2}}
    result = npd.distill(make_tree(student=student, teacher={"model": "student"}, **SHORT))
    start = result.run_dir / "policy/v000000"
    close(logits(start), by_peft(base_dir, adapter_dir))
    options = json.loads((result.run_dir / "adapter/adapter_config.json").read_text())
    assert options["base_model_name_or_path"] == str(start.resolve())
    close(by_peft(start, result.run_dir / "adapter"), logits(result.student))
    assert (logits(result.student) - logits(start)).abs().max() > 1e-3


def test_of_fine_tuning_there_is_no_base_of_merged_weights_and_so_no_adapter(make_tree, base_dir, adapter_dir):
    student = {"model": str(base_dir), "adapter": str(adapter_dir), "adapter_mode": "merge"}
    longer: dict[str, Any] = {"rollout": {"max_new_tokens": 64}, "packing": {"length": 99}}
    result = npd.sft(make_tree("a", student=student | {"lora": {"r": 2}}, **longer))
    assert not (result.run_dir / "adapter").exists()
    plain = {"model": str(base_dir), "lora": {"r": 2, "target_modules": ["q_proj"]}}
    result = npd.sft(make_tree("b", student=plain, **longer))
    close(by_peft(base_dir, result.run_dir / "adapter"), logits(result.student))


def test_all_weights_may_be_trained_on_top_of_an_adapter(make_tree, base_dir, adapter_dir):
    student = {"model": str(base_dir), "adapter": str(adapter_dir), "adapter_mode": "merge"}
    tree = make_tree(student=student, schedule={"generations": 1, "passes": 1})
    npd.refresh(tree)
    close(logits(Path(tree["run_dir"]) / "policy/v000000"), by_peft(base_dir, adapter_dir))
    result = npd.distill(tree)
    assert not (result.run_dir / "adapter").exists()
    assert base_model(load_model(ModelConfig(model=str(result.student)))) is not None


# -- examples


def example(name: str, make_tree: Any, student: dict[str, Any], data: Path) -> dict[str, Any]:
    """An example as a run that takes a second: with tiny models and data of the same shape."""
    tree = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    small = make_tree(name)
    tree["run_dir"], tree["data"]["train"] = small["run_dir"], str(data)
    tree["student"] |= student
    for section, options in small.items():
        if section in ("schedule", "rollout", "scoring", "packing", "training", "checkpoint", "tracking"):
            tree[section] = tree.get(section, {}) | options
    if tree["teacher"]["model"] != "student":
        tree["teacher"] = small["teacher"]
    tree["data"]["max_prompt_tokens"], tree["packing"]["length"] = 60, 128
    return tree


def test_the_example_of_self_distillation_runs(make_tree, tmp_path, base_dir):
    rows = [{"prompt": f"{i}+1=", "teacher_prompt": f"{i}+1={i + 1};{i}+1="} for i in range(6)]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = example("self_distillation", make_tree, {"model": str(base_dir)}, data)
    assert npd.distill(tree).steps > 0
    assert Store(tree["run_dir"]).prompts().privileged == 6


def test_the_example_of_an_adapter_runs(make_tree, base_dir, data_file, tmp_path):
    adapter = save_adapter(tmp_path / "first", base_dir)
    tree = example("adapter", make_tree, {"model": str(base_dir), "adapter": str(adapter)}, data_file)
    result = npd.distill(tree)
    close(by_peft(base_dir, result.run_dir / "adapter"), logits(result.student))
