"""Loading, compatibility, cutting, adapters, saving."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import save_model as save_random_model
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import npd
from npd import models
from npd.config import LoraConfig, ModelConfig, StudentConfig
from npd.demo.task import CHARACTERS
from npd.demo.tokenizer import build_tokenizer
from npd.errors import UserError
from npd.models import (
    ADAPTER,
    AfterHead,
    add_lora,
    batches_for,
    check_compatible,
    context_length,
    cut_student,
    evenly_spaced,
    head_weight,
    hidden_states,
    layout_of,
    load_model,
    load_model_config,
    load_tokenizer,
    parameter_count,
    prove_layout,
    save_model,
    shared_vocabulary,
    stop_ids_of,
)
from npd.scoring import Prefill, ScoreTeacher

TINY: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def some_ids(count=17, vocabulary=20):
    return [4 + 7 * i % (vocabulary - 4) for i in range(count)]


# -- compatibility


def word_tokenizer(tokens, *, bos="<s>", eos="</s>", unk="<unk>", pattern="."):
    backend = Tokenizer(token_models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token="<pad>", unk_token=unk)


TOKENS = ["<pad>", "<s>", "</s>", "<unk>", *CHARACTERS]


def test_the_same_tokenizer_is_compatible(tokenizer):
    check_compatible(tokenizer, build_tokenizer())
    check_compatible(word_tokenizer(TOKENS), word_tokenizer(TOKENS))


def test_another_vocabulary_is_refused():
    with pytest.raises(UserError) as caught:
        check_compatible(word_tokenizer(TOKENS), word_tokenizer([*TOKENS[:-2], "#", ";"]), ("mine", "yours"))
    message = str(caught.value)
    assert "The tokenizers of mine and yours differ in 2 tokens" in message
    assert "'#' is 19 / 18, ';' is 18 / 19" in message
    assert "must share a tokenizer" in message


def test_a_token_more_is_refused():
    with pytest.raises(UserError, match=r"differ in 1 tokens \(student's id / teacher's id: '@' is None / 20\)"):
        check_compatible(word_tokenizer(TOKENS), word_tokenizer([*TOKENS, "@"]))


@pytest.mark.parametrize(("role", "option"), [("eos_token", {"eos": "#"}), ("bos_token", {"bos": ";"})])
def test_special_tokens_treated_differently_are_refused(role, option):
    theirs = word_tokenizer(TOKENS, **option)
    with pytest.raises(UserError, match=f"student and teacher treat special tokens differently: {role} is '</?s>' / "):
        check_compatible(word_tokenizer(TOKENS), theirs)


def test_other_ids_for_the_same_text_are_refused():
    """The same vocabulary, cut into tokens by another rule: words here, characters there."""
    with pytest.raises(UserError, match=r"turn the same text 'The quick brown fox.*' into different ids"):
        check_compatible(word_tokenizer(TOKENS), word_tokenizer(TOKENS, pattern=" "))


def test_a_bos_token_that_only_one_adds_is_refused(tokenizer):
    theirs = build_tokenizer()
    theirs.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    with pytest.raises(UserError, match="into different ids"):
        check_compatible(tokenizer, theirs)


# -- vocabularies of different sizes


@pytest.fixture(scope="module")
def padded_dir(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("models") / "padded", seed=5, vocabulary=24)


def test_shared_vocabulary(student_dir, padded_dir, tokenizer):
    configs = [load_model_config(ModelConfig(model=str(path))) for path in (student_dir, padded_dir)]
    assert [config.vocab_size for config in configs] == [20, 24]
    shared = shared_vocabulary(tokenizer, *configs, stop_ids=[2, 19])
    assert shared.size == 20
    assert shared.stop_ids == (2, 19)
    assert shared.start_id == 1
    assert shared_vocabulary(tokenizer, configs[1], configs[1]).size == 24


def test_start_token_is_eos_without_bos(student_dir):
    tokenizer = build_tokenizer()
    tokenizer.bos_token = None
    shared = shared_vocabulary(tokenizer, load_model_config(ModelConfig(model=str(student_dir))))
    assert shared.start_id == tokenizer.eos_token_id


def test_tokenizer_past_the_embeddings_is_refused(tokenizer):
    with pytest.raises(UserError, match="token id 19, but one of the models has only 18 embeddings"):
        shared_vocabulary(tokenizer, LlamaConfig(vocab_size=18))


def test_padded_teacher_scores_within_the_shared_ids(padded_dir, student_dir, tokenizer):
    teacher = load_model(ModelConfig(model=str(padded_dir)))
    with torch.no_grad():
        head_weight(teacher)[20:] *= 8  # the padding rows are now the teacher's favourites
    vocabulary = shared_vocabulary(tokenizer, teacher.config, load_model_config(ModelConfig(model=str(student_dir))))
    table = pa.table({"prompt_ids": [some_ids(5), some_ids(3)], "response_ids": [some_ids(6), some_ids(4)]})
    scored = ScoreTeacher(Prefill(teacher, vocabulary, 0, 64), top_k=20)(table)
    whole = logits(teacher, some_ids(5) + some_ids(6))[4:10]
    assert (whole.argmax(-1) >= 20).any(), "the test is empty unless the teacher prefers padding somewhere"
    for row, length in ((0, 6), (1, 4)):
        ids = torch.tensor(scored["topk_ids"][row].as_py()).view(length, 20)
        assert torch.equal(ids.sort(-1).values, torch.arange(20).expand(length, 20))
    # Probabilities are the teacher's own, over all 24.
    expected = whole.log_softmax(-1)[:, :20].sort(-1, descending=True).values
    got = torch.tensor(scored["topk_logprobs"][0].as_py()).view(6, 20)
    assert torch.allclose(got, expected, atol=1e-4)


def test_padded_models_distil_end_to_end(make_tree, padded_dir):
    """Teacher and student padded differently, k the whole shared vocabulary: nothing past it is ever stored."""
    tree = make_tree(teacher={"model": str(padded_dir)}, schedule={"generations": 1, "passes": 1}, scoring={"top_k": 20})
    result = npd.distill(tree)
    parts = sorted(result.run_dir.glob("generations/g000/part-*.parquet"))
    assert parts
    for part in parts:
        table = pq.read_table(part)
        assert max(max(ids) for ids in table["topk_ids"].to_pylist()) == 19
        assert max(max(ids) for ids in table["response_ids"].to_pylist()) <= 19
    assert AutoModelForCausalLM.from_pretrained(result.student).config.vocab_size == 20


def test_padded_student_never_samples_its_padding(make_tree, tmp_path, teacher_dir):
    path = save_random_model(tmp_path / "padded", seed=6, vocabulary=24)
    model = LlamaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.lm_head.weight[20:] *= 8
    model.save_pretrained(path)
    generation = npd.refresh(make_tree(student={"model": str(path)}))
    for part in generation.path.glob("part-*.parquet"):
        assert max(max(ids) for ids in pq.read_table(part)["response_ids"].to_pylist()) <= 19


def test_top_k_above_the_shared_vocabulary_is_refused(make_tree, padded_dir):
    with pytest.raises(UserError, match=r"scoring\.top_k is 21, but the models share only 20 tokens"):
        npd.distill(make_tree(teacher={"model": str(padded_dir)}, scoring={"top_k": 21}))


# -- cutting


@pytest.mark.parametrize(
    ("layers", "total", "kept"),
    [(1, 4, [0]), (2, 4, [0, 3]), (3, 5, [0, 2, 4]), (4, 4, [0, 1, 2, 3]), (3, 30, [0, 14, 29]), (1, 1, [0])],
)
def test_evenly_spaced(layers, total, kept):
    assert evenly_spaced(layers, total) == kept


@pytest.mark.parametrize("total", range(1, 33))
def test_evenly_spaced_is_different_ascending_and_holds_both_ends(total):
    for layers in range(1, total + 1):
        kept = evenly_spaced(layers, total)
        assert len(kept) == layers
        assert kept == sorted(set(kept))
        assert kept[0] == 0
        assert layers == 1 or kept[-1] == total - 1


def test_kept_layers_are_the_teachers(teacher_dir):
    teacher = LlamaForCausalLM.from_pretrained(teacher_dir)
    student = cut_student(LlamaForCausalLM.from_pretrained(teacher_dir), [0, 2])
    assert student.config.num_hidden_layers == len(student.model.layers) == 2
    theirs = teacher.state_dict()
    renamed = {"model.layers.1.": "model.layers.2."}
    state = student.state_dict()
    assert len(state) == len(theirs) - len(teacher.model.layers[1].state_dict())
    for name, value in state.items():
        for new, old in renamed.items():
            name = name.replace(new, old)
        assert torch.equal(value, theirs[name]), name
    assert not torch.equal(logits(student, some_ids()), logits(teacher, some_ids()))


def test_keeping_every_layer_changes_nothing(teacher_dir):
    teacher = LlamaForCausalLM.from_pretrained(teacher_dir)
    before = logits(teacher, some_ids())
    assert torch.equal(logits(cut_student(teacher, [0, 1, 2]), some_ids()), before)


@pytest.mark.parametrize("keep", [[], [0, 0], [1, 0], [3], [-1], [0, 5]])
def test_bad_layers_are_refused(teacher_dir, keep):
    model = LlamaForCausalLM.from_pretrained(teacher_dir)
    with pytest.raises(UserError, match=r"different, ascending and within 0\.\.2, but they are"):
        cut_student(model, keep)
    assert len(model.model.layers) == 3


def greedy(model, ids, use_cache):
    return model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=24, use_cache=use_cache, eos_token_id=None, pad_token_id=0
    )[0].tolist()


LAYER_TYPES = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(("config_class", "model_class"), [(Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)])
def test_cutting_a_model_with_options_per_layer(tmp_path, config_class, model_class):
    torch.manual_seed(11)
    extra = {"head_dim": 16} if config_class is Qwen3Config else {}
    config = config_class(
        **TINY, **extra, num_hidden_layers=4, layer_types=LAYER_TYPES, use_sliding_window=True, sliding_window=4
    )
    model = cut_student(model_class(config).eval(), [0, 2, 3])
    assert model.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    prove_layout(model, "cut")

    save_model(model, build_tokenizer(), tmp_path / "cut")
    loaded = load_model(ModelConfig(model=str(tmp_path / "cut")))
    assert len(loaded.model.layers) == 3
    assert torch.allclose(logits(loaded, some_ids()), logits(model, some_ids()), atol=1e-6)
    for each in (model, loaded):
        cached = greedy(each, some_ids(9), use_cache=True)
        assert len(cached) == 9 + 24
        assert cached == greedy(each, some_ids(9), use_cache=False)
        # Greedy by hand, to be sure that generation without a cache reads what it should.
        by_hand = some_ids(9)
        for _ in range(24):
            by_hand.append(int(logits(each, by_hand)[-1].argmax()))
        assert cached == by_hand


def test_parameter_count_is_the_loaded_models(teacher_dir, tmp_path):
    untied = save_random_model(tmp_path / "untied", seed=1, tied=False)
    for path in (teacher_dir, untied):
        config = ModelConfig(model=str(path))
        assert parameter_count(load_model_config(config)) == load_model(config).num_parameters()


# -- how a model is read


def test_plain_models_pass(teacher_dir, student_dir):
    for path in (teacher_dir, student_dir):
        load_model(ModelConfig(model=str(path)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_equal_samples(teacher_dir, attention):
    model = load_model(ModelConfig(model=str(teacher_dir), attention=attention))
    assert model.config._attn_implementation == attention
    parts = [some_ids(5), some_ids(9)[::-1], some_ids(1)]
    positions = torch.tensor([[i for part in parts for i in range(len(part))]])
    with torch.no_grad():
        hidden = hidden_states(model, torch.tensor([[i for part in parts for i in part]]), positions)[0]
    packed = (hidden @ head_weight(model).T).split([len(part) for part in parts])
    for part, mine in zip(parts, packed, strict=True):
        assert torch.allclose(mine, logits(model, part), atol=1e-4)


@pytest.fixture(scope="module")
def soft_capped_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "gemma2"
    torch.manual_seed(12)
    config = Gemma2Config(**TINY, head_dim=16, num_hidden_layers=2, final_logit_softcapping=2.0, attn_logit_softcapping=None)
    Gemma2ForCausalLM(config).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def test_a_soft_cap_is_read_and_taught(soft_capped_dir):
    model = load_model(ModelConfig(model=str(soft_capped_dir)))
    assert layout_of(model).after_head == AfterHead(1.0, 2.0)
    vocabulary = shared_vocabulary(build_tokenizer(), model.config)
    [reading] = Prefill(model, vocabulary, 0, 64)([some_ids(5)], [some_ids(6)])
    expected = logits(model, some_ids(5) + some_ids(6))[4:10].log_softmax(-1).gather(1, torch.tensor(some_ids(6))[:, None])
    assert abs(reading.logprobs - expected[:, 0].numpy()).max() < 1e-4


def test_what_comes_after_the_head_must_be_known(soft_capped_dir, monkeypatch):
    plain = Gemma2ForCausalLM.forward

    def squared(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.logits = out.logits**3
        return out

    monkeypatch.setattr(Gemma2ForCausalLM, "forward", squared)
    with pytest.raises(UserError, match=r"gemma2 \(gemma2\) changes its logits after the language-model head in a way"):
        load_model(ModelConfig(model=str(soft_capped_dir)))


def leaking_positions(plain):
    def forward(self, *args, position_ids=None, **kwargs):
        return plain(self, *args, **kwargs)  # as if the row were one text

    return forward


def leaking_mask(plain):
    """The trap of DESIGN.md: a mask of ones, and attention leaks though positions restart."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return plain(self, input_ids, attention_mask=torch.ones_like(input_ids), **kwargs)

    return forward


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("leak", "mode"), [(leaking_positions, "block mask"), (leaking_mask, "one a row")])
def test_a_model_that_mixes_packed_samples_is_read_in_another_way(teacher_dir, monkeypatch, leak, mode, dtype):
    config = ModelConfig(model=str(teacher_dir), dtype=dtype, attention="rows")
    assert layout_of(load_model(config)).mode == "packed"
    monkeypatch.setattr(LlamaModel, "forward", leak(LlamaModel.forward))
    model = load_model(config)
    assert layout_of(model).mode == mode  # rotary positions are relative, so a mask alone keeps samples apart
    if mode == "block mask":
        return
    batches = list(batches_for(model, [3, 9, 2, 8], 20))
    assert batches == [([[1], [3]], 9), ([[0], [2]], 3)]


