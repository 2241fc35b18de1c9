"""Conversations through chat templates: nothing lost, nothing twice, and one stop token at the end of every reference."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest
import torch
from chats import CHATML, FAMILIES, GEMMA, LLAMA3, MISTRAL, QWEN2, SMOLLM3, byte_tokenizer, metaspace_tokenizer, of_family
from conftest import write_jsonl
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import npd
from npd.config import ModelConfig, TaskConfig, load_config
from npd.errors import UserError
from npd.evaluation import BenchmarkSetting
from npd.evaluation.tasks import ReasoningGym
from npd.models import load_model, load_tokenizer, save_model, shared_vocabulary, stop_at, stop_ids_of, template_difference
from npd.preflight import prepare
from npd.prompts import Chat, load_prompts, turn_end

USER = {"role": "user", "content": "2+2=1"}
THOUGHT = "<think>\nwhy\n</think>\n\n4"


def reply(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def pair(chat, prompt, answer, **options):
    """Prompt and reference as texts, special tokens included."""
    asked, _ = chat.ask("row 1", prompt, **options)
    ids = chat.answer("row 1", asked, answer if isinstance(answer, dict) else reply(answer))
    return chat.decode(asked.ids), chat.decode(ids)


def refused(chat, prompt, answer=None, **options):
    with pytest.raises(UserError, match=r"^row 1\b") as caught:
        chat.ask("row 1", prompt, **options) if answer is None else pair(chat, prompt, answer, **options)
    return str(caught.value)


def template(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


# -- the end of a turn


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_a_turn_is_found_from_the_template(family):
    tokenizer, end = of_family(family), FAMILIES[family][2]
    assert turn_end(tokenizer).token == tokenizer.convert_tokens_to_ids(end)
    assert turn_end(tokenizer).text.strip() == end
    assert Chat(tokenizer).stop_ids == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}


@pytest.mark.parametrize("content", ["4", "\n4", "the 22", "4 <b>", " =1 ", "4\n\n\n"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reference_goes_on_from_the_prompt_and_ends_with_one_stop_token(family, content):
    if family == "deepseek-r1":
        content = f"why</think>{content}"
    tokenizer, end = of_family(family), FAMILIES[family][2]
    chat = Chat(tokenizer, now=datetime(2024, 7, 26))
    asked, _ = chat.ask("row 1", [USER])
    ids = chat.answer("row 1", asked, reply(content))
    assert [token in chat.stop_ids for token in ids] == [False] * (len(ids) - 1) + [True]
    assert ids[-1] == tokenizer.convert_tokens_to_ids(end)
    prompt, reference = chat.decode(asked.ids), chat.decode(ids)
    assert prompt == chat._render("", [USER], None, None, "ask")
    assert content.strip() in reference
    if family != "deepseek-r1":  # which leaves the thought out
        assert chat._render("", [USER, reply(content)], None, None, "closed").startswith(prompt + reference)


def test_the_families_write_what_their_models_expect():
    wanted = {
        "chatml with another eos": ("<|im_start|>user\n2+2=1<|im_end|>\n<|im_start|>assistant\n", "4<|im_end|>"),
        "gemma": ("<bos><start_of_turn>user\n2+2=1<end_of_turn>\n<start_of_turn>model\n", "4<end_of_turn>"),
        "mistral": ("<bos>[INST] 2+2=1 [/INST]", " 4</s>"),
        "phi-3": ("<|user|>\n2+2=1<|end|>\n<|assistant|>\n", "4<|end|>"),
        "qwen3": ("<|im_start|>user\n2+2=1<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n4<|im_end|>"),
        "gpt-oss": ("<|start|>user<|message|>2+2=1<|end|><|start|>assistant", "<|channel|>final<|message|>4<|return|>"),
    }
    for family, (prompt, reference) in wanted.items():
        assert pair(Chat(of_family(family)), [USER], "4") == (prompt, reference), family


def test_a_template_without_a_token_behind_the_turn_ends_with_eos():
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
                               "{% if add_generation_prompt %}assistant: {% endif %}", "</s>")  # fmt: skip
    assert turn_end(tokenizer).token is None
    assert pair(Chat(tokenizer), [USER], "4") == ("user: 2+2=1\n\nassistant: ", "4</s>")


@pytest.fixture
def chat_model(tmp_path):
    """A tiny model with a ChatML tokenizer whose eos is another token than the turn's end; arguments go to its config."""

    def make(name="student", *, seed=0, template=CHATML, eos="<|endoftext|>", **named):
        tokenizer = byte_tokenizer(template, eos, ("<|im_start|>", "<|im_end|>", "<|return|>"))
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=len(tokenizer), **sizes, num_key_value_heads=1, max_position_embeddings=512,
                             tie_word_embeddings=True, initializer_range=0.3, bos_token_id=None,
                             eos_token_id=tokenizer.eos_token_id)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / name / "generation_config.json").unlink()
        if named:
            file = tmp_path / name / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | named))
        return tmp_path / name

    return make


