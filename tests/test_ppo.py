"""PPO through the real stack reaches the known optimum, and what it says about itself is true."""

import ast
import dataclasses
import functools
import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import step_down
from torch import Tensor

import lmgym
from agents import functional as F
from agents import learner, ppo, reward_modelling, sft
from agents.functional import Schedule
from agents.learner import Learner, LearnerConfig
from agents.training import Metrics
from lmgym import LanguageModel, Policy, Prompt, RolloutBuffer, Stream, TokenVectorEnv, collect
from lmgym.env import Finish
from lmgym.exact import enumerate_tree, policy_logp
from lmgym.tasks.probe import Tree

EOS = 1


def remember_texts(lm: LanguageModel) -> None:
    """The probe has few texts: tokenising each once halves the time of these tests, and changes nothing else."""
    encode, decode = lm.text.encode, lm.text.decode_completion
    known = functools.cache(lambda text: tuple(encode(text)))
    read = functools.cache(lambda prompt, ids: decode(prompt, ids))
    lm.text.encode = lambda text: list(known(text))
    lm.text.decode_completion = lambda prompt_ids, ids: read(tuple(prompt_ids), tuple(ids))


@dataclasses.dataclass
class Run:
    policy: Policy
    env: TokenVectorEnv
    learner: Learner


def make(
    rows: int = 32,
    seed: int = 0,
    critic: Any = "head",
    optimizer: LearnerConfig = LearnerConfig(lr=3e-3, warmup=0.0),  # noqa: B008
    rank: int = 16,
    **arguments: Any,
) -> Run:
    lm = lmgym.load("probe")
    remember_texts(lm)
    lm.adapters.add("policy", rank=rank, alpha=2 * rank, seed=seed)
    policy = Policy(lm, critic=critic, seed=seed)
    settings: dict[str, Any] = {"max_prompt_tokens": 1, "max_new_tokens": 3, "kl": "sampled", "beta": 0.2} | arguments
    env = TokenVectorEnv(rows, task=Tree(), model=lm, **settings)
    return Run(policy, env, Learner(policy.parameters(), optimizer, seed))


def train(run: Run, **config: Any) -> list[dict[str, float]]:
    return list(ppo.train(run.policy, run.env, run.learner, ppo.Config(**config)))


# The optimum -------------------------------------------------------------------------------------------------------


def progress(run: Run) -> tuple[float, float, float]:
    """Share of the way from the reference's objective to β log Z, the objective over β log Z, and total variation.

    Each is a mean over the four prompts.
    """
    trees = [enumerate_tree(run.env, Prompt(letter)) for letter in "abcd"]
    logp = [policy_logp(tree, run.policy.log_probs) for tree in trees]
    start = sum(tree.objective(tree.reference_logp) for tree in trees)
    best = sum(tree.optimum for tree in trees)
    now = sum(tree.objective(one) for tree, one in zip(trees, logp, strict=True))
    distance = sum(tree.total_variation(one) for tree, one in zip(trees, logp, strict=True))
    return (now - start) / (best - start), now / best, distance / 4


EXACT: dict[str, Any] = {
    "epochs": 4, "lam": 1.0, "whiten_advantages": False, "value_coef": 1.0, "target_kl": 0.0
}  # fmt: skip
"""No whitening, and a critic that is given weight: at the optimum, score − β·KL to go is what the critic predicts from
every state, and the gradient's noise goes to 0 with it."""


@pytest.mark.slow
def test_ppo_reaches_the_exact_optimum_of_two_tokens() -> None:
    """84 completions, from a total variation of 0.17.

    Observed with seeds 0, 1 and 2: 0.989, 0.989 and 0.993 of the way, total variation 0.015, 0.016 and 0.009.
    """
    run = make(rows=256, max_new_tokens=2)
    way, _, distance = progress(run)
    assert way == pytest.approx(0.0, abs=1e-6)
    assert distance > 0.1
    train(run, updates=40, minibatch_rows=128, **EXACT)
    way, value, distance = progress(run)
    assert way > 0.96
    assert value > 0.99
    assert distance < 0.02


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_ppo_reaches_the_exact_optimum_of_the_tree(seed: int) -> None:
    """340 completions, from a total variation of 0.30.

    Observed: 0.990, 0.993 and 0.991 of the way, total variation 0.012, 0.010 and 0.010, in about a minute each.
    """
    run = make(rows=512, seed=seed)
    train(run, updates=120, minibatch_rows=256, **EXACT)
    way, value, distance = progress(run)
    assert way > 0.97
    assert value > 0.99
    assert distance < 0.02


# Gradients ---------------------------------------------------------------------------------------------------------


