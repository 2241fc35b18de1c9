"""Teachers with another tokenizer: their columns, runs with them, and what is refused."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from conftest import write_jsonl
from fake_server import serving
from tokenizers import Tokenizer, decoders
from tokenizers import models as parts
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import npd
from npd import models
from npd.cli import main
from npd.config import ModelConfig, load_config
from npd.demo.task import CHARACTERS, make_problems
from npd.errors import RunError, UserError
from npd.generations.earlier import earlier_answers
from npd.generations.generation import Generations
from npd.models import Vocabulary
from npd.preflight import prepare
from npd.prompts import TEACHER_PROMPT, Prompts
from npd.report.page import write_report
from npd.scoring import ScoreTeacher, TeacherSetting, teacher_kind
from npd.store import Store
from npd.store.schema import ALIGNED

VOCABULARY = Vocabulary(20, (2,), 1)


def pairs_tokenizer(merges: int = 30, *, template: str | None = None) -> PreTrainedTokenizerFast:
    """A BPE over the demo's characters, in another order: digits join in pairs, and operators with what follows."""
    words = ["</s>", "<pad>", "<s>", *reversed(CHARACTERS)]
    joined = [(a, b) for a in ";+-*=#" for b in "0123456789"] + [(a, b) for a in "123" for b in "0123456789"]
    joined = joined[::-1][:merges]
    vocabulary = {word: i for i, word in enumerate([*words, *(a + b for a, b in joined)])}
    backend = Tokenizer(parts.BPE(vocabulary, joined))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )


def save_teacher(path: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 3, **options: Any) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.3, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **options,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def other_dir(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("aligned") / "teacher", pairs_tokenizer())


def teacher_of(path: Path, student: Path, **options: Any) -> Any:
    config = load_config(
        {"run_dir": "", "student": {"model": ""}, "data": {"train": ""}, "teacher": {"model": str(path)} | options}
    ).teacher
    assert config is not None
    setting = TeacherSetting(VOCABULARY, 0, "cpu", 256, student=ModelConfig(model=str(student)))
    return teacher_kind(config)(config, setting)


def rows(tokenizer: Any, other: Any = None, count: int = 6) -> pa.Table:
    """Prompts and responses as a rollout leaves them; without a stop token every third."""
    problems = make_problems(count, seed=3)
    columns = {
        "prompt_ids": [tokenizer(p.prompt)["input_ids"] for p in problems],
        "response_ids": [tokenizer(p.completion)["input_ids"] + [2] * (i % 3 > 0) for i, p in enumerate(problems)],
    }
    if other is not None:
        columns[TEACHER_PROMPT] = [other(p.prompt)["input_ids"] for p in problems]
    return pa.table({name: pa.array(values, pa.list_(pa.int32())) for name, values in columns.items()})


SCORED = ["teacher_nll", "teacher_nll_free", "topk_ids", "topk_logprobs"]


def numbers(table: pa.Table, name: str) -> np.ndarray:
    column = table[name].combine_chunks()
    return (column.flatten() if pa.types.is_list(column.type) else column).to_numpy(zero_copy_only=False)


def test_the_same_tokenizer_gives_the_same_columns(tokenizer, teacher_dir, student_dir):
    """Bit for bit, with responses that the tokenizer itself would have written otherwise among them."""
    table = rows(tokenizer)
    plain = ScoreTeacher(teacher_of(teacher_dir, student_dir), 4)(table)
    with_own = table.append_column(TEACHER_PROMPT, table["prompt_ids"])
    aligned = ScoreTeacher(teacher_of(teacher_dir, student_dir, align=True), 4)(with_own)
    for name in SCORED:
        assert aligned[name].equals(plain[name]), name
    exact, merged = (numbers(aligned, name).sum() for name in ALIGNED.names)
    assert (exact, merged) == (len(numbers(table, "response_ids")), 0)