def test_all_sources_of_stop_tokens_are_joined(chat_model):
    path = chat_model()
    tokenizer = load_tokenizer(ModelConfig(model=str(path)))
    eos, end, back = (tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>", "<|return|>"))
    for where, ids in (("config.json", [eos, back]), ("generation_config.json", back)):
        file = path / where
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | {"eos_token_id": ids}))
        model = load_model(ModelConfig(model=str(path)))
        named = stop_ids_of(ModelConfig(model=str(path)))
        assert back in named
        assert shared_vocabulary(tokenizer, model.config, stop_ids=named).stop_ids == tuple(sorted((eos, end, back)))
        assert set(shared_vocabulary(tokenizer, model.config).stop_ids) >= {eos, end}
    (path / "generation_config.json").unlink()
    assert set(shared_vocabulary(tokenizer, load_model(ModelConfig(model=str(path))).config).stop_ids) == {eos, end, back}


def test_the_saved_model_stops_where_references_end(chat_model, tmp_path):
    path = chat_model()
    tokenizer, model = load_tokenizer(ModelConfig(model=str(path))), load_model(ModelConfig(model=str(path)))
    eos, end, back = (int(tokenizer.get_vocab()[token]) for token in ("<|endoftext|>", "<|im_end|>", "<|return|>"))
    save_model(model, tokenizer, tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == sorted((eos, end))
    stop_at(model, [back, 10**6])  # as a teacher's generation_config names it
    save_model(model, tokenizer, tmp_path / "more")
    assert GenerationConfig.from_pretrained(tmp_path / "more").eos_token_id == sorted((eos, end, back))


def test_responses_of_a_run_end_at_the_turns_end(chat_model, make_tree, tmp_path):
    """ChatML with another eos: no response runs past <|im_end|>, and neither does what the finished student writes."""
    student, teacher = chat_model("student", seed=3), chat_model("teacher", seed=4)
    rows = [{"messages": [{"role": "user", "content": f"{i}+1"}, reply(str(i + 1))]} for i in range(8)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    tree = make_tree(student={"model": str(student)}, teacher={"model": str(teacher)},
                     data={"train": str(data), "max_prompt_tokens": 80}, 
                     rollout={"max_new_tokens": 40, "samples_per_prompt": 8},
                     schedule={"generations": 1, "passes": 1, "references": 0.2}, packing={"length": 256})  # fmt: skip
    result = npd.distill(tree)
    end = load_tokenizer(ModelConfig(model=str(student))).convert_tokens_to_ids("<|im_end|>")
    store = npd.store.Store(tree["run_dir"])
    written, given = (store.read_part(g, 0)["response_ids"].to_pylist() for g in (0, npd.store.REFERENCE))
    assert sum(end in ids for ids in written) > 3
    assert all(end not in ids[:-1] for ids in [*written, *given])
    assert all(ids[-1] == end for ids in given)
    assert end in GenerationConfig.from_pretrained(result.student).eos_token_id


def test_a_reference_is_cut_at_its_first_stop_token():
    """A template that puts eos behind the turn's end, and replies that carry a stop token of their own."""
    tokenizer = byte_tokenizer(CHATML.replace("<|im_end|>\n", "<|im_end|>\n</s>"), "</s>", ("<|im_start|>", "<|im_end|>"))
    chat = Chat(tokenizer)
    assert pair(chat, [USER], "4")[1] == "4<|im_end|>"
    assert pair(chat, [USER], "4<|im_end|>")[1] == "4<|im_end|>"
    assert pair(chat, "2+2=", "4</s>") == ("2+2=", "4</s>")
    assert pair(chat, "2+2=", "4<|im_end|>\n</s>") == ("2+2=", "4<|im_end|>")


@pytest.mark.parametrize("prompt", ["2+2=", [USER]])
def test_a_reply_with_a_stop_token_inside_is_refused(prompt):
    text = refused(Chat(of_family("chatml")), prompt, "4<|im_end|>\n<|im_start|>user\nand 3+3?<|im_end|>")
    assert "holds the stop token '<|im_end|>' before its end" in text


# -- the border between prompt and reference


def test_a_reply_that_begins_with_a_line_break_which_the_tokenizer_merges():
    tokenizer = of_family("chatml")
    chat = Chat(tokenizer)
    asked, _ = chat.ask("row 1", [USER])
    whole = tokenizer(template(tokenizer, [USER, reply("\n4")]), add_special_tokens=False)["input_ids"]
    assert whole[: len(asked.ids)] != asked.ids  # the two line breaks are one token there
    assert chat.decode(chat.answer("row 1", asked, reply("\n4"))) == "\n4<|im_end|>"


def test_a_string_whose_tokens_merge_across_the_border():
    assert pair(Chat(of_family("chatml")), "2+2=", "14") == ("2+2=", "14<|im_end|>")


@pytest.mark.parametrize(("prompt", "completion", "tokens"), [
    ("Q:", "3 a", ["3", "▁a"]), ("Q: ", "3 a", ["3", "▁a"]), ("Q:", " 3 a", ["▁3", "▁a"]),
])  # fmt: skip
def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_before_a_completion(prompt, completion, tokens):
    tokenizer = metaspace_tokenizer(None)
    chat = Chat(tokenizer)
    asked, _ = chat.ask("row 1", prompt)
    ids = chat.answer("row 1", asked, reply(completion))
    assert tokenizer.convert_ids_to_tokens(ids) == [*tokens, "</s>"]
    assert chat.decode([*asked.ids, *ids]) == f"{prompt}{completion}</s>"


def test_mistral_on_a_tokenizer_with_spaces_before_words():
    tokenizer = metaspace_tokenizer(MISTRAL)
    asked, _ = Chat(tokenizer).ask("row 1", [USER])
    assert tokenizer.convert_ids_to_tokens(Chat(tokenizer).answer("row 1", asked, reply("3 a"))) == ["▁3", "▁a", "</s>"]


@pytest.fixture
def marking():
    """A tokenizer that puts BOS before every text and EOS behind."""
    tokenizer = byte_tokenizer(None, "</s>")
    marks = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A </s>", special_tokens=marks)
    assert tokenizer.decode(tokenizer("<bos>1")["input_ids"]) == "<bos><bos>1</s>"
    return tokenizer


@pytest.mark.parametrize("prompt", ["<bos>2+2=", "2+2="])
def test_a_string_that_begins_with_bos_gets_no_second_one(marking, prompt):
    assert pair(Chat(marking), prompt, "4") == ("<bos>2+2=", "4</s>")


def test_questions_of_evaluation_do_not_end_with_eos(marking):
    assert Chat(marking).decode(Chat(marking).question("2+2?")) == "<bos>2+2?\n"
    config = load_config({"run_dir": "r", "student": {"model": "m"}, "data": {"train": "d"}})
    task = ReasoningGym(TaskConfig(name="basic_arithmetic", size=2), BenchmarkSetting(config, Chat(marking)))
    assert all(marking.eos_token_id not in ids for ids in task.prompts["prompt_ids"].to_pylist())


def test_a_prompt_that_ends_within_the_assistants_turn_is_gone_on_with():
    chat = Chat(of_family("chatml"))
    prompt, reference = pair(chat, [USER, reply("The answer is")], " 4")
    assert prompt.endswith("<|im_start|>assistant\nThe answer is")
    assert reference == " 4<|im_end|>"
    assert pair(Chat(of_family("llama 3")), [USER, reply("It is ")], "4")[1] == " 4<|eot_id|>"  # trimmed, then whole again


# -- thoughts


def test_thoughts_that_the_template_strips_stay_in_the_reference():
    chat = Chat(of_family("deepseek-r1 without a thought opened"))
    assert pair(chat, [USER], THOUGHT)[1] == f"{THOUGHT}<|eos|>"


def test_a_thought_that_the_prompt_opens_is_not_opened_again():
    prompt, reference = pair(Chat(of_family("deepseek-r1")), [USER], THOUGHT)
    assert prompt.endswith("<|Assistant|><think>\n")
    assert reference == "why\n</think>\n\n4<|eos|>"
    assert pair(Chat(of_family("deepseek-r1")), [USER], "why</think>4")[1] == "why</think>4<|eos|>"


def test_a_reply_without_the_thought_that_the_prompt_opens_is_refused():
    assert "but the completion has no </think>" in refused(Chat(of_family("deepseek-r1")), [USER], "4")


@pytest.mark.parametrize("family", ["qwen3", "smollm3"])
def test_a_thought_behind_a_prompt_that_closes_it_is_refused(family):
    chat = Chat(of_family(family), {"enable_thinking": False})
    assert pair(chat, [USER], "4")[0].endswith("<think>\n\n</think>\n" + "\n" * (family == "qwen3"))
    assert pair(chat, [USER], "4")[1] == "4<|im_end|>"
    assert "and the completion has another <think>" in refused(chat, [USER], THOUGHT)


def test_reasoning_content_is_written_or_refused_by_name():
    with_reasoning = reply("4", reasoning_content="because")
    chat = Chat(of_family("qwen3"))
    assert pair(chat, [USER], with_reasoning)[1] == "<think>\nbecause\n</think>\n\n4<|im_end|>"
    text = refused(Chat(of_family("chatml")), [USER], with_reasoning)
    assert 'does not show `reasoning_content` of message 2 (role assistant): "because"' in text
    assert "they part behind" in refused(Chat(of_family("qwen3"), {"enable_thinking": False}), [USER], with_reasoning)
    assert pair(Chat(of_family("gpt-oss")), [USER], reply("4", thinking="because"))[1] == (
        "<|channel|>analysis<|message|>because<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    )


@pytest.mark.parametrize("turn", [reply(THOUGHT), reply("4", reasoning_content="why")])
def test_thoughts_of_earlier_turns_that_the_template_leaves_out_are_remarked(turn):
    _, remarks = Chat(of_family("qwen3")).ask("row 1", [USER, turn, USER])
    assert remarks == ["the chat template leaves out the thoughts of earlier turns"]
    if "reasoning_content" in turn:
        assert "`reasoning_content` of message 2" in refused(Chat(of_family("chatml")), [USER, turn, USER])


def test_options_go_to_the_template_and_unknown_ones_are_refused():
    with pytest.raises(UserError, match=r"data.template_options has enable_thinkin, .* knows nothing of it"):
        Chat(of_family("qwen3"), {"enable_thinkin": False})
    with pytest.raises(UserError, match="has no chat template"):
        Chat(byte_tokenizer(None, "</s>"), {"enable_thinking": False})
    question = Chat(of_family("qwen3"), {"enable_thinking": False}).question("?")
    assert of_family("qwen3").decode(question).endswith("assistant\n<think>\n\n</think>\n\n")


# -- all that messages say

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"left": "two", "n": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
TALK = [
    {"role": "system", "content": "Be brief."},
    USER,
    reply("", tool_calls=[CALL]),
    {"role": "tool", "content": "four", "tool_call_id": "c1", "name": "add"},
]


def test_calls_results_and_tools_go_through_the_template():
    prompt, reference = pair(Chat(of_family("qwen2.5")), TALK, "4", tools=[TOOL])
    assert prompt == template(of_family("qwen2.5"), TALK, tools=[TOOL], add_generation_prompt=True)
    assert '{"name": "add", "arguments": {"left": "two", "n": 2}}' in prompt
    assert "<tool_response>\nfour" in prompt
    assert 'Tools:{"type": "function"' in prompt
    assert reference == "4<|im_end|>"


def test_a_reply_that_calls_a_tool():
    _, reference = pair(Chat(of_family("qwen2.5")), TALK[:2], reply("", tool_calls=[CALL]), tools=[TOOL])
    assert reference == '<tool_call>\n{"name": "add", "arguments": {"left": "two", "n": 2}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize(("messages", "tools", "name"), [
    (TALK[:3], None, "`tool_calls` of message 3 (role assistant)"),
    ([{**USER, "name": "ann"}], None, "`name` of message 1 (role user)"),
    ([{**USER, "weight": 0}], None, "`weight` of message 1 (role user)"),
    ([USER], [TOOL], "`tools`"),
])  # fmt: skip
def test_fields_that_the_template_does_not_show_are_refused_by_name(messages, tools, name):
    assert f"the chat template does not show {name}" in refused(Chat(of_family("chatml")), messages, tools=tools)


def test_a_message_that_the_template_leaves_out_is_refused():
    skips = byte_tokenizer(CHATML.replace("messages %}", "messages if m.role != 'tool' %}"), "<|im_end|>", ("<|im_start|>",))
    assert 'the content of message 2 (role tool): "four"' in refused(Chat(skips), [USER, {"role": "tool", "content": "four"}])
    late = [USER, reply("4"), {"role": "system", "content": "In words."}, USER]
    assert "content of message 3 (role system)" in refused(Chat(of_family("qwen2.5")), late)


def test_a_call_that_is_shown_in_part_is_refused():
    half = byte_tokenizer(QWEN2.replace("c.function.arguments | tojson", "'{}'"), "<|im_end|>", ("<|im_start|>",))
    assert "does not show `tool_calls`" in refused(Chat(half), TALK[:3])


def test_content_that_a_template_writes_as_json_or_trims_is_there():
    tokenizer = of_family("llama 3")
    talk = [USER, reply("I ask."), {"role": "tool", "content": 'a "b"\nc'}, {"role": "user", "content": "  so?  "}]
    asked, _ = Chat(tokenizer, now=datetime(2024, 7, 26)).ask("row 1", talk)
    assert '"a \\"b\\"\\nc"' in asked.text


def test_content_in_parts():
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2=1"}]
    asked, _ = Chat(of_family("gemma")).ask("row 1", [{"role": "user", "content": parts}])
    assert "2+2=1<end_of_turn>" in asked.text
    for family in ("chatml", "mistral"):  # which add texts
        text = refused(Chat(of_family(family)), [{"role": "user", "content": parts}])
        assert "the chat template does not take these messages" in text
    prints = byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}", "</s>")
    assert "has its content in parts" in refused(Chat(prints), [{"role": "user", "content": parts}])


