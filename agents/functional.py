"""The equations, one function each. Every mask is True where an entry counts, and every mean is over those."""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Schedule = Literal["linear", "cosine", "constant"]
"""What the learning rate does after the warm-up."""


def schedule_factor(schedule: Schedule, progress: float, warmup: float) -> float:
    """The learning rate as a share of its peak, at a point of the run between 0 and 1.

    During the first `warmup` of the run it rises in a straight line from 0.1 to 1; then it falls to 0 in a straight
    line ("linear") or half a cosine ("cosine"), or stays ("constant").
    """
    if progress < warmup:
        return 0.1 + 0.9 * progress / warmup
    rest = (progress - warmup) / max(1e-9, 1 - warmup)
    shapes = {"linear": 1 - rest, "cosine": 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * rest)))}
    return max(0.0, shapes.get(schedule, 1.0))


def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean over the entries where `mask` is True; 0 where none is."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    is_action: Bool[Tensor, "B T"],
    bootstrap: Float[Tensor, " B"],
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), and the returns A + V.

    δ_t = r_t + γ V(s_{t+1}) − V(s_t);  A_t = δ_t + γλ A_{t+1}.

    Behind a row's last action the value is `bootstrap`: 0 where the episode ended, the critic's estimate where it was
    cut off.
    """
    following = torch.cat([is_action[:, 1:], torch.zeros_like(is_action[:, :1])], 1)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    next_values = torch.where(following, next_values, bootstrap[:, None])
    deltas = torch.where(is_action, rewards + gamma * next_values - values, 0.0)
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(bootstrap)
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, torch.where(is_action, advantages + values, 0.0)


def reward_to_go(
    rewards: Float[Tensor, "B T"], is_action: Bool[Tensor, "B T"], bootstrap: Float[Tensor, " B"], gamma: float = 1.0
) -> Float[Tensor, "B T"]:
    """What is still to come (Williams 1992; Sutton & Barto 2018, eq. 3.8): G_t = r_t + γ G_{t+1}."""
    _, returns = gae(rewards, torch.zeros_like(rewards), is_action, bootstrap, gamma, 1.0)
    return returns


def leave_one_out(returns: Float[Tensor, " B"], group: int) -> Float[Tensor, " B"]:
    """RLOO's advantage (Kool et al. 2019; Ahmadian et al. 2024): R_i − mean of the group's other returns.

    Rows of a group stand side by side. G = 2 gives R_1 − R_2 and R_2 − R_1.
    """
    grouped = returns.view(-1, group)
    return ((grouped - grouped.mean(1, keepdim=True)) * (group / (group - 1))).flatten()


def group_relative(returns: Float[Tensor, " B"], group: int, scale: bool = True) -> Float[Tensor, " B"]:
    """GRPO's advantage (Shao et al. 2024, section 4.1.2): (R_i − mean) / std over the group; 0 where all are equal.

    Without `scale`, R_i − mean, as Dr. GRPO has it (Liu et al. 2025).
    """
    grouped = returns.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + 1e-4) if scale else centred).flatten()


def whiten(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], shift_mean: bool = True
) -> Float[Tensor, "*shape"]:
    """Scales the entries under the mask to variance 1 and centres them; 0 elsewhere.

    Without `shift_mean` the mean stays where it was: for rewards (Ziegler et al. 2019), whose mean says what is good.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    scaled = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0.0)


def surrogate(
    logp: Float[Tensor, "*shape"], old_logp: Float[Tensor, "*shape"], advantages: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """−ρ A per action, ρ = π/π_old; its gradient where π = π_old is −A ∇ log π, that of REINFORCE (Williams 1992)."""
    return -(logp - old_logp).exp() * advantages


def clipped_surrogate(
    logp: Float[Tensor, "*shape"],
    old_logp: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float = 0.0,
) -> Float[Tensor, "*shape"]:
    """PPO's loss per action (Schulman et al. 2017, eq. 7): −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A), ρ = π/π_old.

    Args:
        logp: log π in nats.
        old_logp: log π_old.
        advantages: A.
        clip: ε.
        clip_high: ε above 1, where it differs from that below ("clip-higher", Yu et al. 2025, section 3.1).
        dual_clip: c > 1 bounds the loss of actions with A < 0 to −c A (Ye et al. 2020); 0 does not.
    """
    ratio = (logp - old_logp).exp()
    high = clip if clip_high is None else clip_high
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + high) * advantages)
    if dual_clip:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    return -gain


