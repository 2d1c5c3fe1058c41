"""Studies: one file a paper, like the algorithms. Each says what the paper claims, measures it here, and judges.

A study's module has a docstring (the paper, and what differs here), `TITLE`, `PAPER`, `CLAIMS`, `PANELS`, a frozen
`Config` whose defaults are the full study, `QUICK`, `SMOKE`, and `run(config, seed)`, which returns what one seed gave.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.studies.form import Claim, Panel, Verdict, judge, measured, run_study, study_named
    from agents.studies.page import write_page

STUDIES = {
    "christiano": "deep reinforcement learning from human preferences (Christiano et al. 2017)",
    "bai": "a helpful and harmless assistant with RLHF (Bai et al. 2022)",
    "limits": "limits and ethics (Gabriel 2020; Casper et al. 2023)",
    "gao": "scaling laws for reward model overoptimization (Gao et al. 2022)",
    "ouyang": "following instructions with human feedback (Ouyang et al. 2022)",
    "stiennon": "learning to summarize from human feedback (Stiennon et al. 2020)",
    "deepseek_r1": "reasoning by reinforcement learning on rules alone (DeepSeek-AI 2025)",
    "nvidia": "a narrow small model against a larger one (NVIDIA 2024)",
    "trial_runs": "trial runs on 1 to 10 % of the data",
    "ziegler": "fine-tuning language models from human preferences (Ziegler et al. 2019)",
}
"""The name of each study, and the paper behind it."""

_LAZY = {
    "Claim": "form",
    "Panel": "form",
    "Verdict": "form",
    "judge": "form",
    "measured": "form",
    "run_study": "form",
    "study_named": "form",
    "write_page": "page",
}

__all__ = ["STUDIES", "Claim", "Panel", "Verdict", "judge", "measured", "run_study", "study_named", "write_page"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"agents.studies.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'agents.studies' has no attribute {name!r}")