# -- dates


def test_the_date_is_the_one_that_is_given():
    tokenizer = byte_tokenizer(LLAMA3, "<|end_of_text|>", ("<|eot_id|>",))
    asked, _ = Chat(tokenizer, now=datetime(2031, 2, 3)).ask("row 1", [USER])
    assert "Today Date: 03 Feb 2031" in asked.text


# -- teacher and student


def test_the_first_difference_of_two_chat_templates_is_told():
    student, teacher = of_family("chatml"), of_family("chatml")
    assert template_difference(student, teacher) is None
    teacher.chat_template = CHATML.replace("'\n' + m.content", "'\n\n' + m.content")
    told = template_difference(student, teacher)
    assert told is not None
    assert told.startswith(r"behind '<|im_start|>system\n' the student's writes 'Be brief.<|im_end|>\n<|im_start|>")
    assert r", the teacher's '\nBe brief.<|im_end|>\n<|im_start|>" in told
    teacher.chat_template = CHATML + "{# the same in other words #}"
    assert template_difference(student, teacher) is None


# -- properties

TEXT = st.text(st.sampled_from("ab 2=\nthe<>\\\"'é漢"), min_size=1, max_size=12).filter(str.strip)


@st.composite
def templates(draw):
    """ChatML's kin: marks of turns, spaces and line breaks around what is said, and what stands behind a turn."""
    opens, between = draw(st.sampled_from(["<|im_start|>", "", "### "])), draw(st.sampled_from(["\n", ": ", "\n\n", ""]))
    ends = draw(st.sampled_from(["<|im_end|>\n", "<|im_end|>", " </s>", "<|im_end|>\n</s>", "\n\n"]))
    said = draw(st.sampled_from(["m.content", "m.content | trim"]))
    return (
        f"{{% for m in messages %}}{{{{ '{opens}' + m.role + '{between}' + ({said}) + '{ends}' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{opens}assistant{between}' }}}}{{% endif %}}"
    ).replace("\n", "\\n")


