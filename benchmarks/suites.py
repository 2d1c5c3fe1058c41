"""The measurements: contenders, shapes, amounts of work."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """A library, or a part of lmgym, that does the work.

    Attributes:
        name: its name in results and tables.
        module: a module of `benchmarks`, with arguments.
        environment: the virtual environment of a peer; "" is the project's own.
        dtype: of the weights.
        options: options of its job in addition to the common ones.
        own_adapter: whether it trains a new adapter instead of the shape's; it is then checked against the base model.
        rounds: the maximum number of rounds in which it takes part.
    """

    name: str
    module: str
    environment: str = ""
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    own_adapter: bool = False
    rounds: int = 1000


@dataclass(frozen=True)
class Measurement:
    """Contenders that do the same work in turns.

    Attributes:
        suite: what is compared.
        shape: a name in `benchmarks.shapes.SHAPES`.
        contenders: the contenders, in the order of their turns.
        work: fields of `Job`: rows, new_tokens, ...
        rounds: timed turns of each contender, after one turn that is checked and not timed.
    """

    suite: str
    shape: str
    contenders: tuple[Contender, ...]
    work: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 5

    @property
    def name(self) -> str:
        return f"{self.suite}/{self.shape}"


def generate(dtype: str) -> Contender:
    """transformers' `generate`."""
    return Contender(f"generate {SHORT[dtype]}", "benchmarks.peers.hf_generate", dtype=dtype)


def trl(dtype: str = "float32") -> Contender:
    """TRL's PPO."""
    return Contender(f"TRL {SHORT[dtype]}", "benchmarks.peers.trl_ppo", "trl", dtype)


def ours(what: str, dtype: str = "float32", note: str = "", name: str = "lmgym", **options: Any) -> Contender:
    """lmgym's rollout, PPO or GRPO."""
    own_adapter = "layers" in options
    name = " ".join(filter(None, (name, SHORT[dtype], note)))
    return Contender(name, f"benchmarks.ours {what}", "", dtype, options, own_adapter)


SHORT = {"float32": "fp32", "bfloat16": "bf16"}
F32, B16 = "float32", "bfloat16"
HEAD: dict[str, Any] = {"critic": "head"}
AGILERL = Contender("AgileRL fp32", "benchmarks.peers.agilerl_ppo", "agilerl", options={"batched": True})
AGILERL_LOOP = Contender(
    "AgileRL fp32, own loop", "benchmarks.peers.agilerl_ppo", "agilerl", options={"batched": False}, rounds=2
)
SB3 = Contender("SB3 fp32", "benchmarks.peers.sb3_ppo", options=HEAD, rounds=1)


def rollouts(shape: str) -> Measurement:
    """A rollout against `generate`."""
    return Measurement("rollout", shape, (generate(F32), ours("rollout"), generate(B16), ours("rollout", B16)))


def iterations(shape: str, *others: Contender) -> Measurement:
    """A PPO iteration against TRL's and others'."""
    own = (
        ours("ppo", **HEAD),
        ours("ppo", B16, **HEAD),
        ours("ppo", note="value network", critic="network"),
        ours("ppo", B16, note="cached trunk", layers=2, **HEAD),
    )
    return Measurement("ppo", shape, (trl(), *own, trl(B16), *others))


def groups(shape: str) -> Measurement:
    """A GRPO iteration: 8 prompts, 8 completions of each."""
    peer = Contender("TRL fp32", "benchmarks.peers.trl_grpo", options={"group": 8})
    options = {"group": 8, "kl": "none"}
    return Measurement("grpo", shape, (peer, ours("grpo", **options), ours("grpo", B16, **options)))


def lengths(shape: str) -> Measurement:
    """Completions of different lengths, 24 tokens on average: the effect of compaction and bucketing."""
    plain: dict[str, Any] = {"plain": True}
    contenders = (
        generate(F32), ours("rollout", name="lmgym rollout"),
        ours("rollout", name="lmgym rollout", note="whole rows", **plain),
        trl(), ours("ppo", **HEAD), ours("ppo", note="whole rows", **HEAD, **plain),
    )  # fmt: skip
    return Measurement("lengths", f"{shape}-eos", contenders, {"ends": True})


