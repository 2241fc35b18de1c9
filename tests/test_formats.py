"""Formats and layouts in the wild: read as what they say, or refused with the remedy that fits."""

from __future__ import annotations

import csv
import gzip
import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chats import of_family
from conftest import write_jsonl

from npd.config import load_config
from npd.errors import UserError
from npd.evaluation import BenchmarkSetting
from npd.evaluation.answers import Answers
from npd.prompts import Chat, accepted_answers, load_prompts, read_data

USER, REPLY = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}
ASKED = "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def chatml():
    return of_family("chatml")


def load(path, tokenizer, **options):
    return load_prompts(str(path), tokenizer, **({"max_prompt_tokens": 99} | options))


def rows_of(tmp_path, tokenizer, *rows, **options):
    return load(write_jsonl(tmp_path / "d.jsonl", rows), tokenizer, **options)


def refusal(tmp_path, tokenizer, *rows, **options):
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path, tokenizer, *rows, **options)
    return str(caught.value)


def texts(prompts, tokenizer):
    """(prompt, completion) of every row, special tokens included."""
    columns = prompts.table["prompt_ids"].to_pylist(), prompts.table["completion_ids"].to_pylist()
    return [tuple(None if ids is None else tokenizer.decode(ids) for ids in pair) for pair in zip(*columns, strict=True)]


# -- packed files and datasets


