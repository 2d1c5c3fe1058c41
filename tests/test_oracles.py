"""What other libraries compute of the same thing: SB3, TRL, transformers, peft and torch, installed for the tests.

TRL's trainers are not made (they want data sets and a training set-up): their loss functions are called with a stand-in
for the trainer, and where a formula stands in the middle of a long method, its lines are run as they are installed.
"""

import inspect
import textwrap
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_gpt2, random_model
from torch import Tensor

from agents import dpo, grpo
from agents import functional as F
from lmgym import LanguageModel, Policy, RolloutBuffer, Stream, TokenVectorEnv, collect
from lmgym.models import Sequences
from lmgym.preferences import Comparison
from lmgym.sampling import log_probs
from lmgym.tasks.probe import Tree


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(lengths: list[int], steps: int) -> Tensor:
    return torch.arange(steps) < torch.tensor(lengths)[:, None]


# Stable-Baselines3 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_sb3(gamma: float, lam: float) -> None:
    from gymnasium import spaces
    from stable_baselines3.common.buffers import RolloutBuffer

    steps, rows = 7, 3
    rewards, values, last = random(rows, steps), random(rows, steps, seed=1), random(rows, seed=2)
    done = torch.tensor([True, False, True])
    buffer = RolloutBuffer(steps, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), "cpu", lam, gamma, rows)
    buffer.reset()
    for t in range(steps):
        starts = np.full(rows, t == 0)
        nothing = np.zeros((rows, 1))
        buffer.add(nothing, nothing, rewards[:, t].numpy(), starts, values[:, t], torch.zeros(rows))
    buffer.compute_returns_and_advantage(last, done.numpy())
    advantages, returns = F.gae(rewards, values, torch.ones(rows, steps, dtype=torch.bool), last * ~done, gamma, lam)
    np.testing.assert_allclose(advantages.T, buffer.advantages, atol=1e-5)
    np.testing.assert_allclose(returns.T, buffer.returns, atol=1e-5)


def test_explained_variance_equals_sb3() -> None:
    from stable_baselines3.common.utils import explained_variance

    returns, mask = random(4, 6), rows_of([6, 2, 3, 4], 6)
    values = returns + 0.5 * random(4, 6, seed=1)
    expected = explained_variance(values[mask].numpy(), returns[mask].numpy())
    assert float(F.explained_variance(values, returns, mask)) == pytest.approx(float(expected), abs=1e-5)
    assert float(F.explained_variance(values, torch.ones(4, 6), mask)) == 0.0


# TRL ---------------------------------------------------------------------------------------------------------------


