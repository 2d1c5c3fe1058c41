"""Several processes that work on one run: `lmgym.ranks` over `torch.distributed`."""

from agents.distributed.joining import TIMEOUT, joined
from agents.distributed.launching import launch
from agents.distributed.torch_ranks import TorchRanks

__all__ = ["TIMEOUT", "TorchRanks", "joined", "launch"]
