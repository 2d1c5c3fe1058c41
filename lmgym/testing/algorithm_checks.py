"""The contract of an algorithm: checks against exact results, which run on a CPU in under two minutes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lmgym.env import TokenVectorEnv
from lmgym.exact import Tree, enumerate_tree, policy_logp
from lmgym.io import encodable
from lmgym.reward import KLForm
from lmgym.tasks.base import Completion, Prompt, ScoreFunction
from lmgym.testing.algorithm_world import (
    PROMPTS,
    GarbagePolicy,
    PaddedEnv,
    ReversedEnv,
    ReversedPolicy,
    SmallTree,
    SplitPolicy,
    WrappedPolicy,
    load_probe,
)
from lmgym.testing.table_policy import TablePolicy

BETA = 0.2
NO_DRIFT = "a constant score makes texts neither longer nor shorter"
CAUSES = {
    "seed": "a seed that is fixed in the code, or a global generator (random, np.random, torch.rand) that it misses",
    "lr": "a learning rate or schedule of its own instead of `lr`, weight decay, or a step that is not the optimizer's",
    "metrics": "a `yield` that some updates skip, a division by zero, or the logarithm of 0",
    "gradient": "minibatches, λ < 1, whitened advantages or a clipped first step (switch them off for this check); a "
    "wrong sign; β·KL left out of the rewards or counted twice; log-probabilities shifted by one token",
    "order": "a baseline or a group that depends on where a row is in the batch",
    "padding": "a mean over columns instead of `is_action`, or a position that counts from the left",
    "split": "something that is normalised over the batch inside the policy or the loss",
    "mask": "a loss, mean or return that is taken over all columns instead of `is_action`",
    "length": "the loss is divided by the length of each completion, or the score is paid to every token",
    "stop": "the end-of-sequence token is left out of the loss: a mask that ends one token too early",
    "optimum": "gradients that are not cleared, too few updates, a learning rate that is too small, a clip that stops "
    "learning, or a wrong gradient (see above)",
}
"""What usually breaks each property, by the name that `skip` takes."""


@runtime_checkable
class Trainer(Protocol):
    """An algorithm as `check_algorithm` calls it: a function of these arguments that yields metrics after each update.

    Use the whole rollout in the first optimizer step (no minibatches), and λ = 1 for generalised advantages: the checks
    compare the gradient with the policy gradient of the objective.
    """

    def __call__(
        self, policy: Any, env: TokenVectorEnv, *, seed: int, lr: float, updates: int
    ) -> Iterable[Mapping[str, float]]: ...


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: the property that was checked.
        passed: whether it holds.
        observed: the measured value.
        expected: the bound.
        key: the name that `skip` takes.
    """

    name: str
    passed: bool
    observed: str
    expected: str
    key: str = ""

    @property
    def cause(self) -> str:
        """What usually breaks this property."""
        return CAUSES.get(self.key, "")

    def __str__(self) -> str:
        found = f"{self.observed} (expected: {self.expected})"
        line = f"{'ok  ' if self.passed else 'FAIL'}  {self.name:58} {self.key:9} {found}"
        return line if self.passed or not self.cause else f"{line}\n      usual cause: {self.cause}"


MakePolicy = Callable[[TokenVectorEnv, Sequence[Tree]], Any]


