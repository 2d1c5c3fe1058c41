"""The MDP: transitions, rewards, masks and errors, against a player in plain Python and plain transformers."""

import copy
import inspect
import itertools
import pickle
import re
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import random_gpt2
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils import seeding
from torch import Tensor

import lmgym
from lmgym import Completion, LanguageModel, Policy, Prompt, TokenAction, TokenEnv, TokenVectorEnv
from lmgym.env import Finish
from lmgym.reward import AdaptiveKL
from lmgym.tasks.probe import Tree

PAD, EOS, A, B, C, D = range(6)
PROMPTS = ["a", "abc", "bd", "dcba", "cc", "d", "bca", "ad"]


def score(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    return [0.1 * len(c.text) + 0.5 * ("d" in c.text) - 0.2 for c in completions]


def make(lm: LanguageModel, rows: int = 8, **arguments: Any) -> TokenVectorEnv:
    defaults: dict[str, Any] = {
        "task": Tree(), "score": score, "max_prompt_tokens": 4, "max_new_tokens": 6, "kl": "none", "beta": 0.3
    }  # fmt: skip
    return TokenVectorEnv(rows, model=lm, **(defaults | arguments))


def random_tokens(rows: int, steps: int, seed: int = 0) -> Tensor:
    """Ends rarely, and holds banned tokens (pad) and early ends, which agents that ignore masks do choose."""
    weights = torch.tensor([0.5, 1.0, 2.0, 2.0, 2.0, 1.0])
    return torch.multinomial(weights, rows * steps, True, generator=torch.Generator().manual_seed(seed)).view(
        rows, steps
    )


def play(tokens: list[int], budget: int, shortest: int, stops: Sequence[str]) -> tuple[str, str, int]:
    """Text, finish reason and length of one row, told in plain Python."""
    written = ""
    for length, token in enumerate(tokens, start=1):
        written += "..abcd"[token].strip(".")
        stopped = [stop for stop in stops if stop in written and length >= shortest]
        if token == EOS or stopped:
            found = [written.index(stop) for stop in stops if stop in written]
            return written[: min(found, default=len(written))], "stop", length
        if length == budget:
            return written, "length", length
    raise AssertionError("the row did not end")


def plain_logp(
    lm: LanguageModel, prompt: str, tokens: list[int], table: Tensor, temperature: float = 1.0
) -> list[float]:
    """log π_ref of each token by a plain transformers call, without padding or cache."""
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([lm.tokenizer(prompt)["input_ids"] + tokens])).logits[0]
    found = []
    for t, (token, row) in enumerate(zip(tokens, logits[-len(tokens) - 1 : -1] / temperature, strict=True)):
        # A banned token has its log-probability under the whole vocabulary.
        mask = table[t] if table[t, token] else torch.ones_like(table[t])
        found.append(float(torch.distributions.Categorical(logits=row[mask]).log_prob(mask[:token].sum())))
    return found


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_eos_score": {"missing_eos_score": -1.0},
    "stop_strings": {"stop": ("bc", "da")},
    "min_tokens": {"min_new_tokens": 3, "stop": ("ab",), "missing_eos_score": -0.5, "banned_tokens": (D,)},
    "warm": {"temperature": 0.7},
}


