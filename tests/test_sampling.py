"""Truncated sampling: the tokens that are kept, how they are stored, and that scoring uses them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_ppo import perturb, remember_texts
from torch import Tensor

import lmgym
from lmgym import LanguageModel, Policy, RolloutBuffer, Stream, TokenVectorEnv, collect
from lmgym.fused.head import BLOCK, LARGE, draw_from_logits
from lmgym.models import Example, collate_examples, encode_example
from lmgym.sampling import Truncation, draw, log_probs, most_probable, pack_bits, packed_width, unpack_bits
from lmgym.tasks.probe import Tree

# Which tokens are kept ---------------------------------------------------------------------------------------------


def naive(probs: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Takes one token after another, the most probable first (ties: the lower id), until both limits are reached."""
    kept = np.zeros(len(probs), dtype=bool)
    order = [i for i in sorted(range(len(probs)), key=lambda i: (-probs[i], i)) if probs[i] > 0]
    order = order[:top_k] if top_k else order
    total, held = sum(probs[i] for i in order), 0.0
    for i in order:
        if kept.any() and held >= top_p * total:
            break
        kept[i] = True
        held += probs[i]
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 3, 7, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_most_probable_equals_a_loop(top_k: int, top_p: float) -> None:
    rng = np.random.default_rng(0)
    for trial in range(60):
        logits = rng.normal(size=12) * 2
        logits[rng.random(12) < 0.3] = -np.inf
        logits[0] = 0.0
        logp = torch.from_numpy(logits).log_softmax(0)
        expected = naive(logp.exp().numpy(), top_k, top_p)
        assert most_probable(logp, top_k, top_p).tolist() == expected.tolist(), f"trial {trial}: {logp}"


def test_equals_are_kept_from_the_first_on() -> None:
    """Halves and quarters are exact in binary: a token too many or too few would show."""
    logp = torch.tensor([0.25, 0.125, 0.25, 0.25, 0.125]).double().log()
    assert most_probable(logp, top_k=2).tolist() == [True, False, True, False, False]
    assert most_probable(logp, top_p=0.5).tolist() == [True, False, True, False, False]
    assert most_probable(logp, top_p=0.51).tolist() == [True, False, True, True, False]
    assert most_probable(logp, top_k=4).tolist() == [True, True, True, True, False]
    # Each of the two tokens that top-k leaves holds half of the probability.
    assert most_probable(logp, top_k=2, top_p=0.5).tolist() == [True, False, False, False, False]


def test_the_most_probable_token_is_always_in_and_a_banned_one_never() -> None:
    logp = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.0, 1.0]]).log()
    for top_k, top_p in ((0, 1e-9), (1, 1.0), (1, 1e-9)):
        assert most_probable(logp, top_k, top_p).tolist() == [[True, False, False], [False, False, True]]
    assert most_probable(logp, 3, 1.0).tolist() == [[True, True, False], [False, False, True]]


def test_what_is_kept_is_drawn_in_proportion() -> None:
    logp = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    kept = most_probable(logp, top_p=0.7)
    grid = (torch.arange(7000) + 0.5) / 7000
    token = draw(log_probs(logp, 1.0, kept).expand(7000, -1), grid)
    np.testing.assert_allclose(torch.bincount(token, minlength=4) / 7000, [4 / 7, 3 / 7, 0, 0], atol=1e-3)


@pytest.mark.parametrize("vocabulary", [1, 5, 6, 7, 8, 9, 16, 17, 1000])
def test_bits_are_packed_and_unpacked(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    for shape in ((), (3,), (2, 4)):
        mask = torch.rand(*shape, vocabulary, generator=generator) < 0.5
        for one in (mask, torch.zeros_like(mask), torch.ones_like(mask)):
            packed = pack_bits(one)
            assert packed.dtype == torch.uint8
            assert packed.shape == (*shape, packed_width(vocabulary))
            assert packed_width(vocabulary) == (vocabulary + 7) // 8
            assert torch.equal(unpack_bits(packed, vocabulary), one)
            np.testing.assert_array_equal(packed, np.packbits(one.numpy(), axis=-1, bitorder="little"))


# Replay ------------------------------------------------------------------------------------------------------------

TRUNCATIONS: list[dict[str, Any]] = [{"top_k": 2}, {"top_p": 0.7}, {"top_k": 3, "top_p": 0.8}]


def world(**arguments: Any) -> TokenVectorEnv:
    lm = lmgym.load("probe")
    remember_texts(lm)
    settings: dict[str, Any] = {"max_prompt_tokens": 1, "max_new_tokens": 4, "kl": "sampled", "beta": 0.2} | arguments
    return TokenVectorEnv(64, task=Tree(), model=lm, **settings)


def truncated(env: TokenVectorEnv, **settings: Any) -> Policy:
    env.model.adapters.add("policy", rank=8)
    policy = Policy(env.model, critic="none", **settings)
    perturb(policy)
    return policy


@pytest.mark.parametrize("settings", TRUNCATIONS, ids=str)
def test_a_rollout_is_replayed_exactly_even_after_the_policy_has_moved(settings: dict[str, Any]) -> None:
    env = world(min_new_tokens=1)
    policy = truncated(env, **settings)
    buffer = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0))
    sequences, mask = buffer.sequences, buffer.is_action
    assert sequences.sampling_mask is not None

    def ratio(of: Any) -> Tensor:
        return (policy.evaluate(of).logp.detach() - buffer.logp).exp()[mask]

    assert float((ratio(sequences) - 1).abs().max()) < 1e-5
    half = torch.arange(0, 64, 2)
    again = policy.evaluate(sequences[half]).logp.detach()[mask[half]]
    torch.testing.assert_close(again, buffer.logp[half][mask[half]], atol=1e-5, rtol=0)
    # Scoring over the whole vocabulary is a known bug: ratios are not 1 (trl #6789).
    whole = policy.truncated().evaluate(replace(sequences, sampling_mask=None)).logp.detach()
    assert float(((whole - buffer.logp).exp()[mask] - 1).abs().mean()) > 0.05
    # A mask recomputed by an updated policy keeps other tokens, and excludes some of the chosen ones.
    for parameter in policy.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    assert bool(torch.isfinite(ratio(sequences)).all())
    assert bool((ratio(sequences) > 0).all())
    anew = policy.evaluate(replace(sequences, sampling_mask=None)).logp.detach()[mask]
    assert bool((anew == -torch.inf).any())