def test_a_model_that_mixes_rows_is_refused(teacher_dir, monkeypatch):
    plain = LlamaModel.forward

    def leaking(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean((0, 1))
        return out

    monkeypatch.setattr(LlamaModel, "forward", leaking)
    with pytest.raises(UserError, match=r"\(llama\), attention sdpa: read with others, .* Choose another attention"):
        load_model(ModelConfig(model=str(teacher_dir)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_refused(tmp_path, teacher_dir, value):
    model = LlamaForCausalLM.from_pretrained(teacher_dir)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(UserError, match="not finite"):
        prove_layout(model, "hurt")  # which reads it, before anything of it is saved
    model.save_pretrained(tmp_path / "hurt")
    with pytest.raises(UserError, match=r"damaged: model\.layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
        load_model(ModelConfig(model=str(tmp_path / "hurt")))


def test_a_bias_in_the_head_is_read(teacher_dir):
    model = LlamaForCausalLM.from_pretrained(teacher_dir)
    model.lm_head.bias = torch.nn.Parameter(torch.arange(20.0) / 10)
    prove_layout(model, "biased")
    [reading] = Prefill(model, shared_vocabulary(build_tokenizer(), model.config), 0, 64)([some_ids(5)], [some_ids(6)])
    expected = logits(model, some_ids(5) + some_ids(6))[4:10].log_softmax(-1).gather(1, torch.tensor(some_ids(6))[:, None])
    assert abs(reading.logprobs - expected[:, 0].numpy()).max() < 1e-4


# -- adapters


def with_adapters(path, **options):
    """A LoRA student whose adapters do something: peft starts them at zero."""
    config = StudentConfig(model=str(path), lora=LoraConfig(r=4, alpha=8, **options))
    model = add_lora(load_model(config, trained=True), config)
    torch.manual_seed(13)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "down_proj"]])
def test_saved_adapters_are_merged(tmp_path, modules, tied):
    path = save_random_model(tmp_path / "base", seed=14, tied=tied)
    model = with_adapters(path, target_modules=modules)
    expected = logits(model, some_ids())
    base = logits(LlamaForCausalLM.from_pretrained(path), some_ids())
    assert (expected - base).abs().max() > 0.1, "adapters must change something for this to be a test"

    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_model(model, build_tokenizer(), tmp_path / "merged")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(logits(model, some_ids()), expected)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged) is LlamaForCausalLM
    assert torch.allclose(logits(merged, some_ids()), expected, atol=1e-4)
    assert not [file.name for file in (tmp_path / "merged").iterdir() if "adapter_" in file.name]
    # Beside them the adapters as peft has them, for an engine that keeps the base.
    apart: Any = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(path), str(tmp_path / "merged" / ADAPTER))
    assert torch.allclose(logits(apart.eval(), some_ids()), expected, atol=1e-4)
    names = set(load_file(tmp_path / "merged" / "model.safetensors"))
    assert names == set(load_file(path / "model.safetensors"))


