"""The tables and plots of docs/performance.md, from benchmarks/results.jsonl: the newest line of each measurement."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import hardware
from benchmarks.learning import write_between
from benchmarks.shapes import PROMPT_TOKENS, SHAPES, bound_seconds
from benchmarks.worker import Job

ROOT = Path(__file__).resolve().parents[1]
PAGE, PLOTS = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance"
ROWS, NEW_TOKENS = Job("").rows, Job("").new_tokens

Line = Mapping[str, Any]
Lines = Mapping[tuple[str, str], Line]


@dataclass(frozen=True)
class Ratio:
    """A row of the main table.

    Attributes:
        label: what is compared.
        suite: of the measurement.
        own: the contender of lmgym.
        peer: the other contender.
        goals: by shape, the ratio to reach; for memory, the ratio not to exceed.
        key: "seconds" (peer / own: more is better) or "peak_mb" (own / peer: less is better).
    """

    label: str
    suite: str
    own: str
    peer: str
    goals: Mapping[str, float]
    key: str = "seconds"

    def of(self, lines: Lines, shape: str) -> float | None:
        """The ratio on one shape; None if it was not measured."""
        contenders = lines.get((self.suite, shape), {}).get("contenders", {})
        if self.own not in contenders or self.peer not in contenders:
            return None
        own, peer = contenders[self.own][self.key], contenders[self.peer][self.key]
        return own / peer if self.key == "peak_mb" else peer / own

    def cell(self, lines: Lines, shape: str) -> str:
        """The ratio and its goal, in bold if the goal is reached."""
        found, goal = self.of(lines, shape), self.goals.get(shape)
        if found is None:
            return "-"
        if goal is None:
            return f"{found:.2f}"
        less = self.key == "peak_mb"
        reached = found <= goal if less else found >= goal
        return f"{'**' if reached else ''}{found:.2f}{'**' if reached else ''} ({'≤' if less else '≥'} {goal:g})"


def goals(*values: float) -> dict[str, float]:
    """Goals for the first of T, S and M."""
    return dict(zip("TSM", values, strict=False))


TRL, GENERATE = "TRL fp32", "generate fp32"
RATIOS = (
    Ratio("rollout against `generate`, fp32", "rollout", "lmgym fp32", GENERATE, goals(2.5, 2.2, 5)),
    Ratio("rollout in bf16 against `generate` in fp32", "rollout", "lmgym bf16", GENERATE, goals(2.6, 2.8, 8)),
    Ratio("both in bf16", "rollout", "lmgym bf16", "generate bf16", {}),
    Ratio("PPO iteration against TRL, fp32", "ppo", "lmgym fp32", TRL, goals(3.3, 2.5, 3)),
    Ratio("PPO in bf16 against TRL in fp32", "ppo", "lmgym bf16", TRL, goals(4.6, 4.5, 6)),
    Ratio("both in bf16", "ppo", "lmgym bf16", "TRL bf16", {}),
    Ratio("equal work: a value network, as TRL has, fp32", "ppo", "lmgym fp32 value network", TRL, goals(1.6, 1.4)),
    Ratio("lower trunk cached, bf16, against TRL in fp32", "ppo", "lmgym bf16 cached trunk", TRL, goals(7, 8, 8.5)),
    Ratio("PPO against AgileRL, prompts batched by hand, fp32", "ppo", "lmgym fp32", "AgileRL fp32", goals(3.1, 2.5)),
    Ratio("PPO against AgileRL's own loop, fp32", "ppo", "lmgym fp32", "AgileRL fp32, own loop", goals(10.5)),
    Ratio("PPO against SB3's on `gymnasium.make`, fp32", "sb3", "lmgym fp32", "SB3 fp32", goals(90)),
    Ratio("GRPO iteration against TRL, fp32", "grpo", "lmgym fp32", TRL, {}),
    Ratio("peak memory of PPO, share of TRL's, fp32", "ppo", "lmgym fp32", TRL, {"S": 0.36, "M": 0.21}, "peak_mb"),
)
LENGTHS = (
    Ratio("rollout: compaction", "lengths", "lmgym rollout fp32", "lmgym rollout fp32 whole rows", {}),
    Ratio("PPO: compaction and bucketing", "lengths", "lmgym fp32", "lmgym fp32 whole rows", {}),
    Ratio("rollout against `generate`, fp32", "lengths", "lmgym rollout fp32", GENERATE, {}),
    Ratio("PPO against TRL, fp32", "lengths", "lmgym fp32", TRL, {}),
)


def read(path: Path) -> list[Line]:
    """All measurements."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def newest(lines: Sequence[Line], device: str) -> dict[tuple[str, str], Line]:
    """The newest line of each suite and shape, from the machine that was used last."""
    return next(iter(by_machine(lines, device)), {})


