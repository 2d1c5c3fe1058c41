"""Checks the outputs of every contender against plain transformers: no cache, one pass, float32.

Comparing the speed of programs that compute different results is meaningless, so nothing is timed before they agree.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.worker import Job
from lmgym.models import silence_libraries

LIMITS = {"float32": (1e-4, 1e-3), "bfloat16": (0.03, 0.6)}
"""Limits for the mean and for the largest difference, in nats; bfloat16 is compared with float32 weights."""
ROWS = 64
"""Number of rows that are compared."""


@torch.inference_mode()
def expected(job: Job, outputs: Mapping[str, Tensor], adapter: bool = True) -> dict[str, Tensor]:
    """Log-probabilities under the policy and the reference, and the reward model's scores."""
    prompts, tokens, is_action = outputs["prompts"].long(), outputs["tokens"].long(), outputs["is_action"].bool()
    ids = torch.cat([prompts, tokens], 1)
    mask = torch.cat([torch.ones_like(prompts), is_action.long()], 1)
    model: Any = AutoModelForCausalLM.from_pretrained(job.part("policy")).eval()
    model = model.to(job.device)
    found = {"reference_logp": _logp(model, ids, mask, tokens)}
    found["logp"] = found["reference_logp"]
    if adapter:
        adapted = PeftModel.from_pretrained(model, job.part("adapter")).eval()
        found["logp"] = _logp(adapted, ids, mask, tokens)
    reward = AutoModelForSequenceClassification.from_pretrained(job.part("reward"), num_labels=1).eval()
    reward = reward.to(job.device)
    found["score"] = torch.cat(
        [reward(input_ids=i, attention_mask=m).logits[:, 0] for i, m in zip(ids.split(32), mask.split(32), strict=True)]
    )
    return found


def _logp(model: torch.nn.Module, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    steps, parts = tokens.shape[1], []
    for i, m, t in zip(ids.split(16), mask.split(16), tokens.split(16), strict=True):
        logits = model(input_ids=i, attention_mask=m).logits[:, -steps - 1 : -1]
        parts.append(logits.log_softmax(-1).gather(2, t[..., None])[..., 0])
    return torch.cat(parts)


def check(name: str, job: Job, outputs: Mapping[str, Tensor], adapter: bool = True) -> dict[str, float]:
    """Compares a contender's outputs with the correct values.

    Returns:
        The largest difference of each output.

    Raises:
        AssertionError: the outputs are wrong, or the number of tokens is.
    """
    mean_limit, most_limit = LIMITS[job.dtype]
    count = int(outputs["is_action"].bool().sum())
    if not job.ends and count != job.rows * job.new_tokens:
        raise AssertionError(f"{name} wrote {count} tokens, not {job.rows} x {job.new_tokens}")
    outputs = {key: x[:ROWS].to(job.device) for key, x in outputs.items()}
    is_action, found = outputs["is_action"].bool(), {}
    with silence_libraries():
        correct = expected(job, outputs, adapter)
    for key, value in correct.items():
        if key not in outputs or (
            key == "score" and job.ends
        ):  # whether EOS itself is scored differs between contenders
            continue
        gap = (outputs[key].float() - value).abs()
        gap = gap[is_action] if gap.ndim == 2 else gap
        found[key] = float(gap.max())
        if not (gap.mean() <= mean_limit and gap.max() <= most_limit):
            raise AssertionError(
                f"{name}: {key} differs from a plain pass by {float(gap.mean()):.2g} on average and {found[key]:.2g} "
                f"at most; the limits are {mean_limit:g} and {most_limit:g}. Nothing was timed"
            )
    return found