def test_the_way_by_bytes_gives_the_same_columns_too(tokenizer, teacher_dir, student_dir, tmp_path):
    """The same teacher with its tokens in another order."""
    words = [f"<{name}>" for name in ("pad", "s", "/s", "unk")]
    words[2] = "</s>"
    order = [*reversed([*words, *CHARACTERS])]
    backend = Tokenizer(parts.BPE({word: i for i, word in enumerate(order)}, []))
    backend.decoder = decoders.Fuse()
    other = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    model: Any = AutoModelForCausalLM.from_pretrained(teacher_dir)
    perm = torch.tensor([tokenizer.convert_tokens_to_ids(word) for word in order])
    weight = model.get_input_embeddings().weight.detach()
    config = model.config
    config.bos_token_id, config.eos_token_id, config.pad_token_id = (order.index(w) for w in ("<s>", "</s>", "<pad>"))
    turned = LlamaForCausalLM(config)
    turned.load_state_dict(model.state_dict())
    turned.get_input_embeddings().weight.data = weight[perm]
    turned.tie_weights()
    turned.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    table = rows(tokenizer, other)
    plain = ScoreTeacher(teacher_of(teacher_dir, student_dir), 4)(table.drop_columns(TEACHER_PROMPT))
    teacher = teacher_of(tmp_path, student_dir, align=True)
    assert not teacher.bridge.one
    aligned = ScoreTeacher(teacher, 4)(table)
    assert aligned["topk_ids"].equals(plain["topk_ids"])
    for name in ("teacher_nll", "teacher_nll_free", "topk_logprobs"):
        np.testing.assert_allclose(numbers(aligned, name), numbers(plain, name), rtol=0, atol=2e-6)


def test_columns_are_what_the_teacher_says_of_the_bytes(tokenizer, other_dir, student_dir):
    """By one pass of the teacher's own model over each text, in float64."""
    other = pairs_tokenizer()
    table = rows(tokenizer, other)
    scored = ScoreTeacher(teacher_of(other_dir, student_dir, align=True), 4)(table)
    model = AutoModelForCausalLM.from_pretrained(other_dir).double()
    names = dict(tokenizer.get_vocab())
    for row in scored.to_pylist():
        text = tokenizer.decode([id_ for id_ in row["response_ids"] if id_ != 2])
        theirs = other(text)["input_ids"] + [0] * (row["response_ids"][-1] == 2)
        for column, context in (("teacher_nll", row[TEACHER_PROMPT]), ("teacher_nll_free", [2])):
            logp = model(torch.tensor([context + theirs])).logits[0].log_softmax(-1)[len(context) - 1 : -1]
            said = logp[range(len(theirs)), theirs].sum().item()
            assert row[column] == pytest.approx(-said / len(row["response_ids"]), rel=1e-5)
            if column == "teacher_nll_free":
                continue
            at, places = 0, {}
            for j, id_ in enumerate(theirs):
                places[at] = j
                at += len(other.convert_ids_to_tokens(id_)) if id_ else 1
            ids, values = (np.array(row[name]).reshape(-1, 4) for name in ("topk_ids", "topk_logprobs"))
            # The student's tokens are single characters, so each is the teacher's token or the first, or lies within one.
            for i in range(len(row["response_ids"])):
                found = {int(a): float(v) for a, v in zip(ids[i], values[i], strict=True) if v > -np.inf}
                expected: dict[int, float] = {}
                if i in places:
                    top = logp[places[i]].topk(4)
                    for value, id_ in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                        word = "</s>" if id_ == 0 else other.convert_ids_to_tokens(id_)
                        mine = names[word] if id_ < 3 else names[word[0]]
                        expected[mine] = float(np.logaddexp(expected.get(mine, -np.inf), value))
                assert found == pytest.approx(expected, abs=1e-4)