@settings(max_examples=300)
@given(templates(), st.lists(TEXT, min_size=2, max_size=6), st.booleans())
def test_prompt_and_reference_join_to_the_templates_own_text(written, texts, system):
    tokenizer = byte_tokenizer(written, "</s>", ("<|im_start|>", "<|im_end|>"))
    roles = ["system"] * system + ["user", "assistant"] * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    assume(len(messages) > 1)
    prompt, said = messages[:-1], messages[-1]["content"]
    assume(prompt[-1]["role"] != "assistant")
    chat = Chat(tokenizer)
    asked, _ = chat.ask("row 1", prompt)
    ids = chat.answer("row 1", asked, reply(said))
    assert (
        asked.ids == tokenizer(template(tokenizer, prompt, add_generation_prompt=True), add_special_tokens=False)["input_ids"]
    )
    assert [i for i, token in enumerate(ids) if token in chat.stop_ids] == [len(ids) - 1]
    joined = chat.decode([*asked.ids, *ids])
    whole = template(tokenizer, [*prompt, reply(said)])
    end = chat.end.text or "</s>"
    assert joined.endswith(end)
    assert whole.startswith(joined if chat.end.token is not None else joined.removesuffix("</s>"))
    for message in [*prompt, reply(said)]:
        assert message["content"].strip() in joined


