"""The equations, one function each. A mask is True where an entry counts; means are over these entries only."""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Schedule = Literal["linear", "cosine", "constant"]
"""The shape of the learning-rate decay after the warm-up."""


def schedule_factor(schedule: Schedule, progress: float, warmup: float) -> float:
    """The learning rate as a fraction of its peak, when the fraction `progress` of the run is done.

    During the first fraction `warmup` of the run it rises linearly from 0.1 to 1. After that it decays to 0 linearly
    ("linear") or along half a cosine ("cosine"), or it stays at 1 ("constant").
    """
    if progress < warmup:
        return 0.1 + 0.9 * progress / warmup
    rest = (progress - warmup) / max(1e-9, 1 - warmup)
    shapes = {"linear": 1 - rest, "cosine": 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * rest)))}
    return max(0.0, shapes.get(schedule, 1.0))


def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean over the entries where `mask` is True; 0 if there are no such entries."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    is_action: Bool[Tensor, "B T"],
    bootstrap: Float[Tensor, " B"],
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16, https://arxiv.org/abs/1506.02438).

    δ_t = r_t + γ V(s_{t+1}) − V(s_t);  A_t = δ_t + γλ A_{t+1}.

    After a row's last action, V(s_{t+1}) is `bootstrap`: 0 if the episode terminated, the critic's estimate if it was
    truncated.

    Returns:
        The advantages A and the returns A + V, both 0 where no action was taken.
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
    """The discounted return from each action on: G_t = r_t + γ G_{t+1}.

    Williams 1992 (https://doi.org/10.1007/BF00992696); Sutton & Barto 2018, eq. 3.8.
    """
    _, returns = gae(rewards, torch.zeros_like(rewards), is_action, bootstrap, gamma, 1.0)
    return returns


def leave_one_out(returns: Float[Tensor, " B"], group: int) -> Float[Tensor, " B"]:
    """RLOO's advantage: R_i − the mean of the other returns of its group.

    Kool et al. 2019 (https://openreview.net/forum?id=r1lgTGL5DE); Ahmadian et al. 2024
    (https://arxiv.org/abs/2402.14740). The rows of a group are adjacent. A group of two gives R_1 − R_2 and R_2 − R_1.
    """
    grouped = returns.view(-1, group)
    return ((grouped - grouped.mean(1, keepdim=True)) * (group / (group - 1))).flatten()


def group_relative(returns: Float[Tensor, " B"], group: int, scale: bool = True) -> Float[Tensor, " B"]:
    """GRPO's advantage: (R_i − mean) / std over the group; 0 if all returns of the group are equal.

    Shao et al. 2024, section 4.1.2 (https://arxiv.org/abs/2402.03300). Without `scale` it is R_i − mean, as in Dr. GRPO
    (Liu et al. 2025, https://arxiv.org/abs/2503.20783). The rows of a group are adjacent.
    """
    grouped = returns.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + 1e-4) if scale else centred).flatten()