def test_only_adapters_are_trained(student_dir):
    model = with_adapters(student_dir)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_hidden_states_and_head_of_an_adapted_model(student_dir):
    """The loss reaches through peft's wrapper: same logits as the whole model, adapters included."""
    model = with_adapters(student_dir)
    ids = torch.tensor([some_ids()])
    with torch.no_grad():
        hidden = hidden_states(model, ids, torch.arange(17)[None])[0]
    assert torch.allclose(hidden @ head_weight(model).T, logits(model, some_ids()), atol=1e-4)


# -- saving and loading


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path, tied):
    path = save_random_model(tmp_path / "first", seed=15, tied=tied)
    model = load_model(ModelConfig(model=str(path)))
    save_model(model, load_tokenizer(ModelConfig(model=str(path))), tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, some_ids()), logits(model, some_ids()))
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("1+2=")["input_ids"] == [5, 14, 6, 17]


@pytest.mark.parametrize("load", [load_tokenizer, load_model_config, load_model])
@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "nowhere", "a/b/c"])
def test_missing_model_directory(load, name):
    with pytest.raises(UserError, match=r"There is no model directory .*give a directory, a \.gguf file, or a Hub id"):
        load(ModelConfig(model=name))


def test_missing_gguf_file(tmp_path):
    with pytest.raises(UserError, match=r"There is no GGUF file .*gone\.gguf"):
        load_model(ModelConfig(model=str(tmp_path / "gone.gguf")))