def by_machine(lines: Sequence[Line], device: str) -> list[dict[tuple[str, str], Line]]:
    """The newest line of each suite and shape on each machine; the most recently used machine comes first."""
    machines: dict[str, dict[tuple[str, str], Line]] = {}
    for line in lines:
        if line["device"] == device:
            machines.setdefault(line["hardware"], {})[line["suite"], line["shape"]] = line
    return sorted(machines.values(), key=lambda found: max(line["when"] for line in found.values()), reverse=True)


def show(name: str, contenders: Mapping[str, Any]) -> None:
    """Prints one measurement."""
    table = Table("contender", "median s", "least", "most", "n", "ratio", "peak MB", "check", title=name)
    base = next(iter(contenders.values()))["seconds"]
    for contender, row in contenders.items():
        figures = (f"{row[key]:.3f}" for key in ("seconds", "least", "most"))
        check = f"{max(row['check'].values()):.1e}" if row["check"] else ""
        table.add_row(
            contender, *figures, str(row["n"]), f"{base / row['seconds']:.2f}", f"{row['peak_mb']:.0f}", check
        )
    Console().print(table)


def write(lines: Sequence[Line]) -> None:
    """Writes tables and plots to docs/performance.md."""
    large = {key: line for key, line in newest(lines, "cpu").items() if key[1] == "L"}
    if large:
        write_between(PAGE, "large", "\n".join([*large_model(large), "", about(large)]))
    on_gpu = newest(lines, "cuda")
    lines = [line for line in lines if line["shape"] != "L"]  # it has a table of its own
    found = newest(lines, "cpu")
    if found:
        tables = [[*ratios(RATIOS, of, "TSM"), "", about(of)] for of in by_machine(lines, "cpu")]
        write_between(PAGE, "ratios", "\n\n".join("\n".join(table) for table in tables))
        write_between(PAGE, "lengths", "\n".join(ratios(LENGTHS, found, ("T-eos", "S-eos"))))
        write_between(PAGE, "environment", environment(found))
        write_between(PAGE, "times", "\n".join(times(found)))
        draw(found)
    if on_gpu:
        write_between(PAGE, "cuda", "\n".join([*times(on_gpu), "", about(on_gpu)]))


def ratios(rows: Sequence[Ratio], lines: Lines, shapes: Sequence[str]) -> list[str]:
    """A table of ratios."""
    table = [f"| | {' | '.join(shapes)} |", "|---|" + "---|" * len(shapes)]
    return table + [f"| {row.label} | {' | '.join(row.cell(lines, shape) for shape in shapes)} |" for row in rows]


def large_model(lines: Lines) -> list[str]:
    """Times, memory and ratios of the model of 135 million parameters, and a rollout's share of the calculated bound.

    The ratio is the seconds of the peer in float32 over those of the contender.
    """
    table = ["| | contender | median s | ratio | share of the bound | peak MB |", "|---|---|---|---|---|---|"]
    machine = lines.get(("rollout", "L"))
    for (suite, shape), line in lines.items():
        rows = {name: row for name, row in line["contenders"].items() if name != "machine"}
        base, work = next(iter(rows.values()))["seconds"], line["work"]
        for name, row in rows.items():
            share = "-"
            if suite == "rollout" and machine is not None:
                bound = (
                    work["rows"]
                    * work["new_tokens"]
                    / _bound(machine, shape, row["dtype"], work["rows"], work["new_tokens"])
                )
                share = f"{bound / row['seconds']:.0%}"
            figures = f"{row['seconds']:.3g} | {base / row['seconds']:.2f} | {share} | {row['peak_mb']:.0f}"
            table.append(f"| {suite} | {name} | {figures} |")
    return table


def times(lines: Lines) -> list[str]:
    """A table of every contender's times. Each phase is a median, so phases need not add up to the total."""
    table = ["| | contender | median s | least – most | n | peak MB | phases, s |", "|---|---|---|---|---|---|---|"]
    for (suite, shape), line in lines.items():
        if suite.startswith("sweep"):
            continue
        for name, row in line["contenders"].items():
            phases = ", ".join(f"{phase} {seconds:.3g}" for phase, seconds in row["phases"].items())
            spread = f"{row['least']:.3g} – {row['most']:.3g}"
            figures = f"{row['seconds']:.3g} | {spread} | {row['n']} | {row['peak_mb']:.0f} | {phases}"
            table.append(f"| {suite} {shape} | {name} | {figures} |")
    return table


