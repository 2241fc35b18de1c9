"""Data in: every format gives the same prompts, nothing is lost without a word, and bad input is named."""

from __future__ import annotations

import csv
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing

from npd.demo.tokenizer import build_tokenizer
from npd.errors import UserError
from npd.prompts import SCHEMA, count_sources, load_prompts

# Fields that CSV could break: a comma, a quote; all within the demo tokenizer's characters or unknown to it.
ROWS = [
    {"prompt": "1+2=", "completion": "1+2=3;#3", "answer": "3", "source": "a"},
    {"prompt": '4*5="', "completion": "#20", "answer": "20", "source": "b, c"},
    {"prompt": "7-2=\n8", "completion": "#5", "answer": "5", "source": "a"},
]


@pytest.fixture
def chat_tokenizer():
    """The demo's, with a template: # opens a user's turn, ; an assistant's, = asks for the next."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ '#' if m.role == 'user' else ';' }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    return tokenizer


def write(path, rows):
    """`rows` in the format that the name asks for."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def load(path, tokenizer, **options):
    return load_prompts(str(path), tokenizer, **({"max_prompt_tokens": 32} | options))


def refusal(path, tokenizer, **options):
    with pytest.raises(UserError) as caught:
        load(path, tokenizer, **options)
    assert caught.value.exit_status == 2
    message = str(caught.value)
    assert "\n" not in message
    return message


def ids_of(tokenizer, text):
    return [tokenizer.convert_tokens_to_ids(character) for character in text]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_format_gives_the_same_prompts(tmp_path, tokenizer, suffix):
    prompts = load(write(tmp_path / f"data{suffix}", ROWS), tokenizer)
    assert prompts.table.schema == SCHEMA
    assert prompts.rows == len(prompts) == 3
    assert prompts.report() == []
    assert prompts.table["prompt_ids"].to_pylist() == [ids_of(tokenizer, row["prompt"]) for row in ROWS]
    assert prompts.table["completion_ids"].to_pylist() == [
        [*ids_of(tokenizer, row["completion"]), tokenizer.eos_token_id] for row in ROWS
    ]
    assert prompts.table["answer"].to_pylist() == ["3", "20", "5"]
    assert prompts.table["source"].to_pylist() == ["a", "b, c", "a"]
    assert count_sources(prompts.table) == {"a": 2, "b, c": 1}


def test_a_directory_of_files(tmp_path, tokenizer):
    folder = tmp_path / "data"
    folder.mkdir()
    for row, name in zip(ROWS, ("1.jsonl", "2.csv", "3.parquet"), strict=True):
        write(folder / name, [row])
    (folder / "README.md").write_text("not data")
    whole = load(write(tmp_path / "data.json", ROWS), tokenizer)
    assert load(folder, tokenizer).table.equals(whole.table)


def test_ids_follow_from_what_is_read(tmp_path, tokenizer):
    there = load(write(tmp_path / "a.jsonl", ROWS), tokenizer).table["prompt_id"].to_pylist()
    back = load(write(tmp_path / "b.jsonl", ROWS[::-1]), tokenizer).table["prompt_id"].to_pylist()
    assert len(set(there)) == 3
    assert there == back[::-1]


def test_prompt_alone(tmp_path, tokenizer):
    table = load(write(tmp_path / "d.jsonl", [{"prompt": "1+2="}]), tokenizer).table
    assert table["completion_ids"].to_pylist() == table["answer"].to_pylist() == [None]
    assert table["source"].to_pylist() == [""]


def test_blank_lines_and_numeric_answers(tmp_path, tokenizer):
    path = tmp_path / "d.jsonl"
    path.write_text('\n{"prompt": "1=", "answer": 1}\n\n  \n{"prompt": "2=", "answer": 2.5}\n\n')
    prompts = load(path, tokenizer)
    assert prompts.rows == 2
    assert prompts.table["answer"].to_pylist() == ["1", "2.5"]