def test_a_token_that_covers_several_has_their_product(make_tree, teacher_dir, other_dir, tokenizer):
    """The student has the longer tokens here, in a whole run: with the free pass, and against a pass in float64."""
    tree = make_tree(
        student={"model": str(other_dir)}, teacher={"model": str(teacher_dir), "align": True}, training={"max_steps": 2},
        evaluation={"kl_prompts": 0},
    )  # fmt: skip
    npd.distill(tree)
    mine = pairs_tokenizer()
    model: Any = AutoModelForCausalLM.from_pretrained(teacher_dir).double()
    store, several = Store(tree["run_dir"]), 0
    for row in pa.concat_tables([store.read_part(0, p) for p in sorted(store.parts(0))]).to_pylist():
        words = [mine.convert_ids_to_tokens(id_) if id_ > 2 else "" for id_ in row["response_ids"]]
        # </s> is theirs too; <pad> and <s> have namesakes.
        read = [
            tokenizer(word)["input_ids"] if word else [{0: 2, 1: 0, 2: 1}[id_]]
            for word, id_ in zip(words, row["response_ids"], strict=True)
        ]
        context = tokenizer("".join(mine.convert_ids_to_tokens(row["prompt_ids"])))["input_ids"]
        for column, before in (("teacher_nll", context), ("teacher_nll_free", [1])):
            ids = [*before, *(token for those in read for token in those)]
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1).detach()
            said = [float(logp[i - 1, ids[i]]) for i in range(len(before), len(ids))]
            assert row[column] == pytest.approx(-sum(said) / len(read), rel=1e-4)
            if column == "teacher_nll_free":
                continue
            ids_, values = (np.array(row[name]).reshape(-1, 4) for name in ("topk_ids", "topk_logprobs"))
            at = 0
            for i, those in enumerate(read):
                if len(those) > 1:
                    several += 1
                    assert (ids_[i, 0], values[i, 0]) == (
                        row["response_ids"][i],
                        pytest.approx(sum(said[at : at + len(those)]), rel=2e-3),
                    )
                    assert (values[i, 1:] == -np.inf).all()
                at += len(those)
        assert row["aligned_exact"] + row["aligned_merged"] == len(read)
    assert several > 20


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_behind_a_server_it_says_the_same(tokenizer, other_dir, student_dir, kind):
    table = rows(tokenizer, pairs_tokenizer())
    here = ScoreTeacher(teacher_of(other_dir, student_dir, align=True), 4)(table)
    with serving(other_dir, kind=kind) as server:
        teacher = teacher_of(other_dir, student_dir, align=True, server=server.url, model="big", tokenizer=str(other_dir))
        assert type(teacher).runs_elsewhere(teacher.config)
        there = ScoreTeacher(teacher, 4)(table)
    assert there["topk_ids"].equals(here["topk_ids"])
    for name in ("teacher_nll", "teacher_nll_free", "topk_logprobs"):
        np.testing.assert_allclose(numbers(there, name), numbers(here, name), atol=1e-4)
    for name in ALIGNED.names:
        assert there[name].equals(here[name])


def test_a_server_is_asked_for_the_tokenizer_that_is_named(make_tree, other_dir, student_dir):
    with serving(other_dir, kind="vllm") as server:
        options = {"model": "big", "server": server.url, "align": True}

        def tree(**more: str) -> dict[str, Any]:
            return make_tree(teacher=options | more, evaluation={"kl_prompts": 0})

        prepare(load_config(tree(tokenizer=str(other_dir))), "distill")
        with pytest.raises(UserError, match=r"nothing says where it lies.*Set teacher\.tokenizer"):
            prepare(load_config(tree()), "distill")
        with pytest.raises(UserError, match=r"teacher\.tokenizer .* and big on .* into different ids"):
            prepare(load_config(tree(tokenizer=str(student_dir))), "distill")
        plain = make_tree(teacher={"model": "big", "server": server.url})
        with pytest.raises(UserError, match=r"teacher\.align: true and teacher\.tokenizer"):
            prepare(load_config(plain), "distill")


def test_what_is_behind_its_context_is_left_out(tokenizer, other_dir, student_dir):
    """And what it read stays the same; Δ-IFD's mean is of what was read."""
    table = rows(tokenizer, pairs_tokenizer(), count=2)
    whole = ScoreTeacher(teacher_of(other_dir, student_dir, align=True), 4)(table)
    teacher = teacher_of(other_dir, student_dir, align=True)
    teacher.inner.context = lambda: 30
    cut = ScoreTeacher(teacher, 4)(table)
    for before, after in zip(whole.to_pylist(), cut.to_pylist(), strict=True):
        a, b = (np.array(row["topk_logprobs"]).reshape(-1, 4) for row in (before, after))
        n = int(np.flatnonzero((b > -np.inf).any(axis=1))[-1]) + 1
        assert 0 < n < len(b)
        np.testing.assert_allclose(a[: n - 1], b[: n - 1], atol=1e-5)
        assert 0 < after["aligned_exact"] + after["aligned_merged"] < before["aligned_exact"] + before["aligned_merged"]
        assert np.isfinite(after["teacher_nll"])