@settings(max_examples=100)
@given(st.sampled_from(sorted(FAMILIES)), st.lists(TEXT, min_size=1, max_size=3), TEXT)
def test_of_public_families_nothing_is_lost(family, texts, said):
    turns = [turn for text in texts for turn in ({"role": "user", "content": text}, reply(text))][:-1]
    said = f"a</think>{said}" if family == "deepseek-r1" else said
    chat = Chat(of_family(family))
    asked, _ = chat.ask("row 1", turns)
    ids = chat.answer("row 1", asked, reply(said))
    assert sum(token in chat.stop_ids for token in ids) == 1
    assert ids[-1] == chat.end.token
    joined = "".join(chat.decode([*asked.ids, *ids]).split())
    assert all(joined.count("".join(text.split())) >= 2 for text in texts[:-1])
    assert "".join(said.split()) in joined


@given(st.dictionaries(st.sampled_from(["name", "mood", "tool_calls"]), TEXT, max_size=2), TEXT, st.booleans())
def test_a_field_is_shown_or_refused(fields, text, shows):
    written = CHATML.replace("messages %}", "messages %}{{ m.mood or '' }}") if shows else CHATML
    tokenizer = byte_tokenizer(written, "<|im_end|>", ("<|im_start|>",))
    prompt = [{**USER, **fields}, reply(text), USER]
    lost = set(fields) - ({"mood"} if shows else set())
    if lost:
        assert any(f"`{name}` of message 1" in refused(Chat(tokenizer), prompt) for name in lost)
    else:
        asked, _ = Chat(tokenizer).ask("row 1", prompt)
        assert all(value in asked.text for value in fields.values())


