"""Grammar-constrained decoding: an action mask that depends on the text so far lets the policy write numbers alone.

python examples/09_grammar.py
"""

import re
from collections.abc import Sequence

import torch

import lmgym
from agents import rloo
from agents.learner import Learner, LearnerConfig
from lmgym.env import ActionMaskFunction
from lmgym.tasks import Arithmetic


def numbers_alone(lm: lmgym.LanguageModel) -> ActionMaskFunction:
    """The grammar: a space, a number of one or two digits, and the end."""
    pieces = [lm.text.decode([token]) for token in range(lm.vocabulary)]

    def may_follow(text: str) -> list[bool]:
        allowed = [piece != "" and re.fullmatch(r" (\d\d?)?", text + piece) is not None for piece in pieces]
        for token in lm.eos_ids:
            allowed[token] = re.fullmatch(r" \d\d?", text) is not None
        return allowed

    def action_mask(prompts: Sequence[lmgym.Prompt], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([may_follow("".join(pieces[token] for token in chosen)) for chosen in tokens])

    return action_mask


def main(updates: int = 30) -> None:
    for name in ("without", "with"):
        lm = lmgym.load("tiny")
        lm.adapters.add("policy")
        policy = lmgym.Policy(lm, critic="none")
        grammar = numbers_alone(lm) if name == "with" else None
        env = lmgym.TokenVectorEnv(
            32, task=Arithmetic(), model=lm, action_mask=grammar, max_new_tokens=8, kl="sampled", beta=0.02
        )
        learner = Learner(policy.parameters(), LearnerConfig(lr=3e-3))
        rows = list(rloo.train(policy, env, learner, rloo.Config(updates=updates, group=4)))
        first, last = rows[0], rows[-1]
        # The grammar holds for the reference too, so KL counts what the policy learned, and not what was forbidden.
        print(
            f"{name:7} grammar: score {first['score/mean']:.2f} -> {last['score/mean']:.2f}, "
            f"KL {last['kl/sequence_nats']:.2f} nats; {env.prompts[0].text}|{env.completions()[0].text}"
        )


if __name__ == "__main__":
    main()