@pytest.mark.parametrize("settings", TRUNCATIONS, ids=str)
def test_what_was_kept_is_what_the_probabilities_say(settings: dict[str, Any]) -> None:
    env = world(min_new_tokens=1)
    policy = truncated(env, **settings)
    buffer = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0))
    assert buffer.sampling_mask is not None
    kept = unpack_bits(buffer.sampling_mask, env.model.vocabulary)[buffer.is_action]
    whole = policy.truncated().log_probs(replace(buffer.sequences, sampling_mask=None)).detach()[buffer.is_action]
    for row, logp in zip(kept, whole, strict=True):
        assert (
            row.tolist()
            == naive(logp.exp().double().numpy(), settings.get("top_k", 0), settings.get("top_p", 1.0)).tolist()
        )
    assert len({tuple(row.tolist()) for row in kept}) > 2


def test_steps_that_are_never_taken_have_finite_numbers() -> None:
    env = world(max_new_tokens=24)
    policy = truncated(env, top_k=2)
    buffer = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0))
    assert bool((buffer.is_action.sum(1) < 8).any())
    found = policy.evaluate(buffer.sequences)
    assert bool(torch.isfinite(found.logp).all())
    assert bool(torch.isfinite(found.entropy).all())
    (found.logp.sum() + found.entropy.sum()).backward()
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert gradients
    assert all(bool(torch.isfinite(g).all()) for g in gradients)


def test_a_buffer_forgets_what_was_kept() -> None:
    env = world()
    policy, buffer = truncated(env, top_k=1), RolloutBuffer.like(env)
    collect(policy, env, buffer, Stream(0, 0))
    assert not buffer.logp.any(), "one token is left, with log-probability 0"
    collect(policy.truncated(), env, buffer, Stream(0, 1))
    assert buffer.sequences.sampling_mask is None
    assert bool((buffer.logp[buffer.is_action] < 0).all())


@pytest.mark.parametrize("settings", TRUNCATIONS, ids=str)
def test_stepping_with_a_bound_truncated_policy_equals_bulk(settings: dict[str, Any]) -> None:
    """kl="sampled" pays −β (log π − log π_ref), π the truncated distribution."""
    env = world()
    policy = truncated(env, **settings)
    buffer = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0))
    assert not torch.allclose(buffer.rewards, buffer.at_last(buffer.score), atol=1e-3)
    env.bind(policy)
    env.reset(seed=Stream(0, 0).prompt_seeds(64))
    assert torch.equal(env.prompt_block()[0], buffer.sequences.prompt_ids)
    alive = torch.ones(64, dtype=torch.bool)
    for t in range(4):
        _, reward, terminated, _, _ = env.step(torch.where(buffer.is_action[:, t], buffer.tokens[:, t], 1))
        assert torch.equal(alive, buffer.is_action[:, t])
        torch.testing.assert_close(reward[alive].float(), buffer.rewards[:, t][alive], atol=1e-5, rtol=0)
        alive &= ~terminated
        if not alive.any():
            break
    assert not alive.any()


