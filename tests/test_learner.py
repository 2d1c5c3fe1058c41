"""What every algorithm's steps have in common: which loss they go down, by which rate, and what may not reach it."""

import re
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import slow, step_down
from test_ppo import Run, make, perturb
from torch import Tensor

import lmgym
from agents import (
    a2c,
    distill,
    dpo,
    expert_iteration,
    grpo,
    nlpo,
    online_dpo,
    ppo,
    reinforce,
    reward_modelling,
    rloo,
    sft,
)
from agents import functional as F
from agents.learner import Learner, LearnerConfig
from agents.pipeline import RLOptions, Setting
from agents.pipeline.build import build_training
from agents.training import State
from lmgym import Policy, Prompt, RolloutBuffer, Stream, collect
from lmgym.exact import enumerate_tree
from lmgym.models import Example, Sequences, encode_example
from lmgym.policy import Evaluation
from lmgym.preferences import Comparison
from lmgym.reward import AdaptiveKL
from lmgym.tasks.probe import Tree
from lmgym.testing import TablePolicy

ON_POLICY = [a2c, grpo, nlpo, ppo, reinforce, rloo]


def name_of(value: Any) -> str:
    return value.__name__.split(".")[1] if isinstance(value, ModuleType) else re.sub(r"\W+", "-", str(value)).strip("-")


def zero(prompts: Any, completions: Any) -> list[float]:
    return [0.0] * len(completions)


def train(module: ModuleType, run: Run, *arguments: Any, **config: Any) -> list[dict[str, float]]:
    return list(module.train(run.policy, run.env, run.learner, module.Config(**config), *arguments))


def first_gradient(module: ModuleType, run: Run, **config: Any) -> list[Tensor]:
    """Of the first loss that an algorithm steps down from, for each trained parameter."""
    found: list[list[Tensor]] = []

    def move(examine: object = None) -> None:
        found.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in run.learner.parameters])
        run.learner.optimizer.zero_grad()

    run.learner.optimizer_step = move
    train(module, run, updates=1, **config)
    return found[0]


@pytest.mark.parametrize("module", [*ON_POLICY, distill, dpo, expert_iteration, online_dpo], ids=name_of)
def test_every_algorithm_follows_the_schedule(module: ModuleType) -> None:
    run = make(rows=8, kl="none", optimizer=LearnerConfig(lr=1e-3, warmup=0.0, schedule="linear"))
    pairs = [Comparison("a", ("b", "c"))] * 4
    if module is dpo:
        rows = train(module, run, pairs, minibatch_pairs=1)
    else:
        rows = train(module, run, *([run.policy] if module is distill else []), updates=4)
    assert [row["optimizer/lr"] for row in rows] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


@pytest.mark.parametrize(
    ("module", "config"),
    [
        *((module, {}) for module in [a2c, ppo, reinforce, rloo, distill, dpo, expert_iteration, online_dpo]),
        (grpo, {"kl_loss": "none"}),
        (ppo, {"reference_refresh": 2, "scale_score": True}),
        (nlpo, {"mask_refresh": 3}),
    ],
    ids=name_of,
)
def test_every_algorithm_goes_on_where_it_was_interrupted(module: ModuleType, config: dict[str, Any]) -> None:
    """With the same metrics and the same bits, from what its learner and β are at a `yield`."""
    pairs = [Comparison("a", ("b", "c")), Comparison("b", ("d", "a")), Comparison("c", ("a", "b"))] * 3
    config = {"minibatch_pairs": 2} if module is dpo else {"updates": 5} | config

    def begun() -> tuple[Run, Any]:
        kl = "none" if module is distill else "sampled"
        run = make(rows=8, beta=AdaptiveKL(0.2, 0.1, 20.0), kl=kl, optimizer=LearnerConfig(lr=1e-2, ema_decay=0.5))
        more = {dpo: [pairs], distill: [Policy(run.policy.lm, None, critic="none")]}.get(module, [])
        return run, module.train(run.policy, run.env, run.learner, module.Config(**config), *more)

    whole, updates = begun()
    for _ in range(3):
        next(updates)
    state, beta = whole.learner.state(), whole.env.kl_controller.beta
    state = State(state.data, {name: tensor.clone() for name, tensor in state.tensors.items()})
    rest = list(updates)
    other, updates = begun()
    other.learner.restore(state)
    other.env.kl_controller.beta = beta
    assert list(updates) == rest
    assert len(rest) == 2
    wanted, found = whole.learner.state(), other.learner.state()
    assert found.data == wanted.data
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in wanted.tensors.items())


