"""The random numbers of a rollout, keyed by seed, update, prompt and sample."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmgym.devices import to_device


@dataclass(frozen=True)
class Stream:
    """The random numbers of a rollout. Seed, update, prompt and sample determine them; the batch does not matter.

    Attributes:
        seed: of the run.
        update: the number of the rollout.
        samples: completions per prompt; row i is sample i % samples of prompt i // samples.
    """

    seed: int
    update: int
    samples: int = 1

    def prompt_seeds(self, rows: int) -> list[int]:
        """One seed for each row, for drawing its prompt; equal for all samples of a prompt."""
        sequences = [np.random.SeedSequence((self.seed, self.update, row // self.samples, 0)) for row in range(rows)]
        return [int(s.generate_state(1)[0]) for s in sequences]

    def uniforms(self, rows: int, steps: int, device: torch.device, first: int = 0) -> Tensor:
        """[B, T] numbers in [0, 1), in one transfer. Each row has its own counter-based generator.

        Args:
            rows: B.
            steps: T.
            device: where they are needed.
            first: the number of the first of these rows in the rollout, if they are only a part of it.
        """
        drawn = np.empty((rows, steps), np.float32)
        for place, row in enumerate(range(first, first + rows)):
            key = np.random.SeedSequence((self.seed, self.update, row // self.samples, 1 + row % self.samples))
            drawn[place] = np.random.Generator(np.random.Philox(key)).random(steps, dtype=np.float32)
        return to_device(torch.from_numpy(drawn), device)
