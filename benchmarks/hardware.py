"""The machine's rates, measured like a contender; the calculated bound uses them."""

import torch

from benchmarks.worker import Turn

SIDE, TIMES, BYTES = 2048, 8, 2**29
FLOPS = 2.0 * SIDE**3 * TIMES


def main() -> None:
    """One measurement per turn: seconds for FLOPS operations in each dtype, and for reading BYTES bytes."""
    turn = Turn()
    job = turn.job()
    squares = {name: torch.randn(SIDE, SIDE, device=job.device).to(getattr(torch, name)) for name in DTYPES}
    memory = torch.ones(BYTES // 4, device=job.device)
    turn.ready()
    while True:
        phases = {}
        for name, square in squares.items():
            began = turn.clock()
            for _ in range(TIMES):
                torch.mm(square, square)
            phases[name] = turn.clock() - began
        began = turn.clock()
        memory.sum()
        phases["read"] = turn.clock() - began
        turn.done(phases)


DTYPES = ("float32", "bfloat16")


if __name__ == "__main__":
    main()
