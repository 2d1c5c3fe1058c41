"""A language model behind a handle, so that Stable-Baselines3 does not treat it as one of its modules."""

from dataclasses import dataclass
from typing import Any, NoReturn

from jaxtyping import Bool, Float
from torch import Tensor

from lmgym.models import Sequences
from lmgym.policy import Policy

Observation = Any
"""A dict of `input_ids` and `attention_mask`, [B, L], left-padded; `Any`, because SB3 declares a single tensor."""


@dataclass(frozen=True, eq=False)
class LMHandle:
    """Passes a policy to SB3 by reference: it is never copied, pickled, or registered as a module.

    Attributes:
        policy: language model, adapter, temperature and critic.
        action_mask: [T, V] True where the environment allows a token at that step.
        reads_text: whether the environment forbids more by the text so far.
    """

    policy: Policy
    action_mask: Bool[Tensor, "T V"]
    reads_text: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "LMHandle":
        return self

    def __reduce__(self) -> Any:
        # SB3 pickles policy_kwargs into its file. The file holds the parameters; the user makes a new handle.
        return _no_handle, ()

    def read(self, observation: Observation, adapter: str | None) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B D"]]:
        """Logits of the next token and the last hidden state, differentiable, of texts that end at the right edge."""
        ids, mask = observation["input_ids"].long(), observation["attention_mask"].bool()
        width = max(1, int(mask.sum(1).max()))  # the columns left of it are padding in every row
        ids, mask = ids[:, -width:], mask[:, -width:]
        after = ids.new_zeros(len(ids), 1)  # a placeholder for the next token, which is not read
        logits, hidden = self.policy.lm.evaluate(Sequences(ids, mask, after, after == 0, self.action_mask[:1]), adapter)
        return logits[:, 0], hidden[:, 0]

    def constant_mask(self) -> Bool[Tensor, " V"]:
        """The tokens that are allowed, if they are the same at every step.

        Raises:
            ValueError: they differ between steps.
        """
        remedy = (
            "use MaskablePPO with MaskableLMPolicy, which gets the masks (and pass them to predict(observation, "
            "action_masks=...)), or make the environment "
        )
        if self.reads_text:
            raise ValueError(
                "the environment allows tokens by the text so far (action_mask), and an observation does not contain "
                f"the prompt that its function needs: {remedy}without action_mask"
            )
        if bool((self.action_mask != self.action_mask[0]).any()):
            raise ValueError(
                "the environment allows different tokens at different steps (min_new_tokens), and an observation does "
                f"not contain the step: {remedy}with min_new_tokens=0"
            )
        return self.action_mask[0]


def _no_handle() -> NoReturn:
    raise ValueError(
        "this file holds an adapter and a critic, not the language model: make the algorithm as before, with "
        "policy_kwargs(policy, env), and read the file with model.set_parameters(path)"
    )
