"""Exercises of lesson 1: a policy is a language model."""

import math

import torch

from agents.lessons.exercise import Answer, demand, exercise, expect, lengths_mask, numbers, probabilities


@exercise(
    "1.1",
    "From logits to log-probabilities",
    "fill",
    '''
"""Exercise 1.1: from logits to log-probabilities.

A language model gives one number for each token of the vocabulary, its logit z. The probability of token k is

    π_k = exp(z_k) / Σ_j exp(z_j)

Write `log_probs`, which returns log π (natural logarithm) for every token. It must also work for large logits, such as
1000, whose exponential is too large for a computer. Do not call torch.log_softmax or logsumexp: write it out.
"""

import torch


def log_probs(logits):
    """[V] log-probabilities, in nats, from [V] logits."""
    ...
''',
    (
        "Take the logarithm of the equation by hand: log π_k = z_k − log Σ_j exp(z_j).",
        "If you subtract the same number from every logit, the probabilities do not change.",
        "Subtract logits.max() first; then z − z.exp().sum().log().",
    ),
)
def log_probs(answer: Answer) -> None:
    """torch.log_softmax is the oracle."""
    for logits in (numbers((4,), 1), numbers((7,), 2, 3.0), torch.tensor([1000.0, 999.0, 998.0], dtype=torch.float64)):
        wanted = logits.log_softmax(0)
        mistakes = {
            "You return probabilities; take their logarithm": wanted.exp(),
            "You use another base than e: log-probabilities are in nats": wanted / math.log(2),
            "You do not normalise: subtract log Σ exp(z)": logits - logits.max(),
        }
        case = f"logits {[round(z, 2) for z in logits.tolist()]}"
        got = answer.log_probs(logits)
        if logits.max() > 500 and not bool(torch.isfinite(torch.as_tensor(got)).all()):
            demand(False, f"For {case}, the exponential overflows: subtract the largest logit first.")
        expect(got, wanted, case, mistakes)


@exercise(
    "1.2",
    "Temperature",
    "mend",
    '''
"""Exercise 1.2: temperature. This code has a bug.

A temperature τ below 1 makes a policy prefer its probable tokens more strongly; τ above 1 makes it more even. The
policy at temperature τ is softmax(z / τ). Find the bug in `log_probs_at` and mend it.
"""

import torch


def log_probs_at(logits, temperature):
    """[V] log-probabilities of softmax(logits / temperature)."""
    return torch.log_softmax(logits, 0) / temperature
''',
    (
        "Add up the probabilities that the function gives at temperature 0.5. What should their sum be?",
        "The division happens after the normalisation.",
        "Divide the logits, and then normalise.",
    ),
)
def log_probs_at(answer: Answer) -> None:
    """The closed form exp(z/τ) / Σ exp(z/τ), and that the probabilities add up to 1."""
    for temperature in (1.0, 0.5, 2.0):
        logits = numbers((5,), 3)
        powers = (logits / temperature).exp()
        wanted = (powers / powers.sum()).log()
        mistakes = {
            "The probabilities do not add up to 1: divide the logits before the normalisation": logits.log_softmax(0)
            / temperature,
            "You multiply by the temperature: a low temperature must make the policy less random": (
                logits * temperature
            ).log_softmax(0),
            "The temperature has no effect": logits.log_softmax(0),
        }
        expect(answer.log_probs_at(logits, temperature), wanted, f"temperature {temperature}", mistakes)


@exercise(
    "1.3",
    "The log-probability of a text",
    "fill",
    '''
"""Exercise 1.3: the log-probability of a text.

A text is as probable as the product of the probabilities of its tokens. Its log-probability is therefore a sum. Rows
have different lengths: `is_action[b, t]` is True where row b has a token at t, and False in the padding behind it.

Write `sequence_logp`: one log-probability per row.
"""

import torch


def sequence_logp(log_probs, tokens, is_action):
    """[B] from log_probs [B, T, V], tokens [B, T] (integers) and is_action [B, T] (True or False)."""
    ...
''',
    (
        "First pick, for each b and t, the entry of log_probs that belongs to the chosen token.",
        "log_probs.gather(2, tokens[..., None])[..., 0] picks it. What should the padding count?",
        "Replace the padding by 0 with torch.where, and sum over dimension 1.",
    ),
)
def sequence_logp(answer: Answer) -> None:
    """Multiplies probabilities one by one."""
    logp = numbers((3, 4, 5), 4).log_softmax(2)
    tokens = torch.tensor([[0, 1, 2, 3], [4, 0, 0, 0], [2, 2, 1, 0]])
    lengths = [4, 1, 3]
    mask = lengths_mask(lengths, 4)
    wanted, everything = [], []
    for row, length in enumerate(lengths):
        chosen = [float(logp[row, t, int(tokens[row, t])].exp()) for t in range(4)]
        wanted.append(math.log(math.prod(chosen[:length])))
        everything.append(math.log(math.prod(chosen)))
    mistakes = {
        "You count the padding: only tokens where is_action is True belong to the text": everything,
        "You take the mean over the tokens; the log-probability of a text is the sum": [
            value / length for value, length in zip(wanted, lengths, strict=True)
        ],
        "You return probabilities; return their logarithm": [math.exp(value) for value in wanted],
    }
    expect(answer.sequence_logp(logp, tokens, mask), wanted, "three rows of 4, 1 and 3 tokens", mistakes)


