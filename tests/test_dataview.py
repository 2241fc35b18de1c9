"""`npd data` and `--dry-run` show what a model reads, before anything runs."""

from __future__ import annotations

import yaml
from chats import of_family
from click.testing import CliRunner
from conftest import write_jsonl
from rich.console import Console

from npd.cli import main
from npd.config import load_config
from npd.dataview import describe_rows, show_data, stops, visible
from npd.observe.display import Display
from npd.prompts import Chat, read_data

USER, REPLY = {"role": "user", "content": "1+1+1+1"}, {"role": "assistant", "content": "3"}


def config_of(tmp_path, rows, **data):
    train = write_jsonl(tmp_path / "d.jsonl", rows)
    tree = {"run_dir": "r", "student": {"model": "m"}, "teachers": {"sums": {"model": "big"}}, "teacher": {"model": "small"}}
    return load_config(tree | {"data": {"train": str(train), "max_prompt_tokens": 40, **data}})


def lines_of(config, chat, first=0, end=9, command="distill"):
    return list(describe_rows(config, command, chat, first, end))


def test_a_row_is_shown_as_the_model_reads_it(tmp_path):
    chat = Chat(of_family("chatml with another eos"))
    config = config_of(tmp_path, [{"messages": [USER, REPLY], "source": "sums"}])
    asked, _ = chat.ask("", [USER])
    answer = chat.answer("", asked, REPLY)
    end = chat.end.token
    ids = f"[{', '.join(map(str, asked.ids[:12]))}, … {', '.join(map(str, asked.ids[-12:]))}]"
    assert len(asked.ids) > 24
    assert lines_of(config, chat) == [[
        f"{config.data.train}, line 1; source 'sums', teacher big",
        f"The prompt, {len(asked.ids)} tokens {ids}:",
        "  | ⟦<|im_start|>⟧user↵\n  | 1+1+1+1⟦<|im_end|>⟧↵\n  | ⟦<|im_start|>⟧assistant↵\n  | ",
        f"The reference behind it, 2 tokens {answer}, the last '<|im_end|>' {end}:",
        "  | 3⟦<|im_end|>⟧",
    ]]  # fmt: skip


def test_why_a_row_is_left_out_or_refused_is_shown(tmp_path):
    chat = Chat(of_family("chatml"))
    rows = [{"messages": [{**USER, "name": "ann"}]}, {"prompt": "1" * 50}, {"prompt": " "}, {"messages": [USER]}]
    refused, long, empty, good = lines_of(config_of(tmp_path, rows), chat)
    assert "It is refused: " in refused[-1]
    assert "does not show `name`" in refused[-1]
    assert "It is left out: prompt longer than data.max_prompt_tokens 40." in long
    assert "Note: prompts that are strings are read as they are, not through the chat template." in long
    assert "It is left out: empty prompt." in empty
    assert good[-1] == "It has no reference: the response begins here."
    assert lines_of(config_of(tmp_path, rows), chat, 3, 4) == [good]


def test_who_says_what_stops_a_response():
    chat = Chat(of_family("chatml with another eos"), stop_ids=[5])
    told = stops(chat)
    assert len(told) == 3
    assert told[0].endswith(" 5 (a model’s configuration)")
    assert sorted(line.partition(" ")[0] + line[line.index("(") :] for line in told[1:]) == [
        "'<|endoftext|>'(tokenizer)", "'<|im_end|>'(chat template)"
    ]  # fmt: skip


def test_a_long_text_is_cut_in_the_middle_unless_it_is_asked_for():
    chat = Chat(of_family("chatml"))
    ids = chat.ids_of("a" * 5000)
    assert len(visible(chat, ids)) > 5000
    assert "[…3,500 characters…]" in visible(chat, ids, whole=False)


def test_all_of_it_in_one_view(tmp_path):
    console = Console(record=True, width=200)
    rows = [{"prompt": "1=", "source": "sums", "completion": "2"}, {"prompt": "1="}, {"prompt": "234=", "source": None}]
    config = config_of(tmp_path, rows)
    chat = Chat(of_family("chatml"))
    show_data(config, "distill", chat, Display(console), lambda: read_data(config, "distill", chat), rows=1)
    text = console.export_text()
    assert "Row 1 of data.train" in text
    assert "Row 2" not in text
    assert "A response stops at '<|im_end|>'" in text
    assert "data.train: 2 prompts of 3 rows." in text
    assert "1 left out, duplicate of an earlier prompt" in text
    assert all(["│ sums   │       1 │     big │" in text, "│ (none) │       1 │   small │" in text])
    prompt = next(line for line in text.splitlines() if line.startswith("│ prompt"))
    assert [cell.strip() for cell in prompt.strip("│").split("│")] == ["prompt", "2", "2", "2", "2", "3", "4", "4", "4", "4"]


def test_the_command_and_the_dry_run(make_tree, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(make_tree()))
    shown = CliRunner().invoke(main, ["data", str(file), "--row", "2"], catch_exceptions=False)
    assert shown.exit_code == 0
    assert "Row 2 of data.train" in shown.output
    assert "line 2; source 'b', teacher " in shown.output
    assert "A response stops at '</s>' 2 (tokenizer)." in shown.output
    dry = CliRunner().invoke(main, ["distill", str(file), "--dry-run"], catch_exceptions=False)
    assert "Row 3 of data.train" in dry.output
    assert "A response stops at '</s>' 2 (tokenizer)." in dry.output
    beyond = CliRunner().invoke(main, ["data", str(file), "--row", "99"])
    assert "--row is 99, but" in str(beyond.exception)
