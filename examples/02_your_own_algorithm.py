"""Your own algorithm in 40 lines: REINFORCE with a batch baseline. It needs only `lmgym`.

python examples/02_your_own_algorithm.py
"""

import torch

import lmgym
from lmgym.tasks import Sort


def main(updates: int = 30, rows: int = 64, lr: float = 3e-3) -> float:
    """Trains a LoRA adapter to sort letters; returns the last mean score."""
    lm = lmgym.load("tiny")
    lm.adapters.add("policy", rank=8)
    policy = lmgym.Policy(lm, critic="none")
    env = lmgym.TokenVectorEnv(
        rows, task=Sort(), model=lm, max_prompt_tokens=12, max_new_tokens=8, kl="sampled", beta=0.02
    )
    buffer = lmgym.RolloutBuffer.like(env)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    score = 0.0
    for update in range(updates):
        lmgym.collect(policy, env, buffer, lmgym.Stream(seed=0, update=update))
        # ∇J = E[Σ_t (G_t − b) ∇ log π(a_t | s_t)]; G_t is the return from t on, KL included.
        returns = buffer.rewards.flip(1).cumsum(1).flip(1)
        advantages = returns - returns[buffer.is_action].mean()
        logp = policy.evaluate(buffer.sequences).logp
        loss = -(advantages * logp)[buffer.is_action].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        score = float(buffer.score.mean())
        if update % 5 == 0 or update == updates - 1:
            kl = float((buffer.logp - buffer.reference_logp).sum(1).mean())
            print(f"update {update:3}  score {score:.3f}  KL {kl:.2f} nats per sequence")
    return score


if __name__ == "__main__":
    main()