class _Suite:
    """Makes environment and policy of the checks, and runs the algorithm with them."""

    def __init__(self, train: Trainer, make_policy: MakePolicy, kl: KLForm, rows: int, lr: float):
        self.train, self.make_policy, self.kl, self.rows, self.lr = train, make_policy, kl, rows, lr

    def world(
        self,
        score: ScoreFunction | None = None,
        kl: KLForm | None = None,
        kind: Callable[..., TokenVectorEnv] = TokenVectorEnv,
        perturb: bool = False,
    ) -> tuple[Any, TokenVectorEnv, list[Tree]]:
        env = kind(
            self.rows,
            task=SmallTree(score),
            model=load_probe(),
            max_prompt_tokens=3,
            max_new_tokens=2,
            kl=self.kl if kl is None else kl,
            beta=BETA,
        )
        trees = [enumerate_tree(env, prompt) for prompt in PROMPTS]
        policy = self.make_policy(env, trees)
        if perturb:
            # Away from the reference, so that KL has a gradient too. Only parameters on which log-probabilities depend.
            generator = torch.Generator().manual_seed(0)
            for parameter, gradient in zip(policy.parameters(), self.gradient(policy, trees), strict=True):
                if gradient is not None:
                    noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                    parameter.data += 0.3 * noise * (1.0 if isinstance(policy, TablePolicy) else 0.3)
        return policy, env, trees

    def objective(self, trees: Sequence[Tree], logp: Sequence[Tensor], kl: bool) -> Tensor:
        """E[score] − β·KL, the mean over the prompts, differentiable."""
        values = []
        for tree, one in zip(trees, logp, strict=True):
            penalty = tree.beta * (one - tree.reference_logp) if kl else 0.0
            values.append((one.exp() * (tree.scores - penalty)).sum())
        return torch.stack(values).mean()

    def gradient(self, policy: Any, trees: Sequence[Tree], kl: bool = True) -> list[Tensor | None]:
        """The gradient of the objective, by enumerating every completion of every prompt."""
        logp = [tree.sequence_logp(policy.log_probs(tree.sequences)).double() for tree in trees]
        return list(torch.autograd.grad(self.objective(trees, logp, kl), policy.parameters(), allow_unused=True))

    def run(
        self, policy: Any, env: TokenVectorEnv, updates: int, lr: float, seed: int = 0
    ) -> tuple[list[dict[str, float]], list[Tensor]]:
        """The metrics of a run, and the gradient of the first optimizer step of each update."""
        parameters = policy.parameters()
        taken: list[Tensor] = []
        fresh = True

        def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            nonlocal fresh
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if fresh and any(id(p) in own for p in parameters):
                taken.append(_flat([None if p.grad is None else p.grad for p in parameters], parameters))
                fresh = False

        hook = register_optimizer_step_pre_hook(look)
        metrics = []
        try:
            for row in self.train(policy, env, seed=seed, lr=lr, updates=updates):
                metrics.append(dict(row))
                fresh = True
        finally:
            hook.remove()
        return metrics, taken

    def checks(self, updates: int) -> dict[str, Callable[[], Check]]:
        """Every check by the name that `skip` takes; `updates` is for the last one."""
        same, plain = self.check_same_gradient, TokenVectorEnv
        return {
            "seed": self.check_seed,
            "lr": self.check_zero_learning_rate,
            "metrics": self.check_metrics,
            "gradient": self.check_gradient,
            "order": lambda: same("the order of the rows does not matter", ReversedEnv, ReversedPolicy),
            "padding": lambda: same("padding does not matter", PaddedEnv, WrappedPolicy),
            "split": lambda: same("the split of a batch does not matter", plain, SplitPolicy),
            "mask": lambda: same("what lies behind the end does not matter", plain, GarbagePolicy),
            "length": self.check_length_bias,
            "stop": self.check_stopping,
            "optimum": lambda: self.check_optimum(updates),
        }

    # The checks ----------------------------------------------------------------------------------------------------

    def check_seed(self) -> Check:
        def once(seed: int) -> tuple[list[dict[str, float]], Tensor]:
            policy, env, _ = self.world()
            metrics, _ = self.run(policy, env, 3, self.lr, seed)
            return metrics, _flat([p.detach() for p in policy.parameters()], policy.parameters())

        one, again, other = once(0), once(0), once(1)
        same = one[0] == again[0] and torch.equal(one[1], again[1])
        different = not torch.equal(one[1], other[1])
        observed = f"same: {'equal' if same else 'different'}; other: {'different' if different else 'equal'}"
        return Check("a seed is a run", same and different, observed, "the same seed repeats it, another does not")

    def check_zero_learning_rate(self) -> Check:
        policy, env, _ = self.world(perturb=True)
        before = [p.detach().clone() for p in policy.parameters()]
        self.run(policy, env, 2, 0.0)
        moved = max(float((p - q).detach().abs().max()) for p, q in zip(policy.parameters(), before, strict=True))
        return Check("a learning rate of 0 changes nothing", moved == 0.0, f"moved by {moved:.2g}", "0")

    def check_metrics(self) -> Check:
        policy, env, _ = self.world()
        metrics, _ = self.run(policy, env, 3, self.lr)
        wrong = sorted({name for row in metrics for name, value in row.items() if not np.isfinite(value)})
        passed = len(metrics) == 3 and bool(metrics[0]) and not wrong
        observed = f"{len(metrics)} rows" + (f", not finite: {', '.join(wrong)}" if wrong else ", all finite")
        return Check("it yields finite metrics, once an update", passed, observed, "3 rows, all finite")

    def check_gradient(self, updates: int = 40) -> Check:
        policy, env, trees = self.world(perturb=True)
        _, taken = self.run(policy, env, updates, 0.0)
        wanted = -_flat(self.gradient(policy, trees), policy.parameters())
        name = "its gradient is the policy gradient"
        if len(taken) < updates:
            return Check(name, False, f"{len(taken)} optimizer steps in {updates} updates", "one in each, at least")
        used = wanted != 0
        mean = torch.stack(taken).mean(0)[used]
        cosine = float(torch.cosine_similarity(mean, wanted[used], dim=0))
        return Check(name, cosine > 0.97, f"cosine {cosine:.4f} over {updates * self.rows} completions", "> 0.97")

    def check_same_gradient(self, name: str, kind: Callable[..., TokenVectorEnv], wrap: Callable[[Any], Any]) -> Check:
        policy, env, _ = self.world(perturb=True)
        metrics, plain = self.run(policy, env, 1, 0.0)
        policy, env, _ = self.world(perturb=True, kind=kind)
        others, other = self.run(wrap(policy), env, 1, 0.0)
        if not (plain and other and metrics and others):
            return Check(name, False, "no optimizer step, or no metrics, in the first update", "one of each, at least")
        gap = float((plain[0] - other[0]).norm() / plain[0].norm())
        worst = max((abs(metrics[0][k] - others[0][k]) for k in metrics[0] if k in others[0]), default=0.0)
        observed = f"gradient by {gap:.1e}, metrics by {worst:.1e}"
        return Check(name, gap < 1e-4 and worst < 1e-3, observed, "1e-4 and 1e-3")

    def check_length_bias(self, updates: int = 40) -> Check:
        """With a constant score no direction is better; a biased algorithm makes texts longer, or shorter."""

        def constant(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
            return [1.0] * len(completions)

        def length(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
            return [float(c.tokens) for c in completions]

        _, _, trees = self.world(length, "none")
        means = []
        for score in (constant, length):
            policy, env, _ = self.world(score, "none", perturb=True)
            _, taken = self.run(policy, env, updates, 0.0)
            if not taken:
                return Check(NO_DRIFT, False, "no optimizer step", "one in each update, or more")
            means.append(torch.stack(taken).mean(0))
        longer = _flat(self.gradient(policy, trees, kl=False), policy.parameters())
        longer = longer / longer.norm()
        bias = -float((means[0] @ longer) / (means[1] @ longer).abs().clamp(min=1e-12))
        return Check(
            NO_DRIFT,
            abs(bias) < 0.2,
            f"{bias:+.3f} of the push that paying for length gives",
            "within ±0.2",
        )

    def check_stopping(self, updates: int = 80) -> Check:
        """One letter scores more than two, and two score more than the completions of the other prompts.

        An algorithm that leaves the end of sequence out of its loss then makes second letters more probable. If two
        letters scored nothing, such an algorithm would also stop earlier, because it makes every letter less probable.
        """
        paid = [prompt.text for prompt in PROMPTS[::2]]

        def brief(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
            worth = {0: 0.0, 1: 1.0, 2: 0.7}
            return [worth[len(c.text)] * (p.text in paid) for p, c in zip(prompts, completions, strict=True)]

        policy, env, trees = self.world(brief, "none")

        def stops() -> float:
            found = []
            for tree in (tree for tree in trees if tree.prompt.text in paid):
                with torch.no_grad():
                    second = policy.log_probs(tree.sequences)[tree.sequences.is_action[:, 1], 1]
                found.append(second[:, list(env.model.eos_ids)].exp().sum(-1).mean())
            return float(torch.stack(found).mean())

        before = stops()
        self.run(policy, env, updates, self.lr)
        after = stops()
        observed = f"P(stop) {before:.3f} -> {after:.3f}"
        return Check("it learns when to stop", after > 2 * before, observed, f"> {2 * before:.3f}")

    def check_optimum(self, updates: int) -> Check:
        policy, env, trees = self.world()
        self.run(policy, env, updates, self.lr)
        logp = [policy_logp(tree, policy.log_probs) for tree in trees]
        value = float(self.objective(trees, logp, kl=True)) / float(np.mean([tree.optimum for tree in trees]))
        distance = float(np.mean([tree.total_variation(one) for tree, one in zip(trees, logp, strict=True)]))
        passed = value > 0.99 and distance < 0.05
        observed = f"{100 * value:.2f} % of β log Z, total variation {distance:.3f}"
        return Check("it reaches the soft-optimal policy", passed, observed, "> 99 %, < 0.05")


def check_algorithm(
    train: Trainer,
    *,
    make_policy: MakePolicy | None = None,
    kl: KLForm = "sampled",
    rows: int = 256,
    lr: float = 0.1,
    updates: int = 250,
    skip: Sequence[str] = (),
    show: bool = True,
) -> list[Check]:
    """Checks an on-policy algorithm against exact results, and prints a table, with the usual cause of each failure.

    The task is small enough to enumerate: up to two letters after a prompt of one or two, from four letters and an end
    of sequence. By default the policy is a table, which can represent every policy, so that any gap is the algorithm's.

        check_algorithm(lambda policy, env, *, seed, lr, updates: my_algorithm(policy, env, lr, updates, seed))

    Args:
        train: the algorithm, see `Trainer`.
        make_policy: makes a new policy for an environment and the trees of its prompts; by default a `TablePolicy` that
            equals the reference.
        kl: the environment's KL form; "none" for an algorithm that has KL in its loss, at `env.kl_controller.beta`.
        rows: completions per rollout; a multiple of the algorithm's group.
        lr: the learning rate of the checks in which something is learned. 0.1 suits a table under Adam.
        updates: rollouts in which the optimum must be reached.
        skip: names of checks to leave out, for an algorithm that breaks one on purpose; add a comment that says why.
        show: print the table.

    Returns:
        The checks, in order.

    Raises:
        AssertionError: a check fails; the message contains the table.
        ValueError: `skip` names a check that does not exist.
    """
    suite = _Suite(train, make_policy or (lambda env, trees: TablePolicy.of(env, list(trees))), kl, rows, lr)
    runs = suite.checks(updates)
    unknown = set(skip) - set(runs)
    if unknown:
        raise ValueError(f"no checks named {sorted(unknown)}: choose from {', '.join(runs)}")
    checks = [replace(run(), key=name) for name, run in runs.items() if name not in skip]
    table = "\n".join(map(str, checks))
    if show:
        print(encodable(table))
    assert all(check.passed for check in checks), f"the algorithm breaks its contract:\n{table}"
    return checks


def _flat(values: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    parts = [torch.zeros_like(p) if v is None else v.detach() for v, p in zip(values, like, strict=True)]
    return torch.cat([part.flatten().double() for part in parts])
