"""Ask a finished student a few questions, with transformers alone.

python examples/ask.py DIRECTORY [QUESTION ...]
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.", "What is 7 + 5?")


def main() -> None:
    path, *questions = sys.argv[1:]
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    for question in questions or QUESTIONS:
        batch = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**batch, max_new_tokens=48, do_sample=False)
        answer = tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{question}\n  {answer.strip()}")


if __name__ == "__main__":
    main()