def test_a_run_distils_from_it(make_tree, other_dir, student_dir, tmp_path):
    """Its counts stand in the manifest and the report; what it said is found again by a later process."""
    tree = make_tree(
        teacher={"model": str(other_dir), "align": True}, selection={"rule": "delta_ifd", "lower": -1e9, "upper": 1e9},
        loss={"top_k_mass": "tail"}, evaluation={"kl_prompts": 0},
    )  # fmt: skip
    npd.distill(tree)
    store, config = Store(tree["run_dir"]), load_config(tree)
    for g in (0, 1):
        manifest = store.check_generation(g)
        table = pa.concat_tables([store.read_part(g, p) for p in sorted(store.parts(g))])
        assert TEACHER_PROMPT not in table.column_names
        counts = manifest.aligned
        assert counts is not None
        assert counts.total == manifest.response_tokens
        assert counts.exact == numbers(table, "aligned_exact").sum()
        assert counts.merged == numbers(table, "aligned_merged").sum()
        assert 0 < counts.left_out < counts.total
        empty = (numbers(table, "topk_logprobs").reshape(-1, 4) == -np.inf).all(axis=1).sum()
        assert empty == counts.left_out
        assert np.isfinite(numbers(table, "teacher_nll")).all()
        assert np.isfinite(numbers(table, "teacher_nll_free")).all()
    assert "own tokenizer" in write_report(tree["run_dir"]).read_text()
    prompts = Prompts.open(store.path / "prompts.arrow")
    generations = Generations(config, prompts)
    earlier = earlier_answers(config, store, generations, None, 1)
    asked = generations.table(1, 0)
    assert earlier is not None
    assert earlier.contexts == asked[TEACHER_PROMPT].to_pylist()
    table = asked.append_column("response_ids", pa.array(earlier.responses, pa.list_(pa.int32())))
    for path, same in ((other_dir, True), (save_teacher(tmp_path / "exchanged", pairs_tokenizer(), seed=9), False)):
        teacher = teacher_of(path, student_dir, align=True)
        teacher.health.recall(*earlier, 4)
        with nullcontext() if same else pytest.raises(RunError, match="can't be trusted"):
            ScoreTeacher(teacher, 4)(table)


def test_one_of_several_teachers_may_have_another_tokenizer(make_tree, other_dir, teacher_dir):
    tree = make_tree(
        teacher={"model": str(teacher_dir)}, teachers={"b": {"model": str(other_dir), "align": True}},
        training={"max_steps": 2}, evaluation={"kl_prompts": 0},
    )  # fmt: skip
    npd.distill(tree)
    store = Store(tree["run_dir"])
    table = pa.concat_tables([store.read_part(0, p) for p in sorted(store.parts(0))])
    read = [value is not None for value in table["aligned_exact"].to_pylist()]
    assert read == [source == "b" for source in table["source"].to_pylist()]
    lengths = [len(ids) for ids, mine in zip(table["response_ids"].to_pylist(), read, strict=True) if mine]
    counts = store.check_generation(0).aligned
    assert counts is not None
    assert counts.total == sum(lengths)