def perturb(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(0)
    assert policy.adapter is not None
    for parameter in policy.lm.adapters.parameters(policy.adapter):
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)


def gradients(policy: Policy, loss: Tensor) -> Tensor:
    assert policy.adapter is not None
    found = torch.autograd.grad(loss, policy.lm.adapters.parameters(policy.adapter))
    return torch.cat([gradient.flatten() for gradient in found])


def test_one_step_is_reinforce(monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch, one minibatch, no critic, λ = 1: the gradient of Σ_t log π(a_t) · (reward to go), told row by row."""
    run = make(rows=64, critic="none")
    perturb(run.policy)
    taken: list[Tensor] = []
    adapted = run.policy.lm.adapters.parameters("policy")
    monkeypatch.setattr(
        run.learner,
        "optimizer_step",
        lambda *_: taken.append(torch.cat([torch.as_tensor(p.grad).flatten() for p in adapted])),
    )
    train(run, updates=1, epochs=1, minibatch_rows=64, lam=1.0, value_coef=0.0, whiten_advantages=False)

    buffer = collect(run.policy, run.env, RolloutBuffer.like(run.env), Stream(0, 0))
    total, count = torch.zeros(()), 0
    steps = run.policy.log_probs(buffer.sequences)
    scores = run.env.score(run.env.prompts, run.env.completions())
    for row in range(64):
        tokens = buffer.tokens[row].tolist()
        tokens = tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
        for t, token in enumerate(tokens):
            to_go = scores[row] - 0.2 * sum(
                float((steps[row, k, tokens[k]] - buffer.reference_logp[row, k]).detach())
                for k in range(t, len(tokens))
            )
            total, count = total - steps[row, t, token] * to_go, count + 1
    expected = gradients(run.policy, total / count)
    assert float(expected.norm()) > 1e-3
    torch.testing.assert_close(taken[0], expected, atol=1e-6, rtol=1e-3)


def test_the_expected_gradient_is_the_gradient_of_the_objective() -> None:
    """Over every completion, weighted by its probability: E[∇ loss] = −∇ (E[score] − β·KL)."""
    run = make(critic="none")
    perturb(run.policy)
    tree = enumerate_tree(run.env, Prompt("b"))
    evaluation = run.policy.evaluate(tree.sequences)
    mask = tree.sequences.is_action
    old = evaluation.logp.detach()
    reference = run.env.reference.evaluate(tree.sequences)
    rewards = -0.2 * (old - reference)
    rewards[torch.arange(len(tree.paths)), mask.sum(1) - 1] += tree.scores.float()
    advantages, _ = F.gae(rewards, torch.zeros_like(rewards), mask, torch.zeros(len(rewards)), 1.0, 1.0)
    loss = (F.clipped_surrogate(evaluation.logp, old, advantages) * mask).sum(1)
    expected = gradients(run.policy, (old.sum(1).exp() * loss).sum())
    evaluation = run.policy.evaluate(tree.sequences)
    logp = evaluation.logp.sum(1)
    objective = (logp.exp() * (tree.scores.float() - 0.2 * (logp - tree.reference_logp.float()))).sum()
    torch.testing.assert_close(expected, -gradients(run.policy, objective), atol=1e-6, rtol=1e-3)


def test_before_the_first_step_the_policy_is_its_reference() -> None:
    run = make(rows=64)
    buffer = collect(run.policy, run.env, RolloutBuffer.like(run.env), Stream(0, 0))
    reference, _ = run.policy.lm.evaluate(buffer.sequences, None)
    own, _ = run.policy.lm.evaluate(buffer.sequences, "policy")
    assert torch.equal(reference, own), "KL is 0, exactly"
    ratio = (run.policy.evaluate(buffer.sequences).logp.detach() - buffer.logp).exp()
    assert float((ratio - 1).abs().max()) < 1e-5
    assert train(run, updates=1)[0]["policy/ratio_deviation"] < 1e-5
    # And on after the policy has moved, at another temperature, and with masks.
    run = make(rows=64, min_new_tokens=1)
    perturb(run.policy)
    assert all(row["policy/ratio_deviation"] < 1e-5 for row in train(run, updates=3))


# What a run is -----------------------------------------------------------------------------------------------------


def parameters(run: Run) -> Tensor:
    return torch.cat([p.detach().flatten() for p in run.policy.parameters()])


def test_a_learning_rate_of_zero_changes_nothing() -> None:
    run = make(optimizer=LearnerConfig(lr=0.0))
    perturb(run.policy)
    before = {name: p.detach().clone() for name, p in run.policy.lm.model.named_parameters()}
    rows = train(run, updates=2, entropy_coef=0.1)
    assert all(row["optimizer/grad_norm"] > 0 for row in rows)
    assert all(torch.equal(p, before[name]) for name, p in run.policy.lm.model.named_parameters())
    assert all(row["policy/approx_kl_nats"] < 1e-6 and row["policy/clip_fraction"] == 0 for row in rows)


def test_training_moves_the_adapter_and_nothing_else() -> None:
    run = make()
    before = {name: p.detach().clone() for name, p in run.policy.lm.model.named_parameters()}
    train(run, updates=1)
    moved = {name for name, p in run.policy.lm.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name and ".policy." in name for name in moved)
    assert bool(run.policy.value_head.weight.any())


def test_the_same_seed_is_the_same_run_and_another_is_not() -> None:
    def once(seed: int) -> tuple[list[dict[str, float]], Tensor]:
        run = make(seed=seed)
        return train(run, updates=3), parameters(run)

    first, again, other = once(0), once(0), once(1)
    assert first[0] == again[0]
    assert torch.equal(first[1], again[1])
    assert first[0] != other[0]
    assert not torch.equal(first[1], other[1])


def test_an_adapter_that_is_frozen_from_outside_is_trained_on() -> None:
    """peft's own disable_adapter() freezes every adapter: without notice, only the value head would be trained."""
    run = make(rows=16)
    said: list[str] = []
    run.learner.say = said.append
    updates = ppo.train(run.policy, run.env, run.learner, ppo.Config(updates=2, **EXACT))
    next(updates)
    with run.policy.lm.model.disable_adapter():
        pass
    adapter = run.policy.lm.adapters.parameters("policy")
    assert not any(p.requires_grad for p in adapter)
    before = [p.detach().clone() for p in adapter]
    next(updates)
    assert any(not torch.equal(p, q) for p, q in zip(adapter, before, strict=True))
    assert len(said) == 1
    assert "requires_grad=False" in said[0]


@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_both_critics_learn(critic: str) -> None:
    run = make(rows=128, critic=critic)
    explained = [row["value/explained_variance"] for row in train(run, updates=7, minibatch_rows=64, **EXACT)]
    assert abs(explained[0]) < 0.05, "a critic of zeros explains nothing"
    # Observed: 0.39 and 0.41.
    assert sum(explained[-3:]) / 3 > 0.25


def test_truncated_rows_are_bootstrapped_and_train() -> None:
    run = make(on_limit="truncate", max_new_tokens=8)
    rows = train(run, updates=2)
    assert all(0 < row["tokens/unfinished_share"] < 1 for row in rows)
    assert all(value == value and abs(value) < 1e6 for row in rows for value in row.values())


def test_the_score_rises() -> None:
    run = make(rows=64, kl="none")
    rows = train(run, updates=8, minibatch_rows=32)
    assert rows[-1]["score/mean"] > rows[0]["score/mean"] + 0.1
    assert rows[-1]["policy/entropy_nats"] < rows[0]["policy/entropy_nats"]


def test_an_update_ends_when_the_policy_has_moved_too_far() -> None:
    assert train(make(), updates=1, epochs=4, minibatch_rows=8, target_kl=1e-12)[0]["optimizer/steps"] == 4
    for never in (0.0, 100.0):
        assert train(make(), updates=1, epochs=4, minibatch_rows=8, target_kl=never)[0]["optimizer/steps"] == 16


def test_metrics_are_those_that_are_documented_and_are_true() -> None:
    run = make(rows=32, beta=lmgym.AdaptiveKL(beta=0.2, target_nats_per_sequence=1.0, horizon=100.0))
    perturb(run.policy)
    row, second = train(run, updates=2, epochs=4, minibatch_rows=16, target_kl=0.0)
    assert set(row) == set(ppo.METRICS) - {"ptx/loss"}
    again = make(rows=32)
    perturb(again.policy)
    buffer = collect(again.policy, again.env, RolloutBuffer.like(again.env), Stream(0, 0))
    lengths = buffer.is_action.sum(1)
    log_ratio = (buffer.logp - buffer.reference_logp)[buffer.is_action]
    assert row["score/mean"] == pytest.approx(float(buffer.score.mean()), abs=1e-6)
    assert row["kl/sequence_nats"] == pytest.approx(float(log_ratio.sum()) / 32, abs=1e-5)
    assert row["kl/token_k3_nats"] == pytest.approx(float(((-log_ratio).exp() - 1 + log_ratio).mean()), abs=1e-5)
    assert row["reward/sequence"] == pytest.approx(row["score/mean"] - 0.2 * row["kl/sequence_nats"], abs=1e-5)
    assert row["tokens/mean"] == pytest.approx(float(lengths.float().mean()))
    assert row["tokens/unfinished_share"] == pytest.approx(float((buffer.finish == Finish.LENGTH).float().mean()))
    assert row["optimizer/steps"] == 4 * 2
    assert second["kl/beta"] == pytest.approx(
        0.2 * (1 + min(max(row["kl/sequence_nats"] - 1, -0.2), 0.2) * 32 / 100), rel=1e-5
    )


# Knobs and the learner ---------------------------------------------------------------------------------------------


def read_attributes(*modules: ModuleType) -> set[str]:
    """Names read as `config.<name>` or `self.config.<name>`."""
    found = set()
    for module in modules:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = (
                    owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
                )
                if name == "config":
                    found.add(node.attr)
    return found


@pytest.mark.parametrize(
    ("module", "config"),
    [(ppo, ppo.Config), (sft, sft.Config), (reward_modelling, reward_modelling.Config), (learner, LearnerConfig)],
)
def test_every_setting_is_read(module: ModuleType, config: Any) -> None:
    fields = {field.name for field in dataclasses.fields(config)}
    assert fields
    assert fields - read_attributes(module) == set()


def test_the_schedule() -> None:
    shapes: tuple[tuple[Schedule, float, float], ...]
    shapes = (("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0))
    for schedule, middle, last in shapes:
        points = [F.schedule_factor(schedule, progress, 0.1) for progress in (0.0, 0.05, 0.1, 0.55, 1.0)]
        assert points == pytest.approx([0.1, 0.55, 1.0, middle, last], abs=1e-6)


def test_updates_set_the_learning_rate() -> None:
    one = Learner([torch.nn.Parameter(torch.zeros(1))], LearnerConfig(lr=2.0, warmup=0.5, schedule="linear"))
    rates = [(one.lr, one.optimizer.param_groups[0]["lr"]) for _ in one.updates(4)]
    assert rates == [(pytest.approx(rate), pytest.approx(rate)) for rate in (0.2, 1.1, 2.0, 1.0)]


def test_minibatches_hold_every_row_once() -> None:
    one, two = (Learner([torch.nn.Parameter(torch.zeros(1))], LearnerConfig(), seed=3) for _ in range(2))
    parts = list(one.minibatch_indices(10, 4))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert sorted(torch.cat(parts).tolist()) == list(range(10))
    assert torch.equal(torch.cat(parts), torch.cat(list(two.minibatch_indices(10, 4))))
    assert not torch.equal(torch.cat(parts), torch.cat(list(one.minibatch_indices(10, 4))))


def test_a_step_goes_down_and_not_too_far() -> None:
    parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    one = Learner([parameter, torch.nn.Parameter(torch.ones(1), requires_grad=False)], LearnerConfig(lr=0.1))
    assert len(one.parameters) == 1
    step_down(one, 100 * parameter.square().sum())
    assert one.metrics.drain()["optimizer/grad_norm"] == pytest.approx(1000.0)
    assert parameter.grad is not None
    assert float(parameter.grad.norm()) == pytest.approx(1.0, abs=1e-4)
    assert bool((parameter.detach() < torch.tensor([3.0, 4.0])).all())
    with pytest.raises(ValueError, match="nothing to train"):
        Learner([torch.nn.Parameter(torch.ones(1), requires_grad=False)], LearnerConfig())


def test_an_adapter_that_peft_switches_off_between_updates_is_trained_on_and_the_user_is_told() -> None:
    """peft's disable_adapter() leaves requires_grad off; the learner would silently train the value head alone."""
    kept = [torch.zeros(0)] * 2
    for i, interfere in enumerate((False, True)):
        run = make(rows=8, kl="none")
        run.policy.lm.adapters.add("another")
        said: list[str] = []
        run.learner.say = said.append
        for row in ppo.train(run.policy, run.env, run.learner, ppo.Config(updates=2)):
            assert row["optimizer/steps"] > 0
            if interfere:
                with run.policy.lm.adapters.using("another"), run.policy.lm.model.disable_adapter():
                    pass
                assert not any(p.requires_grad for p in run.policy.lm.adapters.parameters("policy"))
        kept[i] = torch.cat([p.detach().flatten() for p in run.policy.parameters()])
        assert len(said) == interfere
        assert all("disable_adapter" in line for line in said)
    assert torch.equal(*kept), "the result differs from that of an undisturbed run"


def test_metrics_are_masked_means_over_everything_added() -> None:
    metrics = Metrics()
    metrics.add("x", torch.tensor([1.0, 2.0, 99.0]), torch.tensor([True, True, False]))
    metrics.add("x", torch.tensor([6.0]), torch.tensor([True]))
    metrics.add("y", torch.tensor(4))
    assert metrics.mean("x") == 3.0
    assert metrics.drain() == {"x": 3.0, "y": 4.0}
    assert metrics.drain() == {}
