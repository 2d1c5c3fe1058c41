"""What tests/test_compile.py runs in a process of its own: torch.compile cannot look through run-time type checks."""

import json
import sys
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lmgym
from agents import ppo
from agents.learner import Learner, LearnerConfig
from lmgym import LanguageModel, Policy, RolloutBuffer, Stream, TokenVectorEnv, collect

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 6, "initializer_range": 0.3}
IDS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
INNER = {
    "GPT2Config": {"n_inner": 64},
    "Qwen3Config": {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 8},
}


def adapted(lm: LanguageModel, std: float = 0.2) -> Policy:
    lm.adapters.add("policy")
    generator = torch.Generator().manual_seed(0)
    for parameter in lm.adapters.parameters("policy"):
        nn.init.normal_(parameter, std=std, generator=generator)
    return Policy(lm)


def gradients(name: str) -> dict[str, Any]:
    """How far gradients of passes of several shapes are from those that are not compiled, and the graphs they took."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**SIZES, **IDS, **INNER[name]))
    policy = adapted(LanguageModel(model, lmgym.load("probe").tokenizer))
    env = TokenVectorEnv(24, task=lmgym.tasks.Tree(), model=policy.lm, max_prompt_tokens=4, max_new_tokens=12)
    sequences = collect(policy, env, RolloutBuffer.like(env), Stream(3, 0)).sequences
    shapes = ((24, 12), (5, 9), (13, 4), (2, 12))
    parts = [replace(sequences[torch.arange(rows)].first_steps(steps), frozen_prefix=None) for rows, steps in shapes]

    def of(part: Any) -> Tensor:
        weights = torch.randn(3, *part.tokens.shape, generator=torch.Generator().manual_seed(0)) * part.is_action
        found = zip(weights, policy.evaluate(part), strict=True)
        total = torch.stack([(w * x.where(part.is_action, 0.0)).sum() for w, x in found]).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, policy.parameters())])

    plain = [of(part) for part in parts]
    policy.compile()
    far = [float((of(part) - p).norm() / p.norm()) for part, p in zip(parts, plain, strict=True)]
    return {"far": far, "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def ratios() -> dict[str, Any]:
    """Metrics of an update in bfloat16, as it is and compiled."""
    rows = []
    for compiled in (False, True):
        policy = adapted(lmgym.load("tiny", dtype="bfloat16"), std=0.02)
        env = TokenVectorEnv(16, task=lmgym.tasks.Sort(), model=policy.lm, max_new_tokens=12, kl="sampled")
        learner = Learner(policy.parameters(), LearnerConfig(compile=compiled), 0)
        rows += ppo.train(policy, env, learner, ppo.Config(updates=1, epochs=1))
    return {"ratio": rows[1]["policy/ratio_deviation"], "norms": [row["optimizer/grad_norm"] for row in rows]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(ratios() if sys.argv[1] == "ratios" else gradients(sys.argv[1])))