def test_it_writes_references_in_its_own_tokens(make_tree, other_dir, tokenizer):
    """Greedily, they are what its own model writes, in the student's tokens, with the student's stop token."""
    tree = make_tree(
        teacher={"model": str(other_dir), "align": True}, data={"references": "teacher"}, training={"max_steps": 2},
        rollout={"temperature": 0.0}, evaluation={"kl_prompts": 0},
    )  # fmt: skip
    npd.sft(tree)
    store, other = Store(tree["run_dir"]), pairs_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(other_dir)
    for row in pa.concat_tables([store.read_part(0, p) for p in sorted(store.parts(0))]).to_pylist():
        ids = other(tokenizer.decode(row["prompt_ids"]))["input_ids"]
        asked = len(ids)
        while len(ids) < asked + 12 and (len(ids) == asked or ids[-1] != 0):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        text = "".join(other.convert_ids_to_tokens([id_ for id_ in ids[asked:] if id_ > 2]))
        expected = (tokenizer(text)["input_ids"] + [2] * (ids[-1] == 0))[:12] or [2]
        assert row["response_ids"] == expected
        assert (row["finish_reason"] == "stop") == (expected[-1] == 2)


TEMPLATE = (
    "{% for m in messages %}{{ '<s>' if m['role'] == 'user' else '' }}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


def test_messages_go_through_its_own_template(make_tree, student_dir, tmp_path, tokenizer):
    mine = tmp_path / "mine"
    shutil.copytree(student_dir, mine)
    tokenizer = models.load_tokenizer(ModelConfig(model=str(mine)))
    tokenizer.chat_template = TEMPLATE.replace("<s>", "#")
    tokenizer.save_pretrained(mine)
    other = pairs_tokenizer(template=TEMPLATE)
    theirs = save_teacher(tmp_path / "theirs", other)
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": [{"role": "user", "content": f"1+{i}"}]} for i in range(6)])
    tree = make_tree(
        student={"model": str(mine)}, teacher={"model": str(theirs), "align": True}, data={"train": str(data)},
        training={"max_steps": 1}, evaluation={"kl_prompts": 0},
    )  # fmt: skip
    npd.distill(tree)
    table = Store(tree["run_dir"]).path / "prompts.arrow"
    kept = pa.ipc.open_file(str(table)).read_all().to_pylist()
    for i, row in enumerate(kept):
        assert tokenizer.decode(row["prompt_ids"]) == f"#1+{i}="
        assert row[TEACHER_PROMPT] == [2, *other(f"1+{i}=")["input_ids"]]


def test_the_dry_run_says_how_it_reads(make_tree, other_dir, tmp_path, capsys):
    tree = make_tree(teacher={"model": str(other_dir), "align": True}, evaluation={"kl_prompts": 0})
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree))
    assert main(["distill", str(path), "--dry-run"], standalone_mode=False) in (0, None)
    assert "aligned by bytes" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("sections", "words"), [
    ({"teacher": {"align": False}}, r"The tokenizers of .* differ in .* teacher\.align: true"),
    ({"loss": {"top_k_mass": "renormalize"}}, r"top_k_mass renormalize does not go with teacher\.align"),
    ({"data": {"eval": "train"}, "evaluation": {"kl_prompts": 4}}, r"KL to the teacher is not defined.*kl_prompts: 0"),
    ({"evaluation": {"teacher": True, "kl_prompts": 0}}, r"evaluation\.teacher asks"),
    ({"scoring": {"top_k": 20}}, r"some must be left for the rest"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_at_the_start(make_tree, other_dir, data_file, sections, words):
    sections = {name: dict(options) for name, options in sections.items()}
    if "data" in sections:
        sections["data"]["eval"] = str(data_file)
    sections["teacher"] = {"model": str(other_dir), "align": True} | sections.get("teacher", {})
    with pytest.raises(UserError, match=words):
        npd.distill(make_tree(**sections))


def test_the_example_runs(make_tree, student_dir, other_dir, data_file, tmp_path):
    example = yaml.safe_load((Path(__file__).parent.parent / "examples/aligned.yaml").read_text())
    small = make_tree(training={"max_steps": 2})
    example["student"]["model"], example["teacher"]["model"] = str(student_dir), str(other_dir)
    example["data"], example["run_dir"] = small["data"], str(tmp_path / "example")
    example["rollout"] |= small["rollout"]
    example["scoring"]["top_k"] = 8  # of 20 tokens
    assert npd.distill(example | {name: small[name] for name in ("training", "tracking", "selection", "schedule")}).steps == 2
