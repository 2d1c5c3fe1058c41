"""The global random generators: seeded when a run begins, and part of its checkpoints."""

import random
from collections.abc import Container

import numpy as np
import torch

from agents.training import State
from lmgym.ranks import current

NUMPY_WORDS = 624
"""Size of the state of NumPy's global generator, a Mersenne twister."""


class GlobalGenerators:
    """The global generators of Python, NumPy and torch. lmgym does not use them, but a user's task or score may."""

    def state(self) -> State:
        kind, words, gauss = random.getstate()
        name, keys, at, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
        tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64))}
        tensors["python"] = torch.tensor(words, dtype=torch.int64)
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        tensors |= {f"cuda/{i}": state for i, state in enumerate(devices)}
        return State({"python": [kind, gauss], "numpy": [str(name), at, has_gauss, cached]}, tensors)

    def restore(self, state: State) -> None:
        tensors, (kind, gauss) = state.tensors, state.data["python"]
        random.setstate((kind, tuple(tensors["python"].tolist()), gauss))
        name, *rest = state.data["numpy"]
        if not 0 <= rest[0] <= NUMPY_WORDS:  # NumPy does not check it, and would read beyond its state
            raise ValueError(
                f"the checkpoint's position in NumPy's generator is {rest[0]!r}, and must be 0 to {NUMPY_WORDS}"
            )
        np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *rest))  # noqa: NPY002
        torch.set_rng_state(tensors["torch"])
        devices = [tensors[name] for name in sorted(tensors) if name.startswith("cuda/")]
        if devices and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(devices)


def generators_name(names: Container[str] = ()) -> str:
    """The name of the state of this rank's generators in a checkpoint; that of rank 0 if `names` lack it."""
    rank = current().rank
    name = f"random of rank {rank}"
    return name if rank and name in names else "random"


def seed_everything(seed: int) -> None:
    """Seeds the global generators, for a user's tasks and scores; lmgym itself does not use them.

    Each rank scores other rows, and so gets other random numbers; those of rank 0 are those of a run of one rank.
    """
    rank = current().rank
    if rank:
        seed = int(np.random.SeedSequence((seed, rank)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
