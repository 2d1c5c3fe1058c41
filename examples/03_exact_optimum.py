"""PPO compared with the exact optimum, which can be computed if the environment is small enough.

python examples/03_exact_optimum.py
"""

import numpy as np

import lmgym
from agents import ppo
from agents.learner import Learner, LearnerConfig
from lmgym.exact import enumerate_tree, policy_logp
from lmgym.tasks import Tree


def main(updates: int = 30, rows: int = 256) -> None:
    lm = lmgym.load("probe")
    lm.adapters.add("policy", rank=8)
    policy = lmgym.Policy(lm)
    env = lmgym.TokenVectorEnv(
        rows, task=Tree(), model=lm, max_prompt_tokens=4, max_new_tokens=3, kl="sampled", beta=0.1
    )
    tree = enumerate_tree(env, env.task.sample(np.random.default_rng(0)))
    optimum, start = tree.optimum, tree.objective(tree.reference_logp)
    print(
        f"{len(tree.paths)} completions of {tree.prompt.text!r}; E[score] − β·KL: best {optimum:.4f}, now {start:.4f}"
    )
    learner = Learner(policy.parameters(), LearnerConfig(lr=5e-3))
    config = ppo.Config(updates=updates, minibatch_rows=rows // 4)
    for update, metrics in enumerate(ppo.train(policy, env, learner, config)):
        if update % 5 == 0 or update == updates - 1:
            logp = policy_logp(tree, policy.log_probs)
            share = (tree.objective(logp) - start) / (optimum - start)
            print(
                f"update {update:3}  sampled {metrics['reward/sequence']:.3f}  exact {tree.objective(logp):.4f}  "
                f"{share:.0%} of the improvement  total variation {tree.total_variation(logp):.3f}"
            )


if __name__ == "__main__":
    main()
