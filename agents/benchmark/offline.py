"""Agents that learn nothing while they sample: they buy completions and labels first, through the same meter."""

from collections.abc import Iterator

import torch
from torch import Tensor

from agents.benchmark.meter import MeteredEnv
from agents.benchmark.world import World
from agents.pipeline import RLOptions, build_training
from agents.training import Batch
from lmgym.policy import Evaluation, Policy, TokenPolicy
from lmgym.preferences import Comparison
from lmgym.rollout import RolloutBuffer, Stream, collect

KEPT = 0.25
"""Share of the bought completions that `sft` imitates: those of the highest scores."""


def buy(world: World, policy: TokenPolicy, env: MeteredEnv, samples: int) -> Iterator[RolloutBuffer]:
    """Spends the whole budget on rollouts of a policy; each overwrites the one before."""
    buffer, update = RolloutBuffer.like(env), 0
    while world.tokens_left >= env.num_envs * env.max_new_tokens:
        yield collect(policy, env, buffer, Stream(world.seed, update, samples))
        update += 1


def buy_comparisons(world: World, rows: int = 64, group: int = 4) -> tuple[list[Comparison], bool]:
    """Pairs of completions of the same prompt, the best and the worst of each group by their score.

    Returns:
        The pairs, and whether their texts are complete. Texts that were cut off at the token budget are left out,
        unless most texts are.
    """
    env = world.env(max(1, rows // group) * group, kl="none")
    groups: list[tuple[str, list[tuple[float, str, bool]]]] = []
    for rollout in buy(world, Policy(world.model, None, critic="none"), env, group):
        completions = zip(rollout.score.tolist(), env.completions(), strict=True)
        texts = [(score, c.text, c.finish_reason == "stop") for score, c in completions]
        groups += [(env.prompts[i].text, texts[i : i + group]) for i in range(0, len(texts), group)]
    stopped = [stop for _, texts in groups for _, _, stop in texts]
    finished = 2 * sum(stopped) > len(stopped)
    found = []
    for prompt, texts in groups:
        scores = {text: score for score, text, stop in texts if stop or not finished}
        ranked = sorted(scores, key=lambda text: -scores[text])
        if len(ranked) > 1 and scores[ranked[0]] > scores[ranked[-1]]:
            found.append(Comparison(prompt, (ranked[0], ranked[-1])))
    return found, finished


def sft(world: World, rl: RLOptions, epochs: int = 4) -> TokenPolicy:
    """Supervised fine-tuning on the best of the completions that the budget buys: one round of rejection sampling."""
    setup = build_training(world.setting(), rl)
    policy, learner = setup.policy, setup.learner
    bought = []
    for rollout in buy(world, Policy(world.model, None, critic="none"), world.env(rl.rows, kl="none"), 1):
        copied = Batch.of(rollout, rollout.logp)[torch.arange(rollout.rows, device=policy.device)]
        bought.append((copied, rollout.score.clone()))
    scores = torch.cat([score for _, score in bought])
    least = scores.quantile(1 - KEPT)
    better = scores[scores > scores.min()]
    least = max(least, better.min()) if len(better) else scores.max() + 1
    steps = [batch[(score >= least).nonzero()[:, 0]] for batch, score in bought]
    steps = [batch for batch in steps if len(batch)]

    def loss(new: Evaluation, old: Batch) -> Tensor:
        return -new.logp

    for update in learner.updates(epochs * len(steps)):
        learner.step(policy, steps[update % len(steps)], loss)
    return policy