def test_chosen_log_probs_equal_trls_selective_log_softmax() -> None:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits, tokens = random(3, 5, 11) * 4, torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(1))
    everything = torch.ones(11, dtype=torch.bool)
    ours = log_probs(logits, 0.7, everything)
    torch.testing.assert_close(
        ours.gather(2, tokens[..., None])[..., 0], selective_log_softmax(logits / 0.7, tokens), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(torch.special.entr(ours.exp()).sum(-1), entropy_from_logits(logits / 0.7))


def installed_lines(method: Callable[..., Any], first: str, last: str, names: dict[str, Any]) -> dict[str, Any]:
    """Runs the lines of an installed method from the one that begins with `first` up to the one before `last`."""
    lines = inspect.getsource(method).splitlines()
    begin = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    end = next(i for i, line in enumerate(lines) if i > begin and line.strip().startswith(last))
    found = dict(names)
    exec(textwrap.dedent("\n".join(lines[begin:end])), {"torch": torch}, found)
    return found


@pytest.mark.parametrize("scale", ["group", "none"])
def test_grpos_advantages_equal_trls(scale: str) -> None:
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.utils import nanstd

    returns = random(24)
    returns[4:8] = 0.5
    trainer = SimpleNamespace(
        multi_objective_aggregation="sum_then_normalize", reward_weights=torch.ones(1), scale_rewards=scale
    )
    names = {
        "self": trainer, "rewards_per_func": returns[:, None], "num_generations": 4, "device": "cpu", "nanstd": nanstd,
    }  # fmt: skip
    method = GRPOTrainer._generate_and_score_completions
    found = installed_lines(method, "unscorable_mask = ", "# Slice to keep only the local part", names)
    torch.testing.assert_close(F.group_relative(returns, 4, scale == "group"), found["advantages"])


def test_rloos_advantages_equal_trls() -> None:
    """KL in the return, by k1, summed over the completion."""
    from trl.trainer.rloo_trainer import RLOOTrainer
    from trl.trainer.utils import nanstd

    logp, reference, mask, scores = random(12, 5), random(12, 5, seed=1), rows_of([5, 1, 3] * 4, 5), random(12, seed=2)
    trainer = SimpleNamespace(normalize_advantages=False, beta=0.3)
    names = {
        "self": trainer, "rewards": scores, "num_generations": 3, "old_per_token_logps": logp, "nanstd": nanstd,
        "ref_per_token_logps": reference, "completion_mask": mask, "gather": lambda x: x,
    }  # fmt: skip
    method = RLOOTrainer._generate_and_score_completions
    found = installed_lines(method, "# Include the KL penalty in the reward", "is_std_zero = ", names)
    rewards = -0.3 * (logp - reference) * mask
    rewards[torch.arange(12), mask.sum(1) - 1] += scores
    torch.testing.assert_close(F.leave_one_out(rewards.sum(1), 3), found["advantages"])


class Accelerator:
    """One process."""

    device = torch.device("cpu")

    def gather(self, x: Tensor) -> Tensor:
        return x

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x

    gather_for_metrics = gather


def stand_in(logp: Tensor, **settings: Any) -> SimpleNamespace:
    """As much of a trainer as its loss asks for; the model says `logp`."""

    def per_token(*arguments: Any, **more: Any) -> tuple[Tensor, Tensor, None]:
        return logp, torch.zeros_like(logp), None

    return SimpleNamespace(
        _get_per_token_logps_and_entropies=per_token, aux_loss_enabled=False, accelerator=Accelerator(),
        _metrics=defaultdict(lambda: defaultdict(list)), model=SimpleNamespace(training=False), **settings,
    )  # fmt: skip


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
@pytest.mark.parametrize(
    ("ratio", "kl_loss"),
    # Not ("sequence", "ratio_k3"): TRL multiplies k3 by the ratio of the sequence there, ours by that of the token.
    [("token", "none"), ("token", "k3"), ("token", "ratio_k3"), ("sequence", "none"), ("sequence", "k3")],
)
def test_grpos_loss_and_gradient_equal_trls(aggregate: str, ratio: str, kl_loss: str) -> None:
    """Ratios on both sides of a clip that is wider above, with padding, by each published average."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    mask, advantages = rows_of([5, 2, 4, 1], 5), torch.tensor([1.0, -1.0, 0.5, -2.0])
    logp = (0.3 * random(4, 5) - 2).requires_grad_()
    drift = torch.tensor([0.5, -0.5, 0.1, -0.3])[:, None]
    old, reference = logp.detach() + drift + 0.3 * random(4, 5, seed=1), logp.detach() + 0.5 * random(4, 5, seed=2)
    loss_type = {"sequence": "grpo", "token": "bnpo", "constant": "dr_grpo"}[aggregate]
    trainer = stand_in(
        logp, top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=ratio,
        beta=0.0 if kl_loss == "none" else 0.3, loss_type=loss_type,
        epsilon_low=0.2, epsilon_high=0.28, use_vllm=False, max_completion_length=5, _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=kl_loss == "ratio_k3"),
    )  # fmt: skip
    nothing = torch.zeros(4, 0, dtype=torch.long)
    inputs = {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": torch.zeros_like(mask, dtype=torch.long),
        "completion_mask": mask.long(), "advantages": advantages, "old_per_token_logps": old,
        "ref_per_token_logps": reference,
    }  # fmt: skip
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs)  # pyright: ignore[reportArgumentType]

    now, before = logp, old
    if ratio == "sequence":
        now, before = F.sequence_logp_ratio(logp, old, mask), torch.zeros_like(old)
    per_action = F.clipped_surrogate(now, before, advantages[:, None].expand_as(mask), 0.2, 0.28)
    if kl_loss != "none":
        per_action = per_action + 0.3 * F.kl_loss(kl_loss, logp, old, reference)
    ours = (grpo.AGGREGATES[aggregate](mask) * torch.where(mask, per_action, 0.0)).sum()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logp)[0], torch.autograd.grad(theirs, logp)[0])
    outside = (now.detach() - before).exp()[mask]
    assert bool((outside < 0.8).any())
    assert bool((outside > 1.2).any())


def test_rloos_first_gradient_equals_trls() -> None:
    """TRL's ratio is the whole completion's and ours each token's: one and the same where the policy has not moved."""
    from trl.trainer.rloo_trainer import RLOOTrainer

    mask, advantages = rows_of([5, 2, 4, 1], 5), random(4, seed=1)
    logp = (random(4, 5) - 2).requires_grad_()
    nothing = torch.zeros(4, 0, dtype=torch.long)
    inputs = {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": torch.zeros_like(mask, dtype=torch.long),
        "completion_mask": mask.long(), "advantages": advantages, "old_logps": (logp.detach() * mask).sum(1),
    }  # fmt: skip
    trainer = stand_in(logp, epsilon_low=0.2, epsilon_high=0.2)
    theirs = RLOOTrainer._compute_loss(trainer, None, inputs)  # pyright: ignore[reportArgumentType]
    per_action = F.surrogate(logp, logp.detach(), advantages[:, None].expand_as(mask))
    ours = (F.sequence_sum(mask) * torch.where(mask, per_action, 0.0)).sum()
    torch.testing.assert_close(torch.autograd.grad(ours, logp)[0], torch.autograd.grad(theirs, logp)[0])


def test_dpos_loss_and_gradient_equal_trls() -> None:
    from trl.trainer.dpo_trainer import DPOTrainer

    mask = rows_of([5, 3, 4, 2, 5, 1], 5)  # three chosen completions, then three rejected ones
    logp, reference = (random(6, 5) * mask).requires_grad_(), random(6, seed=1)
    outputs = SimpleNamespace(
        log_probs=torch.where(mask, logp, 0.0), entropy=torch.zeros(6, 5), mean_logits=torch.zeros(6, 5),
        is_top1=torch.zeros(6, 5, dtype=torch.bool),
    )  # fmt: skip
    trainer = stand_in(
        logp, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=["sigmoid"],
        loss_weights=[1.0], beta=0.4, use_weighting=False, _total_train_tokens=0,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(6, 6, dtype=torch.long), "ref_chosen_logps": reference[:3],
        "completion_mask": torch.nn.functional.pad(mask.long(), (1, 0)), "ref_rejected_logps": reference[3:],
    }  # fmt: skip
    method = DPOTrainer._compute_loss
    theirs = method(trainer, lambda **_: outputs, inputs, return_outputs=False)  # pyright: ignore
    ratios = torch.where(mask, logp, 0.0).sum(1) - reference
    ours = F.dpo(ratios[:3], ratios[3:], 0.4).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logp)[0], torch.autograd.grad(theirs, logp)[0])