def test_model_inside_a_package():
    config = ModelConfig(model="package:npd/demo/teacher")
    model = load_model(config)
    assert model.config.num_hidden_layers == 4
    assert load_tokenizer(config)("1+2=")["input_ids"] == [5, 14, 6, 17]
    assert context_length(model.config) == 256


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:no_such_package_here/x", "names the Python package 'no_such_package_here', which is not installed"),
        ("package:not-a-name/x", "'not-a-name', which is not installed"),
        ("package:sys/x", "'sys', which is not installed"),
        ("package:npd/demo/nothing", "the package 'npd' holds no 'demo/nothing'"),
        ("package:npd/demo/nothing.gguf", "the package 'npd' holds no 'demo/nothing.gguf'"),
    ],
)
def test_package_paths_that_lead_nowhere(name, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(ModelConfig(model=name))


@pytest.fixture
def copy_dir(student_dir, tmp_path):
    return shutil.copytree(student_dir, tmp_path / "copy")


@pytest.mark.parametrize("damage", ["cut", "header", "gone"])
def test_corrupt_weights(copy_dir, damage):
    file = copy_dir / "model.safetensors"
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "header":
        file.write_bytes(b"\xff" * 64 + whole[64:])
    else:
        file.unlink()
    with pytest.raises(UserError) as caught:
        load_model(ModelConfig(model=str(copy_dir)))
    message = str(caught.value)
    assert f"The model of {copy_dir} cannot be loaded" in message
    assert "that it is whole" in message
    assert "\n" not in message


def test_pickled_weights_are_not_loaded(copy_dir):
    state = load_file(copy_dir / "model.safetensors")
    (copy_dir / "model.safetensors").unlink()
    torch.save(state, copy_dir / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(ModelConfig(model=str(copy_dir)))


def test_corrupt_configuration(copy_dir):
    (copy_dir / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"configuration of .* cannot be loaded"):
        load_model_config(ModelConfig(model=str(copy_dir)))


def test_model_type_that_transformers_does_not_know(copy_dir):
    config = json.loads((copy_dir / "config.json").read_text()) | {"model_type": "novel"}
    (copy_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="novel"):
        load_model_config(ModelConfig(model=str(copy_dir)))


def test_tokenizer_without_an_end(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no eos_token, so a response could never stop"):
        load_tokenizer(ModelConfig(model=str(tmp_path)))


def test_tokenizer_without_padding_pads_with_its_end(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(ModelConfig(model=str(tmp_path))).pad_token_id == 2


@pytest.mark.parametrize(("eos", "ids"), [(2, [2]), ([2, 18], [2, 18]), (None, [])])
def test_stop_tokens_of_a_chat_model(copy_dir, eos, ids):
    (copy_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert stop_ids_of(ModelConfig(model=str(copy_dir))) == ids


def test_no_generation_config(copy_dir):
    (copy_dir / "generation_config.json").unlink()
    config = json.loads((copy_dir / "config.json").read_text())
    assert set(stop_ids_of(ModelConfig(model=str(copy_dir)))) <= {config["eos_token_id"]}


def test_auto_dtype_on_a_cpu_is_float32(student_dir, monkeypatch):
    monkeypatch.setattr(models.devices, "device", lambda: torch.device("cpu"))
    config = StudentConfig(model=str(student_dir))
    assert models.resolve_dtype(config, trained=True) == models.resolve_dtype(config, trained=False) == torch.float32
    assert load_model(config).dtype == torch.float32


def test_missing_tensors_are_refused(tmp_path, student_dir):
    from safetensors.torch import load_file, save_file

    shutil.copytree(student_dir, tmp_path / "torn")
    tensors = load_file(tmp_path / "torn/model.safetensors")
    kept = {name: value for name, value in tensors.items() if "layers.1.mlp" not in name}
    save_file(kept, tmp_path / "torn/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"are not whole: 3 tensors are missing.*layers\.1\.mlp"):
        models.load_model(ModelConfig(model=str(tmp_path / "torn")))


def test_lora_on_what_cannot_carry_it_is_refused(student_dir):
    model = models.load_model(ModelConfig(model=str(student_dir)))
    with pytest.raises(UserError, match="target_modules 'nothing_like_it' does not fit"):
        models.add_lora(model, StudentConfig(model="a/b", lora=LoraConfig(target_modules="nothing_like_it")))
    untied = LoraConfig(target_modules=["lm_head", "q_proj"])
    with pytest.raises(UserError, match="names the language-model head"):
        models.add_lora(model, StudentConfig(model="a/b", lora=untied))


def test_auto_dtype_on_cuda(monkeypatch):
    monkeypatch.setattr(models.devices, "fast_bfloat16", lambda on=None: True)
    full, lora = StudentConfig(model="a/b"), StudentConfig(model="a/b", lora=LoraConfig())
    assert models.resolve_dtype(full, trained=True) == torch.float32
    assert models.resolve_dtype(full, trained=False) == torch.bfloat16
    assert models.resolve_dtype(lora, trained=True) == torch.bfloat16
    for name in ("float16", "bfloat16"):
        named = StudentConfig(model="a/b", dtype=name)  # what is trained has float32 masters
        assert models.resolve_dtype(named, trained=True) == torch.float32
        assert models.resolve_dtype(named, trained=False) == getattr(torch, name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not json", "is no JSON"),
        ("[]", "holds list, not an object"),
        ('{"eos_token_id": "x"}', "names 'x' as eos_token_id"),
        ('{"eos_token_id": [2, {"a": 1}]}', "as eos_token_id, which is no token id"),
        ('{"eos_token_id": -5}', "names '-5' as eos_token_id"),
        ('{"eos_token_id": true}', "names 'True' as eos_token_id"),
    ],
)
def test_a_malformed_generation_config_is_named(tmp_path, text, said):
    path = save_random_model(tmp_path / "student", seed=2)
    (path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        models.stop_ids_of(ModelConfig(model=str(path)))
    assert str(path / "generation_config.json") in str(caught.value)