def outside(
    logp: Float[Tensor, "*shape"], old_logp: Float[Tensor, "*shape"], clip: float = 0.2
) -> Float[Tensor, "*shape"]:
    """1 where the probability ratio lies outside 1 ± ε, else 0: its mean is the share of clipped actions."""
    return (((logp - old_logp).detach().exp() - 1).abs() > clip).float()


def sequence_logp_ratio(
    logp: Float[Tensor, "B T"], old_logp: Float[Tensor, "B T"], is_action: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """GSPO's log-ratio at every token (Zheng et al. 2025, section 4): the sequence's mean of log π − log π_old.

    Its value is the sequence's, and its gradient reaches each token through the mean.
    """
    log_ratio = torch.where(is_action, logp - old_logp, 0.0)
    mean = log_ratio.sum(1, keepdim=True) / is_action.sum(1, keepdim=True).clamp(min=1)
    return mean.expand_as(logp)


def kl_loss(
    estimator: str,
    logp: Float[Tensor, "*shape"],
    old_logp: Float[Tensor, "*shape"],
    reference_logp: Float[Tensor, "*shape"],
) -> Float[Tensor, "*shape"]:
    """KL(π ‖ π_ref) per action as a loss, r = log π − log π_ref on actions of π_old (Schulman 2020).

    "k2": r²/2, whose gradient on fresh actions is the KL's. "k3": e^{−r} − 1 + r, as GRPO has it (Shao et al. 2024,
    eq. 4), whose gradient is that of KL(π_ref ‖ π) and not the KL's. "ratio_k3": ρ (e^{−r} − 1 + r), ρ = π/π_old, whose
    gradient is the KL's on old actions too. All are of one state at a time: only a KL in the reward credits an action
    with the KL of the states that it leads to.
    """
    log_ratio = logp - reference_logp
    if estimator == "k2":
        return log_ratio.square() / 2
    k3 = torch.expm1(-log_ratio) + log_ratio
    return k3 if estimator == "k3" else (logp - old_logp).exp() * k3


def token_mean(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Weights of a mean over tokens (DAPO: Yu et al. 2025, section 3.3): 1 / Σ_i |y_i|."""
    return mask / mask.sum().clamp(min=1)


def sequence_mean(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Weights of a mean over rows of means over tokens (GRPO: Shao et al. 2024, eq. 3): 1 / (B |y_i|)."""
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


def sequence_sum(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Weights of a mean over rows of sums over tokens, the policy gradient's own (Williams 1992): 1 / B."""
    return mask / float(len(mask))


def constant_mean(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Weights of a sum over a constant (Dr. GRPO: Liu et al. 2025): 1 / (B T), T the token budget."""
    return mask / float(mask.numel())


def clipped_value_loss(
    values: Float[Tensor, "*shape"],
    old_values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    clip: float = 0.2,
) -> Float[Tensor, "*shape"]:
    """½ max((V − R)², (V_clipped − R)²) per action, V_clipped within `clip` of the old value (PPO's reference code)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


def explained_variance(
    values: Float[Tensor, "*shape"], returns: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """1 − Var(R − V) / Var(R): 1 is a perfect critic, 0 one that knows the mean; 0 where the returns do not vary."""

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    total = variance(returns)
    return torch.where(total > 0, 1 - variance(returns - values) / total.clamp(min=1e-12), 0.0)


def best_of_n_kl(n: int) -> float:
    """KL(best of n ‖ π) in nats where no two scores are equal: log n − (n − 1)/n (Stiennon et al. 2020, app. G.3)."""
    return math.log(n) - (n - 1) / n


def best_of_n_probs(
    scores: Float[Tensor, "*group N"], probs: Float[Tensor, "*group N"], n: int
) -> Float[Tensor, "*group N"]:
    """The probability that each of N outcomes is the best of n draws, ties broken at random.

    p_i · (F(s_i)ⁿ − F(<s_i)ⁿ) / P(score = s_i), F the distribution of the scores: exact with ties, which make
    `best_of_n_kl` an upper bound.
    """
    at_most = ((scores[..., None, :] <= scores[..., None]) * probs[..., None, :]).sum(-1)
    below = ((scores[..., None, :] < scores[..., None]) * probs[..., None, :]).sum(-1)
    return probs * (at_most.pow(n) - below.pow(n)) / (at_most - below)


def expected_best(scores: Float[Tensor, "G N"], n: int) -> Float[Tensor, " G"]:
    """The mean over all choices of n of a group's N scores of the best one: no bias, and less noise than one choice."""
    size = scores.shape[1]
    weights = [math.comb(rank, n - 1) / math.comb(size, n) for rank in range(size)]
    return scores.sort(1).values @ scores.new_tensor(weights)


def best_of_group(scores: Float[Tensor, " B"], group: int, keep: int = 1) -> Bool[Tensor, " B"]:
    """True for the `keep` best rows of each group; among equals the first. Rows of a group stand side by side."""
    order = scores.view(-1, group).sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return torch.zeros_like(scores, dtype=torch.bool).view(-1, group).scatter(1, order, True).flatten()


def dpo(
    chosen_log_ratio: Float[Tensor, " B"],
    rejected_log_ratio: Float[Tensor, " B"],
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " B"]:
    """DPO's loss per pair (Rafailov et al. 2023, eq. 7): −log σ(β r_chosen − β r_rejected), r = log π(y)/π_ref(y).

    With `label_smoothing` ε, for labels that are wrong at that rate (Mitchell 2023): (1 − ε) and ε of both orders.
    """
    margin = beta * (chosen_log_ratio - rejected_log_ratio)
    loss = torch.nn.functional.logsigmoid
    return -(1 - label_smoothing) * loss(margin) - label_smoothing * loss(-margin)


def forward_kl(
    teacher_log_probs: Float[Tensor, "*shape V"], log_probs: Float[Tensor, "*shape V"]
) -> Float[Tensor, "*shape"]:
    """KL(teacher ‖ student) over the vocabulary (Hinton et al. 2015); tokens that the teacher never says count as 0."""
    probs = teacher_log_probs.exp()
    return torch.where(probs > 0, probs * (teacher_log_probs - log_probs), 0.0).sum(-1)


def bradley_terry(scores: Float[Tensor, " K"], rejected: Float[Tensor, " K"], margin: float = 0.0) -> Float[Tensor, ""]:
    """−log σ(r_chosen − r_rejected − margin), the mean over pairs (Bradley & Terry 1952; Stiennon et al. 2020)."""
    return -torch.nn.functional.logsigmoid(scores - rejected - margin).mean()


def ranking_loss(scores: Float[Tensor, " K"]) -> Float[Tensor, ""]:
    """The mean of −log σ(r_i − r_j) over all pairs of one ranking, best first (Ouyang et al. 2022, eq. 1)."""
    better, worse = torch.triu_indices(len(scores), len(scores), offset=1, device=scores.device)
    return bradley_terry(scores[better], scores[worse])


def expected_calibration_error(
    probability: Float[Tensor, " N"], outcome: Bool[Tensor, " N"], bins: int = 10
) -> Float[Tensor, ""]:
    """Σ_bins share · |mean probability − frequency| (Guo et al. 2017, eq. 3), over bins of equal width."""
    index = (probability * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, device=probability.device).scatter_add_(0, index, outcome.float() - probability)
    return gap.abs().sum() / len(probability)