def test_empty_cells_of_a_csv_are_no_values(tmp_path, tokenizer):
    path = tmp_path / "d.csv"
    path.write_text("prompt,completion,answer\n1=,,\n2=,#2,2\n")
    table = load(path, tokenizer).table
    assert table["answer"].to_pylist() == [None, "2"]
    assert table["completion_ids"].to_pylist()[0] is None


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_a_byte_order_mark_as_spreadsheets_write_it(tmp_path, tokenizer, suffix):
    path = write(tmp_path / f"d{suffix}", [{"prompt": "1=", "answer": "1"}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(path, tokenizer).table["answer"].to_pylist() == ["1"]


# -- messages


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_last_assistant_turn_is_the_completion(tmp_path, chat_tokenizer, suffix):
    rows = [
        {"messages": [user("1+1"), assistant("2")], "answer": "2"},
        {"messages": [user("1"), assistant("3"), user("2"), assistant("4")], "answer": "4"},
    ]
    table = load(write(tmp_path / f"d{suffix}", rows), chat_tokenizer).table
    assert table["prompt_ids"].to_pylist() == [ids_of(chat_tokenizer, text) for text in ("#1+1=", "#1;3#2=")]
    eos = chat_tokenizer.eos_token_id
    assert table["completion_ids"].to_pylist() == [[*ids_of(chat_tokenizer, text), eos] for text in ("2", "4")]


def test_messages_that_end_with_the_user(tmp_path, chat_tokenizer):
    table = load(write(tmp_path / "d.jsonl", [{"messages": [user("1+1")]}]), chat_tokenizer).table
    assert table["prompt_ids"].to_pylist() == [ids_of(chat_tokenizer, "#1+1=")]
    assert table["completion_ids"].to_pylist() == [None]


def test_prompt_and_completion_as_messages_equal_messages(tmp_path, chat_tokenizer):
    apart = [{"prompt": [user("1+1")], "completion": [assistant("2")]}]
    mixed = [{"prompt": [user("1+1")], "completion": "2"}]
    whole = [{"messages": [user("1+1"), assistant("2")]}]
    tables = [
        load(write(tmp_path / f"{i}.jsonl", rows), chat_tokenizer).table for i, rows in enumerate((apart, mixed, whole))
    ]
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


def test_a_string_does_not_go_through_the_template(tmp_path, chat_tokenizer):
    table = load(write(tmp_path / "d.jsonl", [{"prompt": "1+1"}]), chat_tokenizer).table
    assert table["prompt_ids"].to_pylist() == [ids_of(chat_tokenizer, "1+1")]


def test_no_chat_template(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", [{"prompt": "1="}, {"messages": [user("1")]}])
    message = refusal(path, tokenizer)
    assert f"{path}, line 2 gives its prompt as messages, but the student's tokenizer has no chat template" in message
    assert "add a chat_template" in message


def test_a_template_that_refuses(tmp_path, chat_tokenizer):
    path = write(tmp_path / "d.jsonl", [{"messages": [{"role": "tool", "content": "1"}]}])
    assert f"{path}, line 1: the chat template does not take these messages: no tools here" in refusal(path, chat_tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hello"}, '`messages` must be a string or a list of messages.*but it is "hello"'),
        ({"messages": []}, r"`messages` must be .*but it is \[\]"),
        ({"messages": ["hello"]}, "`messages` must be"),
        ({"messages": [{"role": "user"}]}, "string `role` and `content`"),
        ({"messages": [{"role": "user", "content": 3}]}, r'but it is \[{"role": "user", "content": 3}\]'),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "string `role` and `content`"),
        ({"messages": [{"role": None, "content": "x"}]}, "string `role` and `content`"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "`messages` holds only an assistant turn"),
        ({"prompt": 3}, "`prompt` must be a string or a list of messages.*but it is 3"),
        ({"prompt": {"role": "user", "content": "x"}}, "`prompt` must be a string or a list"),
        ({"prompt": "1=", "completion": 3}, "`completion` must be a string or a list of messages.*but it is 3"),
        ({"prompt": "1=", "completion": [user("1")]}, "`completion` must be one assistant message, or a string"),
        ({"prompt": "1=", "completion": [assistant("1"), assistant("2")]}, "`completion` must be one assistant message"),
        ({"title": "1=", "text": "x"}, "has neither `prompt` nor `messages`; it has text, title. .*data.columns"),
        ({}, "has neither `prompt` nor `messages`; it has nothing"),
    ],
)
def test_rows_of_the_wrong_shape(tmp_path, chat_tokenizer, row, message):
    path = write(tmp_path / "d.jsonl", [{"prompt": "1="}, {"prompt": "2="}, row])
    text = refusal(path, chat_tokenizer)
    assert f"{path}, line 3" in text
    assert re.search(message, text)


# -- what is left out


def test_left_out_rows_are_counted_and_named(tmp_path, tokenizer):
    rows = [
        {"prompt": "1="},
        {"prompt": ""},
        {"prompt": "1+1+1+1+1="},
        {"prompt": "1="},
        {"prompt": "  "},
        {"prompt": "2="},
        {"prompt": "1234567890="},
    ]
    path = write(tmp_path / "d.jsonl", rows)
    prompts = load(path, tokenizer, max_prompt_tokens=9)
    assert prompts.table["prompt_ids"].to_pylist() == [ids_of(tokenizer, text) for text in ("1=", "2=")]
    assert prompts.rows == 7
    assert prompts.report() == [
        f"2 left out, empty prompt: {path}, line 2, {path}, line 5",
        f"2 left out, prompt longer than data.max_prompt_tokens 9: {path}, line 3, {path}, line 7",
        f"1 left out, duplicate of an earlier prompt: {path}, line 4",
    ]


def test_length_limit_is_inclusive(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", [{"prompt": "1234", "completion": "12"}, {"prompt": "5678", "completion": "123"}])
    assert len(load(path, tokenizer, max_prompt_tokens=4)) == 2
    prompts = load(path, tokenizer, max_prompt_tokens=4, max_completion_tokens=3)  # 12 and the stop token
    assert len(prompts) == 1
    assert prompts.report() == [f"1 left out, completion longer than rollout.max_new_tokens 3: {path}, line 2"]


def test_a_long_list_is_cut_short_but_counted(tmp_path, tokenizer):
    prompts = load(write(tmp_path / "d.jsonl", [{"prompt": "1="}] * 9), tokenizer)
    (line,) = prompts.report()
    assert line.startswith("8 left out, duplicate")
    assert line.endswith("line 6, ...")


def test_an_empty_chat_message_is_an_empty_prompt(tmp_path, chat_tokenizer):
    prompts = load(write(tmp_path / "d.jsonl", [{"messages": [user(" ")]}, {"messages": [user("1")]}]), chat_tokenizer)
    assert list(prompts.dropped) == ["empty prompt"]


def test_no_prompts_left(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", [{"prompt": ""}, {"prompt": "1+1+1="}])
    message = refusal(path, tokenizer, max_prompt_tokens=3)
    assert f"No prompts are left of the 2 rows of {path}" in message
    assert "1 left out, empty prompt" in message
    assert "1 left out, prompt longer than data.max_prompt_tokens 3" in message


def test_an_empty_file(tmp_path, tokenizer):
    path = tmp_path / "d.jsonl"
    path.write_text("")
    assert "No prompts are left of the 0 rows" in refusal(path, tokenizer)


# -- bad files


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.parquet", "gone.csv", "gone.json", "deep/er/gone", "./gone"])
def test_missing_file(tmp_path, tokenizer, name):
    message = refusal(f"{tmp_path}/{name}", tokenizer)
    assert "There is no data file" in message
    assert "gone" in message
    assert "data.train" in message


def test_neither_a_file_nor_on_the_hub(tokenizer, monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = refusal("nobody/nothing", tokenizer, split="validation")
    assert "nobody/nothing is neither a file here nor a dataset on the Hub with a split 'validation'" in message
    assert "Couldn't reach the Hub" in message


def test_a_dataset_from_the_hub(tokenizer, monkeypatch):
    import datasets

    seen = []

    def given(source, split):
        seen.append((source, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", given)
    prompts = load("me/sums", tokenizer, split="test")
    assert seen == [("me/sums", "test")]
    assert prompts.table["prompt_ids"].to_pylist() == [ids_of(tokenizer, row["prompt"]) for row in ROWS]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "d.jsonl",
            '{"prompt": "1="}\n\n{"prompt": "2="\n',
            r"d\.jsonl, line 3 is not valid JSON: .* at column \d+\.",
        ),
        ("d.jsonl", '{"prompt": "1="}\n[1, 2]\n', r"d\.jsonl, line 2 must hold an object.*holds '\[1, 2\]'"),
        ("d.jsonl", '"text"\n', r"d\.jsonl, line 1 must hold an object"),
        ("d.json", '[{"prompt": "1="},\n{"prompt" "2="}]', r"d\.json, line 2 is not valid JSON"),
        ("d.json", '{\n "prompt": "1="\n}', r"d\.json must hold a list of objects; .*\.jsonl"),
        ("d.json", '[{"prompt": "1="}, 3]', r"d\.json, item 2 must be an object"),
        ("d.csv", "prompt,answer\n1=,1\n2=,3,4\n", r"d\.csv, line 3 has not as many fields as the header"),
        ("d.csv", "prompt,answer\n1=,1\n2=\n", r"d\.csv, line 3 has not as many fields as the header"),
        ("d.csv", 'prompt,answer\n"1=,1\n', r"data file .*d\.csv cannot be read"),
        ("d.csv", "title,answer\n1=,1\n", r"d\.csv, line 2 has neither `prompt` nor `messages`; it has answer, title"),
        ("d.parquet", "PAR? no", r"data file .*d\.parquet cannot be read"),
        ("d.txt", "1=", r"d\.txt is of an unknown kind; give one of \.jsonl, \.json, \.parquet, \.csv"),
    ],
)
def test_unreadable_file_or_row(tmp_path, tokenizer, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    assert re.search(message, refusal(path, tokenizer))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_file_that_is_not_utf8(tmp_path, tokenizer, suffix):
    path = tmp_path / f"d{suffix}"
    path.write_bytes(b'{"prompt": "caf\xe9="}\n')
    message = refusal(path, tokenizer)
    assert f"The data file {path} cannot be read" in message
    assert "UTF-8" in message


def test_an_unreadable_row_of_a_parquet_file(tmp_path, tokenizer):
    path = write(tmp_path / "d.parquet", [{"prompt": "1="}, {"prompt": None}])
    assert f"{path}, row 2 has neither" in refusal(path, tokenizer)


def test_a_directory_without_data(tmp_path, tokenizer):
    (tmp_path / "notes.txt").write_text("x")
    assert f"The directory {tmp_path} holds no .jsonl, .json, .parquet, .csv file" in refusal(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("need", "message"),
    [("completion", "has no completion, .* data.references: teacher"), ("answer", r"has no answer, .* Add it\.")],
)
def test_a_needed_column(tmp_path, tokenizer, need, message):
    row = {"prompt": "2=", "completion": "#2", "answer": "2"}
    path = write(tmp_path / "d.jsonl", [ROWS[0], {key: value for key, value in row.items() if key != need}])
    text = refusal(path, tokenizer, need=need)
    assert re.search(f"{re.escape(str(path))}, line 2 {message}", text)
    assert len(load(write(tmp_path / "whole.jsonl", [ROWS[0], row]), tokenizer, need=need)) == 2


def test_a_tokenizer_that_ends_every_text(tmp_path):
    """The response goes on from the prompt, so a stop token between them is taken away."""

    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    assert tokenizer("1")["input_ids"][-1] == tokenizer.eos_token_id
    table = load(write(tmp_path / "d.jsonl", ROWS[:1]), tokenizer).table
    assert table["prompt_ids"].to_pylist() == [ids_of(tokenizer, "1+2=")]
    assert table["completion_ids"].to_pylist() == [[*ids_of(tokenizer, "1+2=3;#3"), tokenizer.eos_token_id]]


def test_what_is_longer_than_any_model_reads_is_left_out_unread(tmp_path, tokenizer, monkeypatch):
    """A tokenizer takes gigabytes for it."""
    monkeypatch.setattr("npd.prompts.load.MANY_CHARACTERS", 1000)
    file = tmp_path / "long.jsonl"
    rows = [{"prompt": "1+2="}, {"prompt": "1" * 5000}, {"prompt": "3=", "completion": "1" * 5000}, {"prompt": "4="}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked: list[int] = []
    real = type(tokenizer).__call__

    def heard(self, text, *args, **options):
        asked.append(len(text))
        return real(self, text, *args, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", heard)
    prompts = load(file, tokenizer, max_prompt_tokens=16, max_completion_tokens=8)
    assert len(prompts) == 2
    assert max(asked) < 1000
    assert "1 left out, prompt longer than data.max_prompt_tokens 16" in " ".join(prompts.report())