@pytest.mark.parametrize(
    ("architecture", "kl", "on_limit", "variant"),
    [
        *itertools.product(["llama"], ["reference", "sampled"], ["terminate", "truncate"], VARIANTS),
        *itertools.product(["llama"], ["none"], ["terminate", "truncate"], ["plain", "min_tokens"]),
        ("gpt2", "sampled", "terminate", "plain"),
        ("gpt2", "sampled", "truncate", "min_tokens"),
    ],
)
def test_stepping_equals_bulk_equals_plain_python(
    architecture: str, kl: str, on_limit: str, variant: str, request: pytest.FixtureRequest
) -> None:
    lm: LanguageModel = request.getfixturevalue(architecture)
    settings = VARIANTS[variant]
    env = make(lm, kl=kl, on_limit=on_limit, **settings)
    tokens = random_tokens(8, 6, seed=len(variant))
    logp = -torch.rand(8, 6, generator=torch.Generator().manual_seed(1)) * 3

    env.reset(seed=0, options={"prompt": PROMPTS})
    for t in range(6):
        env.append(tokens[:, t])
    bulk = env.pay_rewards(logp if kl == "sampled" else None)
    bulk_texts = [c.text for c in env.completions()]

    env.reset(seed=0, options={"prompt": PROMPTS})
    running = torch.ones(8, dtype=torch.bool)
    rewards, reference, finish, scores = torch.zeros(8, 6), torch.zeros(8, 6), torch.zeros(8), torch.zeros(8)
    lengths, truncated_rows = torch.zeros(8, dtype=torch.long), torch.zeros(8, dtype=torch.bool)
    for t in range(6):
        action = TokenAction(tokens[:, t], logp[:, t]) if kl == "sampled" else tokens[:, t]
        _, reward, terminated, truncated, info = env.step(action)
        assert not bool((terminated & truncated).any())
        rewards[:, t], reference[:, t] = reward * running, info["reference_logp"] * running
        lengths += running
        ended = (terminated | truncated) & running
        finish[ended], scores[ended] = info["finish_reason"][ended].float(), info["score"][ended]
        truncated_rows |= truncated & running
        running &= ~ended
    assert not bool(running.any())

    # Relative too: log-probabilities of -3 and below differ by up to 1.1e-5 between the two passes on some processors.
    torch.testing.assert_close(rewards, bulk.rewards, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reference, bulk.reference_logp, atol=1e-5, rtol=1e-5)
    assert torch.equal(finish.long(), bulk.finish.long())
    assert torch.equal(scores, bulk.score)
    assert torch.equal(truncated_rows, bulk.truncated)
    assert torch.equal(lengths, bulk.is_action.sum(1))

    for row, prompt in enumerate(PROMPTS):
        text, reason, length = play(
            tokens[row].tolist(), 6, settings.get("min_new_tokens", 0), settings.get("stop", ())
        )
        assert (bulk_texts[row], Finish(int(bulk.finish[row])).text, int(lengths[row])) == (text, reason, length)
        cut = reason == "length" and on_limit == "truncate"
        assert bool(bulk.truncated[row]) == cut
        if cut:
            paid = 0.0
        elif reason == "length" and settings.get("missing_eos_score") is not None:
            paid = settings["missing_eos_score"]
        else:
            paid = score([Prompt(prompt)], [Completion(text)])[0]
        plain = plain_logp(
            lm, prompt, tokens[row, :length].tolist(), env.action_mask_table, settings.get("temperature", 1.0)
        )
        expected = [
            {"none": 0.0, "reference": 0.3 * ref, "sampled": -0.3 * (float(logp[row, t]) - ref)}[kl]
            for t, ref in enumerate(plain)
        ]
        expected[-1] += paid
        assert bulk.score[row] == pytest.approx(paid, abs=1e-6)
        assert bulk.rewards[row, :length].tolist() == pytest.approx(expected, abs=1e-5)
        assert bulk.rewards[row, length:].abs().sum() == 0
        assert bulk.reference_logp[row, :length].tolist() == pytest.approx(plain, abs=1e-5)


def test_pay_rewards_finds_a_stop_string_that_a_later_end_hides(probe: LanguageModel) -> None:
    env = make(probe, 3, stop=("bc",))
    env.reset(seed=0)
    for column in ([A, B, A], [B, C, B], [C, A, C], [A, EOS, D], [A, A, A], [A, A, B]):
        env.append(torch.tensor(column))
    outcome = env.pay_rewards()
    assert [(c.text, c.finish_reason, c.tokens) for c in env.completions()] == [
        ("a", "stop", 3), ("", "stop", 2), ("a", "stop", 3),
    ]  # fmt: skip
    assert outcome.is_action.sum(1).tolist() == [3, 2, 3]
    assert outcome.rewards.nonzero().tolist() == [[0, 2], [1, 1], [2, 2]]


def test_the_earliest_stop_string_cuts_the_text(probe: LanguageModel) -> None:
    env = make(probe, 1, stop=("bc", "abc"))
    env.reset(seed=0)
    for token in (D, A, B, C):
        env.append(torch.tensor([token]))
    assert not env.any_running()
    assert env.completions() == [Completion("d", "stop", 4)]


# Positions and padding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
def test_absolute_positions_ignore_left_padding(gpt2: LanguageModel, fast: bool) -> None:
    gpt2.fast = fast
    narrow = gpt2.start(torch.tensor([[A, B]]), torch.ones(1, 2, dtype=torch.long))
    padded = gpt2.start(torch.tensor([[PAD, PAD, PAD, A, B]]), torch.tensor([[0, 0, 0, 1, 1]]))
    torch.testing.assert_close(padded.logits, narrow.logits, atol=1e-5, rtol=0)


