"""Action masks that depend on the text so far: a grammar holds alike for what is sampled, scored, measured and listed.

The oracle is plain transformers: every completion that the grammar allows, with a softmax over the allowed tokens.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model
from torch import Tensor, nn

import lmgym
from agents import ppo
from agents.evaluate import _over_vocabulary
from agents.learner import Learner, LearnerConfig
from lmgym import LanguageModel, Policy, Prompt, RolloutBuffer, Stream, TokenVectorEnv, collect
from lmgym.env import Finish
from lmgym.exact import enumerate_tree, policy_logp
from lmgym.tasks.probe import Tree
from lmgym.testing import check_policy

EOS, OPEN, CLOSE, WORD, OTHER = 1, 2, 3, 4, 5
BUDGET = 5
PROMPTS = ["c", "dc", "a", "bd", "c", "cc", "d", "ab"]


def grammar(prompt: str, chosen: Sequence[int]) -> set[int]:
    """Balanced brackets (a opens, b closes) around words (c) that end in time; after a prompt of d, one word only."""
    depth, left = chosen.count(OPEN) - chosen.count(CLOSE), BUDGET - len(chosen)
    allowed = {EOS} if depth == 0 else {CLOSE}
    if depth + 1 < left:
        allowed.add(OPEN)
    if depth < left and not (prompt.startswith("d") and WORD in chosen):
        allowed.add(WORD)
    return allowed


class Grammar:
    """The grammar as an `ActionMaskFunction`, which remembers what it was asked."""

    def __init__(self, vocabulary: int = 6):
        self.vocabulary = vocabulary
        self.asked: list[tuple[str, tuple[int, ...]]] = []

    def __call__(self, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]]) -> Tensor:
        mask = torch.zeros(len(prompts), self.vocabulary, dtype=torch.bool)
        for row, (prompt, chosen) in enumerate(zip(prompts, tokens, strict=True)):
            self.asked.append((prompt.text, tuple(chosen)))
            mask[row, list(grammar(prompt.text, list(chosen)))] = True
        return mask


def score(prompts: Any, completions: Any) -> list[float]:
    return [1.0 + len(c.text) for c in completions]


def make(lm: LanguageModel, rows: int = 8, temperature: float = 0.7, **arguments: Any) -> tuple[Policy, TokenVectorEnv]:
    if "policy" not in lm.adapters:
        lm.adapters.add("policy")
        for parameter in lm.adapters.parameters("policy"):
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    policy = Policy(lm, temperature=temperature, top_k=arguments.pop("top_k", 0))
    nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"action_mask": Grammar(), "kl": "sampled", "beta": 0.3, "score": score} | arguments
    settings = {"max_prompt_tokens": 4, "max_new_tokens": BUDGET, "temperature": temperature} | settings
    return policy, TokenVectorEnv(rows, task=Tree(), model=lm, **settings)


def plain(lm: LanguageModel, adapter: str | None, prompt: str, chosen: Sequence[int], temperature: float) -> Tensor:
    """[T, V] log-probabilities under the grammar at each step of a completion, by one plain pass without padding."""
    ids = [*(OPEN + "abcd".index(letter) for letter in prompt), *chosen]
    with torch.no_grad(), lm.adapters.using(adapter):
        logits = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    for t in range(len(chosen)):
        banned = sorted(set(range(6)) - grammar(prompt, list(chosen[:t])))
        logits[t, banned] = -torch.inf
    return (logits / temperature).log_softmax(-1)


def completions_of(prompt: str, chosen: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Every completion of the grammar."""
    found = []
    for token in sorted(grammar(prompt, list(chosen))):
        longer = (*chosen, token)
        found += [longer] if token == EOS or len(longer) == BUDGET else completions_of(prompt, longer)
    return found