def test_rows_are_refused_by_file_and_line(tmp_path):
    file = write_jsonl(tmp_path / "d.jsonl", [{"messages": [USER]}, {"messages": [{**USER, "name": "ann"}]}])
    with pytest.raises(UserError, match=r"d\.jsonl, line 2: the chat template does not show `name` of message 1"):
        load_prompts(str(file), of_family("chatml"), max_prompt_tokens=99)


def test_gemma_refuses_turns_that_do_not_alternate():
    tokenizer = byte_tokenizer(GEMMA, "<eos>", ("<start_of_turn>", "<end_of_turn>"))
    assert "turns must alternate" in refused(Chat(tokenizer), [USER, USER])


def test_a_run_is_told_of_a_teacher_with_another_template_and_of_its_date(chat_model, make_tree, tmp_path):
    student, teacher = chat_model("student", seed=3), chat_model("teacher", seed=4, template=CHATML + "{{ '' }}\n!")
    data = write_jsonl(tmp_path / "d.jsonl", [{"messages": [USER]}])
    tree = make_tree(student={"model": str(student)}, teacher={"model": str(teacher)}, packing={"length": 512},
                     data={"train": str(data), "max_prompt_tokens": 240})  # fmt: skip
    notes = prepare(load_config(tree), "distill").notes
    assert any(f"The chat template of {teacher} is another one than the student's: behind " in note for note in notes)
    write_jsonl(data, [{"prompt": "1="}])  # which goes through neither
    assert not any("is another one" in note for note in prepare(load_config(tree), "distill").notes)
    dated = chat_model("dated", template=LLAMA3)
    write_jsonl(data, [{"messages": [USER]}])
    notes = prepare(load_config(tree | {"student": {"model": str(dated)}}), "distill").notes
    assert any("the chat template asks for the date: this run keeps 20" in note for note in notes)