def about(lines: Lines) -> str:
    """Commands, machines and versions behind the figures."""
    versions: dict[str, set[str]] = {}
    for line in lines.values():
        for row in line["contenders"].values():
            for package, version in row["versions"].items():
                versions.setdefault(package, set()).add(version)
    packages = ", ".join(f"{package} {' and '.join(sorted(found))}" for package, found in sorted(versions.items()))
    machines = sorted({f"{line['hardware']}, {line['threads']} threads" for line in lines.values()})
    revisions = sorted({line["revision"] for line in lines.values()})
    commands = sorted({line["command"] for line in lines.values()})
    return (
        f"`{'`, `'.join(commands)}`; {'; '.join(machines)}; revision {', '.join(revisions)}; {packages}; "
        f"{min(line['when'] for line in lines.values())[:10]}."
    )


def environment(lines: Lines) -> str:
    """The environment's share of a rollout's time."""
    line = lines.get(("rollout", "T"))
    if line is None:
        return "Not measured yet."
    shares = [
        f"{100 * row['phases']['environment'] / row['seconds']:.1f} % of a T rollout in {row['dtype']}"
        for row in line["contenders"].values()
        if "environment" in row["phases"]
    ]
    return f"The environment (prompts, appending, checking which rows still run) takes {' and '.join(shares)}."


# Plots -------------------------------------------------------------------------------------------------------------


def rates(line: Line) -> dict[str, float]:
    """Multiplications per second in each dtype, and bytes read per second, measured in the same run."""
    phases = line["contenders"]["machine"]["phases"]
    return {name: hardware.FLOPS / phases[name] for name in hardware.DTYPES} | {"read": hardware.BYTES / phases["read"]}


def draw(lines: Lines) -> None:
    """A plot for each sweep: tokens per second, and the calculated bound."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "lmgym"  # the same figures give the same file
    import matplotlib.pyplot as plt

    PLOTS.mkdir(parents=True, exist_ok=True)
    for over, label in (("rows", "completions in a batch"), ("tokens", "tokens of a completion")):
        figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="tokens per second")
        for number, shape in enumerate("TS"):
            line = lines.get((f"sweep {over}", shape))
            if line is not None:
                _sweep(axes, line, over, f"C{number}")
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        _finish(figure, axes, f"{over}.svg")
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    measured = [(shape, lines[("rollout", shape)]) for shape in "TSM" if ("rollout", shape) in lines]
    speeds = lines.get(("sweep rows", "S"))
    sizes = [SHAPES[shape].matrix_weights for shape, _ in measured]
    for name in ("lmgym fp32", "lmgym bf16", "generate fp32", "generate bf16"):
        seconds = [line["contenders"][name]["seconds"] for _, line in measured]
        axes.plot(sizes, [ROWS * NEW_TOKENS / s for s in seconds], marker="o", label=name)
    if speeds is not None:
        bounds = [_bound(speeds, shape, "float32", ROWS, NEW_TOKENS) for shape, _ in measured]
        axes.plot(sizes, bounds, color="0.4", linestyle=":", label="bound fp32")
    axes.set(xscale="log", yscale="log", xlabel="weights multiplied with each token", ylabel="tokens per second")
    _finish(figure, axes, "size.svg")


def _sweep(axes: Any, line: Line, over: str, colour: str) -> None:
    for name, row in line["contenders"].items():
        if name == "machine":
            continue
        values = [int(value) for value in row["phases"]]
        axes.set_xticks(values, list(row["phases"]))
        work = [(value, NEW_TOKENS) if over == "rows" else (ROWS, value) for value in values]
        speed = [rows * new / row["phases"][str(v)] for v, (rows, new) in zip(values, work, strict=True)]
        bound = [_bound(line, line["shape"], row["dtype"], *sizes) for sizes in work]
        style = "-" if row["dtype"] == "float32" else "--"
        label = f"{line['shape']}, {'fp32' if row['dtype'] == 'float32' else 'bf16'}"
        axes.plot(values, speed, color=colour, linestyle=style, marker="o", label=label)
        axes.plot(values, bound, color=colour, linestyle=style, linewidth=0.7, alpha=0.5, label=f"{label}: bound")


def _bound(line: Line, shape: str, dtype: str, rows: int, new: int) -> float:
    """The calculated bound, in tokens per second."""
    speeds = rates(line)
    size = 4 if dtype == "float32" else 2
    return rows * new / bound_seconds(SHAPES[shape], rows, PROMPT_TOKENS, new, size, speeds[dtype], speeds["read"])


def _finish(figure: Any, axes: Any, name: str) -> None:
    axes.legend(frameon=False, fontsize="x-small", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PLOTS / name, metadata={"Date": None, "Creator": None})
