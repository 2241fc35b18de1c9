"""Checkpoints as people have them: quantised, damaged, of other kinds, in other types; and what comes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_model as save_random_model
from families import FAMILIES, model_of
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import npd
from npd.config import LoraConfig, ModelConfig, StudentConfig, load_config
from npd.demo.tokenizer import build_tokenizer
from npd.errors import RunError, UserError
from npd.models import (
    add_lora,
    batches_for,
    check_saved,
    check_weights,
    cut_student,
    hidden_states,
    learning_mode,
    load_model,
    load_model_config,
    prompt_batches,
    prove_layout,
    save_model,
)
from npd.models.files import read_header, stored_dtype
from npd.models.rope import rope_switch, split_at
from npd.preflight import prepare


def save(path: Path, family: str, seed: int = 1) -> Path:
    model_of(family, seed=seed).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def check(path: Path, **options: Any) -> list[str]:
    config = ModelConfig(model=str(path))
    return check_weights(config, load_model_config(config), **options)


@pytest.fixture
def copy_dir(student_dir, tmp_path) -> Path:
    return Path(shutil.copytree(student_dir, tmp_path / "copy"))


# -- a no comes at once


def test_whole_weights_pass(student_dir):
    assert check(student_dir) == check(student_dir, trained=True) == []


def test_a_header_that_promises_more_than_there_is(copy_dir):
    file = copy_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"has [\d,]+ bytes, but its header says [\d,]+\. Fetch or copy it again"):
        check(copy_dir)
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="is no whole safetensors file"):
        check(copy_dir)


def test_a_file_of_several_that_is_missing(tmp_path):
    model = LlamaForCausalLM.from_pretrained(save_random_model(tmp_path / "one", seed=3))
    model.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert check(tmp_path / "many") == []
    files[1].unlink()
    with pytest.raises(UserError, match=rf"1 of {len(files)} files that .*index\.json names are missing \({files[1].name}\)"):
        check(tmp_path / "many")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "pickled files .*they can run any code. Convert them"),
        ("model-Q4_K_M.gguf", r"weights as GGUF. Name the file itself: .*model-Q4_K_M\.gguf"),
        ("README.md", "holds no weights"),
    ],
)
def test_weights_of_another_kind(copy_dir, name, message):
    (copy_dir / "model.safetensors").rename(copy_dir / name)
    with pytest.raises(UserError, match=message):
        check(copy_dir)


def test_adapters_are_no_model(copy_dir):
    (copy_dir / "config.json").unlink()
    (copy_dir / "adapter_config.json").write_text("{}")
    (copy_dir / "model.safetensors").rename(copy_dir / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds adapters, no model"):
        load_model_config(ModelConfig(model=str(copy_dir)))


def test_an_encoder_decoder_is_refused(tmp_path):
    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"\(t5\) is an encoder-decoder: .* Choose a decoder-only language model"):
        load_model_config(ModelConfig(model=str(tmp_path)))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_nothing_is_generated_for_weights_that_are_not_there(make_tree, copy_dir, role):
    (copy_dir / "model.safetensors").unlink()
    tree = make_tree(**{role: {"model": str(copy_dir)}})
    with pytest.raises(UserError, match="holds no weights"):
        prepare(load_config(tree), "distill")
    assert not Path(tree["run_dir"]).exists()


# -- quantised


def quantise(path: Path) -> None:
    """An FP8 checkpoint as DeepSeek and Qwen publish them: blocks of 128 by 128 share a scale."""
    tensors = load_file(path / "model.safetensors")
    for name, value in list(tensors.items()):
        if "proj" in name:
            scale = value.abs().max() / 448
            tensors[name] = (value / scale).to(torch.float8_e4m3fn)
            tensors[name.replace("weight", "weight_scale_inv")] = scale.view(1, 1).float()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_a_quantised_student_becomes_a_plain_one(copy_dir, tmp_path):
    before = LlamaForCausalLM.from_pretrained(copy_dir)
    quantise(copy_dir)
    options = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    edit(copy_dir / "config.json", quantization_config=options)
    assert "trained, and saved, as plain weights" in check(copy_dir, trained=True)[0]
    student = load_model(StudentConfig(model=str(copy_dir)), trained=True)
    save_model(student, build_tokenizer(), tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    for name, value in before.state_dict().items():
        assert saved[name].dtype == torch.float32
        assert (saved[name] - value).norm() < 0.05 * value.norm(), name


def test_a_quantised_student_that_cannot_become_one_is_refused(copy_dir, monkeypatch):
    edit(copy_dir / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match=r"quantised \(gptq\), which needs the package gptqmodel"):
        check(copy_dir)
    monkeypatch.setattr("npd.models.files.PACKAGES", {})
    with pytest.raises(UserError, match=r"quantised \(gptq\), and its weights cannot be trained"):
        check(copy_dir, trained=True)


def test_scales_that_the_configuration_does_not_speak_of(copy_dir):
    quantise(copy_dir)
    with pytest.raises(UserError, match=r"quantised, but its config\.json does not say how: \d+ tensors are left over"):
        load_model(ModelConfig(model=str(copy_dir)))


# -- types


@pytest.mark.parametrize(
    ("stored", "named", "expected"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float32, "float16", torch.float16),
    ],
)
def test_the_finished_student_has_the_type_it_came_in_or_the_one_that_is_named(make_tree, copy_dir, stored, named, expected):
    LlamaForCausalLM.from_pretrained(copy_dir).to(stored).save_pretrained(copy_dir)
    assert stored_dtype([copy_dir / "model.safetensors"]) == stored
    tree = make_tree(student={"model": str(copy_dir), "dtype": named}, schedule={"generations": 1, "passes": 1})
    result = npd.distill(tree)
    assert stored_dtype([result.student / "model.safetensors"]) == expected
    assert json.loads((result.student / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
    finished = AutoModelForCausalLM.from_pretrained(result.student, dtype="auto")
    assert finished.dtype == expected
    assert finished.lm_head.weight is finished.model.embed_tokens.weight
    # Training went on in float32: what is saved is its rounding.
    exact = npd.distill(tree | {"run_dir": tree["run_dir"] + "2", "student": {"model": str(copy_dir), "dtype": "float32"}})
    if named == "auto" or stored == torch.float32 == expected:
        theirs = load_file(exact.student / "model.safetensors")
        mine = load_file(result.student / "model.safetensors")
        assert all(torch.equal(mine[name], value.to(expected)) for name, value in theirs.items())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3_next", "mixtral"])
def test_bfloat16_is_within_rounding_of_float32(family, tmp_path):
    path = save(tmp_path / family, family)
    exact = load_model(ModelConfig(model=str(path)))
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.bfloat16().float())
    rounded = load_model(ModelConfig(model=str(path), dtype="bfloat16"))
    ids = torch.arange(4, 18)[None]
    positions = torch.tensor([[*range(6), *range(8)]]) if family != "qwen3_next" else torch.arange(14)[None]
    with torch.no_grad():
        mine, theirs = (hidden_states(m, ids, positions).float() for m in (rounded, exact))
    assert (mine - theirs).norm() < 0.05 * theirs.norm()
    assert (mine - theirs).norm() > 0


# -- values that are not finite


def test_no_student_with_values_that_are_not_finite_is_written(student_dir, tmp_path):
    model = LlamaForCausalLM.from_pretrained(student_dir)
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    with pytest.raises(RunError, match=r"not finite \(model\.norm\.weight\).* student\.dtype bfloat16"):
        save_model(model, build_tokenizer(), tmp_path / "s", dtype=torch.float16)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(RunError, match=r"so s was not written"):
        save_model(model, build_tokenizer(), tmp_path / "s")
    assert not (tmp_path / "s").exists()


# -- generation_config.json


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"do_sample": False, "temperature": 0.6, "eos_token_id": [2, 3]}, {"do_sample": True, "temperature": 0.6}),
        ({"temperature": 0.6, "top_p": 0.95, "eos_token_id": [2, 3]}, {"do_sample": True, "temperature": 0.6}),
        ({"do_sample": True, "temperature": -1.0, "eos_token_id": [2, 3]}, {}),
    ],
)
def test_a_generation_config_that_transformers_will_not_save(make_tree, copy_dir, options, expected):
    (copy_dir / "generation_config.json").write_text(json.dumps(options))
    result = npd.distill(make_tree(student={"model": str(copy_dir)}, schedule={"generations": 1, "passes": 1}))
    saved = json.loads((result.student / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [2, 3]
    assert {name: saved[name] for name in expected} == expected


# -- what is random in training


@pytest.fixture
def gpt2_dir(tmp_path) -> Path:
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=20, n_positions=128, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2,
                        pad_token_id=0, initializer_range=0.3)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    build_tokenizer().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize("options", [{}, {"dropout": True}, {"gradient_checkpointing": True}])
def test_the_kl_of_unchanged_weights_is_zero(make_tree, gpt2_dir, options):
    training = {"batch_tokens": 4096, "learning_rate": 1e-3} | options
    result = npd.distill(make_tree(student={"model": str(gpt2_dir)}, training=training))
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line.get("step") == 1 and "loss" in line)
    assert abs(first["near_policy_kl"]) < 1e-6
    assert json.loads((result.student / "config.json").read_text())["resid_pdrop"] == 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("family", "options"), [("gpt2", {}), ("opt", {"layerdrop": 0.5}), ("mixtral", {"router_jitter_noise": 0.2})]
)
def test_nothing_is_random_unless_asked(monkeypatch, family, options, checkpointing):
    monkeypatch.setitem(FAMILIES, family, FAMILIES[family] | options)
    ids, positions = torch.arange(4, 18)[None], torch.arange(14)[None]
    for dropout in (False, True):
        model = model_of(family)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        learning_mode(model, dropout=dropout)
        assert any(m.training for m in model.modules() if hasattr(m, "gradient_checkpointing")) == (dropout or checkpointing)
        first, second = (hidden_states(model, ids, positions) for _ in range(2))
        assert torch.equal(first, second) != dropout


# -- adapters


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "gate"]])
def test_adapters_on_experts_reach_what_is_saved(tmp_path, modules):
    path = save(tmp_path / "base", "mixtral")
    config = StudentConfig(model=str(path), lora=LoraConfig(r=2, target_modules=modules))
    before = load_model(config).state_dict()
    student = add_lora(load_model(config, trained=True), config).eval()
    # The proof at the start leaves everything as it was.
    assert all(not p.any() for n, p in student.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.sin(torch.arange(parameter.numel())).view_as(parameter))
    save_model(student, build_tokenizer(), tmp_path / "merged")
    ids = torch.arange(4, 18)[None]
    with torch.no_grad():
        mine = student(input_ids=ids, use_cache=False).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(input_ids=ids, use_cache=False).logits
    assert (mine - theirs).abs().max() < 1e-4
    merged = load_model(ModelConfig(model=str(tmp_path / "merged"))).state_dict()
    experts = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(before[experts], merged[experts]) == (modules != "all-linear")


def test_adapters_on_a_tied_embedding_are_refused(student_dir):
    config = StudentConfig(model=str(student_dir), lora=LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(UserError, match="names the embedding, which this model ties to its language-model head"):
        add_lora(load_model(config, trained=True), config)


def test_adapters_that_would_not_be_merged_are_refused(student_dir, monkeypatch):
    config = StudentConfig(model=str(student_dir), lora=LoraConfig())
    monkeypatch.setattr("npd.models.students.adapted", lambda model: iter(()))
    with pytest.raises(UserError, match="hidden states miss 100% of what the adapters do"):
        add_lora(load_model(config, trained=True), config)


# -- longrope


def test_samples_on_both_sides_of_the_switch_share_no_batch():
    model = model_of("phi3")
    prove_layout(model, "phi3")
    assert rope_switch(model.config) == 16
    lengths = [5, 30, 16, 17, 3, 24]
    batches = [([[lengths[i] for i in row] for row in rows], length) for rows, length in batches_for(model, lengths, 1000)]
    assert batches == [([[30], [24], [17]], 30), ([[16], [5, 3]], 16)]
    # Prompts that may come to pass it are answered with their likes alone, and without a cache.
    prompts = [30, 5, 14, 14, 20, 15, 6]
    assert [([prompts[i] for i in batch], cache) for batch, cache in prompt_batches(model, prompts, 10, 4)] == [
        ([30, 20], True),
        ([15], False),
        ([14, 14], False),
        ([6, 5], True),
    ]


def test_no_switch_changes_nothing():
    assert split_at([3, 1, 2], ()) == [[0, 1, 2]]
    assert split_at([], (4,)) == []
    assert rope_switch(model_of("llama").config) is None


# -- cutting


def cut_and_read(path: Path, keep: list[int], out: Path) -> Any:
    student = cut_student(load_model(ModelConfig(model=str(path)), trained=True), keep)
    save_model(student, build_tokenizer(), out)
    check_saved(student, out)
    return student.config


@pytest.mark.parametrize(
    ("family", "options", "keep", "expected"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, [1, 2], {"decoder_sparse_step": 1, "mlp_only_layers": [1]}),
        ("qwen3_moe", {"mlp_only_layers": [1, 3]}, [0, 3], {"mlp_only_layers": [1]}),
        ("deepseek_v3", {"first_k_dense_replace": 2}, [1, 2, 3], {"first_k_dense_replace": 1}),
        ("lfm2_moe", {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2}, [0, 3],
         {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}),
    ],
)  # fmt: skip
def test_options_that_count_or_list_layers_follow_a_cut(tmp_path, monkeypatch, family, options, keep, expected):
    monkeypatch.setitem(FAMILIES, family, FAMILIES[family] | {"num_hidden_layers": 4} | options)
    config = cut_and_read(save(tmp_path / "whole", family), keep, tmp_path / "cut")
    assert {name: getattr(config, name) for name in expected} == expected


def test_what_cannot_be_cut_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"This gemma3n_text model cannot be cut like this: .*embed_tokens_per_layer"):
        cut_and_read(save(tmp_path / "gemma", "gemma3n_text"), [0], tmp_path / "cut")
    with pytest.raises(UserError, match=r"This diffllama model cannot be cut like this: loaded again, .*differ by \d+%"):
        cut_and_read(save(tmp_path / "diff", "diffllama"), [1], tmp_path / "cut")


def test_headers_name_every_tensor(student_dir):
    assert set(read_header(student_dir / "model.safetensors")) == set(load_file(student_dir / "model.safetensors"))