def test_a_run_with_a_date_and_template_options_goes_on_the_next_day(chat_model, make_tree, tmp_path, monkeypatch):
    class Day(datetime):
        at = 1

        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 3, cls.at)

    monkeypatch.setattr("npd.prompts.templates.datetime", Day)
    student, teacher = chat_model("student", seed=3, template=SMOLLM3), chat_model("teacher", seed=4, template=SMOLLM3)
    data = write_jsonl(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": f"{i}+1"}]} for i in range(4)])
    tree = make_tree(student={"model": str(student)}, teacher={"model": str(teacher)}, packing={"length": 256},
                     schedule={"generations": 2, "passes": 1}, data={"train": str(data), "max_prompt_tokens": 200,
                     "template_options": {"enable_thinking": True}})  # fmt: skip
    npd.refresh(tree)
    Day.at = 2
    npd.distill(tree)
    store, tokenizer = npd.store.Store(tree["run_dir"]), load_tokenizer(ModelConfig(model=str(student)))
    asked = [str(tokenizer.decode(ids)) for g in (0, 1) for ids in store.read_part(g, 0)["prompt_ids"].to_pylist()]
    assert len(asked) == 8
    assert all("Today: 01 March 2026" in text and text.endswith("<|im_start|>assistant\n") for text in asked)
    assert "enable_thinking: true" in (store.path / "config.yaml").read_text()