def test_the_judge_may_be_another_adapter() -> None:
    """NLPO's masks: the copy's most probable tokens are kept, however the policy has changed since."""
    env = world()
    policy = truncated(env)
    env.model.adapters.copy("policy", "judge")
    for parameter in policy.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    judged = policy.truncated(top_p=0.7, by="judge")
    buffer = collect(judged, env, RolloutBuffer.like(env), Stream(0, 0))
    assert buffer.sampling_mask is not None
    kept = unpack_bits(buffer.sampling_mask, env.model.vocabulary)[buffer.is_action]
    judge, own = Policy(env.model, "judge", critic="none"), policy.truncated()
    plain, taken = replace(buffer.sequences, sampling_mask=None), buffer.is_action
    assert torch.equal(kept, most_probable(judge.log_probs(plain).detach()[taken], 0, 0.7))
    assert not torch.equal(kept, most_probable(own.log_probs(plain).detach()[taken], 0, 0.7))
    assert torch.equal(kept, judged.log_probs(plain).detach()[taken] > -torch.inf), "also where nothing was stored"
    torch.testing.assert_close(judged.evaluate(buffer.sequences).logp.detach(), buffer.logp, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fast", [True, False], ids=["fused", "transformers"])
@pytest.mark.parametrize("settings", TRUNCATIONS, ids=str)
def test_a_moved_policy_is_scored_over_what_was_kept_and_not_over_what_it_would_keep(
    settings: dict[str, Any], fast: bool
) -> None:
    """Each step's distribution by hand: the softmax of the logits over the stored tokens, whatever is probable now."""
    env = world(min_new_tokens=1)
    policy = truncated(env, **settings)
    sequences = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0)).sequences
    assert sequences.sampling_mask is not None
    for parameter in policy.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    env.model.fast = fast
    kept = unpack_bits(sequences.sampling_mask, env.model.vocabulary)
    logits = policy.lm.evaluate(sequences, "policy")[0].detach()
    expected = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)[sequences.is_action]
    found = policy.log_probs(sequences).detach()[sequences.is_action]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    evaluation = policy.evaluate(sequences)
    entropy = torch.distributions.Categorical(logits=expected).entropy()
    torch.testing.assert_close(evaluation.entropy.detach()[sequences.is_action], entropy, atol=1e-5, rtol=1e-5)
    chosen = expected.gather(1, sequences.tokens[sequences.is_action][:, None])[:, 0]
    torch.testing.assert_close(evaluation.logp.detach()[sequences.is_action], chosen, atol=1e-5, rtol=1e-5)
    # Without what was kept, it is what the policy would keep now: for texts that it did not draw.
    unseen = replace(sequences, sampling_mask=None)
    own = policy.log_probs(unseen).detach()[sequences.is_action] > -torch.inf
    whole = logits.masked_fill(~sequences.action_mask, -torch.inf).log_softmax(-1)[sequences.is_action]
    assert own.tolist() == [
        naive(row.exp().double().numpy(), policy.truncation.top_k, policy.truncation.top_p).tolist() for row in whole
    ]
    assert not torch.equal(own, kept[sequences.is_action])


def test_a_policy_keeps_everything_unless_told_otherwise(probe: LanguageModel) -> None:
    probe.adapters.add("policy")
    for policy in (Policy(probe), Policy(probe, top_k=2).truncated()):
        assert (policy.truncation.top_k, policy.truncation.top_p, policy.truncates) == (0, 1.0, False)
    assert all(Policy(probe, **settings).truncates for settings in TRUNCATIONS)
    assert (Policy(probe).temperature, Policy(probe).critic) == (1.0, "head")


def test_truncations_that_make_no_sense_are_refused(probe: LanguageModel) -> None:
    probe.adapters.add("policy")
    wrong: list[dict[str, Any]] = [{"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": float("nan")}]
    for settings in wrong:
        with pytest.raises(ValueError, match=r"top_k=.* must not be negative, and top_p=.* must lie in \(0, 1\]"):
            Policy(probe, **settings)


def test_texts_that_others_wrote_are_scored_by_the_whole_policy(probe: LanguageModel) -> None:
    probe.adapters.add("policy")
    policy = Policy(probe, critic="none", top_k=1)
    texts = collate_examples(
        probe, [encode_example(probe, Example("a", "bcd")), encode_example(probe, Example("b", "d"))]
    )
    assert bool((policy.evaluate(texts.sequences).logp == -torch.inf).any())
    assert bool(torch.isfinite(policy.truncated().evaluate(texts.sequences).logp).all())


def test_by_default_every_token_can_be_sampled() -> None:
    assert not Truncation().active
    assert Truncation(top_k=1).active
    assert Truncation(top_p=0.5).active
    for top_k, top_p in ((-1, 1.0), (0, 0.0), (0, 1.5)):
        with pytest.raises(ValueError, match="must lie in"):
            Truncation(top_k, top_p)


@pytest.mark.parametrize("vocabulary", [LARGE - 1, LARGE, LARGE + 1, LARGE + BLOCK - 1])
def test_every_token_of_a_large_vocabulary_can_be_drawn(vocabulary: int) -> None:
    """Also the last ones, which do not fill a block."""
    wanted = torch.tensor([0, BLOCK - 1, BLOCK, vocabulary - 2, vocabulary - 1])
    logits = torch.full((len(wanted), vocabulary), -30.0).scatter_(1, wanted[:, None], 0.0)
    token, logp = draw_from_logits(logits.clone(), torch.full((len(wanted),), 0.5))
    assert torch.equal(token, wanted)
    torch.testing.assert_close(logp, logits.log_softmax(1).gather(1, wanted[:, None])[:, 0], atol=1e-5, rtol=0)