def test_the_test_above_would_notice_missing_position_ids(gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2.fast = False
    ids, mask = torch.tensor([[PAD, PAD, PAD, A, B]]), torch.tensor([[0, 0, 0, 1, 1]])
    right = gpt2.start(ids, mask).logits
    monkeypatch.setattr(gpt2._transformers, "_takes_position_ids", False)
    assert (gpt2.start(ids, mask).logits - right).abs().max() > 0.05


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_a_budget_of_all_positions_can_be_stepped_through_resets(mode: str) -> None:
    lm = random_gpt2(positions=7)
    env = make(lm, 3, max_new_tokens=3, kl="reference", autoreset_mode=mode)
    env.reset(seed=0, options={"prompt": ["abcd", "a", "abcd"]})
    for t in range(12):
        env.step(torch.tensor([A, A, EOS if t % 2 else A]))
    with pytest.raises(ValueError, match="exceed the 7 positions"):
        make(lm, 1, max_new_tokens=4)


def test_a_bound_critic_restarts_with_its_row() -> None:
    lm = random_gpt2(positions=7)
    lm.adapters.add("policy")
    env = make(lm, 2, max_new_tokens=3, kl="sampled")
    env.bind(Policy(lm, critic="adapter"))
    env.reset(seed=0, options={"prompt": "abcd"})
    for t in range(12):
        env.step(torch.tensor([A, EOS if t % 2 else A]))


def test_reference_follows_rows_through_partial_resets(gpt2: LanguageModel) -> None:
    env = make(gpt2, 4, kl="reference", autoreset_mode="SameStep")
    env.reset(seed=0)
    tokens = random_tokens(4, 25, seed=3)
    state = env.observation()
    for t in range(25):
        before = [
            (gpt2.tokenizer.decode(ids[mask.bool()]).replace(" ", ""), length)
            for ids, mask, length in zip(state["input_ids"], state["attention_mask"], env.length.tolist(), strict=True)
        ]
        state, _, terminated, _, info = env.step(tokens[:, t])
        for row, (text, length) in enumerate(before):
            got = (info["final_info"] if terminated[row] else info)["reference_logp"][row]
            assert float(got) == pytest.approx(
                plain_logp(gpt2, text, [int(tokens[row, t])], env.action_mask_table[length:])[0], abs=1e-5
            )


def test_the_reference_is_the_adapter_that_it_is_told_to_be(gpt2: LanguageModel) -> None:
    """In steps and in bulk, and from any step on."""
    for seed, name in enumerate(("policy", "old")):
        gpt2.adapters.add(name, seed=seed)
        for parameter in gpt2.adapters.parameters(name):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(seed))
    tokens = random_tokens(8, 6).clamp(min=A)
    env = make(gpt2, kl="reference", reference_adapter="old")

    def expected(adapter: str | None) -> Tensor:
        with gpt2.adapters.using(adapter):
            rows = [
                plain_logp(gpt2, p, t.tolist(), env.action_mask_table) for p, t in zip(PROMPTS, tokens, strict=True)
            ]
        return torch.tensor(rows)

    assert float((expected("old") - expected("policy")).abs().mean()) > 0.1
    assert float((expected("old") - expected(None)).abs().mean()) > 0.1

    def in_steps(switch_at: int = 6, to: str | None = None) -> Tensor:
        env.reset(options={"prompt": PROMPTS})
        found = []
        for t in range(6):
            if t == switch_at:
                env.set_reference(to)
            found.append(env.step(tokens[:, t])[4]["reference_logp"])
        return torch.stack(found, 1)

    def in_bulk() -> Tensor:
        env.reset(options={"prompt": PROMPTS})
        for t in range(6):
            env.append(tokens[:, t])
        return env.pay_rewards().reference_logp

    for found in (in_steps(), in_bulk()):
        torch.testing.assert_close(found, expected("old"), atol=1e-5, rtol=1e-5)
    mixed = torch.cat([expected("old")[:, :3], expected(None)[:, 3:]], 1)
    torch.testing.assert_close(in_steps(3, None), mixed, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(in_bulk(), expected(None), atol=1e-5, rtol=1e-5)


# Masks -------------------------------------------------------------------------------------------------------------


def test_action_masks(probe: LanguageModel) -> None:
    env = TokenEnv(
        task=Tree(), model=probe, max_prompt_tokens=4, max_new_tokens=5, min_new_tokens=2, banned_tokens=(C,)
    )
    _, info = env.reset(seed=0)
    for t in range(4):
        expected = [PAD not in (PAD,), t >= 2, True, True, False, True]
        assert env.action_masks().tolist() == expected
        assert info["action_mask"].dtype == np.int8
        assert info["action_mask"].astype(bool).tolist() == expected
        _, _, terminated, _, info = env.step(A)
        assert not terminated


def test_masks_that_leave_nothing_or_lie_outside_are_refused(probe: LanguageModel) -> None:
    with pytest.raises(ValueError, match="no token is allowed"):
        make(probe, min_new_tokens=1, banned_tokens=(A, B, C, D))
    with pytest.raises(ValueError, match=r"\[6\] are outside the vocabulary of 6"):
        make(probe, banned_tokens=(6,))


def test_a_chosen_eos_ends_a_row_whatever_the_mask(probe: LanguageModel) -> None:
    env = make(probe, 1, min_new_tokens=3)
    env.reset(seed=0)
    _, _, terminated, _, info = env.step(torch.tensor([EOS]))
    assert bool(terminated[0])
    assert int(info["finish_reason"][0]) == Finish.STOP


def test_every_eos_of_several_ends() -> None:
    lm = lmgym.load("probe")
    lm.model.generation_config.eos_token_id = [1, 5]
    lm = LanguageModel(lm.model, lm.tokenizer)
    assert lm.eos_ids == (1, 5)
    env = make(lm, 3)
    env.reset(seed=0)
    _, _, terminated, _, _ = env.step(torch.tensor([EOS, D, A]))
    assert terminated.tolist() == [True, True, False]


# Observations ------------------------------------------------------------------------------------------------------


def test_observation_is_prompt_and_tokens_at_the_right_edge(probe: LanguageModel) -> None:
    env = make(probe, 2, max_new_tokens=3)
    obs, _ = env.reset(options={"prompt": ["a", "abcd"]})
    assert obs["input_ids"].tolist() == [[0] * 6 + [A], [0] * 3 + [A, B, C, D]]
    obs, *_ = env.step(torch.tensor([C, D]))
    assert obs["input_ids"].tolist() == [[0] * 5 + [A, C], [0] * 2 + [A, B, C, D, D]]
    assert obs["attention_mask"].tolist() == [[0] * 5 + [1] * 2, [0] * 2 + [1] * 5]


def test_returned_tensors_are_not_reused(probe: LanguageModel) -> None:
    env = make(probe, 2, kl="reference")
    first = env.reset(seed=0)
    kept = copy.deepcopy(first)
    env.step(torch.tensor([A, B]))
    for new, old in zip(first, kept, strict=True):
        for key in ("input_ids", "attention_mask", "action_mask", "reference_logp", "finish_reason", "score"):
            if key in new:
                assert torch.equal(new[key], old[key])


# Prompts and seeds -------------------------------------------------------------------------------------------------


def test_row_i_draws_from_seed_plus_i(probe: LanguageModel) -> None:
    env = make(probe, 4)
    env.reset(seed=10)
    drawn = [p.text for p in env.prompts]
    for row in range(4):
        rng, _ = seeding.np_random(10 + row)
        assert drawn[row] == Tree().sample(rng).text
    env.reset(seed=[13, 12, 11, 10])
    assert [p.text for p in env.prompts] == drawn[::-1]
    with pytest.raises(ValueError, match="2 seeds for 4 rows"):
        env.reset(seed=[1, 2])


def test_reset_mask_is_read_and_not_popped(probe: LanguageModel) -> None:
    env = make(probe, 3, autoreset_mode="Disabled")
    with pytest.raises(ResetNeeded, match="must reset every row"):
        env.reset(options={"reset_mask": np.array([True, False, False])})
    env.reset(seed=0)
    env.step(torch.tensor([A, A, EOS]))
    options = {"reset_mask": np.array([False, True, False]), "prompt": "dd"}
    obs, _ = env.reset(options=options)
    assert sorted(options) == ["prompt", "reset_mask"]
    assert env.length.tolist() == [1, 0, 1]
    assert obs["input_ids"][1].tolist() == [0] * 8 + [D, D]
    for wrong in (np.zeros(3, bool), np.ones(2, bool), np.ones(3, int)):
        with pytest.raises(ValueError, match="reset_mask"):
            env.reset(options={"reset_mask": wrong})


def test_long_prompts(probe: LanguageModel) -> None:
    with pytest.raises(ValueError, match="has 5 tokens and the budget is 4"):
        make(probe, 1).reset(options={"prompt": "abcda"})
    env = make(probe, 1, long_prompts="truncate")
    env.reset(options={"prompt": "abcda"})
    assert env.prompt_ids.tolist() == [[B, C, D, A]]
    with pytest.raises(ValueError, match="has no tokens"):
        env.reset(options={"prompt": ""})
    with pytest.raises(ValueError, match="2 prompts for 1 rows"):
        env.reset(options={"prompt": ["a", "b"]})


def test_a_bad_prompt_changes_nothing(probe: LanguageModel) -> None:
    env = make(probe, 2)
    env.reset(seed=0, options={"prompt": ["ab", "c"]})
    env.step(torch.tensor([A, B]))
    before = env.observation()["input_ids"].clone()
    with pytest.raises(ValueError, match="budget is 4"):
        env.reset(options={"prompt": ["d", "abcda"]})
    assert torch.equal(env.observation()["input_ids"], before)


# Errors ------------------------------------------------------------------------------------------------------------


def test_steps_out_of_order_raise(probe: LanguageModel) -> None:
    env = make(probe, 2, autoreset_mode="Disabled")
    with pytest.raises(ResetNeeded, match="before reset"):
        env.step(torch.tensor([A, A]))
    env.reset(seed=0)
    with pytest.raises(ResetNeeded, match="until every row has ended"):
        env.pay_rewards()
    env.step(torch.tensor([EOS, A]))
    with pytest.raises(ResetNeeded, match=r"rows \[0\] have ended"):
        env.step(torch.tensor([A, A]))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ([2, 6], "token 6 is outside the vocabulary: actions are ids from 0 to 5"),
        ([-1, 2], "token -1 is outside"),
        ([2], "expected 2 integer"),
        ([2.0, 3.0], "integer token ids"),
        (TokenAction([2, 2], -1.0), "2 log-probabilities, got 1"),
    ],
)
def test_invalid_actions_raise_and_change_nothing(probe: LanguageModel, action: Any, message: str) -> None:
    env = make(probe, 2)
    env.reset(seed=0)
    with pytest.raises(InvalidAction, match=message):
        env.step(action)
    assert env.length.tolist() == [0, 0]


