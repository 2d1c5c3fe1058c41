"""The suites that come with the package. Rows are frozen: a change makes a new suite, with another name.

Where `exact` is true, `reference` is the reference's mean gold score and `best` is β log Z, both by enumeration; a test
computes them again. How the other levels were measured is written beside them.
"""

from agents.benchmark.suite import Row, Suite

TEXT_V1 = Suite(
    "text-v1",
    (
        Row(
            "Bandit", "lmgym/Bandit-v0", "canary: one letter out of four", "objective",
            tokens=4096, passes=32_768, beta=0.1, reference=0.4833, best=0.8241,
        ),
        Row(
            "Tree", "lmgym/Tree-v0", "decoy: the best text begins with a letter that is bad on average", "objective",
            tokens=12_000, passes=96_000, beta=0.05, reference=0.3002, best=0.7110,
        ),
        Row(
            "Scale", "lmgym/ScaledBandit-v0", "large scores: the bandit times 100, and β likewise", "objective",
            tokens=4096, passes=32_768, beta=10.0, reference=48.33, best=82.41,
        ),
        Row(
            "Small", "lmgym/SmallBandit-v0", "small scores: the bandit times 0.01, and β likewise", "objective",
            tokens=4096, passes=32_768, beta=0.001, reference=0.004833, best=0.008241,
        ),
        Row(
            "Noise", "lmgym/NoisyTree-v0", "noise: the tree, and N(0, 1) on its scores, which are below 1", "objective",
            tokens=12_000, passes=96_000, beta=0.05, reference=0.3002, best=0.7110,
        ),
        # Reference: its first letter, by enumeration. Best: the best letter, which 1.8 nats of KL can always choose.
        Row(
            "First", "lmgym/FirstLetter-v0", "credit: only the first of 16 letters counts", "gold",
            tokens=40_000, passes=320_000, beta=0.05, reference=0.5561, best=1.0,
            arguments={"banned_tokens": [1]}, max_kl=3.0, exact=False, test_rows=256,
        ),
        Row(
            "Password", "lmgym/Password-v0", "exploration: one text scores, and a decoy pays a little", "objective",
            tokens=12_000, passes=96_000, beta=0.02, reference=0.001729, best=0.8317,
        ),
        # Best: the largest gold score of the policies π_ref · exp(score/β), over all β (at β = 0.095).
        Row(
            "Goodhart", "lmgym/Goodhart-v0", "hacking: the score comes apart from the gold score", "gold",
            tokens=15_000, passes=120_000, beta=0.1, reference=0.02843, best=0.3850,
        ),
        Row(
            "Count", "lmgym/Count-v0", "stopping: as many letters as the prompt says", "objective",
            tokens=15_000, passes=180_000, beta=0.05, reference=0.2830, best=0.8697,
        ),
        Row(
            "Few", "lmgym/FewPrompts-v0", "generalisation: other prompts than the 16 of training", "objective",
            tokens=24_000, passes=288_000, beta=0.05, reference=0.02564, best=0.5830,
        ),
        Row(
            "Both", "lmgym/Both-v0", "two objectives: the lower one counts", "objective",
            tokens=18_000, passes=144_000, beta=0.02, reference=0.1872, best=0.6501,
        ),
        # Reference of this row and the next two: the mean gold of 8,192 held-out completions (Sentiment: 2,048).
        Row(
            "Alternate", "lmgym/Alternate-v0", "long horizon: letters of two kinds must alternate", "gold",
            tokens=32_000, passes=256_000, beta=0.01, reference=0.0731, best=1.0, exact=False, test_rows=256,
        ),
        Row(
            "Arithmetic", "lmgym/Arithmetic-v0", "sums: a digit is added to a number, in text", "gold",
            tokens=10_000, passes=120_000, beta=0.02, reference=0.4335, best=1.0, lr=2e-3, exact=False, test_rows=256,
        ),
        Row(
            "Sentiment", "lmgym/Sentiment-v0", "a learned reward model, within 6 nats of KL", "gold",
            tokens=30_000, passes=360_000, beta=0.08, reference=0.161, best=1.0, lr=2e-3, exact=False,
            arguments={"max_new_tokens": 24}, max_kl=6.0,
        ),
    ),
)  # fmt: skip

TUNING_V1 = Suite(
    "tuning-v1",
    (
        Row(
            "Pairs", "lmgym/Pairs-v0", "adjacent letters", "objective",
            tokens=8000, passes=64_000, beta=0.02, reference=0.5977, best=0.8138,
        ),
        Row(
            "NoisyPairs", "lmgym/NoisyPairs-v0", "noise on the score", "objective",
            tokens=8000, passes=64_000, beta=0.02, reference=0.5977, best=0.8138,
        ),
        Row(
            "LargePairs", "lmgym/LargePairs-v0", "large scores, and β likewise", "objective",
            tokens=8000, passes=64_000, beta=0.2, reference=5.977, best=8.138,
        ),
        Row(
            "Successors", "lmgym/Successors-v0", "the prompt decides", "objective",
            tokens=12_000, passes=96_000, beta=0.05, reference=0.0233, best=0.5172,
        ),
        Row(
            "LastLetter", "lmgym/LastLetter-v0", "credit: the last letter counts", "objective",
            tokens=12_000, passes=96_000, beta=0.05, reference=0.001444, best=0.4186,
        ),
        Row(
            "Palindrome", "lmgym/Palindrome-v0", "letters depend on earlier ones", "objective",
            tokens=12_000, passes=96_000, beta=0.05, reference=0.255, best=0.7908,
        ),
        Row(
            "Twice", "lmgym/Twice-v0", "a score that is often 0", "objective",
            tokens=8000, passes=64_000, beta=0.05, reference=0.04163, best=0.8056,
        ),
        # Reference of this row and the next two: the mean gold of 8,192 held-out completions.
        Row(
            "Balance", "lmgym/Balance-v0", "long texts", "gold",
            tokens=30_000, passes=240_000, beta=0.01, reference=0.5616, best=1.0, exact=False, test_rows=256,
        ),
        Row(
            "Sort", "lmgym/Sort-v0", "text: letters in order", "gold",
            tokens=6000, passes=72_000, beta=0.02, reference=0.6079, best=1.0, lr=2e-3, exact=False, test_rows=256,
        ),
        Row(
            "Reverse", "lmgym/Reverse-v0", "text: letters backwards", "gold",
            tokens=6000, passes=72_000, beta=0.02, reference=0.6565, best=1.0, lr=2e-3, exact=False, test_rows=256,
        ),
    ),
)  # fmt: skip
"""Tasks on which the defaults of the algorithms are tuned; none of them is in text-v1."""

SUITES = {suite.name: suite for suite in (TEXT_V1, TUNING_V1)}


def find_suite(name: str) -> Suite:
    """A suite by its name.

    Raises:
        ValueError: there is no such suite.
    """
    if name not in SUITES:
        raise ValueError(f"no suite {name!r}: choose from {', '.join(SUITES)}")
    return SUITES[name]
