"""Tokenizers and chat templates that behave as public families do, in a few lines of our own."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen2.5: ChatML with tools in the system's turn, calls as JSON, and results as the user's.
QWEN2 = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "Tools:{% for t in tools %}\n{{ t | tojson }}{% endfor %}<|im_end|>\n{% elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m.role != 'system' %}{{ '<|im_start|>' + m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}"
    '{{ \'\n<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}{{ c.function.arguments | tojson }}'
    "{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3: thoughts of earlier turns are left out, the last turn always has a block for them, an empty one where it has none.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or '' %}{% set said = m.content %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}{% else %}{{ said }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Llama 3: content is trimmed, results of tools are JSON, the system's turn has the date.
LLAMA3 = (
    "{{ bos_token }}{% set rest = messages %}{% set said = '' %}{% if messages[0].role == 'system' %}"
    "{% set said = messages[0].content | trim %}{% set rest = messages[1:] %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' }}"
    "{{ said + '<|eot_id|>' }}"
    "{% for m in rest %}{% if m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' }}"
    "{{ m.content | tojson }}{{ '<|eot_id|>' }}{% else %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Gemma: the system's words go into the first turn, the assistant is called model.
GEMMA = (
    "{{ bos_token }}{% set first = '' %}{% set rest = messages %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for p in m.content %}{{ p.text | trim }}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# Phi-3: the end of the text stands behind the end of the turn.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# DeepSeek-R1: everything before </think> is left out of replies; the generation prompt may open a thought.
R1_CLOSED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'assistant' %}"
    "{% set said = m.content %}{% if '</think>' in said %}{% set said = said.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + said + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
R1 = R1_CLOSED.replace("{{ '<|Assistant|>' }}", "{{ '<|Assistant|><think>\n' }}")
# gpt-oss: channels; the last turn returns, earlier ones end.
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}{% else %}"
    "{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# SmolLM3: the generation prompt closes an empty thought unless thinking is asked for.
SMOLLM3 = (
    "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %B %Y') + '\n' }}{% if messages[0].role == 'system' %}"
    "{{ messages[0].content }}{% endif %}{{ '<|im_end|>\n' }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if not enable_thinking %}{{ '<think>\n\n</think>\n' }}{% endif %}{{ m.content.lstrip('\n') + '<|im_end|>\n' }}"
    "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if not enable_thinking %}"
    "{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
)

# Family -> its template, what ends its text, what ends a turn, and further special tokens.
FAMILIES: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "chatml": (CHATML, "<|im_end|>", "<|im_end|>", ("<|im_start|>", "<|endoftext|>")),
    "chatml with another eos": (CHATML, "<|endoftext|>", "<|im_end|>", ("<|im_start|>",)),
    "qwen2.5": (QWEN2, "<|im_end|>", "<|im_end|>", ("<|im_start|>", "<|endoftext|>")),
    "qwen3": (QWEN3, "<|im_end|>", "<|im_end|>", ("<|im_start|>", "<|endoftext|>")),
    "llama 3": (LLAMA3, "<|end_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "gemma": (GEMMA, "<eos>", "<end_of_turn>", ("<start_of_turn>",)),
    "mistral": (MISTRAL, "</s>", "</s>", ("[INST]", "[/INST]")),
    "phi-3": (PHI3, "<|endoftext|>", "<|end|>", ("<|user|>", "<|assistant|>", "<|system|>")),
    "deepseek-r1": (R1, "<|eos|>", "<|eos|>", ("<|User|>", "<|Assistant|>")),
    "deepseek-r1 without a thought opened": (R1_CLOSED, "<|eos|>", "<|eos|>", ("<|User|>", "<|Assistant|>")),
    "gpt-oss": (GPT_OSS, "<|return|>", "<|return|>", ("<|start|>", "<|end|>", "<|message|>", "<|channel|>")),
    "smollm3": (SMOLLM3, "<|im_end|>", "<|im_end|>", ("<|im_start|>", "<|endoftext|>")),
}

MERGES = [("Ċ", "Ċ"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("2", "2"), ("=", "1"), ("Ġ", "Ġ")]


def byte_tokenizer(
    template: str | None, eos: str, special: tuple[str, ...] = (), bos: str = "<bos>"
) -> PreTrainedTokenizerFast:
    """Bytes with a few merges, over line breaks and words' borders too; `special` are added tokens that no role names."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in MERGES)])}
    backend = Tokenizer(models.BPE(words, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.add_tokens([token for token in special if token not in (bos, eos)], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def metaspace_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Characters, with a space put before a text and its words joined to their spaces, as SentencePiece does."""
    characters = ["▁", *map(chr, range(33, 127)), "\n"]
    merges = [("▁", "3"), ("▁", "a")]
    words = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *characters, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(words, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_tokens(["[INST]", "[/INST]"], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def of_family(name: str) -> PreTrainedTokenizerFast:
    template, eos, end, special = FAMILIES[name]
    return byte_tokenizer(template, eos, (*special, end))
