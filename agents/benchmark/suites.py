"""The suites that come with the package. Rows are frozen: a change makes a new suite, with another name."""

from agents.benchmark.suite import Row, Suite

TEXT_V1 = Suite(
    "text-v1",
    (
        Row("Tree", "lmgym/Tree-v0", "decoy: the best text begins with a letter that is bad on average", "objective",
            tokens=12_000, passes=10**9, beta=0.05, reference=0.3, best=0.711),
    ),
)  # fmt: skip

SUITES = {suite.name: suite for suite in (TEXT_V1,)}


def find_suite(name: str) -> Suite:
    """A suite by its name.

    Raises:
        ValueError: there is none.
    """
    if name not in SUITES:
        raise ValueError(f"no suite {name!r}: choose from {', '.join(SUITES)}")
    return SUITES[name]
