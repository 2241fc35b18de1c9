"""The near-policy estimate against the KL of two models whose distributions are computed in full."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch
from conftest import engine_of
from transformers import AutoModelForCausalLM

from npd.config import Sampling
from npd.losses import near_policy_kl
from npd.models import Vocabulary


@pytest.mark.parametrize("change", [0.02, 0.1])
def test_the_estimate_is_the_kl_of_the_states_that_were_visited(student_dir, tokenizer, change):
    """States are those that the snapshot visits; at each the exact KL(current || snapshot) is a sum over all tokens."""
    torch.manual_seed(3)
    snapshot = AutoModelForCausalLM.from_pretrained(student_dir)
    current = AutoModelForCausalLM.from_pretrained(student_dir)
    with torch.no_grad():
        for parameter in current.parameters():
            parameter.add_(change * parameter.std() * torch.randn_like(parameter))
    vocabulary = Vocabulary(20, (tokenizer.eos_token_id,), tokenizer.bos_token_id)
    prompts = [tokenizer(f"{n}+{n % 9}=")["input_ids"] for n in range(10, 99)]
    engine = engine_of(snapshot, vocabulary, batch_size=500)
    table = engine.answer(pa.table({"prompt_ids": prompts * 20}), Sampling(10), seed=1)

    estimates, exact = [], []
    by_length: dict[int, list[tuple[list[int], list[int], list[float]]]] = {}
    for row in table.to_pylist():
        ids, response = row["prompt_ids"] + row["response_ids"], row["response_ids"]
        by_length.setdefault((len(ids) << 8) + len(response), []).append((ids, response, row["behavior_logprobs"]))
    for rows in by_length.values():
        ids, responses, behavior = (torch.tensor(column) for column in zip(*rows, strict=True))
        start = ids.shape[1] - responses.shape[1]
        with torch.no_grad():
            log_c, log_s = (
                model.double()(input_ids=ids, use_cache=False).logits[:, start - 1 : -1].log_softmax(-1)
                for model in (current, snapshot)
            )
        exact.append((log_c.exp() * (log_c - log_s)).sum(-1).flatten())
        label = log_c.gather(2, responses[:, :, None])[:, :, 0]
        estimates.append(near_policy_kl(label, behavior.double()).flatten())
    estimate, kl = torch.cat(estimates), torch.cat(exact)
    assert len(kl) > 5000
    error = estimate - kl  # its mean is zero, given the states
    assert abs(float(error.mean())) <= 4 * float(error.std()) / len(error) ** 0.5
    assert float(error.std()) / len(error) ** 0.5 < 0.2 * float(kl.mean()), "too few samples to tell"