def test_a_step_goes_down_its_own_loss_alone() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    one = Learner([parameter], LearnerConfig(max_grad_norm=0.0))
    for slope in ([100.0, -3.0], [1.0, 5.0]):
        step_down(one, (parameter * torch.tensor(slope)).sum())
        assert parameter.grad is not None
        assert parameter.grad.tolist() == slope


def test_parameters_with_a_factor_step_at_a_multiple_of_the_rate() -> None:
    """Each is what an AdamW of torch's own makes of it at its own rate, through the whole schedule."""
    start, slopes = torch.tensor([1.0, -2.0]), [torch.tensor(slope) for slope in ([3.0, -1.0], [0.5, 2.0], [-1.0, 4.0])]
    config = LearnerConfig(lr=0.1, warmup=0.0, max_grad_norm=0.0)
    plain, fast = (torch.nn.Parameter(start.clone()) for _ in range(2))
    one = Learner([plain, fast], config, lr_factors={fast: 4.0})
    assert one.lr == 0.1
    for update in one.updates(len(slopes)):
        step_down(one, ((plain + fast) * slopes[update]).sum())
    assert one.lr == pytest.approx(0.1 / 3)
    for parameter, peak in ((plain, 0.1), (fast, 0.4)):
        expected = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([expected], lr=peak, eps=config.adam_eps, weight_decay=0.0)
        for update, slope in enumerate(slopes):
            optimizer.param_groups[0]["lr"] = peak * (1 - update / 3)
            expected.grad = slope.clone()
            optimizer.step()
        torch.testing.assert_close(parameter, expected)


@pytest.mark.parametrize("critic", ["head", "adapter", "network", "none"])
def test_a_run_trains_its_critic_and_nothing_else_at_the_critics_rate(critic: Any) -> None:
    lm = lmgym.load("probe")
    options = RLOptions(lr=1e-3, critic=critic, critic_lr_factor=3.0)
    made = build_training(Setting(Tree(), lm, {"max_prompt_tokens": 1, "max_new_tokens": 2}), options)
    own = [] if critic == "none" else [*made.policy.value_head.parameters()]
    own += lm.adapters.parameters("value") if critic == "adapter" else []
    own += made.policy.network.trunk_parameters() if made.policy.network is not None else []
    expected = {id(p): 1e-3 for p in lm.adapters.parameters("policy")} | {id(p): 3e-3 for p in own}
    groups = made.learner.optimizer.param_groups
    assert {id(p): pytest.approx(group["lr"]) for group in groups for p in group["params"]} == expected


