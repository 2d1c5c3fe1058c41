"""Each fast path against a slow one: the fused pass, sampling, compaction, refill, passes, frozen layers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import as_on_an_accelerator, random_model, step_down
from test_rollout import Waits
from torch import Tensor, nn

import lmgym
from agents import grpo, ppo
from agents.learner import Learner, LearnerConfig
from lmgym import LanguageModel, Policy, RolloutBuffer, Stream, TokenVectorEnv, collect
from lmgym.env import Finish
from lmgym.fused import draw_from_logits, onednn
from lmgym.fused.head import LARGE
from lmgym.models import buckets
from lmgym.reward import RewardModel
from lmgym.rollout import decode
from lmgym.sampling import draw
from lmgym.tasks.probe import Tree

FUSED: dict[str, dict[str, Any]] = {
    "GPT2Config": {"n_inner": 64},
    "LlamaConfig": {"num_key_value_heads": 1, "mlp_bias": True, "attention_bias": True},
    "Qwen2Config": {"num_key_value_heads": 1},
    "Qwen3Config": {"num_key_value_heads": 1, "head_dim": 8},
    "MistralConfig": {"num_key_value_heads": 2, "sliding_window": None},
}


def perturb(parameters: list[nn.Parameter], std: float = 0.2, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        nn.init.normal_(parameter, std=std, generator=generator)


def made(lm: LanguageModel, rows: int = 16, critic: Any = "head", **arguments: Any) -> tuple[Policy, TokenVectorEnv]:
    if "policy" not in lm.adapters:
        adapter = {key: arguments.pop(key) for key in ("targets", "layers") if key in arguments}
        lm.adapters.add("policy", **adapter)
        perturb(lm.adapters.parameters("policy"))
    settings: dict[str, Any] = {"max_prompt_tokens": 4, "max_new_tokens": 12, "kl": "sampled"} | arguments
    env = TokenVectorEnv(rows, task=Tree(), model=lm, score=lambda p, c: [float(len(x.text)) for x in c], **settings)
    policy = Policy(lm, critic=critic)
    perturb(list(policy.value_head.parameters()), seed=1)
    return policy, env


def rollout(policy: Policy, env: TokenVectorEnv, samples: int = 1, **more: Any) -> RolloutBuffer:
    return collect(policy, env, RolloutBuffer.like(env), Stream(3, 0, samples), **more)


def assert_same_rollout(one: RolloutBuffer, other: RolloutBuffer) -> None:
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.is_action, other.is_action)
    assert torch.equal(one.finish, other.finish)
    for name in ("logp", "values", "reference_logp", "rewards", "bootstrap"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-5, rtol=1e-5)


# The fused pass ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [{}, {"targets": "attention"}, {"layers": 1}])
@pytest.mark.parametrize("config", FUSED)
def test_values_and_gradients_are_those_of_transformers(config: str, adapter: dict[str, Any]) -> None:
    lm = random_model(config, **FUSED[config])
    policy, env = made(lm, min_new_tokens=2, **adapter)
    assert lm.path("policy") == "fused"
    sequences = replace(rollout(policy, env).sequences, frozen_prefix=None)
    weights = torch.randn(3, *sequences.tokens.shape, generator=torch.Generator().manual_seed(0)) * sequences.is_action

    def found() -> tuple[Any, list[Tensor]]:
        evaluation = policy.evaluate(sequences)
        parts = [(w * x.where(sequences.is_action, 0.0)).sum() for w, x in zip(weights, evaluation, strict=True)]
        total = torch.stack(parts).sum()
        return evaluation, list(torch.autograd.grad(total, policy.parameters()))

    fused, gradients = found()
    lm.fast = False
    plain, expected = found()
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours[sequences.is_action], theirs[sequences.is_action], atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.cat([g.flatten() for g in some]) for some in (gradients, expected))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    assert all(float(g.norm()) > 0 for g in gradients)


def test_a_temperature_is_in_the_gradient() -> None:
    lm = random_model("LlamaConfig")
    _, env = made(lm, temperature=0.6)
    policy = Policy(lm, temperature=0.6)
    sequences = rollout(policy, env).sequences
    gradients = []
    for fast in (True, False):
        lm.fast = fast
        found = torch.autograd.grad(policy.evaluate(sequences).logp.sum(), lm.adapters.parameters("policy"))
        gradients.append(torch.cat([g.flatten() for g in found]))
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-5


def test_the_reference_has_its_temperature() -> None:
    lm = random_model("LlamaConfig")
    _, env = made(lm, temperature=0.6)
    buffer = rollout(Policy(lm, temperature=0.6), env)
    lm.fast = False
    torch.testing.assert_close(buffer.reference_logp, env.reference.evaluate(buffer.sequences), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", FUSED)
def test_all_weights_can_be_trained_through_it(config: str) -> None:
    """As in supervised fine-tuning and a value network: the gradient of every weight equals that of transformers."""
    lm = random_model(config, **FUSED[config])
    policy, env = Policy(lm, None, critic="none"), TokenVectorEnv(8, task=Tree(), model=lm, kl="none", max_new_tokens=8)
    sequences = rollout(policy, env).sequences
    lm.model.requires_grad_(True)
    gradients = []
    for fast in (True, False):
        lm.fast = fast
        logits, _ = lm.evaluate(sequences)
        lm.model.zero_grad()
        logits.log_softmax(-1).gather(2, sequences.tokens[..., None])[sequences.is_action].sum().backward()
        gradients.append({name: p.grad.clone() for name, p in lm.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, theirs in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], theirs, atol=1e-4, rtol=1e-4, msg=f"{name} differs")


@pytest.mark.parametrize("small", [onednn.SMALL, 0])
def test_weights_that_change_are_read_anew(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "SMALL", small)
    lm = random_model("LlamaConfig")
    policy, env = made(lm)
    sequences = rollout(policy, env).sequences
    before = policy.evaluate(sequences).logp.detach()
    for change in (
        lambda: lm.adapters.parameters("policy")[0].data.mul_(1.5),
        lambda: perturb(lm.adapters.parameters("policy"), seed=5),
        lambda: next(p for n, p in lm.model.named_parameters() if "up_proj.base_layer" in n).mul_(1.1),
        lambda: lm.model.get_output_embeddings().weight.mul_(1.2),
        lambda: lm.to(dtype=torch.float64).to(dtype=torch.float32),
    ):
        with torch.no_grad():
            change()
        lm.fast = True
        assert lm.path("policy") == "fused", "also after a pass through transformers"
        decoded, fused = rollout(policy, env), policy.evaluate(sequences).logp.detach()
        lm.fast = False
        torch.testing.assert_close(fused, policy.evaluate(sequences).logp.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(decoded.logp, rollout(policy, env).logp, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, fused)


@pytest.mark.parametrize("frozen_again", [False, True])
@pytest.mark.parametrize(("part", "adapter"), [("lm_head", "policy"), ("lm_head", None), ("up_proj", None)])
def test_a_base_that_was_trained_is_read_anew(
    part: str, adapter: str | None, frozen_again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused optimizer changes a weight, but torch does not count the change."""
    monkeypatch.setattr(onednn, "SMALL", 0)
    lm = random_model("LlamaConfig")
    _, env = made(lm, kl="none")
    policy = Policy(lm, adapter, critic="none")
    sequences = rollout(policy, env).sequences
    weight = next(p for name, p in lm.model.named_parameters() if part in name and "lora" not in name)
    weight.requires_grad_(True)
    learner = Learner([weight], LearnerConfig(lr=0.3, schedule="constant", warmup=0.0))
    before = weight.detach().clone()
    step_down(learner, -policy.evaluate(sequences).logp.sum())
    assert not torch.allclose(before, weight)
    weight.requires_grad_(not frozen_again)
    decoded = rollout(policy, env)
    lm.fast = False
    torch.testing.assert_close(decoded.logp, rollout(policy, env).logp, atol=1e-5, rtol=1e-5)


