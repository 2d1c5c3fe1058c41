"""A step that several ranks take together: the gradient of all, and a check that their parameters are equal."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lmgym.ranks import current, gather_data

CHECK_INTERVAL = 50
"""Updates between two checks that all ranks have the same parameters."""


@torch.no_grad()
def sum_gradients(values: Sequence[Tensor]) -> None:
    """Replaces each gradient by its sum over the ranks, in one exchange.

    A parameter that no rank has a gradient of keeps none, so that the optimizer leaves it alone, as with one rank.
    """
    ranks = current()
    used = ranks.sum(torch.tensor([value.grad is not None for value in values], dtype=torch.int32)).tolist()
    trained = [value for value, count in zip(values, used, strict=True) if count]
    if not trained:
        return
    flat = torch.cat([(torch.zeros_like(v) if v.grad is None else v.grad).flatten() for v in trained])
    parts = ranks.sum(flat).split([value.numel() for value in trained])
    for value, part in zip(trained, parts, strict=True):
        value.grad = part.view_as(value).to(value.dtype)


def check_equal(values: Sequence[Tensor], when: str) -> None:
    """Refuses to go on if the ranks have come to have different parameters.

    Args:
        values: the trained parameters.
        when: the update, in words.

    Raises:
        RuntimeError: they differ; the message names the ranks.
    """
    if current().world == 1:
        return
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.detach().flatten().cpu().view(torch.uint8).numpy().tobytes())
    found = gather_data(digest.hexdigest())
    odd = [rank for rank, other in enumerate(found) if other != found[0]]
    if odd:
        raise RuntimeError(
            f"{when}: the trained parameters of rank {odd[0]} are not those of rank 0, so the ranks do not train the "
            "same model. Usual causes: processors of different types, different numbers of threads, weights that a "
            "program changes on one rank alone"
        )