@pytest.mark.parametrize("family", ["probe", "LlamaConfig"])
@pytest.mark.parametrize("fast", [True, False], ids=["fused", "transformers"])
@pytest.mark.parametrize("how", [{}, {"compact": False}, {"slots": 3}], ids=["compact", "whole", "slots"])
def test_a_rollout_is_scored_under_the_grammar(family: str, fast: bool, how: dict[str, Any]) -> None:
    lm = lmgym.load("probe") if family == "probe" else random_model(family)
    lm.fast = fast
    policy, env = make(lm, rows=24)
    buffer = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0), PROMPTS * 3, **how)
    again = policy.evaluate(buffer.sequences)
    kl, entropy = _over_vocabulary(policy, env, buffer.sequences)
    forced = 0
    for row, prompt in enumerate(PROMPTS * 3):
        chosen = buffer.tokens[row][buffer.is_action[row]].tolist()
        assert tuple(chosen) in completions_of(prompt)
        mine, reference = (plain(lm, adapter, prompt, chosen, 0.7) for adapter in ("policy", None))
        at, steps = torch.tensor(chosen)[:, None], len(chosen)
        expected, base = (logp.gather(1, at)[:, 0] for logp in (mine, reference))
        torch.testing.assert_close(buffer.logp[row, :steps], expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(again.logp[row, :steps].detach(), expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(buffer.reference_logp[row, :steps], base, atol=2e-5, rtol=1e-5)
        exact = torch.where(mine > -torch.inf, mine.exp() * (mine - reference), 0.0).sum(1)
        torch.testing.assert_close(kl[row, :steps], exact, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(entropy[row, :steps], torch.special.entr(mine.exp()).sum(1), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(again.entropy[row, :steps].detach(), entropy[row, :steps], atol=2e-5, rtol=1e-4)
        rewards = -0.3 * (expected - base)
        rewards[-1] += 1.0 + sum(token != EOS for token in chosen)
        torch.testing.assert_close(buffer.rewards[row, :steps], rewards, atol=2e-5, rtol=1e-4)
        for t in range(steps):
            if len(grammar(prompt, chosen[:t])) == 1:
                forced += 1
                assert abs(float(buffer.logp[row, t])) < 1e-6
                assert abs(float(buffer.reference_logp[row, t])) < 1e-6
    assert forced, "no state of these rollouts left a single token"


@pytest.mark.parametrize("mode", ["Disabled", "NextStep", "SameStep"])
def test_steps_and_rollouts_have_the_same_masks_and_rewards(probe: LanguageModel, mode: str) -> None:
    policy, env = make(probe)
    buffer = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0), PROMPTS)
    _, single = make(probe, rows=1, autoreset_mode=mode)
    for row, prompt in enumerate(PROMPTS):
        _, info = single.reset(seed=row, options={"prompt": prompt})
        chosen = buffer.tokens[row][buffer.is_action[row]].tolist()
        for t, token in enumerate(chosen):
            assert set(info["action_mask"][0].nonzero()[:, 0].tolist()) == grammar(prompt, chosen[:t])
            assert torch.equal(single.action_masks(), info["action_mask"].bool())
            action = lmgym.TokenAction(torch.tensor([token]), buffer.logp[row, t][None])
            _, reward, terminated, _, info = single.step(action)
            assert bool(terminated) == (t + 1 == len(chosen))
            reference = info.get("final_info", info)["reference_logp"]
            torch.testing.assert_close(reference[0], buffer.reference_logp[row, t], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(reward[0], buffer.rewards[row, t], atol=1e-5, rtol=1e-5)


def test_masks_follow_rows_that_restart_alone(probe: LanguageModel) -> None:
    """Rows of different lengths restart by themselves: each mask is that of its own row's present text."""
    _, env = make(probe, rows=3, autoreset_mode="SameStep", kl="none")
    _, info = env.reset(seed=0)
    draws, restarts = np.random.default_rng(0), 0
    for _ in range(40):
        for row, mask in enumerate(info["action_mask"]):
            chosen = env.tokens[row, : env.length[row]].tolist()
            assert set(mask.nonzero()[:, 0].tolist()) == grammar(env.prompts[row].text, chosen)
        actions = [int(draws.choice(np.flatnonzero(mask))) for mask in info["action_mask"].numpy()]
        _, _, terminated, _, info = env.step(torch.tensor(actions))
        restarts += int(terminated.sum())
    assert restarts > 10


def test_the_enumerated_tree_is_the_grammar(probe: LanguageModel) -> None:
    policy, env = make(probe)
    for prompt in ("c", "d"):
        tree = enumerate_tree(env, Prompt(prompt))
        expected = completions_of(prompt)
        assert sorted(tree.paths) == sorted(expected)
        for adapter, found in ((None, tree.reference_logp), ("policy", policy_logp(tree, policy.log_probs))):
            logp = [
                plain(probe, adapter, prompt, path, 0.7).gather(1, torch.tensor(path)[:, None]).sum()
                for path in tree.paths
            ]
            torch.testing.assert_close(found, torch.stack(logp).double(), atol=1e-5, rtol=1e-5)
            assert float(found.exp().sum()) == pytest.approx(1, abs=1e-5)


def test_the_frequencies_of_completions_are_their_probabilities(probe: LanguageModel) -> None:
    policy, env = make(probe, rows=2000, temperature=1.5)
    tree = enumerate_tree(env, Prompt("c"))
    buffer = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0, samples=2000), ["c"] * 2000)
    logp = policy_logp(tree, policy.log_probs)
    counts = dict.fromkeys(tree.paths, 0)
    for tokens, mask in zip(buffer.tokens, buffer.is_action, strict=True):
        counts[tuple(tokens[mask].tolist())] += 1
    expected = logp.exp() * 2000
    deviation = (torch.tensor(list(counts.values())) - expected) / expected.clamp(min=1).sqrt()
    assert float(deviation.abs().max()) < 5


@pytest.mark.parametrize("fast", [True, False], ids=["fused", "transformers"])
@pytest.mark.parametrize("limit", ["terminate", "truncate"])
@pytest.mark.parametrize("top_k", [0, 2])
def test_an_update_begins_at_ratio_one(probe: LanguageModel, fast: bool, limit: str, top_k: int) -> None:
    probe.fast = fast
    policy, env = make(probe, on_limit=limit, top_k=top_k)
    learner = Learner(policy.parameters(), LearnerConfig(lr=1e-3))
    rows = list(ppo.train(policy, env, learner, ppo.Config(updates=2, minibatch_rows=4)))
    assert rows[0]["policy/ratio_deviation"] < 1e-5
    assert all(np.isfinite(list(row.values())).all() for row in rows)


def test_it_keeps_the_policys_contract(probe: LanguageModel) -> None:
    policy, env = make(probe)
    check_policy(policy, env)


def test_only_running_rows_are_asked_for_and_once_for_each_state(probe: LanguageModel) -> None:
    asks = Grammar()
    policy, env = make(probe, action_mask=asks, stop=("ab",))
    buffer = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0), PROMPTS)
    states = [
        (prompt, tuple(buffer.tokens[row, :t].tolist()))
        for row, prompt in enumerate(PROMPTS)
        for t in range(int(buffer.is_action[row].sum()))
    ]
    assert sorted(asks.asked) == sorted(states)
    assert any(bool(finish == Finish.STOP) for finish in buffer.finish)