@exercise(
    "1.4",
    "Sampling with one uniform number",
    "mend",
    '''
"""Exercise 1.4: sampling with one uniform number. This code has a bug.

To draw a token from probabilities p, take a uniform number u, at least 0 and below 1, and walk along the cumulative
sums p_0, p_0 + p_1, …: the token is the first whose cumulative sum is above u. Find the bug in `draw` and mend it.
"""

import torch


def draw(probs, u):
    """The token, an integer, that the uniform number u draws from the probabilities [V]."""
    cumulative = 0.0
    for token in range(len(probs)):
        cumulative += probs[token]
        if cumulative < u:
            return token
    return len(probs) - 1
''',
    (
        "Draw by hand with probs = [0.5, 0.5] and u = 0.1, and then with u = 0.9.",
        "The text says: the first token whose cumulative sum is above u.",
        "Turn the comparison round: cumulative > u.",
    ),
)
def draw(answer: Answer) -> None:
    """A grid of uniform numbers must give each token its share; the edges are tried too."""
    probs = torch.tensor([0.2, 0.0, 0.5, 0.3], dtype=torch.float64)
    grid = [(i + 0.5) / 100 for i in range(100)]
    drawn = [int(answer.draw(probs, u)) for u in grid]
    share = [drawn.count(token) / 100 for token in range(4)]
    demand(drawn.count(1) == 0, "You draw token 1, whose probability is 0.")
    mistakes = {
        "The comparison is the wrong way round: the first token whose cumulative sum is above u": [0.8, 0.0, 0.0, 0.2],
        "You always draw the most probable token: that is greedy decoding, not sampling": [0.0, 0.0, 1.0, 0.0],
    }
    expect(share, probs, "the shares of 100 evenly spread u", mistakes, tolerance=2e-3)
    first = int(answer.draw(torch.tensor([0.0, 1.0]), 0.0))
    demand(
        first == 1,
        "For u = 0 and probabilities [0, 1] you draw token 0, whose probability is 0: compare with >, not >=.",
    )


@exercise(
    "1.5",
    "Entropy",
    "fill",
    '''
"""Exercise 1.5: entropy.

The entropy of a policy says how random it is, in nats: H = −Σ_k π_k log π_k. It is 0 for a policy that always chooses
the same token and log V for an even one. A token of probability 0 contributes 0, although log 0 is −∞.

Write `entropy`.
"""

import torch


def entropy(probs):
    """The entropy in nats of the probabilities [V]."""
    ...
''',
    (
        "Write the sum first, and try it on [0.5, 0.5]: log 2 is 0.693.",
        "What does Python give for 0 * log(0)? Choose what stands there with torch.where.",
        "torch.where(probs > 0, -probs * probs.log(), 0.0).sum() is safe, because where picks the 0.",
    ),
)
def entropy(answer: Answer) -> None:
    """torch.distributions is the oracle."""
    for probs in (probabilities(5, 5), torch.full((4,), 0.25, dtype=torch.float64)):
        wanted = torch.distributions.Categorical(probs=probs).entropy()
        mistakes = {
            "The sign is wrong: entropy is not negative": -wanted,
            "You measure in bits; use the natural logarithm": wanted / math.log(2),
            "You forget to weight by the probabilities": -probs.log().sum(),
            "You take the mean over the tokens; weight them by their probabilities and sum": wanted / len(probs),
        }
        expect(answer.entropy(probs), wanted, f"probabilities {[round(p, 3) for p in probs.tolist()]}", mistakes)
    zero = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    got = torch.as_tensor(answer.entropy(zero))
    demand(
        bool(torch.isfinite(got).all()),
        "For [0.5, 0, 0.5] you return no finite number: a probability of 0 contributes 0.",
    )
    expect(got, math.log(2), "[0.5, 0, 0.5]")