def test_sampled_kl_needs_a_log_probability(probe: LanguageModel) -> None:
    env = make(probe, 1, kl="sampled")
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"step with TokenAction\(token, logp\), or bind a policy"):
        env.step(torch.tensor([EOS]))
    assert env.length.tolist() == [0]
    env.append(torch.tensor([EOS]))
    with pytest.raises(ValueError, match="needs the policy's log-probability"):
        env.pay_rewards()


@pytest.mark.parametrize(("estimator", "distance"), [("k2", "0.247"), ("k3", "0.755")])
def test_wrong_estimators_in_the_reward_are_refused(probe: LanguageModel, estimator: str, distance: str) -> None:
    with pytest.raises(ValueError, match=distance):
        make(probe, kl_estimator=estimator)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kl": "k3"}, "choose from 'reference', 'sampled', 'none'"),
        ({"on_limit": "stop"}, "on_limit='stop'"),
        ({"output": "jax"}, "output='jax'"),
        ({"split": "dev"}, "split='dev'"),
        ({"on_limit": "truncate", "max_new_tokens": 1}, "needs max_new_tokens of at least 2"),
        ({"min_new_tokens": 7}, "min_new_tokens=7"),
        ({"max_prompt_tokens": 0}, "must be at least 1"),
        ({"kl_estimator": "k4"}, "only 'k1'"),
    ],
)
def test_wrong_arguments_are_refused(probe: LanguageModel, arguments: dict[str, Any], message: str) -> None:
    # The hook of the tests would refuse wrong literals before the environment can.
    unchecked = inspect.unwrap(TokenVectorEnv.__init__)
    arguments = {"max_prompt_tokens": 4, "max_new_tokens": 6} | arguments
    with pytest.raises(ValueError, match=message):
        unchecked(object.__new__(TokenVectorEnv), 1, model=probe, task=Tree(), **arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_must_be_finite_and_the_environment_survives(probe: LanguageModel, value: float) -> None:
    broken = True

    def sometimes(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        return [value if broken else 1.0 for _ in completions]

    reference = make(probe, 2, kl="reference", score=lambda p, c: [1.0] * len(c))
    env = make(probe, 2, kl="reference", score=sometimes)
    for one in (reference, env):
        one.reset(seed=0, options={"prompt": ["ab", "c"]})
    reference.step(torch.tensor([EOS, A]))
    with pytest.raises(
        ValueError, match=r"the score 'tree' returned -?(nan|inf) for the completion '' of the prompt 'ab'"
    ):
        env.step(torch.tensor([EOS, A]))
    broken = False
    # The other row goes on as if nothing had happened, and the first one restarts.
    for token in (B, C, EOS):
        expected, got = reference.step(torch.tensor([A, token])), env.step(torch.tensor([A, token]))
        assert float(got[1][1]) == pytest.approx(float(expected[1][1]), abs=1e-6)
    env.reset(seed=1, options={"prompt": "a"})
    assert float(env.step(torch.tensor([EOS, EOS]))[1][0]) == pytest.approx(
        float(plain_reward(probe, "a", EOS)) * 0.3 + 1.0, abs=1e-5
    )


def plain_reward(lm: LanguageModel, prompt: str, token: int) -> float:
    table = torch.ones(1, 6, dtype=torch.bool)
    table[0, PAD] = False
    return plain_logp(lm, prompt, [token], table)[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(lambda p, c: [1.0], "returned 1 numbers for 2"), (lambda p, c: 1.0, "one number per completion")],
)
def test_scores_must_be_one_for_each(probe: LanguageModel, wrong: Any, message: str) -> None:
    env = make(probe, 2, score=lmgym.Score({"mine": wrong}))
    env.reset(seed=0)
    env.append(torch.tensor([EOS, EOS]))
    with pytest.raises(ValueError, match=f"the score 'mine'.*{message}"):
        env.pay_rewards()


# Bound policies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["torch", "numpy"])
def test_a_bound_policy_pays_what_its_log_probabilities_pay(probe: LanguageModel, output: str) -> None:
    probe.adapters.add("policy")
    for parameter in probe.adapters.parameters("policy"):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    policy = Policy(probe)
    bound = make(probe, 4, kl="sampled", output=output)
    bound.bind(policy)
    told = make(probe, 4, kl="sampled", output=output)
    bound.reset(seed=0)
    told.reset(seed=0)
    tokens = random_tokens(4, 14, seed=5)
    for t in range(14):
        state = told.observation()
        decoding = policy.start(state["input_ids"], state["attention_mask"])
        logp = policy.logp(decoding, tokens[:, t], torch.as_tensor(told.action_masks())).detach()
        _, expected, *_ = told.step(TokenAction(tokens[:, t], logp))
        _, got, *_ = bound.step(tokens[:, t])
        assert np.isfinite(np.asarray(got)).all()
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=1e-5)
    assert not torch.as_tensor(bound.rewards.token_rewards).requires_grad


