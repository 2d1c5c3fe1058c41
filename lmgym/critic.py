"""The kinds of critic that a policy can have, and their files beside a saved policy."""

from pathlib import Path
from typing import Literal

from safetensors.torch import save_file
from torch import nn

from lmgym.models import LanguageModel, check_shapes, load_folder, read_weights

Critic = Literal["head", "adapter", "network", "none"]

VALUE_ADAPTER = "value"
"""The name of the adapter of an "adapter" critic."""

_HEAD_FILE, _ADAPTER_FOLDER, _NETWORK_FOLDER = "value_head.safetensors", "value", "value_network"


def save_critic(
    folder: str | Path, critic: Critic, value_head: nn.Linear, lm: LanguageModel, network: LanguageModel | None
) -> None:
    """Saves a critic beside a policy's adapter.

    Args:
        folder: where the adapter is.
        critic: its kind.
        value_head: its last layer.
        lm: the model that holds the adapter of an "adapter" critic.
        network: the model of a "network" critic.
    """
    folder = Path(folder)
    if critic != "none":
        save_file(value_head.state_dict(), str(folder / _HEAD_FILE))
    if critic == "adapter":
        lm.adapters.save(folder / _ADAPTER_FOLDER, VALUE_ADAPTER)
    if network is not None:
        network.save(folder / _NETWORK_FOLDER)


def load_value_adapter(folder: Path, lm: LanguageModel) -> Critic:
    """Loads the adapter of a saved critic, if it has one, and returns the critic's kind.

    Raises:
        ValueError: a file is pickled, damaged, or of another model.
    """
    critic: Critic = "head" if (folder / _HEAD_FILE).is_file() else "none"
    if (folder / _ADAPTER_FOLDER).is_dir():
        lm.adapters.load(folder / _ADAPTER_FOLDER, VALUE_ADAPTER)
        critic = "adapter"
    return "network" if (folder / _NETWORK_FOLDER).is_dir() else critic


def load_value_head(folder: Path, value_head: nn.Linear, network: LanguageModel | None) -> None:
    """Loads the weights of a saved critic's last layer, and of its network if it has one.

    Raises:
        ValueError: a file is missing, pickled, damaged, or of another model.
    """
    weights = read_weights(folder / _HEAD_FILE)
    check_shapes(folder / _HEAD_FILE, weights, value_head.state_dict())
    value_head.load_state_dict(weights)
    if network is not None:
        source = folder / _NETWORK_FOLDER
        saved = load_folder(str(source), str(source), network.device, network.model.dtype).model.state_dict()
        check_shapes(source, saved, network.model.state_dict())
        network.model.load_state_dict(saved)