def test_what_it_does_not_know_goes_through_transformers_and_says_so() -> None:
    assert "gpt_neox is not of the GPT-2 or Llama families" in random_model("GPTNeoXConfig").path()
    assert "sliding window" in random_model("MistralConfig", sliding_window=4, num_key_value_heads=1).path()
    assert "not gelu_new" in random_model("GPT2Config", activation_function="relu").path()
    assert (
        "'yarn'"
        in random_model(
            "LlamaConfig", rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}
        ).path()
    )
    lm = random_model("LlamaConfig")
    lm.model.model.layers[0].register_forward_hook(lambda *_: None)
    assert "hooks" in lm.path()


def test_a_rollout_is_that_of_transformers() -> None:
    for config, settings in FUSED.items():
        lm = random_model(config, **settings)
        policy, env = made(lm, rows=32, temperature=1.0)
        fused = rollout(policy, env)
        lm.fast = False
        assert_same_rollout(fused, rollout(policy, env))


# Who is in the batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"min_new_tokens": 3}, {"critic": "adapter"}, {"on_limit": "truncate"}])
def test_rows_that_leave_change_nothing(arguments: dict[str, Any], fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = random_model("LlamaConfig")
    lm.fast = fast
    policy, env = made(lm, rows=32, **arguments)
    whole, counts = rollout(policy, env, compact=False), []
    select = Policy.select
    monkeypatch.setattr(Policy, "select", lambda self, d, rows: counts.append(len(rows)) or select(self, d, rows))
    assert_same_rollout(rollout(policy, env), whole)
    assert counts, "some rows left the batch"
    assert counts[-1] < 16
    assert int((whole.finish == Finish.STOP).sum()) > 16


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("slots", [1, 5, 31])
@pytest.mark.parametrize("arguments", [{}, {"min_new_tokens": 3}])
def test_slots_that_are_filled_again_change_nothing(
    arguments: dict[str, Any], slots: int, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmgym.rollout.token_loop.CHECK_INTERVAL_NO_SYNC", 3)
    # Exactly as many positions as prompt and budget need: a row that is decoded for too long would exceed them.
    lm = random_model("GPT2Config", n_inner=64, max_position_embeddings=16)
    lm.fast = fast
    policy, env = made(lm, rows=32, **arguments)
    prompts = ["abcd", "dcba"] * 16  # as long as the budget
    filled, whole = (rollout(policy, env, prompts=prompts, **how) for how in ({"slots": slots}, {"compact": False}))
    assert_same_rollout(filled, whole)


def test_slots_keep_the_tokens_that_were_sampled_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a truncated policy the buffer holds a mask for each token, and an ended row must not overwrite it."""
    monkeypatch.setattr("lmgym.rollout.token_loop.CHECK_INTERVAL_NO_SYNC", 3)
    policy, env = made(random_model("LlamaConfig"), rows=16)
    policy = policy.truncated(top_k=3)
    slots, whole = rollout(policy, env, slots=5), rollout(policy, env, compact=False)
    assert_same_rollout(slots, whole)
    assert slots.sampling_mask is not None
    assert whole.sampling_mask is not None
    assert torch.equal(slots.sampling_mask[slots.is_action], whole.sampling_mask[whole.is_action])


def test_slots_and_cut_off_rows_do_not_go_together() -> None:
    policy, env = made(random_model("LlamaConfig"), on_limit="truncate")
    with pytest.raises(ValueError, match="slots needs a policy"):
        rollout(policy, env, slots=4)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_a_groups_prompt_is_read_once(critic: Any, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = random_model("LlamaConfig")
    lm.fast = fast
    policy, env = made(lm, rows=24, critic=critic)
    rows: list[int] = []
    start = Policy.start
    monkeypatch.setattr(Policy, "start", lambda self, ids, *more: rows.append(len(ids)) or start(self, ids, *more))
    shared = rollout(policy, env, samples=4)
    assert rows == [6]
    monkeypatch.setattr(Policy, "select", lambda *_: None)
    assert_same_rollout(shared, rollout(policy, env, samples=4))
    assert rows == [6, 6, 24]


def test_a_table_is_compacted_too(probe: LanguageModel) -> None:
    _, env = made(probe, rows=64, max_new_tokens=3, max_prompt_tokens=2)
    from lmgym.testing import TablePolicy

    policy = TablePolicy(6, 5)
    whole = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0), compact=False)
    assert_same_rollout(collect(policy, env, RolloutBuffer.like(env), Stream(0, 0), slots=7), whole)


# Drawing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [6, LARGE - 1, LARGE, 2000, 32_000])
def test_drawing_by_blocks_is_drawing(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, vocabulary, generator=generator) * 3
    logits[:, torch.rand(vocabulary, generator=generator) < 0.3] = -1e30
    uniform = torch.rand(2000, generator=generator)
    uniform[0], uniform[1] = 0.0, float(torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)))
    logp = logits.double().log_softmax(-1)
    token, drawn = draw_from_logits(logits.clone(), uniform)
    assert bool((logits.gather(1, token[:, None]) > -1e29).all()), "a banned token was drawn"
    torch.testing.assert_close(drawn.double(), logp.gather(1, token[:, None])[:, 0], atol=2e-5, rtol=1e-5)
    # Rounding moves a boundary by a few parts in a million, so a draw close to it may give another token.
    assert float((token == draw(logp, uniform.double())).double().mean()) > 0.998


@pytest.mark.parametrize("vocabulary", [LARGE, LARGE + 3, 2000])
def test_the_last_token_of_a_vocabulary_is_drawn_as_often_as_it_should(vocabulary: int) -> None:
    """Three tokens of one third each, two of them in the last block."""
    logits = torch.full((3, vocabulary), -1e30)
    logits[:, [0, vocabulary - 3, vocabulary - 1]] = 0.0
    token, _ = draw_from_logits(logits, torch.tensor([0.2, 0.5, 0.9]))
    assert token.tolist() == [0, vocabulary - 3, vocabulary - 1]


# The update --------------------------------------------------------------------------------------------------------


def trained(config: str = "GPT2Config", micro_tokens: int = 0, bucket: bool = True, **arguments: Any) -> Tensor:
    """The parameters after one PPO update."""
    settings = FUSED[config]
    policy, env = made(random_model(config, **settings), rows=32, **arguments)
    learner = Learner(policy.parameters(), LearnerConfig(micro_tokens=micro_tokens, bucket=bucket), 0)
    list(ppo.train(policy, env, learner, ppo.Config(updates=1, epochs=2, minibatch_rows=16)))
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


@pytest.mark.parametrize("micro_tokens", [1, 40, 200])
@pytest.mark.parametrize("bucket", [True, False])
def test_smaller_passes_take_the_same_step(micro_tokens: int, bucket: bool) -> None:
    """Observed: 1e-7."""
    assert float((trained(micro_tokens=micro_tokens, bucket=bucket) - trained(bucket=False)).abs().max()) < 1e-6


def test_the_pass_size_shapes_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int, int]] = []
    evaluate = Policy.evaluate

    def watched(self: Policy, sequences: Any) -> Any:
        shapes.append((*sequences.tokens.shape, sequences.prompt_ids.shape[1]))
        return evaluate(self, sequences)

    monkeypatch.setattr(Policy, "evaluate", watched)
    trained(micro_tokens=64)
    assert all(rows * (width + steps) <= 64 or rows == 1 for rows, steps, width in shapes)
    assert len({steps for _, steps, _ in shapes}) > 1


def test_buckets_hold_every_row_once() -> None:
    lengths = [3, 48, 1, 20, 20, 7, 48, 2] * 20
    found = buckets(lengths, 16, 600)
    assert sorted(row for rows, _ in found for row in rows) == list(range(len(lengths)))
    for rows, longest in found:
        assert longest == max(lengths[row] for row in rows)
        assert len(rows) * (16 + longest) <= 600
    assert buckets([0, 0], 4, 100) == [([0, 1], 1)]
    assert len(buckets([1000, 1000], 4, 100)) == 2, "a row that is too long gets its own bucket"


@pytest.mark.parametrize("config", FUSED)
def test_cached_layers_change_nothing(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA on the top layer: the rollout's output of the layer below is used by the reference and in all epochs."""
    kept = trained(config, layers=1)
    monkeypatch.setattr("lmgym.fused.weights.FusedWeights.frozen_layers", lambda *_: 0)
    assert float((kept - trained(config, layers=1)).abs().max()) < 1e-6


@pytest.mark.parametrize("more", [{}, {"slots": 5}, {"samples": 4}])
def test_what_lies_below_the_adapter_is_kept_for_every_row(
    more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, env = made(random_model("LlamaConfig"), rows=32, layers=1)
    buffer = rollout(policy, env, **more)
    assert buffer.frozen_prefix is not None
    assert buffer.frozen_prefix.layers == 1
    with torch.no_grad():
        found = policy.evaluate(buffer.sequences)
        expected = policy.evaluate(replace(buffer.sequences, frozen_prefix=None))
    torch.testing.assert_close(found.logp[buffer.is_action], expected.logp[buffer.is_action], atol=1e-5, rtol=0)
    other = Policy(random_model("LlamaConfig", initializer_range=0.1), None, critic="none")
    torch.testing.assert_close(
        other.evaluate(buffer.sequences).logp, other.evaluate(replace(buffer.sequences, frozen_prefix=None)).logp
    )


# As on an accelerator ----------------------------------------------------------------------------------------------


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths are not read on the host, as on a device where that would need synchronisation."""
    as_on_an_accelerator(monkeypatch)


@pytest.mark.parametrize("arguments", [{}, {"layers": 1}, {"critic": "adapter", "on_limit": "truncate"}])
@pytest.mark.parametrize("config", ["GPT2Config", "LlamaConfig"])
def test_lengths_need_not_be_looked_at(
    config: str, arguments: dict[str, Any], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, env = made(random_model(config, **FUSED[config]), rows=32, **arguments)
    seen, found = rollout(policy, env), []
    for _ in range(2):
        evaluation = policy.evaluate(replace(seen.sequences, frozen_prefix=None))
        found.append(torch.stack([torch.where(seen.is_action, x, 0.0) for x in evaluation]))
        request.getfixturevalue("unseen")
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    assert_same_rollout(rollout(policy, env), seen)


def test_an_update_waits_for_the_device_only_where_it_must(unseen: None) -> None:
    """The optimizer steps never read from the device; the rollout reads which rows run, and their tokens."""
    policy, env = made(random_model("LlamaConfig"), rows=16, layers=1)
    learner = Learner(policy.parameters(), LearnerConfig(), 0)
    waits = Waits()
    step = learner.step

    def watched(*arguments: Any, **more: Any) -> None:
        waits.on = True
        step(*arguments, **more)
        waits.on = False

    learner.step = watched
    updates = ppo.train(policy, env, learner, ppo.Config(updates=2, epochs=2, minibatch_rows=8, target_kl=0.0))
    next(updates)
    with waits:
        next(updates)
    assert not waits.found


# Low precision, and the other critics ------------------------------------------------------------------------------


def test_bfloat16_is_near_and_its_ratio_starts_at_one() -> None:
    """On the built-in model. Observed between decoding and training: mean 0.004, at most 0.06."""
    lm = lmgym.load("tiny", dtype="bfloat16")
    lm.adapters.add("policy")
    assert {p.dtype for p in lm.adapters.parameters("policy")} == {torch.float32}, "the adapter's own weights are exact"
    perturb(lm.adapters.parameters("policy"), std=0.02)
    policy = Policy(lm)
    env = TokenVectorEnv(32, task=lmgym.tasks.Sort(), model=lm, max_new_tokens=24, kl="sampled")
    buffer = RolloutBuffer.like(env)
    decode(policy, env, buffer, Stream(0, 0))
    decoded = buffer.logp.clone()
    collect(policy, env, buffer, Stream(0, 0))
    gap = (decoded - buffer.logp)[buffer.is_action].abs()
    assert float(gap.mean()) < 0.005
    assert 0 < float(gap.max()) < 0.15
    learner = Learner(policy.parameters(), LearnerConfig(), 0)
    (row,) = ppo.train(policy, env, learner, ppo.Config(updates=1, epochs=1))
    assert row["policy/ratio_deviation"] < 1e-6
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in policy.parameters())


@pytest.mark.parametrize("on_limit", ["terminate", "truncate"])
def test_a_value_network_is_read_after_the_rollout(on_limit: Any, tmp_path: Any) -> None:
    lm = random_model("LlamaConfig")
    policy, env = made(lm, critic="network", on_limit=on_limit, layers=1)
    buffer = rollout(policy, env)
    with torch.no_grad():
        assert policy.network is not None
        expected = policy.value_head(policy.network.hidden(replace(buffer.sequences, frozen_prefix=None)))[..., 0]
    torch.testing.assert_close(buffer.values, expected * buffer.is_action, atol=1e-5, rtol=0)
    assert bool(buffer.bootstrap.any()) == (on_limit == "truncate")
    if on_limit == "truncate":
        row = int(buffer.bootstrap.abs().argmax())
        text = torch.cat([buffer.sequences.prompt_ids[row][buffer.sequences.prompt_mask[row]], buffer.tokens[row]])
        with torch.no_grad():
            hidden = policy.network.model(input_ids=text[None], output_hidden_states=True).hidden_states[-1][0, -1]
            assert float(buffer.bootstrap[row]) == pytest.approx(float(policy.value_head(hidden)), abs=1e-4)
    before = [p.detach().clone() for p in policy.network.trunk_parameters()]
    list(ppo.train(policy, env, Learner(policy.parameters(), LearnerConfig()), ppo.Config(updates=1)))
    after = policy.network.trunk_parameters()
    assert all(not torch.equal(b, a) for b, a in zip(before, after, strict=True) if b.abs().sum() > 0)
    policy.save(tmp_path / "policy")
    again = Policy.load(random_model("LlamaConfig"), tmp_path / "policy")
    assert again.critic == "network"
    sequences = replace(buffer.sequences, frozen_prefix=None)
    ours, theirs = (p.evaluate(sequences).value[buffer.is_action] for p in (policy, again))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_grpo_trains_on_groups_whose_prompts_are_shared() -> None:
    policy, env = made(random_model("GPT2Config", n_inner=64), rows=16, critic="none", kl="none")
    learner = Learner(policy.parameters(), LearnerConfig(), 0)
    (row,) = grpo.train(policy, env, learner, grpo.Config(updates=1, group=4))
    assert row["policy/ratio_deviation"] < 1e-5


@pytest.mark.parametrize("config", ["GPT2Config", "LlamaConfig"])
def test_reward_models_score_alike_on_both_ways(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = random_model(config, **FUSED[config])
    model = RewardModel.from_language_model(lm, rank=0, ends_with_eos=True)
    texts, finished = ["ab", "abcdabcd", "d", "cab"] * 3, [True, False, True, True] * 3
    assert model._fused_model() is not None
    fused = model.score_texts(texts, finished)
    monkeypatch.setattr(RewardModel, "_fused_model", lambda self: None)
    torch.testing.assert_close(fused, model.score_texts(texts, finished), atol=1e-5, rtol=0)


def test_adapters_where_they_are_asked_for() -> None:
    lm = random_model("LlamaConfig")
    lm.adapters.add("attention", targets="attention")
    lm.adapters.add("top", layers=1)
    names = {name for name, _ in lm.model.named_parameters() if "lora_A" in name}
    attention = {name for name in names if ".attention." in name}
    assert {name.split(".")[-4] for name in attention} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {name.split("layers.")[1][0] for name in names - attention} == {"1"}
    assert len(names - attention) == 7
    for layers in (3, -1):
        with pytest.raises(ValueError, match="the model has 2 layers"):
            lm.adapters.add("wrong", layers=layers)


def test_a_model_decodes_with_the_weights_that_an_adapter_was_merged_into() -> None:
    """The weights that were fused before are out of date."""
    lm = lmgym.load("tiny")
    lm.adapters.add("sft", rank=2)
    perturb(lm.adapters.parameters("sft"))
    policy = Policy(lm, "sft", critic="none")
    settings: dict[str, Any] = {"max_prompt_tokens": 4, "max_new_tokens": 4, "kl": "none"}
    env = TokenVectorEnv(4, task=Tree(), model=lm, score=lambda p, c: [0.0] * len(c), **settings)
    before = collect(policy, env, RolloutBuffer.like(env), Stream(0, 0))
    lm.adapters.merge()
    after = collect(Policy(lm, None, critic="none"), env, RolloutBuffer.like(env), Stream(0, 0))
    assert torch.equal(after.tokens, before.tokens)
    torch.testing.assert_close(after.logp, before.logp, rtol=0, atol=1e-4)
