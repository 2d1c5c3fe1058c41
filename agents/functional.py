"""The equations, one function each. Every mask is True where an entry counts, and every mean is over those."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


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


def whiten(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Centres and scales the entries under the mask to mean 0 and variance 1; 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), 0.0)


def clipped_surrogate(
    logp: Float[Tensor, "*shape"],
    old_logp: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    clip: float = 0.2,
) -> Float[Tensor, "*shape"]:
    """PPO's loss per action (Schulman et al. 2017, eq. 7): −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A), ρ = π/π_old."""
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


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