# Handles, rendering, the scalar view -------------------------------------------------------------------------------


def test_the_model_is_shared_by_copies_and_specs(probe: LanguageModel) -> None:
    assert copy.deepcopy(probe) is probe
    env = gym.make("lmgym/Tree-v0", model=probe)
    assert env.spec is not None
    assert env.spec.kwargs["model"] is probe
    again = gym.make(env.spec)
    assert isinstance(again.unwrapped, TokenEnv)
    assert again.unwrapped.row.model is probe


@pytest.mark.parametrize("fast", [True, False], ids=["fused", "transformers"])
@pytest.mark.parametrize("mode", ["Disabled", "NextStep", "SameStep"])
def test_a_copy_in_the_middle_of_an_episode_goes_its_own_way(gpt2: LanguageModel, fast: bool, mode: str) -> None:
    """Tree search: original and copy equal environments that nobody copied, in whichever order they move."""
    gpt2.fast = fast
    settings: dict[str, Any] = {"beta": AdaptiveKL(0.3), "autoreset_mode": mode, "kl": "sampled"}

    def fresh(*steps: list[int]) -> tuple[TokenVectorEnv, list[Any]]:
        env = make(gpt2, 3, **settings)
        env.reset(seed=3)
        return env, [env.step(TokenAction(torch.tensor(tokens), torch.zeros(3))) for tokens in steps]

    env, _ = fresh([A, B, C], [B, B, D])
    twin = copy.deepcopy(env)
    assert twin.model is env.model
    assert twin.task is env.task
    assert twin.kl_controller is not env.kl_controller
    assert twin.tokens is twin.state.tokens
    plans = {id(env): ([C, D, A], [A, A, A]), id(twin): ([D, A, B], [B, C, D])}
    found = {id(env): [], id(twin): []}
    for step in (0, 1):
        for one in (env, twin):
            action = TokenAction(torch.tensor(plans[id(one)][step]), torch.zeros(3))
            found[id(one)].append(one.step(action))
    for one in (env, twin):
        _, expected = fresh([A, B, C], [B, B, D], *plans[id(one)])
        for mine, theirs in zip(found[id(one)], expected[2:], strict=True):
            assert torch.equal(mine[0]["input_ids"], theirs[0]["input_ids"])
            torch.testing.assert_close(mine[1], theirs[1], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(mine[4]["reference_logp"], theirs[4]["reference_logp"], atol=1e-5, rtol=1e-5)
    restart = {"reset_mask": torch.tensor([True, False, False])}
    drawn = [one.reset(options=restart)[0]["input_ids"][0] for one in (env, twin)]
    assert torch.equal(*drawn), "the copy has its own generator, in the same state"


def test_a_pickle_in_the_middle_of_an_episode_continues_it(gpt2: LanguageModel) -> None:
    env = TokenVectorEnv(3, task=Tree(), model=gpt2, max_prompt_tokens=4, max_new_tokens=6)
    env.reset(seed=3)
    env.step(torch.tensor([A, B, C]))
    twin = pickle.loads(pickle.dumps(env))
    for tokens in ([B, C, D], [D, D, EOS]):
        one, other = env.step(torch.tensor(tokens)), twin.step(torch.tensor(tokens))
        assert torch.equal(one[0]["input_ids"], other[0]["input_ids"])
        torch.testing.assert_close(one[1], other[1], atol=1e-5, rtol=1e-5)


def test_a_copied_scalar_environment_and_a_copied_decoding(llama: LanguageModel) -> None:
    env = gym.make("lmgym/Tree-v0", model=llama)
    env.reset(seed=3)
    env.step(A)
    twin = copy.deepcopy(env)
    observations = [one.step(token)[0]["input_ids"].tolist()[-1] for one, token in ((env, B), (twin, C))]
    assert observations == [B, C]

    ids = torch.tensor([[A, B], [C, D]])
    decoding = llama.start(ids, torch.ones_like(ids))
    other = copy.deepcopy(decoding)
    decoding.advance(torch.tensor([D, D]))
    other.advance(torch.tensor([A, B]))
    for part, last in ((decoding, [D, D]), (other, [A, B])):
        whole = torch.cat([ids, torch.tensor(last)[:, None]], 1)
        expected = llama.start(whole, torch.ones_like(whole)).logits
        torch.testing.assert_close(part.logits, expected, atol=1e-5, rtol=1e-5)


def test_rendering_is_data_not_terminal_commands(probe: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    env = make(probe, 2, render_mode="ansi", max_new_tokens=3)
    env.reset(seed=0, options={"prompt": [Prompt("ab"), Prompt("a")]})
    env.step(torch.tensor([C, EOS]))
    assert env.render() == ("abc", "a")

    env = make(probe, 1, render_mode="human", max_new_tokens=3, kl="sampled", score=lambda p, c: [2.0])
    env.reset(seed=0, options={"prompt": "a"})
    for token in (B, C, EOS):
        env.step(TokenAction(torch.tensor([token]), torch.tensor([20.0 if token == B else -5.0])))
    capsys.readouterr()  # reset and step print too
    assert env.render() is None
    shown = capsys.readouterr().out
    assert shown.startswith("a\x1b[38;2;")
    red, green = (tuple(map(int, piece.split("m")[0].split(";")[2:4])) for piece in shown.split("\x1b[")[1::2][:2])
    assert red[0] > red[1], "b lost reward: red"
    assert green[1] > green[0], "c gained reward: green"


def test_the_scalar_view_gives_pythons_own_types(probe: LanguageModel) -> None:
    env = TokenEnv(task=Tree(), model=probe, max_prompt_tokens=4, max_new_tokens=3)
    env.reset(seed=0)
    for token in (C, D, B):
        _, reward, terminated, truncated, info = env.step(token)
        assert (type(reward), type(terminated), type(truncated)) == (float, bool, bool)
    assert (terminated, truncated, info["finish_reason"]) == (True, False, "length")
    assert info["score"] == pytest.approx(1.0)
    assert info["scores"] == pytest.approx({"tree": 1.0})
    assert env.completion() == Completion("cdb", "length", 3)


def test_composed_scores_and_their_breakdown(probe: LanguageModel) -> None:
    both = lmgym.Score(
        {"length": lambda p, c: [len(x.text) for x in c], "tokens": (-0.5, lambda p, c: [x.tokens for x in c])}
    )
    env = make(probe, 2, score=both)
    env.reset(seed=0)
    for column in ([A, B], [B, EOS], [EOS, A]):
        env.append(torch.tensor(column))
    outcome = env.pay_rewards()
    assert outcome.breakdown["length"].tolist() == [2, 1]
    assert outcome.breakdown["tokens"].tolist() == [3, 2]
    assert outcome.score.tolist() == [0.5, 0.0]


def test_every_path_of_a_small_tree_ends(probe: LanguageModel) -> None:
    env = make(probe, 216, max_new_tokens=3)
    env.reset(seed=0)
    for t, column in enumerate(torch.tensor(list(itertools.product(range(6), repeat=3))).T):
        env.append(column)
        assert env.any_running() == (t < 2)
    assert env.pay_rewards().is_action.sum(1).tolist() == [
        next((i + 1 for i, token in enumerate(path) if token == EOS), 3)
        for path in itertools.product(range(6), repeat=3)
    ]


@pytest.mark.parametrize(("output", "dtype"), [("torch", torch.float32), ("numpy", np.float64)])
def test_rewards_have_the_dtype_of_their_world(probe: LanguageModel, output: Any, dtype: Any) -> None:
    """Gymnasium's checkers want double precision of NumPy; torch's own is single."""
    env = make(probe, 2, output=output)
    env.reset(seed=0)
    _, rewards, *_ = env.step(np.array([2, 3]) if output == "numpy" else torch.tensor([2, 3]))
    assert rewards.dtype == dtype


def test_an_environment_is_this_unless_told_otherwise(probe: LanguageModel) -> None:
    """What is trained where the user says nothing: another default is another task under the same name."""
    given = {name: p.default for name, p in inspect.signature(TokenVectorEnv.__init__).parameters.items()}
    for name in ("self", "task", "model"):
        del given[name]
    assert given == {
        "num_envs": 1, "score": None, "split": "train", "max_prompt_tokens": 32, "max_new_tokens": 48,
        "min_new_tokens": 0, "on_limit": "terminate", "long_prompts": "error", "kl": "reference",
        "kl_estimator": "k1", "beta": 0.05, "temperature": 1.0, "reference_adapter": None, "banned_tokens": (),
        "action_mask": None, "stop": (), "missing_eos_score": "task",
        "autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP, "output": "torch", "render_mode": None,
    }  # fmt: skip


def test_colours_say_how_much_of_the_largest_reward_a_token_got(
    probe: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    env = make(
        probe, 1, render_mode="human", max_new_tokens=4, kl="sampled", beta=1.0, score=lambda p, c: [0.0],
        autoreset_mode=gym.vector.AutoresetMode.DISABLED,
    )  # fmt: skip
    env.reset(seed=0, options={"prompt": "a"})
    assert capsys.readouterr().out == "a\n", "nothing is written yet"
    for token, wanted in ((2, 4.0), (3, 2.0), (4, -1.0)):
        env.reset(options={"prompt": "a"}) if token == 2 else None
        env.step(TokenAction(torch.tensor([token]), torch.tensor([0.0])))
        env.rewards.token_rewards[0, token - 2] = wanted
    capsys.readouterr()
    env.render()
    shown = capsys.readouterr().out.strip()
    pieces = [piece.split("m")[0].split(";")[2:] for piece in shown.split("\x1b[")[1::2]]
    assert pieces == [["100", "255", "100"], ["100", "177", "100"], ["138", "100", "100"]]
    assert re.findall(r"m(\w)\x1b\[0m", shown) == ["a", "b", "c"]


def test_rows_that_have_ended_are_paid_and_measured_nothing(probe: LanguageModel) -> None:
    """Under NEXT_STEP autoreset a row's next action is ignored: no reward, no log-probability, nothing terminated."""
    env = make(probe, 2, kl="reference", beta=1.0, max_new_tokens=3)
    env.reset(seed=0, options={"prompt": "a"})
    _, _, terminated, _, _ = env.step(torch.tensor([EOS, B]))
    assert terminated.tolist() == [True, False]
    _, rewards, terminated, truncated, info = env.step(torch.tensor([C, C]))
    assert rewards[0] == 0
    assert info["reference_logp"][0] == 0
    assert info["reference_logp"][1] < 0
    assert rewards[1] == pytest.approx(float(info["reference_logp"][1]))
    assert terminated.tolist() == truncated.tolist() == [False, False]


def test_any_token_of_the_vocabulary_can_be_banned_and_no_other(probe: LanguageModel) -> None:
    for token in (0, probe.vocabulary - 1):
        table = make(probe, banned_tokens=(token,)).action_mask_table
        assert not table[:, token].any()
    for token in (-1, probe.vocabulary):
        with pytest.raises(ValueError, match="banned"):
            make(probe, banned_tokens=(token,))


def test_the_last_token_of_the_budget_shows_its_own_reward(
    probe: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    env = make(
        probe, 1, render_mode="human", max_new_tokens=2, kl="sampled", beta=1.0, score=lambda p, c: [9.0],
        autoreset_mode=gym.vector.AutoresetMode.DISABLED,
    )  # fmt: skip
    env.reset(seed=0, options={"prompt": "a"})
    for token in (B, C):
        env.step(TokenAction(torch.tensor([token]), torch.tensor([5.0 if token == B else 0.0])))
    capsys.readouterr()
    env.render()
    shown = capsys.readouterr().out.split("\x1b[")[1::2]
    red, green = (tuple(map(int, piece.split("m")[0].split(";")[2:4])) for piece in shown)
    assert red[0] > red[1], "b lost reward"
    assert green == (100, 255), "c gained the score"


def test_each_row_ends_at_its_own_budget(probe: LanguageModel) -> None:
    """Rows that take turns, as in slots; an end-of-sequence token at the last place of the budget is a stop."""
    env = make(probe, 2, max_new_tokens=3)
    env.reset(seed=0)
    first, second = torch.tensor([0]), torch.tensor([1])
    for _ in range(3):
        assert env.running_rows() == [0, 1]
        env.append(torch.tensor([B]), first)
    assert env.running_rows() == [1]
    env.append(torch.tensor([C]), second)
    env.append(torch.tensor([C]), second)
    assert env.running_rows() == [1]
    env.append(torch.tensor([EOS]), second)
    assert env.running_rows() == []
    assert env.finish.tolist() == [Finish.LENGTH, Finish.STOP]
    assert env.length.tolist() == [3, 3]
    assert [c.text for c in env.completions()] == ["bbb", "cc"]