@pytest.mark.parametrize("packing", ["gz", "zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_packed_files(tmp_path, tokenizer, packing, suffix):
    rows = [{"prompt": f"{i}+1=", "answer": "7"} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    text = {".jsonl": lines, ".json": json.dumps(rows), ".csv": "prompt,answer\n" + "".join(f"{i}+1=,7\n" for i in range(3))}
    content = text[suffix].encode()
    packed = gzip.compress(content) if packing == "gz" else pa.Codec("zstd").compress(content, asbytes=True)
    path = tmp_path / f"d{suffix}.{packing}"
    path.write_bytes(packed)
    assert load(path, tokenizer).table["answer"].to_pylist() == ["7"] * 3
    path.write_bytes(packed[:-9])
    with pytest.raises(UserError, match=rf"The data file .*d{suffix}\.{packing} cannot be read"):
        load(path, tokenizer)


def test_a_packed_file_of_several_pieces(tmp_path, tokenizer):
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(b"".join(gzip.compress(f'{{"prompt": "{i}="}}\n'.encode()) for i in range(3)))
    assert len(load(path, tokenizer)) == 3
    assert len(load(tmp_path, tokenizer)) == 3  # in a directory too


def test_json_lines_in_a_json_file(tmp_path, tokenizer):
    path = tmp_path / "d.json"
    path.write_text('\n{"prompt": "1="}\n{"prompt": "2="}\n')
    assert len(load(path, tokenizer)) == 2
    path.write_text('{"prompt": "1="}\n{"prompt": \n')
    with pytest.raises(UserError, match=r"d\.json, line 2 is not valid JSON"):
        load(path, tokenizer)


def test_a_csv_cell_over_pythons_limit(tmp_path, tokenizer):
    path = tmp_path / "d.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "note"], ["1=", "x" * 200_000]])
    assert len(load(path, tokenizer)) == 1


@pytest.fixture
def saved(tmp_path):
    """Directories of `save_to_disk`: one split, and several."""
    sets = {
        name: datasets.Dataset.from_list([{"prompt": f"{n + i}="} for i in range(10)])
        for name, n in (("train", 10), ("test", 50))
    }
    sets["train"].save_to_disk(tmp_path / "one")
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "several")
    return tmp_path


@pytest.mark.parametrize(("name", "split", "first", "count"), [
    ("one", "train", "10=", 10), ("one", "train[2:5]", "12=", 3), ("several", "test", "50=", 10),
    ("several", "test[50%:]", "55=", 5), ("several", "train[:2]+test[:3]", "10=", 5),
])  # fmt: skip
def test_a_directory_of_save_to_disk(saved, tokenizer, name, split, first, count):
    prompts = load(saved / name, tokenizer, split=split)
    assert len(prompts) == count
    assert tokenizer.decode(prompts.table["prompt_ids"][0].as_py()) == first


def test_a_split_that_a_saved_dataset_has_not(saved, tokenizer):
    with pytest.raises(UserError, match=r"several has no split 'dev' .*it has train, test\. Set data\.split"):
        load(saved / "several", tokenizer, split="dev")


def test_a_damaged_directory_of_save_to_disk(saved, tokenizer):
    next((saved / "one").glob("*.arrow")).write_bytes(b"no")
    with pytest.raises(UserError, match=r"The dataset in .*one cannot be read"):
        load(saved / "one", tokenizer)


def test_a_copy_of_a_hub_repository(tmp_path, tokenizer):
    (tmp_path / "repo" / "data").mkdir(parents=True)
    pq.write_table(pa.table({"prompt": ["1=", "2="]}), tmp_path / "repo" / "data" / "train-00000-of-00001.parquet")
    assert len(load(tmp_path / "repo", tokenizer)) == 2


def test_a_dataset_with_several_configurations(tokenizer, monkeypatch):
    asked = []

    def give(source, *config, split):
        if not config:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']")
        asked.append((source, *config, split))
        return datasets.Dataset.from_list([{"prompt": "1="}])

    monkeypatch.setattr(datasets, "load_dataset", give)
    with pytest.raises(UserError, match=r"\['main', 'socratic'\] It has several configurations: set data\.config"):
        load("openai/sums", tokenizer)
    assert len(load("openai/sums", tokenizer, config="main", split="train[:1%]")) == 1
    assert asked == [("openai/sums", "main", "train[:1%]")]


def test_a_slice_of_a_file(tmp_path, tokenizer):
    rows = [{"prompt": f"{i}="} for i in range(9)]
    prompts = rows_of(tmp_path, tokenizer, *rows, split="train[2:4]")
    assert texts(prompts, tokenizer) == [("2=", None), ("3=", None)]
    assert "a slice by row numbers alone" in refusal(tmp_path, tokenizer, *rows, split="train[:10%]")
    assert "data.config is 'main'" in refusal(tmp_path, tokenizer, *rows, config="main")


# -- layouts


@pytest.mark.parametrize(("row", "note"), [
    ({"conversations": [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]}, "`conversations` is read"),
    ({"conversation": [USER, REPLY]}, "`conversation` is read as messages"),
    ({"instruction": "1+1", "input": "", "output": "2"}, "`instruction` goes through the chat template as a user's turn"),
    ({"problem": "1+1", "solution": "2", "answer": "2"}, "`problem` goes through .*, `solution` is the completion"),
    ({"messages": json.dumps([USER, REPLY])}, None),
    ({"prompt": json.dumps([USER]), "completion": "2"}, None),
    ({"prompt": "1+1", "messages": [USER, REPLY]}, "`messages` is read, and `prompt`, which repeats its first turn, is not"),
])  # fmt: skip
def test_a_known_layout_is_read_and_said_aloud(tmp_path, chatml, row, note):
    prompts = rows_of(tmp_path, chatml, row)
    assert texts(prompts, chatml) == [(ASKED, "2<|im_end|>")]
    assert len(prompts.notes) == (note is not None)
    if note is not None:
        assert re.search(rf"^{note}.* \(1 row, first .*d\.jsonl, line 1\)\.$", prompts.notes[0])


def test_alpaca_with_input_system_and_history(tmp_path, chatml):
    row = {"instruction": "Add.", "input": "1+1", "output": "2", "system": "Be brief.", "history": [["0+1?", "1"]]}
    ((prompt, reference),) = texts(rows_of(tmp_path, chatml, row), chatml)
    said = ["system\nBe brief.", "user\n0+1?", "assistant\n1", "user\nAdd.\n\n1+1"]
    assert prompt == "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in said) + "<|im_start|>assistant\n"
    assert reference == "2<|im_end|>"


def test_questions_alone(tmp_path, chatml):
    assert texts(rows_of(tmp_path, chatml, {"question": "1+1", "level": 3}), chatml) == [(ASKED, None)]


def test_a_layout_without_a_chat_template_is_a_line(tmp_path, tokenizer):
    prompts = rows_of(tmp_path, tokenizer, {"question": "1+1=", "answer": "2"})
    assert prompts.table["answer"].to_pylist() == ["2"]
    assert "`question` is the prompt, with a line break behind it" in prompts.notes[0]


def test_an_answer_with_its_reasoning_as_gsm8k_has_it(tmp_path, chatml):
    prompts = rows_of(tmp_path, chatml, {"question": "1+1", "answer": "One and one.\n#### 2"})
    assert texts(prompts, chatml) == [(ASKED, "One and one.\n#### 2<|im_end|>")]
    assert prompts.table["answer"].to_pylist() == ["2"]
    assert "what stands behind its #### the answer" in prompts.notes[0]


def test_sharegpt_with_calls_and_results(tmp_path):
    qwen = of_family("qwen2.5")
    row = {"conversations": [
        {"from": "system", "value": "Be brief."}, {"from": "human", "value": "1+1"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "two"}, {"from": "gpt", "value": "2"}],
        "tools": '[{"type": "function", "function": {"name": "add"}}]'}  # fmt: skip
    ((prompt, reference),) = texts(rows_of(tmp_path, qwen, row, max_prompt_tokens=999), qwen)
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in prompt
    assert "<tool_response>\ntwo" in prompt
    assert reference == "2<|im_end|>"


def test_columns_of_other_names(tmp_path, tokenizer):
    row = {"q": "1+1=", "a": 2, "topic": "sums", "prompt": None}
    columns = {"prompt": "q", "answer": "a", "source": "topic"}
    prompts = rows_of(tmp_path, tokenizer, row, columns=columns)
    assert prompts.table.select(["source", "answer"]).to_pylist() == [{"source": "sums", "answer": "2"}]
    assert texts(prompts, tokenizer) == [("1+1=", None)]
    assert "data.columns names 'b', but no row" in refusal(tmp_path, tokenizer, row, columns=columns | {"completion": "b"})


@pytest.mark.parametrize(("row", "message"), [
    ({"messages": "[{'role': 'user', 'content': '1'}]"}, "Python's own notation"),
    ({"prompt": "[{'role': 'user', 'content': '1'}]"}, "Python's own notation"),
    ({"conversations": [{"from": "martian", "value": "1"}]}, "a message is from 'martian'"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "content of type 'image'"),
    ({"prompt": "1=", "answer": {"value": 1}}, "`answer` must be a text or a number, or a list"),
    ({"prompt": "1=", "answer": [["1"]]}, "`answer` must be a text or a number, or a list"),
    ({"prompt": "1=", "tools": [{"name": "add"}]}, "a string cannot show `tools`"),
    ({"prompt": "1=", "completion": [REPLY | {"reasoning_content": "x"}]}, "`completion` cannot show reasoning_content"),
    ({"messages": [USER, REPLY], "completion": "3"}, "`messages` ends with a reply, and `completion` gives another one"),
    ({"messages": [USER, REPLY | {"tool_calls": "add"}]}, "`tool_calls` must be a list of calls"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path, chatml, row, message):
    text = refusal(tmp_path, chatml, {"messages": [USER]}, row)
    assert "d.jsonl, line 2" in text
    assert message in text


def test_nulls_that_arrow_gives_every_message_are_no_fields(tmp_path, chatml):
    rows = [{"messages": [{**USER, "name": None, "tool_calls": None}, {**REPLY, "name": None, "tool_calls": None}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert texts(load(tmp_path / "d.parquet", chatml), chatml) == [(ASKED, "2<|im_end|>")]


def test_one_part_of_text_is_a_string_and_calls_may_hold_their_arguments_as_json(tmp_path):
    qwen = of_family("qwen2.5")
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "1+1"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
    }
    ((prompt, reference),) = texts(rows_of(tmp_path, qwen, row), qwen)
    assert prompt == ASKED.removesuffix("\n") + "\n"
    assert reference.endswith('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>')


# -- dropped or doubled


@pytest.mark.parametrize(("source", "read"), [(0, "0"), (False, "False"), (None, ""), ("", ""), ("a", "a")])
def test_only_null_is_no_source(tmp_path, tokenizer, source, read):
    assert rows_of(tmp_path, tokenizer, {"prompt": "1=", "source": source}).table["source"].to_pylist() == [read]


def test_any_of_a_lists_answers_counts(tmp_path, tokenizer):
    rows = {"prompt": "1=", "answer": [1, "one"]}, {"prompt": "2=", "answer": []}, {"prompt": "3=", "answer": "[1, 2]"}
    held_out = rows_of(tmp_path, tokenizer, *rows)
    first, second, third = held_out.table["answer"].to_pylist()
    assert accepted_answers(first) == ["1", "one"]
    assert second is None
    assert accepted_answers(third) == ["[1, 2]"]
    config = load_config({"run_dir": "r", "student": {"model": "m"}, "data": {"train": "t"},
                          "evaluation": {"tasks": [{"name": "answer", "size": 1}]}})  # fmt: skip
    task = Answers(config.evaluation.tasks[0], BenchmarkSetting(config, Chat(tokenizer), held_out))
    assert [task.score(0, text) for text in ("answer: one", "#1", "#2")] == [1.0, 1.0, 0.0]


def test_prompt_and_messages_that_differ(tmp_path, chatml):
    prompts = rows_of(tmp_path, chatml, {"prompt": "2+2=", "messages": [USER, REPLY]})
    assert texts(prompts, chatml) == [("2+2=", None)]
    assert "both `prompt` and `messages` are there: `prompt` is read" in prompts.notes[0]
    assert "strings are read as they are, not through the chat template" in prompts.notes[1]


def test_for_sft_another_completion_of_the_same_prompt_is_data(tmp_path, tokenizer):
    rows = [{"prompt": "1=", "completion": c} for c in ("1", "2", "1")]
    assert [c for _, c in texts(rows_of(tmp_path, tokenizer, *rows, need="completion"), tokenizer)] == ["1</s>", "2</s>"]
    assert len(rows_of(tmp_path, tokenizer, *rows)) == 1


def test_a_completion_that_nothing_asks_for_does_not_stop_a_run(tmp_path):
    r1 = of_family("deepseek-r1")
    row = {"messages": [USER, REPLY]}
    assert "has no </think>" in refusal(tmp_path, r1, row)
    prompts = rows_of(tmp_path, r1, row, lenient=True)
    assert texts(prompts, r1)[0][1] is None
    assert "the completion can't be written as a reference, which nothing asks for here (1 row, first " in prompts.notes[0]


def test_a_conversation_with_several_turns_and_results_is_a_prompt(tmp_path):
    qwen = of_family("qwen2.5")
    talk = [USER, REPLY, USER, {"role": "tool", "content": "two"}]
    ((prompt, reference),) = texts(rows_of(tmp_path, qwen, {"messages": talk}, max_prompt_tokens=999), qwen)
    assert prompt == qwen.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert reference is None


def test_template_options_of_a_row_and_of_the_configuration(tmp_path):
    qwen = of_family("qwen3")
    plain = {"messages": [USER]}
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    closed = f"{ASKED}<think>\n\n</think>\n\n"
    assert [p for p, _ in texts(rows_of(tmp_path, qwen, plain, plain | options), qwen)] == [ASKED, closed]
    train = write_jsonl(tmp_path / "t.jsonl", [plain])
    config = load_config({"run_dir": "r", "student": {"model": "m"}, "data": {"train": str(train), "eval": str(train),
                          "template_options": {"enable_thinking": False}}})  # fmt: skip
    chat = Chat(qwen, config.data.template_options)
    for prompts in read_data(config, "distill", chat):
        assert prompts is not None
        assert texts(prompts, qwen) == [(closed, None)]
    assert qwen.decode(chat.question("1+1")) == closed
