"""An ensemble of reward models: the mean is the score, the spread says how far the members agree.

Christiano et al. 2017, section 2.2.3 (https://arxiv.org/abs/1706.03741).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmgym.models import Example, LanguageModel, read_settings
from lmgym.reward.model import RewardModel
from lmgym.reward.reading import read_text
from lmgym.tasks.base import Completion, Prompt

ENSEMBLE_FILE = "ensemble.json"
"""The file that makes a folder the folder of an ensemble; its members are in the folders "0", "1", …"""


class RewardEnsemble:
    """Several reward models that score the same texts: a score function for environments.

    Each member is an ordinary `RewardModel`: trained on its own draw of the comparisons
    (`agents.reward_modelling.bootstrap`), and normalised by itself (`agents.reward_modelling.normalise`), so that none
    outweighs the others. Members with adapters share the weights of one trunk.

    Args:
        members: K reward models.

    Attributes:
        shift: is subtracted from every score, after that of each member.

    Raises:
        ValueError: there are fewer than two members.
    """

    def __init__(self, members: Sequence[RewardModel], shift: float = 0.0):
        if len(members) < 2:
            raise ValueError(f"an ensemble of {len(members)} has no spread: give at least 2 reward models")
        self.members = tuple(members)
        self.shift = shift

    def __deepcopy__(self, memo: dict[int, Any]) -> "RewardEnsemble":
        # gymnasium's env.spec deep-copies every argument of make(): a handle is shared, not copied.
        return self

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    def member_scores(
        self, texts: Sequence[str | Example], finished: Sequence[bool] | None = None
    ) -> Float[Tensor, "K N"]:
        """The scores of each member, minus its own shift, on the CPU. As `RewardModel.score_texts`."""
        return torch.stack([member.score_texts(texts, finished) - member.shift for member in self.members])

    def score_texts(
        self, texts: Sequence[str | Example], finished: Sequence[bool] | None = None
    ) -> Float[Tensor, " N"]:
        """The mean over members, before `shift`."""
        return self.member_scores(texts, finished).mean(0)

    def raw_scores(self, texts: Sequence[str | Example], finished: Sequence[bool], rows: int) -> Float[Tensor, " N"]:
        """As `score_texts`, differentiable, on the members' device."""
        return torch.stack([m.raw_scores(texts, finished, rows) - m.shift for m in self.members]).mean(0)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        """The score of each completion: a `ScoreFunction`."""
        return (self._of(prompts, completions).mean(0) - self.shift).tolist()

    def spread(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        """The standard deviation over the members' scores of each completion: large where they are unsure."""
        return self._of(prompts, completions).std(0).tolist()

    def _of(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float[Tensor, "K N"]:
        texts = [read_text(prompt, completion.text) for prompt, completion in zip(prompts, completions, strict=True)]
        return self.member_scores(texts, [completion.finish_reason == "stop" for completion in completions])

    # Creating, loading and saving ----------------------------------------------------------------------------------

    @classmethod
    def from_language_model(
        cls, lm: LanguageModel, members: int, rank: int = 8, alpha: int = 16, seed: int = 0, ends_with_eos: bool = True
    ) -> "RewardEnsemble":
        """New reward models on a language model's trunk, each with random weights of its own.

        Args:
            lm: a model without adapters.
            members: K. With rank 0 each is a whole copy of the model: K times its memory.
            rank: of each member's LoRA adapter; 0 trains all weights.
            alpha: LoRA's scale is alpha / rank.
            seed: of all random weights.
            ends_with_eos: as in `RewardModel.from_language_model`.

        Raises:
            ValueError: fewer than two members, or the architecture has no reward model.
        """
        seeds = [int(s.generate_state(1)[0]) for s in np.random.SeedSequence((seed, 4)).spawn(members)]
        made = [RewardModel.from_language_model(lm, rank, alpha, one, ends_with_eos) for one in seeds]
        ensemble = cls(made)
        ensemble._share_trunk()
        return ensemble

    def parameters(self) -> list[nn.Parameter]:
        """The weights to train, of all members."""
        return [p for member in self.members for p in member.parameters()]

    def _share_trunk(self) -> None:
        """Lets the frozen weights of all members that equal those of the first one be the same memory."""
        first = {name: p for name, p in self.members[0].model.named_parameters() if ".lora_" not in name}
        for member in self.members[1:]:
            for name, parameter in member.model.named_parameters():
                own = first.get(name)
                if own is not None and not parameter.requires_grad and torch.equal(own, parameter):
                    parameter.data = own.data

    def save(self, folder: str | Path) -> None:
        """Saves each member in a folder of its own: its adapter and head, or the whole model if it has no adapter."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for index, member in enumerate(self.members):
            (member.save_adapter if member.base else member.save)(folder / str(index))
        content = {"members": len(self.members), "shift": self.shift}
        (folder / ENSEMBLE_FILE).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "RewardEnsemble":
        """Loads an ensemble.

        Raises:
            ValueError: it is no folder of an ensemble, or a member cannot be loaded.
        """
        file = Path(folder) / ENSEMBLE_FILE
        if not file.is_file():
            raise ValueError(f"{str(folder)!r} is no ensemble of reward models: it has no {ENSEMBLE_FILE}")
        settings = read_settings(file)
        count, shift = settings.get("members"), settings.get("shift")
        if type(count) is not int or not 2 <= count <= 1000 or not isinstance(shift, int | float):
            raise ValueError(f"{file}: expected are members (a number of at least 2) and shift (a number)")
        members = [RewardModel.load(Path(folder) / str(index), device, merged=False) for index in range(count)]
        ensemble = cls(members, float(shift))
        ensemble._share_trunk()
        return ensemble


def load_reward_model(name: str | Path, device: str | torch.device = "cpu") -> "RewardModel | RewardEnsemble":
    """Loads a reward model or an ensemble of them, by what the folder holds; see `RewardModel.load`."""
    kind = RewardEnsemble if (Path(name) / ENSEMBLE_FILE).is_file() else RewardModel
    return kind.load(name, device)
