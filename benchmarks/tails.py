"""Throughput where responses vary in length as those of reasoning models do: the longest of 64 is five times the mean.

    python -m benchmarks.tails             # three turns; about ten minutes on two quiet cores
    python -m benchmarks.tails --quick     # one turn of less
    python -m benchmarks.tails --device cuda --quick    # weights of 0.5 B

Student and teacher have random weights in which the stop token has the same probability everywhere: lengths are geometric,
whoever draws them. Learning rates are too small to change that. Contenders are those of `benchmarks.distillation` and
*plain*, a loop written by hand. Seconds are from loading the models to the finished student; a token counts once in each pass
in which it was trained on.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from benchmarks import peers
from benchmarks.chains import tokenizer_of
from benchmarks.common import interleaved, matmul_rate, record
from npd.store import Store

RESPONSES = 32
"""Responses in an optimiser step."""
KEEP_ALL = {"lower": -1e9, "upper": 1e9}
"""Bounds of the paper's rule that random weights do not fall out of; what it reads is read all the same."""


@dataclass(frozen=True)
class Shape:
    """Random models: of the student and of the teacher."""

    width: int
    layers: int
    teacher_width: int
    teacher_layers: int
    vocabulary: int
    spread: float = 0.1
    """Standard deviation of the weights."""
    constant: float = 0.5
    """What the embeddings' first element is."""
    wide: bool = False

    def config(self, width: int, layers: int) -> PreTrainedConfig:
        common: dict[str, Any] = {
            "vocab_size": self.vocabulary,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "initializer_range": self.spread,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.wide:
            heads = width // 64
            return LlamaConfig(intermediate_size=4864, num_attention_heads=heads, num_key_value_heads=2, **common)
        heads = width // 32
        return LlamaConfig(intermediate_size=3 * width, num_attention_heads=heads, num_key_value_heads=heads, **common)


SHAPES = {
    "small": Shape(128, 4, 192, 4, 512),
    "larger": Shape(256, 6, 384, 6, 2048),
    "0.5B": Shape(896, 24, 896, 24, 151_936, spread=0.02, constant=0.1, wide=True),
}


@torch.no_grad()
def random_model(config: PreTrainedConfig, mean: float, constant: float, seed: int, device: str) -> Any:
    """A model that stops with probability 1 / `mean` at every token, whatever it has read.

    No layer writes the first element of the residual stream, so that it stays what the embeddings say, and the stop token's
    logit reads it alone. The head is tied: all other logits have the same share of it.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0.0
    embeddings = model.get_input_embeddings().weight
    embeddings[:, 0] = constant
    embeddings[2] = 0.0
    ids = torch.randint(3, config.vocab_size, (16, 64), device=device)
    hidden_ND = model.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
    rest_N = torch.cat([(h @ embeddings.T)[:, 3:].logsumexp(-1) for h in hidden_ND.split(64)])
    low, high = -1e3, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        stops = torch.sigmoid(middle * hidden_ND[:, 0] - rest_N).mean().item()
        low, high = (middle, high) if stops < 1 / mean else (low, middle)
    embeddings[2, 0] = low
    return model


def build(home: Path, shape: Shape, mean: float, prompts: int, device: str) -> None:
    """Student, teacher, tokenizer and prompts."""
    done = home / f"done-{mean:g}-{prompts}.json"
    if done.exists():
        return
    characters = (chr(code) for code in itertools.count(0x4E00) if not 0xD800 <= code < 0xE000)
    alphabet = list(itertools.islice(characters, shape.vocabulary - 4))
    tokenizer = tokenizer_of("".join(alphabet))
    sizes = {"warm-up/student": (shape.width, shape.layers), "teacher": (shape.teacher_width, shape.teacher_layers)}
    for seed, (name, (width, layers)) in enumerate(sizes.items()):
        model = random_model(shape.config(width, layers), mean, shape.constant, seed, device)
        (model.to(torch.bfloat16) if device == "cuda" else model).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(alphabet, rng.integers(8, 17))) for _ in range(prompts)]
    (home / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    (home / "held-out.jsonl").write_text(json.dumps({"prompt": texts[0], "answer": "0"}) + "\n")
    peers.fewer_prompts(home, prompts)
    done.write_text("{}")


def task_of(home: Path, cap: int, at_once: int) -> peers.Task:
    rates = {"learning_rate": 1e-8, "final_learning_rate": 1e-9}
    return peers.Task(str(home / "teacher"), 16, cap, cap + 16, rates=rates, selection=KEEP_ALL, batch_size=at_once)


def batch_tokens(task: peers.Task, mean: float) -> int:
    """A step of npd that holds about RESPONSES of them: whole rows."""
    return max(1, round(RESPONSES * (mean + 12) / task.row)) * task.row


def lengths_of(run_dir: Path) -> list[tuple[int, int]]:
    """(prompt, response) tokens of the first generation."""
    store, pairs = Store(run_dir), []
    for file in sorted(store.part(0, 0).parent.glob("*.parquet")):
        columns = pq.read_table(file, columns=["prompt_ids", "response_ids"])
        pairs += [(len(p), len(r)) for p, r in zip(*(c.to_pylist() for c in columns.columns), strict=True)]
    return pairs


def forward(shape: tuple[int, int, int, bool], tokens: float, head: float, pairs: float) -> float:
    """Operations of matrix products in one forward pass; `pairs` are those of queries and keys that attention computes."""
    width, layers, vocabulary, wide = shape
    block = 3 * width * 4864 + 2 * width * width + 2 * width * 128 if wide else 13 * width * width
    return 2 * block * layers * tokens + 2 * vocabulary * width * head + 4 * width * layers * pairs


def counted(shape: Shape, lengths: list[tuple[int, int]], passes: int) -> dict[str, dict[str, float]]:
    """Operations for each token that is trained on, by stage: npd's, ours on policy, and a padded on-policy trainer's.

    A padded trainer decodes and reads every response at the length of the batch's longest, and its attention computes what
    is masked; the others decode and read each response alone, with causal attention.
    """
    student = (shape.width, shape.layers, shape.vocabulary, shape.wide)
    teacher = (shape.teacher_width, shape.teacher_layers, shape.vocabulary, shape.wide)
    real, trained = np.zeros(3), 0.0  # tokens, head, pairs
    padded, decoded = np.zeros(3), 0.0
    free = np.zeros(3)
    for at in range(0, len(lengths) // RESPONSES * RESPONSES, RESPONSES):
        batch = np.array(lengths[at : at + RESPONSES])
        whole = batch.sum(1)
        p, r = batch.max(0)
        trained += batch[:, 1].sum()
        real += [whole.sum(), batch[:, 1].sum(), (whole**2).sum() / 2]
        free += [(batch[:, 1] + 1).sum(), batch[:, 1].sum(), ((batch[:, 1] + 1) ** 2).sum() / 2]
        padded += [RESPONSES * (p + r), RESPONSES * r, RESPONSES * (p + r) ** 2]
        decoded += RESPONSES * (p + r) ** 2 / 2
    written, read = forward(student, *real), forward(teacher, *real)
    alone = forward(teacher, *free) + forward(student, *free)
    wide, wide_read = forward(student, *padded), forward(teacher, *padded)
    stages = {
        "npd": {"generate": written / passes, "score": (read + alone) / passes, "train": 3 * written},
        "strict": {"generate": written, "score": read, "train": 3 * written},
        "padded": {"generate": forward(student, padded[0], padded[1], decoded), "score": wide_read, "train": 3 * wide},
    }
    return {name: {stage: float(value / trained) for stage, value in each.items()} for name, each in stages.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/tails"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer prompts and steps, one turn, small models")
    parser.add_argument("--shapes", nargs="*", choices=[*SHAPES], help="default: small and larger; on a GPU 0.5B")
    parser.add_argument("--only", nargs="*", help="contenders")
    parser.add_argument("--repeat", type=int, help="turns")
    parser.add_argument("--prompts", type=int, help="that npd's generations answer")
    parser.add_argument("--steps", type=int, help="of the on-policy contenders, whose speed does not depend on it")
    parser.add_argument("--mean", type=float, default=75.0, help="length of a response")
    parser.add_argument("--cap", type=int, default=512, help="longest response")
    parser.add_argument("--name", help="of the file in benchmarks/results; default: tails, on a GPU tails-cuda")
    options = parser.parse_args()
    quick, cuda = options.quick, options.device == "cuda"
    options.name = options.name or ("tails-cuda" if cuda else "tails")
    options.repeat = options.repeat or (1 if quick else 3)
    options.prompts = options.prompts or (64 if quick and not cuda else 256)
    options.steps = options.steps or (2 if quick else 4)
    options.shapes = options.shapes or (["0.5B"] if cuda else ["small"] if quick else ["small", "larger"])
    if not cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

    runs: list[dict[str, Any]] = []
    for name in options.shapes:
        shape, home = SHAPES[name], options.out / f"{name}-{options.mean:g}"
        task = task_of(home, options.cap, 256 if cuda else 64)
        build(home, shape, options.mean, options.prompts, options.device)

        def npd(task: peers.Task = task, home: Path = home) -> dict[str, Any]:
            return peers.near_policy(task, home, 0, 0, None, batch_tokens(task, options.mean))

        def on_policy(which: Callable[..., dict[str, Any]], task: peers.Task = task, home: Path = home) -> dict[str, Any]:
            return which(task, home, 0, 0, options.steps, RESPONSES, options.steps)

        contenders: dict[str, Callable[[], dict[str, Any]]] = {
            "npd": npd,
            "strict": lambda act=on_policy: act(peers.strict),  # type: ignore[misc]
            "plain": lambda act=on_policy: act(peers.plain),  # type: ignore[misc]
        }
        if importlib.util.find_spec("trl"):
            contenders["trl-distillation"] = lambda act=on_policy: act(peers.CONTENDERS["trl-distillation"])  # type: ignore[misc]
            contenders["trl-gkd"] = lambda act=on_policy: act(peers.CONTENDERS["trl-gkd"])  # type: ignore[misc]
        wanted = [c for c in contenders if not options.only or c in options.only]
        count: dict[str, dict[str, float]] | None = None
        for turn, contender in interleaved(wanted, options.repeat):
            rate = matmul_rate(seconds=0.3) if not cuda else None
            try:
                result = contenders[contender]()
            except Exception as error:  # one that fails must not take the others' figures with it
                traceback.print_exc()
                result = {"failed": f"{type(error).__name__}: {error}"}
            if contender == "npd" and count is None:
                lengths = lengths_of(home / "npd-2")
                count = counted(shape, lengths, passes=5)
                answers = [r for _, r in lengths]
                longest = [max(answers[i : i + 64]) for i in range(0, len(answers), 64)]
                facts: dict[str, Any] = {"mean": np.mean(answers), "longest_of_64": np.mean(longest), "longest": max(answers)}
                runs.append({"shape": name, **asdict(shape), **{k: float(v) for k, v in facts.items()}, "count": count})
                print(runs[-1], flush=True)
            drop = ("curve", "publications")
            runs.append({"shape": name, "contender": contender, "turn": turn, "matmul_rate": rate})
            runs[-1] |= {k: v for k, v in result.items() if k not in drop}
            speed = f"{result['tokens'] / result['seconds']:,.0f} tokens/s" if "tokens" in result else str(result)
            print(name, turn, contender, speed, {k: round(v, 2) for k, v in result.get("stages", {}).items()}, flush=True)
            record(options.name, vars(options) | {"out": str(options.out)}, runs)


if __name__ == "__main__":
    main()