@pytest.mark.parametrize(
    ("module", "config"),
    [*((module, {}) for module in ON_POLICY), (grpo, {"kl_loss": "k2"}), (ppo, {"kl_loss": "ratio_k3"})],
    ids=name_of,
)
def test_what_stands_behind_the_end_is_not_read(
    module: ModuleType, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where it is −∞, as the log-probability of the padding is that no policy may choose."""

    def gradient(spoil: bool) -> Tensor:
        run = make(rows=32, kl="none")
        perturb(run.policy)
        evaluate = run.policy.evaluate

        def spoiled(sequences: Sequences) -> Evaluation:
            behind = ~sequences.is_action
            assert behind.any()
            return Evaluation(*(torch.where(behind, part - torch.inf, part) for part in evaluate(sequences)))

        monkeypatch.setattr(run.policy, "evaluate", spoiled if spoil else evaluate)
        return torch.cat([part.flatten() for part in first_gradient(module, run, **config)])

    clean = gradient(spoil=False)
    assert float(clean.norm()) > 1e-4
    torch.testing.assert_close(gradient(spoil=True), clean)


@pytest.mark.parametrize("module", [a2c, ppo, nlpo], ids=name_of)
def test_the_critic_learns_from_its_own_loss_alone(module: ModuleType) -> None:
    """An advantage is a number: what the policy makes of it tells the critic nothing."""
    run = make(rows=32)
    perturb(run.policy)
    heads = {id(p) for p in run.policy.value_head.parameters()}
    for coefficient, learns in ((0.0, False), (0.5, True)):
        gradients = first_gradient(module, run, value_coef=coefficient)
        of_head = [g for g, p in zip(gradients, run.learner.parameters, strict=True) if id(p) in heads]
        assert len(of_head) == 2
        assert any(bool(g.any()) for g in of_head) is learns


@pytest.mark.parametrize(
    ("module", "config"),
    [(ppo, {"minibatch_rows": 0}), (a2c, {}), (rloo, {}), (reinforce, {})],
    ids=name_of,
)
def test_an_entropy_bonus_raises_the_entropy(module: ModuleType, config: dict[str, Any]) -> None:
    """With nothing else to gain."""
    run = make(rows=32, kl="none", score=zero, optimizer=LearnerConfig(lr=5e-3, warmup=0.0))
    perturb(run.policy)
    rows = train(module, run, updates=6, entropy_coef=1.0, **config)
    assert rows[-1]["policy/entropy_nats"] > rows[0]["policy/entropy_nats"] + 0.02


@pytest.mark.parametrize(
    ("module", "estimator"),
    [(grpo, "k3"), (grpo, "ratio_k3"), (grpo, "k2"), (ppo, "ratio_k3"), (ppo, "k2")],
    ids=name_of,
)
def test_kl_in_the_loss_draws_the_policy_to_its_reference(module: ModuleType, estimator: str) -> None:
    """With nothing else to gain."""
    run = make(rows=64, kl="none", score=zero, beta=1.0, optimizer=LearnerConfig(lr=5e-3, warmup=0.0))
    perturb(run.policy)
    rows = train(module, run, updates=6, minibatch_rows=0, kl_loss=estimator)
    assert rows[-1]["kl/token_k3_nats"] < 0.7 * rows[0]["kl/token_k3_nats"]


def test_a_rollout_moves_no_action_much_beyond_the_clip() -> None:
    """However often it is gone over: what the clip holds back is measured from the policy that acted."""
    run = make(rows=64, kl="none", max_new_tokens=1, critic="none")
    trees = [enumerate_tree(run.env, Prompt(letter)) for letter in "abcd"]
    policy = TablePolicy.of(run.env, trees, "none")
    buffer = collect(policy, run.env, RolloutBuffer.like(run.env), Stream(0, 0))
    one = Learner(policy.parameters(), LearnerConfig(lr=0.002, warmup=0.0, schedule="constant"))
    settings = ppo.Config(
        updates=1, epochs=200, minibatch_rows=0, lam=1.0, value_coef=0.0, whiten_advantages=False, target_kl=0.0
    )
    list(ppo.train(policy, run.env, one, settings))
    ratio = (policy.evaluate(buffer.sequences).logp.detach() - buffer.logp).exp()
    best = buffer.score == buffer.score.max()
    print(ratio[best].max(), ratio.max(), ratio.min())
    assert float(buffer.score.min()) >= 0, "nothing is pushed down"
    assert 1.15 < float(ratio[buffer.is_action].max()) < 1.35


def test_nlpo_chooses_among_the_most_probable_alone() -> None:
    """And scores under the mask that it chose under: where one token is left, it is certain."""
    run = make(rows=64)
    perturb(run.policy)
    some, one = (train(nlpo, run, updates=2, mask_top_p=top_p, mask_refresh=1) for top_p in (0.6, 1e-6))
    assert all(row["policy/ratio_deviation"] < 1e-5 for row in some + one)
    assert all(row["policy/entropy_nats"] > 0.01 for row in some)
    assert all(abs(row["policy/entropy_nats"]) < 1e-6 for row in one)


def test_distillation_measures_the_kl_from_the_teacher() -> None:
    """By torch, on the teacher's own tokens: a mean over them."""
    run = make(rows=32, critic="none", kl="none")
    run.policy.lm.adapters.add("teacher", rank=16, alpha=32)
    teacher = Policy(run.policy.lm, "teacher", critic="none")
    perturb(teacher)
    (row,) = train(distill, run, teacher, updates=1)
    fresh = make(rows=32, critic="none", kl="none")
    buffer = collect(teacher, run.env, RolloutBuffer.like(run.env), Stream(0, 0))
    of_teacher, of_policy = (p.log_probs(buffer.sequences).detach() for p in (teacher, fresh.policy))
    Categorical = torch.distributions.Categorical
    kl = torch.distributions.kl_divergence(Categorical(logits=of_teacher), Categorical(logits=of_policy))
    assert row["distill/kl_nats"] == pytest.approx(float(kl[buffer.is_action].mean()), rel=1e-4)


def test_a_schedule_at_its_borders() -> None:
    """A run that is all warm-up ends at the peak; progress beyond the end is the end."""
    points: list[tuple[F.Schedule, float, float, float]] = [
        ("linear", 1.0, 0.0, 0.1),
        ("linear", 1.0, 1.0, 1.0),
        ("cosine", 0.0, 0.0, 1.0),
        ("cosine", 0.0, 1.0, 0.0),
    ]
    points += [("cosine", 0.0, 0.25, 0.5 + 0.5 * 0.5**0.5), ("linear", 0.0, 1.5, 0.0)]
    for schedule, warmup, progress, factor in points:
        assert F.schedule_factor(schedule, progress, warmup) == pytest.approx(factor, abs=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_items_are_halved_until_they_fit(rows: int) -> None:
    """The same gradient in smaller passes, and an end where one item is too much."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    given, said = [float(i + 1) for i in range(rows)], []
    for most in (1, 2, 3):
        one = Learner([parameter], LearnerConfig(lr=0.0, max_grad_norm=0.0), say=said.append)
        passes: list[int] = []

        def share(part: list[float], most: int = most, passes: list[int] = passes) -> Tensor:
            if len(part) > most:
                raise MemoryError
            passes.append(len(part))
            return parameter.sum() * sum(part)

        one.minimise(given, share)
        assert parameter.grad is not None
        assert float(parameter.grad) == sum(given)
        assert sum(passes) == rows
    assert (rows == 1) == (not said)
    one, tries = Learner([parameter], LearnerConfig(), say=said.append), []

    def never(part: list[float]) -> Tensor:
        tries.append(len(part))
        raise MemoryError

    with pytest.raises(MemoryError, match="a pass of one row is the smallest"):
        one.minimise(given, never)
    assert tries[0] == rows
    assert tries[-1] == 1
    assert len(set(tries)) == len(tries), "each try is smaller than the last"


# Weights in half precision -------------------------------------------------------------------------------------------


def tuned(dtype: str, **config: Any) -> tuple[lmgym.LanguageModel, Learner]:
    """A model all of whose weights are trained."""
    lm = lmgym.load("probe", dtype=dtype)
    parameters = [p.requires_grad_(True) for p in lm.model.parameters()]
    settings = {"lr": 1e-4, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.1} | config
    return lm, Learner(parameters, LearnerConfig(**settings), say=lambda text: None)


EXAMPLES = [Example("ab", "cd"), Example("c", "dab"), Example("ad", "b"), Example("d", "dd")]


def steps(lm: lmgym.LanguageModel, learner: Learner, count: int) -> list[dict[str, float]]:
    """`count` steps of fine-tuning in minibatches of two examples."""
    rows = sft.train(lm, EXAMPLES, [], learner, sft.Config(epochs=4, minibatch_rows=2))
    return [next(rows) for _ in range(count)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_steps_of_half_precision_are_not_lost(dtype: str) -> None:
    """The oracle: AdamW by hand on float32 copies, which are rounded into the weights."""
    lm, learner = tuned(dtype)
    before = [p.detach().clone() for p in learner.parameters]
    gradients: list[list[Tensor]] = []
    take = learner.weights.take_gradients

    def remember() -> None:
        gradients.append([p.grad.float() for p in learner.parameters if p.grad is not None])
        take()

    learner.weights.take_gradients = remember
    steps(lm, learner, 8)
    masters = [p.float() for p in before]
    first, second = ([torch.zeros_like(p) for p in masters] for _ in range(2))
    for t, gradient in enumerate(gradients, start=1):
        norm = torch.stack([g.norm() for g in gradient]).norm()
        for p, g, m, v in zip(masters, gradient, first, second, strict=True):
            g = g * min(1.0, 1.0 / (float(norm) + 1e-6))
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).add_(g * g, alpha=0.001)
            p.mul_(1 - 1e-4 * 0.1)
            p -= 1e-4 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-5)
    for p, master, weight in zip(learner.parameters, masters, learner.weights.values, strict=True):
        torch.testing.assert_close(weight, master, atol=1e-6, rtol=1e-5)
        assert torch.equal(p, weight.to(p.dtype))
    kept = torch.cat([(a.float() - b.float()).abs().flatten() for a, b in zip(before, masters, strict=True)])
    assert float(kept.max()) > 5e-4, "eight steps of 1e-4"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns_about_as_much_as_float32(dtype: str) -> None:
    gained = {}
    for kind in ("float32", dtype):
        lm, learner = tuned(kind, lr=2e-5)
        start = sft.evaluate(lm, EXAMPLES, sft.Config())
        list(sft.train(lm, EXAMPLES * 8, [], learner, sft.Config(epochs=8, minibatch_rows=4)))
        gained[kind] = start - sft.evaluate(lm, EXAMPLES, sft.Config())
    assert gained["float32"] > 0.02
    assert gained[dtype] == pytest.approx(gained["float32"], rel=0.25)


def test_gradients_of_several_passes_are_added_up_in_float32() -> None:
    lm, learner = tuned("bfloat16")
    expected = [torch.zeros_like(value) for value in learner.weights.values]
    for example in EXAMPLES * 8:
        for backward in (True, False):
            loss, mask = sft.nll(lm, [encode_example(lm, example)])
            share = torch.where(mask, loss, 0.0).sum() / 32
            if backward:
                learner.backward(share)
                continue
            for total, part in zip(expected, torch.autograd.grad(share, learner.parameters), strict=True):
                total += part.float()
    for value, total in zip(learner.weights.values, expected, strict=True):
        assert value.grad is not None
        assert value.grad.dtype == torch.float32
        torch.testing.assert_close(value.grad, total, atol=1e-7, rtol=1e-5)
    assert all(p.grad is None for p in learner.parameters)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_resumed_run_of_half_precision_is_the_same_to_the_bit(dtype: str) -> None:
    whole, learner = tuned(dtype, ema_decay=0.9)
    steps(whole, learner, 8)

    half, first = tuned(dtype, ema_decay=0.9)
    steps(half, first, 3)
    state = first.state()
    again, second = tuned(dtype, ema_decay=0.9)
    second.restore(State(state.data, {name: t.clone() for name, t in state.tensors.items()}))
    assert all(torch.equal(a, b) for a, b in zip(half.model.parameters(), again.model.parameters(), strict=True))
    steps(again, second, 5)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(learner.weights.values, second.weights.values, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(learner.average.values, second.average.values, strict=True))


def test_the_moving_average_of_half_precision_is_in_float32_and_is_swapped_in() -> None:
    lm, learner = tuned("bfloat16", ema_decay=0.5)
    steps(lm, learner, 2)
    present = [p.detach().clone() for p in learner.parameters]
    with learner.averaged():
        for p, average in zip(learner.parameters, learner.average.values, strict=True):
            assert average.dtype == torch.float32
            assert torch.equal(p, average.to(torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(present, learner.parameters, strict=True))
    learner.use_average()
    assert not all(torch.equal(a, b) for a, b in zip(present, learner.parameters, strict=True))


def test_weights_that_are_loaded_between_steps_are_kept() -> None:
    lm, learner = tuned("bfloat16")
    steps(lm, learner, 1)
    with torch.no_grad():
        for p in learner.parameters:
            p.copy_(torch.zeros_like(p))
    loss = sum((p.float() * 0.0).sum() for p in learner.parameters)
    assert isinstance(loss, Tensor)
    step_down(learner, loss)
    assert max(float(p.detach().abs().max()) for p in learner.parameters) < 1e-3


@pytest.mark.parametrize("rank", [slow(0), 4])
def test_a_reward_model_of_half_precision_learns(rank: int) -> None:
    """Loss before and after on the same weights in float32, so that only training is in half precision."""
    pairs = [Comparison("a", ("bb", "cc")), Comparison("d", ("b", "c"))] * 16

    def loss(model: lmgym.RewardModel) -> float:
        model.model.float()
        with torch.no_grad():
            return float(torch.stack([F.ranking_loss(s) for s in reward_modelling.scores_of(model, pairs)]).mean())

    gained = {}
    for dtype in ("float32", "bfloat16"):
        lm = lmgym.load("probe", dtype=dtype)
        before = loss(lmgym.RewardModel.from_language_model(lm, rank=rank))
        model = lmgym.RewardModel.from_language_model(lm, rank=rank)
        learner = Learner(model.parameters(), LearnerConfig(lr=2e-5, schedule="constant", warmup=0.0))
        list(reward_modelling.train(model, pairs, [], learner, reward_modelling.Config(epochs=8, minibatch_prompts=4)))
        gained[dtype] = before - loss(model)
    assert gained["float32"] > 0.01
    assert gained["bfloat16"] == pytest.approx(gained["float32"], rel=0.3)