# transformers and peft ---------------------------------------------------------------------------------------------


def moved(lm: LanguageModel, **settings: Any) -> Policy:
    lm.adapters.add("policy", rank=4)
    generator = torch.Generator().manual_seed(0)
    for parameter in lm.adapters.parameters("policy"):
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return Policy(lm, critic="none", **settings)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8, "temperature": 1.3}], ids=str
)
def test_generate_and_its_transition_scores_equal_the_policys(architecture: str, settings: dict[str, Any]) -> None:
    """transformers samples left-padded prompts of two lengths; the policy gives its tokens the same log-probabilities.

    Truncation by both libraries leaves the same tokens in.
    """
    from transformers import GenerationConfig

    lm = random_gpt2(positions=16) if architecture == "gpt2" else random_model("LlamaConfig")
    policy = moved(lm, **settings)
    prompts = torch.tensor([[0, 2, 3], [4, 5, 2], [0, 0, 5]] * 8)
    config = GenerationConfig(
        do_sample=True, max_new_tokens=6, min_new_tokens=6, output_scores=True, return_dict_in_generate=True,
        temperature=settings.get("temperature", 1.0), top_k=settings.get("top_k", 0), top_p=settings.get("top_p", 1.0),
        eos_token_id=1, pad_token_id=0, bad_words_ids=[[0]],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad(), lm.adapters.using("policy"):
        torch.manual_seed(0)
        model: Any = lm.model
        found = model.generate(input_ids=prompts, attention_mask=(prompts != 0).long(), generation_config=config)
        theirs = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    tokens = found.sequences[:, prompts.shape[1] :]
    allowed = torch.ones(6, lm.vocabulary, dtype=torch.bool)
    allowed[:, :2] = False
    sequences = Sequences(prompts, prompts != 0, tokens, torch.ones_like(tokens, dtype=torch.bool), allowed)
    ours = policy.evaluate(sequences).logp.detach()
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert len(tokens.unique()) > 2


def test_a_greedy_rollout_is_what_generate_writes(probe: LanguageModel) -> None:
    from transformers import GenerationConfig

    policy = moved(probe, top_k=1)
    env = TokenVectorEnv(32, task=Tree(), model=probe, max_prompt_tokens=1, max_new_tokens=6, kl="none")
    buffer = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0))
    config = GenerationConfig(
        do_sample=False, max_new_tokens=6, eos_token_id=1, pad_token_id=0, bad_words_ids=[[0]],
    )  # fmt: skip
    with torch.no_grad(), probe.adapters.using("policy"):
        model: Any = probe.model
        prompts = buffer.sequences.prompt_ids
        found = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
    written = torch.nn.functional.pad(found[:, 1:], (0, 7 - found.shape[1]))
    assert torch.equal(written, torch.where(buffer.is_action, buffer.tokens, 0))
    assert not buffer.logp.any(), "one token is left to choose from"