def sweep(shape: str, over: str, values: list[int]) -> Measurement:
    """Rollouts of many sizes, and the rates that the machine reaches at the same time."""
    machine = Contender("machine", "benchmarks.hardware")
    options = {"over": over, "values": values}
    own = (ours("sweep", **options), ours("sweep", B16, **options))
    return Measurement(f"sweep {over}", shape, (machine, *own), {}, 3)


FULL = (
    *(rollouts(shape) for shape in "TSM"),
    iterations("T", AGILERL, AGILERL_LOOP),
    iterations("S", AGILERL),
    iterations("M"),
    groups("T"),
    groups("S"),
    lengths("T"),
    lengths("S"),
    *(sweep(shape, "rows", [1, 4, 16, 64, 256, 512]) for shape in "TS"),
    *(sweep(shape, "tokens", [16, 48, 128, 512]) for shape in "TS"),
    Measurement("sb3", "T", (SB3, ours("ppo", **HEAD)), rounds=1),
)
QUICK = tuple(
    measurement
    for shape in "TS"
    for measurement in (
        Measurement("rollout", shape, (generate(F32), ours("rollout")), rounds=5),
        Measurement("ppo", shape, (trl(), ours("ppo", **HEAD)), rounds=3),
    )
)
CUDA = tuple(
    measurement
    for shape in ("GPT-2", "Qwen")
    for rows in (64, 256, 1024)
    for measurement in (
        Measurement(f"rollout {rows}", shape, (generate(B16), ours("rollout", B16)), {"rows": rows}),
        Measurement(f"ppo {rows}", shape, (trl(B16), ours("ppo", B16, **HEAD)), {"rows": rows}, 3),
    )
    # TRL keeps all logits of a rollout twice: 60 GB here.
    if measurement.name != "ppo 1024/Qwen"
)
SMALL_WORK: dict[str, Any] = {"rows": 16, "new_tokens": 32, "micro_rows": 16, "epochs": 2}
MACHINE = Contender("machine", "benchmarks.hardware")
LARGE = (
    Measurement("rollout", "L", (MACHINE, *rollouts("L").contenders), SMALL_WORK, 2),
    Measurement(
        "ppo", "L", (trl(), ours("ppo", **HEAD), ours("ppo", B16, **HEAD),
                     ours("ppo", B16, note="cached trunk", layers=8, **HEAD)), SMALL_WORK, 2,
    ),
)  # fmt: skip
"""A Llama of 135 million parameters, with less work: a few minutes on one core."""
GPU = (
    *(
        measurement
        for rows in (64, 256)
        for shape in ("L", "Qwen")
        for measurement in (
            Measurement(f"rollout {rows}", shape, (generate(B16), ours("rollout", B16)), {"rows": rows}, 3),
            Measurement(f"ppo own {rows}", shape, (ours("ppo", B16, **HEAD),), {"rows": rows}, 3),
        )
    ),
    Measurement("ppo 64", "L", (trl(B16), ours("ppo", B16, **HEAD)), {"rows": 64}, 2),
)
"""What `make gpu` measures: bfloat16, 135 million and half a billion parameters. TRL is last: its set-up may fail."""
GPU_TRY = tuple(Measurement(m.suite, "tiny-grouped", m.contenders, m.work, 1) for m in GPU[:2])
TRY = (
    *(Measurement(m.suite, "tiny", m.contenders, m.work, 1) for m in CUDA[2:4]),
    rollouts("tiny"), iterations("tiny"), groups("tiny"), lengths("tiny"),
    sweep("tiny", "rows", [1, 4]), rollouts("tiny-grouped"),
    Measurement("ppo", "tiny-grouped", (trl(), ours("ppo", **HEAD))),
)  # fmt: skip
"""Every kind of measurement on tiny models, to test the benchmark itself."""
PLANS = {
    "full": FULL, "quick": QUICK, "large": LARGE, "cuda": CUDA, "gpu": GPU, "gpu-try": GPU_TRY, "try": TRY,
}  # fmt: skip