def test_without_a_function_nothing_is_recorded(probe: LanguageModel) -> None:
    policy, env = make(probe, action_mask=None)
    buffer = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0), PROMPTS)
    assert buffer.text_mask is None
    assert buffer.sequences.text_mask is None
    assert env.state._chosen_under.numel() == 0


def test_a_mask_that_leaves_nothing_names_the_row(probe: LanguageModel) -> None:
    def dead_end(prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]]) -> Any:
        rows = zip(prompts, tokens, strict=True)
        return np.array([[prompt.text != "dc" or len(chosen) < 2] * 6 for prompt, chosen in rows])

    policy, env = make(probe, action_mask=dead_end, min_new_tokens=4, kl="none")
    with pytest.raises(
        ValueError, match=r"leaves no token for row 1, after the prompt 'dc' and the 2 tokens '[abcd]{2}'"
    ):
        collect(policy, env, RolloutBuffer.like(env), Stream(0, 0), PROMPTS)
    env.reset(options={"prompt": PROMPTS})
    env.step(torch.full((8,), WORD))
    with pytest.raises(ValueError, match="leaves no token for row 1"):
        env.step(torch.full((8,), WORD))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda prompts, tokens: torch.ones(6, dtype=torch.bool),
        lambda prompts, tokens: torch.ones(len(prompts), 6),
        lambda prompts, tokens: [[2, 3]] * len(prompts),
        lambda prompts, tokens: None,
    ],
)
def test_masks_of_another_form_are_refused(probe: LanguageModel, wrong: Any) -> None:
    _, env = make(probe, action_mask=wrong)
    with pytest.raises(ValueError, match=r"action_mask returned .* booleans of shape \(8, 6\)"):
        env.reset(seed=0)


def test_the_scalar_environment_and_masks_of_arrays(probe: LanguageModel) -> None:
    def only_words(prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]]) -> Any:
        return np.array([[token == (EOS if len(chosen) == 2 else OTHER) for token in range(6)] for chosen in tokens])

    env = lmgym.TokenEnv(task=Tree(), model=probe, action_mask=only_words, max_prompt_tokens=4, max_new_tokens=4)
    _, info = env.reset(seed=0)
    for expected in (OTHER, OTHER, EOS):
        assert np.flatnonzero(info["action_mask"]).tolist() == [expected] == np.flatnonzero(env.action_masks()).tolist()
        _, _, terminated, _, info = env.step(expected)
    assert terminated
    assert env.completion().text == "dd"


def test_a_subclass_gives_its_mask_as_an_argument(probe: LanguageModel) -> None:
    class Words(TokenVectorEnv):
        def __init__(self, **arguments: Any):
            super().__init__(2, action_mask=self.only_words, **arguments)

        def only_words(self, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]]) -> Any:
            return torch.arange(6)[None].expand(len(tokens), 6) == WORD

    class Ignored(TokenVectorEnv):
        def action_masks(self) -> Any:
            return super().action_masks()

    settings: dict[str, Any] = {"task": Tree(), "model": probe, "kl": "none", "max_prompt_tokens": 4}
    env = Words(max_new_tokens=3, **settings)
    buffer = collect(Policy(probe, None, critic="none"), env, RolloutBuffer.like(env), Stream(0, 0))
    assert (buffer.tokens == WORD).all()
    assert (copy.deepcopy(env).action_masks() == env.action_masks()).all()
    with pytest.raises(ValueError, match=r"Ignored overrides action_masks.*action_mask=FUNCTION"):
        Ignored(2, **settings)
