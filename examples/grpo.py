"""Go on from a finished run's student with reinforcement learning: TRL's GRPO, rewarded by npd's verifiers.

    pip install 'npd[rl]'
    python examples/grpo.py RUN_DIR                       # the run's own prompts, which need an `answer` (docs/data.md)
    python examples/grpo.py RUN_DIR --data more.jsonl     # rows {"prompt": ..., "answer": ...}

The model is written to RUN_DIR/grpo. The defaults are small, for a small model on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from npd import rewards


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--data", type=Path, help="JSON lines with prompt and answer, or with prompt and reasoning_gym")
    parser.add_argument("--out", type=Path, help="directory of the model; default: RUN_DIR/grpo")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=16, help="of a step")
    parser.add_argument("--samples", type=int, default=8, help="responses to each")
    parser.add_argument("--max-new-tokens", type=int, default=72)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--kl", type=float, default=0.0, help="weight of the KL to the model it began as")
    parser.add_argument("--format", type=float, default=0.0, help="weight of a reward for marking the answer")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def train(options: argparse.Namespace, right: Callable[..., list[float | None]] = rewards.verified) -> list[dict[str, Any]]:
    """Train and save; TRL's log, one entry a step. `right` is the reward function, as TRL calls it."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    student = options.run_dir / "student"
    tokenizer = AutoTokenizer.from_pretrained(student)
    data = (
        rewards.dataset(options.run_dir, tokenizer)
        if options.data is None
        else rewards.verifiable(load_dataset("json", data_files=str(options.data), split="train"))
    )
    out = options.out or options.run_dir / "grpo"
    trainer = GRPOTrainer(
        model=str(student),
        reward_funcs=[right, rewards.marked],
        args=GRPOConfig(
            output_dir=str(out),
            max_steps=options.steps,
            per_device_train_batch_size=options.prompts * options.samples,
            num_generations=options.samples,
            max_completion_length=options.max_new_tokens,
            temperature=options.temperature,
            learning_rate=options.learning_rate,
            beta=options.kl,
            reward_weights=[1.0, options.format],
            seed=options.seed,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(out))
    log: list[dict[str, Any]] = trainer.state.log_history
    return log


def main() -> None:
    options = parse()
    log = [line for line in train(options) if "reward" in line]
    tenth = max(1, len(log) // 10)
    for name, lines in (("first", log[:tenth]), ("last", log[-tenth:])):
        share = sum(line["rewards/verified/mean"] for line in lines) / len(lines)
        print(f"Right answers in the {name} {len(lines)} steps: {share:.1%}.")
    print(f"The model is in {options.out or options.run_dir / 'grpo'}.")


if __name__ == "__main__":
    main()
