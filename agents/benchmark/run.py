"""One cell of a benchmark: an agent on a task of a suite, with one seed."""

from collections.abc import Sequence
from typing import Any

import torch

from agents.benchmark.agents import Agent, find_agent
from agents.benchmark.suite import Row, Suite
from agents.benchmark.world import World
from agents.experiments import Cell

FUNCTION = "agents.benchmark.run:run"
"""What the worker processes run."""


def cells_of(
    suite: Suite, agents: Sequence[Agent], seeds: int, tasks: Sequence[str] = (), device: str = "cpu"
) -> list[Cell]:
    """The cells of a benchmark: seed by seed, so that a table is complete for few seeds before there are many.

    Args:
        suite: the tasks.
        agents: what is compared.
        seeds: number of seeds.
        tasks: those of the suite's tasks to run; all by default.
        device: of the models.

    Raises:
        ValueError: a task is not in the suite.
    """
    rows = [suite.row(task) for task in tasks] if tasks else suite.rows
    elsewhere = {} if device == "cpu" else {"device": device}
    return [
        Cell(
            suite.name,
            row.name,
            agent.name,
            index,
            dict(agent.config),
            {"suite": suite.hash, "row": row.as_data(), **elsewhere},
        )
        for index in range(seeds)
        for row in rows
        for agent in agents
    ]


def run(cell: Cell) -> dict[str, Any]:
    """Runs a cell: the curve of its evaluations, the first before training and the last after it.

    Raises:
        ValueError: the agent is another one than when the cell was planned.
    """
    agent = find_agent(cell.config["spec"])
    if dict(agent.config) != dict(cell.config):
        raise ValueError(f"the agent {agent.spec!r} was changed since the run began: start the command again")
    torch.manual_seed(cell.seed)
    world = World(Row(**cell.setting["row"]), cell.seed, cell.setting.get("device", "cpu"))
    world.record(find_agent("reference").make(world))
    trained = agent.make(world)
    if trained is None:
        raise ValueError(f"make(world) of {agent.spec!r} returned None, and must return the trained policy")
    world.record(trained)
    return {"curve": world.curve}