def whiten(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], shift_mean: bool = True
) -> Float[Tensor, "*shape"]:
    """Scales the entries under the mask to variance 1 and mean 0; the other entries become 0.

    Without `shift_mean` the mean is unchanged. This is for rewards, because a shift of the rewards would change the
    objective (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593).
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    scaled = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0.0)


def surrogate(
    logp: Float[Tensor, "*shape"], old_logp: Float[Tensor, "*shape"], advantages: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """The policy-gradient loss per action, −ρ A, where ρ = π/π_old.

    At π = π_old its gradient is −A ∇ log π, which is REINFORCE's (Williams 1992, https://doi.org/10.1007/BF00992696).
    """
    return -(logp - old_logp).exp() * advantages


def clipped_surrogate(
    logp: Float[Tensor, "*shape"],
    old_logp: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float = 0.0,
) -> Float[Tensor, "*shape"]:
    """PPO's loss per action: −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A), where ρ = π/π_old.

    Schulman et al. 2017, eq. 7 (https://arxiv.org/abs/1707.06347).

    Args:
        logp: log π in nats.
        old_logp: log π_old in nats.
        advantages: A.
        clip: ε.
        clip_high: ε of the upper bound 1 + ε, if it differs from that of the lower bound ("clip-higher", DAPO: Yu et
            al. 2025, section 3.1, https://arxiv.org/abs/2503.14476).
        dual_clip: a constant c > 1, which bounds the loss by −c A if A < 0 ("dual clip", Ye et al. 2020,
            https://arxiv.org/abs/1912.09729); 0 is off.
    """
    ratio = (logp - old_logp).exp()
    high = clip if clip_high is None else clip_high
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + high) * advantages)
    if dual_clip:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    return -gain


def is_clipped(
    logp: Float[Tensor, "*shape"], old_logp: Float[Tensor, "*shape"], clip: float = 0.2
) -> Float[Tensor, "*shape"]:
    """1 if the probability ratio is outside 1 ± ε, else 0. The mean is the share of clipped actions."""
    return (((logp - old_logp).detach().exp() - 1).abs() > clip).float()


def sequence_logp_ratio(
    logp: Float[Tensor, "B T"], old_logp: Float[Tensor, "B T"], is_action: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """GSPO's log-ratio: the mean of log π − log π_old over the sequence, repeated at every token.

    Zheng et al. 2025, section 4 (https://arxiv.org/abs/2507.18071). The gradient flows to every token through the mean.
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
    """An estimate of KL(π ‖ π_ref) per action, used as a loss. r = log π − log π_ref, on actions sampled from π_old.

    The estimators (Schulman 2020, http://joschu.net/blog/kl-approx.html):

    - "k2": r²/2. Its expected gradient is that of the KL if π = π_old.
    - "k3": e^{−r} − 1 + r, as in GRPO (Shao et al. 2024, eq. 4, https://arxiv.org/abs/2402.03300). Its expected
      gradient is that of KL(π_ref ‖ π), not that of the KL.
    - "ratio_k3": ρ (e^{−r} − 1 + r), where ρ = π/π_old. Its expected gradient is that of the KL, also if π ≠ π_old.

    Each estimate concerns one state only. Only a KL in the reward also charges an action for the KL of later states.
    """
    log_ratio = logp - reference_logp
    if estimator == "k2":
        return log_ratio.square() / 2
    k3 = torch.expm1(-log_ratio) + log_ratio
    return k3 if estimator == "k3" else (logp - old_logp).exp() * k3


def token_mean(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The weights of a mean over all tokens: 1 / Σ_i |y_i|.

    DAPO: Yu et al. 2025, section 3.3 (https://arxiv.org/abs/2503.14476).
    """
    return mask / mask.sum().clamp(min=1)


def sequence_mean(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The weights of a mean over each row's tokens, and then over rows: 1 / (B |y_i|).

    GRPO: Shao et al. 2024, eq. 3 (https://arxiv.org/abs/2402.03300).
    """
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


def sequence_sum(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The weights of a sum over each row's tokens, and then a mean over rows: 1 / B.

    This gives the unbiased policy gradient (Williams 1992, https://doi.org/10.1007/BF00992696).
    """
    return mask / float(len(mask))


def constant_mean(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The weights of a sum divided by a constant: 1 / (B T), where T is the token budget.

    Dr. GRPO: Liu et al. 2025 (https://arxiv.org/abs/2503.20783).
    """
    return mask / float(mask.numel())


def clipped_value_loss(
    values: Float[Tensor, "*shape"],
    old_values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    clip: float = 0.2,
) -> Float[Tensor, "*shape"]:
    """The clipped value loss per action: ½ max((V − R)², (V_clipped − R)²).

    V_clipped is V, clipped to within `clip` of the old value. As in PPO's reference code
    (https://github.com/openai/baselines). `clip` = 0 is off: ½ (V − R)².
    """
    if not clip:
        return (values - returns).square() / 2
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


def explained_variance(
    values: Float[Tensor, "*shape"], returns: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """1 − Var(R − V) / Var(R). 1: a perfect critic; 0: no better than a constant. It is 0 if all returns are equal."""

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    total = variance(returns)
    return torch.where(total > 0, 1 - variance(returns - values) / total.clamp(min=1e-12), 0.0)


def best_of_n_kl(n: int) -> float:
    """KL(best of n ‖ π) in nats if no two scores are equal: log n − (n − 1)/n.

    Stiennon et al. 2020, app. G.3 (https://arxiv.org/abs/2009.01325).
    """
    return math.log(n) - (n - 1) / n


def best_of_n_probs(
    scores: Float[Tensor, "*group N"], probs: Float[Tensor, "*group N"], n: int
) -> Float[Tensor, "*group N"]:
    """The probability that each of N outcomes is the best of n draws, with ties broken at random.

    p_i · (P(s ≤ s_i)ⁿ − P(s < s_i)ⁿ) / P(s = s_i), where s is the score of one draw. This is exact also with ties,
    which make `best_of_n_kl` an upper bound.
    """
    at_most = ((scores[..., None, :] <= scores[..., None]) * probs[..., None, :]).sum(-1)
    below = ((scores[..., None, :] < scores[..., None]) * probs[..., None, :]).sum(-1)
    return probs * (at_most.pow(n) - below.pow(n)) / (at_most - below)


def expected_best(scores: Float[Tensor, "G N"], n: int) -> Float[Tensor, " G"]:
    """The best score of n, averaged over all subsets of n of a group's N scores.

    It is unbiased, and has less variance than the best score of a single subset.
    """
    return scores.sort(1).values @ scores.new_tensor(best_weights(scores.shape[1], n))


def best_weights(size: int, n: int) -> list[float]:
    """The share of all subsets of n of `size` scores in which the score of each rank, the lowest first, is the best."""
    return [math.comb(rank, n - 1) / math.comb(size, n) for rank in range(size)]


def best_of_group(scores: Float[Tensor, " B"], group: int, keep: int = 1) -> Bool[Tensor, " B"]:
    """True for the `keep` best rows of each group; the earlier row wins a tie. The rows of a group are adjacent."""
    order = scores.view(-1, group).sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return torch.zeros_like(scores, dtype=torch.bool).view(-1, group).scatter(1, order, True).flatten()


def dpo(
    chosen_log_ratio: Float[Tensor, " B"],
    rejected_log_ratio: Float[Tensor, " B"],
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " B"]:
    """DPO's loss per pair: −log σ(β r_chosen − β r_rejected), where r = log π(y)/π_ref(y).

    Rafailov et al. 2023, eq. 7 (https://arxiv.org/abs/2305.18290). `label_smoothing` is the probability ε that a label
    is wrong. The loss is then (1 − ε) times that of the pair as labelled, plus ε times that of the swapped pair
    (conservative DPO: Mitchell 2023, "A note on DPO with noisy preferences").
    """
    margin = beta * (chosen_log_ratio - rejected_log_ratio)
    loss = torch.nn.functional.logsigmoid
    return -(1 - label_smoothing) * loss(margin) - label_smoothing * loss(-margin)


def forward_kl(
    teacher_log_probs: Float[Tensor, "*shape V"], log_probs: Float[Tensor, "*shape V"]
) -> Float[Tensor, "*shape"]:
    """KL(teacher ‖ student) over the vocabulary, in nats; tokens of teacher probability 0 contribute 0.

    Hinton et al. 2015 (https://arxiv.org/abs/1503.02531).
    """
    probs = teacher_log_probs.exp()
    return torch.where(probs > 0, probs * (teacher_log_probs - log_probs), 0.0).sum(-1)


def noisy_logsigmoid(difference: Float[Tensor, "*shape"], error_rate: float) -> Float[Tensor, "*shape"]:
    """log P of a label whose annotator errs at random: P = ε + (1 − 2ε) σ(difference).

    Christiano et al. 2017, section 2.2.3 (https://arxiv.org/abs/1706.03741): an annotator who answers at random in 10 %
    of the cases flips 5 % of the labels, so that ε = 0.05. Without ε, the loss of a wrong label grows without bound
    with the difference, and the fitted scores become too small.

    Args:
        difference: the score of the preferred text minus that of the other.
        error_rate: ε, the probability that a label is flipped, in [0, 0.5).
    """
    right = torch.nn.functional.logsigmoid(difference)
    if not error_rate:
        return right
    return torch.logaddexp(right + math.log(1 - 2 * error_rate), torch.full_like(right, math.log(error_rate)))


def bradley_terry(
    scores: Float[Tensor, " K"], rejected: Float[Tensor, " K"], margin: float = 0.0, error_rate: float = 0.0
) -> Float[Tensor, ""]:
    """The mean over pairs of −log σ(r_chosen − r_rejected − margin). `scores` holds r_chosen.

    Bradley & Terry 1952 (https://doi.org/10.2307/2334029); Stiennon et al. 2020 (https://arxiv.org/abs/2009.01325).
    With an `error_rate`, the probability is that of `noisy_logsigmoid`.
    """
    return -noisy_logsigmoid(scores - rejected - margin, error_rate).mean()


def ranking_loss(scores: Float[Tensor, " K"], error_rate: float = 0.0) -> Float[Tensor, ""]:
    """The mean of −log σ(r_i − r_j) over all pairs of one ranking. `scores` are in ranked order, best first.

    Ouyang et al. 2022, eq. 1 (https://arxiv.org/abs/2203.02155). `error_rate` is that of a pair, as in `bradley_terry`.
    """
    better, worse = torch.triu_indices(len(scores), len(scores), offset=1, device=scores.device)
    return bradley_terry(scores[better], scores[worse], error_rate=error_rate)


def choice_loss(scores: Float[Tensor, " K"]) -> Float[Tensor, ""]:
    """−log of the probability that the first of K texts is chosen: −log exp(r_1) / Σ_i exp(r_i).

    Ziegler et al. 2019, eq. 1 (https://arxiv.org/abs/1909.08593), where K = 4. The order of the other texts does not
    matter. With K = 2 it is `ranking_loss`.
    """
    return -scores.log_softmax(0)[0]


def expected_calibration_error(
    probability: Float[Tensor, " N"], outcome: Bool[Tensor, " N"], bins: int = 10
) -> Float[Tensor, ""]:
    """Σ_bins share · |mean probability − frequency| over bins of equal width.

    Guo et al. 2017, eq. 3 (https://arxiv.org/abs/1706.04599).
    """
    index = (probability * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, device=probability.device).scatter_add_(0, index, outcome.float() - probability)
    return gap.abs().sum() / len(probability)