def test_log_ratios_of_dpo_equal_plain_peft_and_trl() -> None:
    """Both log-probabilities from peft's own switch of the adapter, one text at a time and so without padding."""
    from trl.trainer.utils import selective_log_softmax

    lm = random_gpt2(positions=16)
    policy = moved(lm)
    env = TokenVectorEnv(2, task=Tree(), model=lm, max_prompt_tokens=4, max_new_tokens=6, kl="none")
    comparisons = [Comparison("ab", ("cdc", "d", "ab")), Comparison("c", ("", "dd"))]
    chosen, rejected = dpo.log_ratios(policy, env, dpo.encode_pairs(policy, comparisons, dpo.Config()))

    def logp(text: str, prompt: str) -> Tensor:
        ids = torch.tensor([[*lm.text.encode(prompt), *(lm.text.encode(text) if text else []), 1]])
        model: Any = lm.model
        per_token = selective_log_softmax(model(input_ids=ids).logits[:, :-1], ids[:, 1:])
        return per_token[0, len(prompt) - 1 :].sum()

    expected = []
    with torch.no_grad():
        for c in comparisons:
            with lm.adapters.using("policy"):
                now = [logp(text, c.prompt) for text in c.ranked]
            model: Any = lm.model
            with model.disable_adapter():
                before = [logp(text, c.prompt) for text in c.ranked]
            ratios = [a - b for a, b in zip(now, before, strict=True)]
            expected += [(ratios[i], ratios[j]) for i in range(len(ratios)) for j in range(i + 1, len(ratios))]
    assert len(expected) == 3 + 1
    torch.testing.assert_close(chosen.detach(), torch.stack([a for a, _ in expected]), atol=1e-5, rtol=0)
    torch.testing.assert_close(rejected.detach(), torch.stack([b for _, b in expected]), atol=1e-5, rtol=0)
    assert float(chosen.detach().abs().max()) > 0.1
