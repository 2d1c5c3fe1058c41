"""Random one-token changes in the core, each of which a default test must see.

    python tests/random_mutants.py --count 300 --seed 0     # a sample; exit status 1 if fewer than 95 % are caught
    python tests/random_mutants.py --only agents/ppo.py     # a sample of one file, or of several
    python tests/random_mutants.py --jobs 2                 # two at a time

A change swaps an operator, a comparison, `and` and `or`, or `min` and `max`; drops a minus or a `not`; or replaces a
number, True or False, defaults included. Texts, annotations, assertions (`strict=True` too), what
`raise` says and the dimension −1 for 1 are left alone. Each
change runs against the tests that `TESTS` names for its file; a failure, a crash or a time-out counts as caught.

One process for each file imports everything and collects the tests. For each change it forks a child, which puts the
changed code into the functions as they stand, and runs the quickest tests first. What a test starts as a process of its
own, or reads as a text, is not changed, and nor are the run-time checks of annotations on: both can only hide a catch.

A survivor is a missing test: write one that states the property that the change breaks, and never one that pins the
line. If nobody can observe the change, put its line into `EQUIVALENT`, with the reason.
"""

import argparse
import ast
import inspect
import multiprocessing
import os
import random
import shlex
import sys
import time
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mutants import LOADED, ROOT

GOAL = 0.95
TIMEOUT = 120.0
PLAIN = (bool, int, float, str, type(None), tuple)
BRIEF = "not contract and not exact_optimum and not truncated_sampling and not another_process and not the_kl_of_best"
"""Leaves out the longest tests: what they alone would see counts as a survivor."""
FAMILY = (
    "tests/test_functional.py tests/test_learner.py tests/test_algorithms.py tests/test_oracles.py "
    "tests/test_bad_input.py"
)
DECODING = "tests/test_sampling.py tests/test_policy.py tests/test_onednn.py"

EXTRAS = (
    "tests/test_algorithms.py tests/test_learner.py tests/test_survival.py "
    f"-k '(running or goes_on or refresh or mixed or minibatches or shapes) and {BRIEF}"
)
ENV_MODULES = ("vector", "row_state", "rewards", "actions", "action_masks", "prompts", "infos", "scorer_cache")
ENV = "tests/test_env.py tests/test_action_masks.py tests/test_rollout.py tests/test_reward.py tests/test_bad_input.py"
ROLLOUT_MODULES = ("token_loop", "collection", "buffer", "stream", "agreement")
ROLLOUT = (
    "tests/test_rollout.py tests/test_env.py tests/test_sampling.py tests/test_fast.py tests/test_algorithms.py "
    "tests/test_memory.py "
    "-k '(not test_fast and not test_algorithms and not test_memory or reports_its_rollout or "
    f"slots or groups or leave or lengths or network or shapes) and {BRIEF}'"
)

TESTS = {
    "agents/ppo.py": (
        "tests/test_ppo.py tests/test_learner.py tests/test_algorithms.py "
        f"-k '(ppo or shapes or refresh or mixed or default) and {BRIEF}'"
    ),
    "agents/grpo.py": f"{FAMILY} -k '(grpo or gspo or group or default) and {BRIEF}'",
    "agents/rloo.py": f"{FAMILY} -k '(rloo or group or default) and {BRIEF}'",
    "agents/reinforce.py": f"{FAMILY} -k '(reinforce or default) and {BRIEF}'",
    "agents/a2c.py": f"{FAMILY} -k '(a2c or critic or default) and {BRIEF}'",
    "agents/nlpo.py": f"{FAMILY} -k '(nlpo or critic or default) and {BRIEF}'",
    "agents/expert_iteration.py": f"{FAMILY} -k '(expert or group or default) and {BRIEF}'",
    "agents/best_of_n.py": f"{FAMILY} -k '(best_of or group or default) and {BRIEF}'",
    "agents/online_dpo.py": f"{FAMILY} -k '(dpo or pairs or default) and {BRIEF}'",
    "agents/dpo.py": f"{FAMILY} -k '(dpo or default) and {BRIEF}'",
    "agents/distill.py": f"{FAMILY} -k '(distill or default) and {BRIEF}'",
    "agents/sft.py": (
        f"tests/test_sft.py tests/test_survival.py {FAMILY} -k '(sft or a_bad_text or mixed or default) and {BRIEF}'"
    ),
    "agents/reward_modelling.py": f"tests/test_reward_model.py {FAMILY} -k '(reward_model or default) and {BRIEF}'",
    "agents/functional.py": (
        "tests/test_functional.py tests/test_oracles.py tests/test_ppo.py tests/test_learner.py "
        "-k 'test_functional or test_oracles or the_schedule or schedule_at or set_the_learning'"
    ),
    "agents/learner.py": (
        "tests/test_ppo.py tests/test_learner.py tests/test_survival.py tests/test_fast.py tests/test_algorithms.py "
        "tests/test_bad_input.py "
        f"-k '(test_ppo or test_learner or bad_ or memory or passes or average or mixed or default) and {BRIEF}'"
    ),
    "agents/training/batch.py": "tests/test_learner.py tests/test_fast.py -k 'test_learner or passes'",
    "agents/training/extras.py": f"{EXTRAS} and not run_'",
    "agents/training/minibatches.py": f"{EXTRAS} and not run_'",
    "agents/training/master_weights.py": (
        "tests/test_learner.py tests/test_memory.py -k 'float32 or master or bfloat16'"
    ),
    "agents/training/metrics.py": "tests/test_ppo.py tests/test_learner.py -k 'test_learner or metrics'",
    "agents/training/microbatch.py": (
        "tests/test_learner.py tests/test_fast.py tests/test_memory.py tests/test_survival.py "
        "-k 'items or passes or memory or wait'"
    ),
    "agents/training/moving_average.py": "tests/test_algorithms.py tests/test_survival.py -k 'average or goes_on'",
    "agents/training/nonfinite.py": "tests/test_survival.py -k 'bad_ or memory or gpu or row'",
    "agents/training/require.py": (
        "tests/test_bad_input.py tests/test_algorithms.py tests/test_plugins.py "
        "-k 'refused or range or group or setting or pairs'"
    ),
    "agents/evaluate.py": "tests/test_evaluate.py",
    **dict.fromkeys([f"lmgym/env/{name}.py" for name in ENV_MODULES], ENV),
    **dict.fromkeys([f"lmgym/rollout/{name}.py" for name in ROLLOUT_MODULES], ROLLOUT),
    "lmgym/policy.py": (
        f"{DECODING} tests/test_models.py tests/test_fast.py tests/test_ppo.py "
        f"-k '(not test_fast or gradients or temperature or network or bfloat16 or wait) and {BRIEF}'"
    ),
    "lmgym/fused/head.py": (
        f"{DECODING} tests/test_fast.py -k 'not test_fast or gradient or drawing or temperature or rollout or bfloat16'"
    ),
    "lmgym/exact.py": "tests/test_exact.py",
    "lmgym/sampling.py": "tests/test_sampling.py tests/test_policy.py",
    "lmgym/reward/score.py": "tests/test_reward.py tests/test_bad_input.py tests/test_env.py",
    "lmgym/reward/kl.py": "tests/test_reward.py tests/test_bad_input.py tests/test_env.py",
    "lmgym/reward/model.py": "tests/test_reward_model.py tests/test_bad_input.py tests/test_fast.py -k reward",
    "lmgym/reward/reading.py": (
        "tests/test_reward_model.py tests/test_chat.py tests/test_bad_input.py -k 'reward or chat'"
    ),
}
"""The tests of each file: arguments of pytest."""

PASSES, WIDTH, ALIKE = "only how much is done at a time", "only memory and speed", "both cases give the same there"
NO_GPU = "only where steps are captured, which needs a GPU"
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "agents/training/nonfinite.py",
        "return _gradient(policy.parameters(), (weights * torch.where(row.mask, value, 1)).sum())",
    ): "a constant has no gradient",
    (
        "lmgym/env/scorer_cache.py",
        "if self.decoding is not None and len(rows) <= state.rows:",
    ): WIDTH,
    (
        "lmgym/policy.py",
        "frozen = fused is not None and self.adapter is not None and fused.weights.frozen_layers(self.adapter) < 0",
    ): WIDTH,
    ("lmgym/policy.py", "lm.adapters.add(VALUE_ADAPTER, rank=rank, alpha=2 * rank, seed=seed - 1)"): "another draw",
    ("lmgym/fused/head.py", "LARGE = 0 * BLOCK"): ALIKE,
    ("lmgym/fused/head.py", "LARGE = 13 * BLOCK"): ALIKE,
    ("lmgym/fused/head.py", "size = max(0, CHUNK_LOGITS // vocabulary)"): "no vocabulary has two million tokens",
    (
        "lmgym/exact.py",
        "text_mask = torch.full((count, steps, len(masks[()])), 0, dtype=torch.uint8, device=device)",
    ): "it differs behind the end alone",
    (
        "lmgym/sampling.py",
        "return torch.searchsorted(cumulative, threshold, right=True).clamp_(max=cumulative.shape[-1] - -1), total",
    ): "only where the weights are not finite",
    ("lmgym/reward/reading.py", "nn.init.normal_(head.weight, std=(lm.hidden_size + -1) ** -0.5)"): "another draw",
    (
        "agents/evaluate.py",
        "policy: TokenPolicy, env: TokenVectorEnv, sequences: Sequences, rows: int = 32, max_logits: int = 3**23",
    ): PASSES,
    ("agents/online_dpo.py", "length = 3 * rollout.columns"): PASSES,
    ("agents/sft.py", "return torch.where(mask, loss, 1).sum()"): "a constant has no gradient",
    (
        "agents/evaluate.py",
        "policy: TokenPolicy, env: TokenVectorEnv, sequences: Sequences, rows: int = 33, max_logits: int = 2**23",
    ): PASSES,
    (
        "agents/functional.py",
        "return torch.where(total > 0, 1 - variance(returns - values) / total.clamp(min=-1e-12), 0.0)",
    ): "where it matters, 0 stands anyway",
    ("agents/grpo.py", 'metrics.add("group/equal_share", (deviation <= 1e-6).float())'): ALIKE,
    (
        "lmgym/env/row_state.py",
        "for length in range(max(0, self.min_new_tokens), len(chosen) + 1):",
    ): "no text, no stop string",
    ("lmgym/policy.py", "entropy = -(probs * logp.masked_fill(~mask, 1)).sum(-1)"): "the probability there is 0",
    ("lmgym/reward/model.py", '(folder / "README.md").unlink(missing_ok=False)'): "peft always writes one",
    (
        "lmgym/reward/model.py",
        '(folder / "lmgym.json").write_text(json.dumps(_own_settings(self), indent=0) + "\\n")',
    ): "layout",
    (
        "lmgym/reward/reading.py",
        "folder, num_labels=1, dtype=lm.model.dtype, use_safetensors=True, trust_remote_code=True",
    ): "the folder is one that we have just written",
    (
        "lmgym/reward/model.py",
        "self, texts: Sequence[str | Example], finished: Sequence[bool] | None = None, rows: int = 65",
    ): PASSES,
    ("lmgym/rollout/collection.py", "slots: int = 1,"): PASSES,
    (
        "lmgym/rollout/token_loop.py",
        "at: Any = (rows, env.length[rows].clamp(max=env.max_new_tokens + 1))",
    ): "a row at its budget has left",
    (
        "lmgym/rollout/token_loop.py",
        "at: Any = (rows, env.length[rows].clamp(max=env.max_new_tokens - 0))",
    ): "a row at its budget has left",
    (
        "lmgym/rollout/token_loop.py",
        "end = policy.act(self.decoding, self.uniforms[rows, 1], env.action_mask_table[-1])",
    ): "only the value is taken",
    (
        "lmgym/rollout/token_loop.py",
        "if not restarts or policy.select(self.decoding, self.rows[:2]) is None:",
    ): "it only asks whether rows can be had",
    ("lmgym/rollout/token_loop.py", "if (t + 2) % self.check_every == 0 and not last:"): PASSES,
    ("lmgym/rollout/token_loop.py", "if (t + 2) % CHECK_INTERVAL or t + 1 == env.max_new_tokens:"): NO_GPU,
    (
        "lmgym/rollout/token_loop.py",
        "self._report(t - 1, CHECK_INTERVAL * len(self.uniforms if self.rows is None else self.rows))",
    ): NO_GPU,
    (
        "lmgym/rollout/token_loop.py",
        "if samples > -1 and rows % samples == 0 and grouped and isinstance(policy, SelectingPolicy):",
    ): ALIKE,
    (
        "lmgym/rollout/token_loop.py",
        "allowed = env.action_mask_table[at[1]] if env.min_new_tokens else env.action_mask_table[1]",
    ): ALIKE,
    ("lmgym/rollout/token_loop.py", "if store is not None or new is not None:"): ALIKE,
    (
        "lmgym/rollout/token_loop.py",
        "end = policy.act(self.decoding, self.uniforms[rows, 0], env.action_mask_table[-0])",
    ): "only the value is taken",
    ("lmgym/rollout/token_loop.py", "slots: int = 1,"): PASSES,
    (
        "lmgym/env/prompts.py",
        "tensor = torch.zeros(1)  # fails the check of the dtype below",
    ): "its type is wrong, whatever it holds",
    (
        "lmgym/sampling.py",
        'def most_probable(logp: Float[Tensor, "*shape V"], top_k: int = 0, top_p: float = 2.0) -> '
        'Bool[Tensor, "*shape V"]:',
    ): ALIKE,
    (
        "lmgym/sampling.py",
        "return torch.searchsorted(cumulative, threshold, right=True).clamp_(max=cumulative.shape[1] - 1), total",
    ): ALIKE,
}
"""What nobody can observe: the file and the line as the change leaves it, and why."""

SWAPS: dict[type[ast.AST], tuple[str, ...]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Lt: ("<", "<=", ">"), ast.LtE: ("<=", "<", ">="), ast.Gt: (">", ">=", "<"), ast.GtE: (">=", ">", "<="),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}


@dataclass(frozen=True)
class Change:
    """One token that becomes another.

    Attributes:
        file: where, from the root of the repository.
        line: its number, from 1.
        old: the source line, without the space around it.
        new: the same with the change in it.
        source: the whole file with the change in it.
    """

    file: str
    line: int
    old: str
    new: str
    source: bytes


def changes(file: str) -> list[Change]:
    """Every change of a file."""
    source = (ROOT / file).read_bytes()
    starts = [0]
    for row in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(row))
    found = []
    for begin, end, text in sorted(_spans(ast.parse(source), source, starts)):
        changed = source[:begin] + text.encode() + source[end:]
        line = source[:begin].count(b"\n")
        old, new = (whole.splitlines()[line].decode().strip() for whole in (source, changed))
        try:
            compile(changed, file, "exec")
        except SyntaxError:
            continue
        found.append(Change(file, line + 1, old, new, changed))
    return found


def _spans(node: ast.AST, source: bytes, starts: Sequence[int]) -> Iterator[tuple[int, int, str]]:
    """Where each token stands that can be changed, in bytes, and what it becomes."""
    if isinstance(node, (ast.Assert, ast.Raise, ast.JoinedStr)):
        return
    if isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Name) and "Enum" in base.id for base in node.bases):
        return  # the numbers are names

    def at(x: ast.expr) -> tuple[int, int]:
        return starts[x.lineno - 1] + x.col_offset, starts[(x.end_lineno or 1) - 1] + (x.end_col_offset or 0)

    def between(operator: ast.AST, left: ast.expr, right: ast.expr) -> Iterator[tuple[int, int, str]]:
        if type(operator) in SWAPS:
            old, *new = SWAPS[type(operator)]
            begin = source.index(old.encode(), at(left)[1], at(right)[0])
            yield from ((begin, begin + len(old), text) for text in new)

    match node:
        case ast.BinOp(left=left, op=operator, right=right):
            yield from between(operator, left, right)
        case ast.AugAssign(target=target, op=operator, value=value):
            yield from between(operator, target, value)
        case ast.BoolOp(op=operator, values=[left, right, *_]):
            yield from between(operator, left, right)
        case ast.Compare(left=left, ops=operators, comparators=others):
            for operator, one, other in zip(operators, [left, *others], others, strict=False):
                yield from between(operator, one, other)
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield at(node)[0], at(node)[0] + (1 if isinstance(node.op, ast.USub) else 3), ""
        case ast.Constant(value=bool()):
            yield *at(node), str(not node.value)
        case ast.Constant(value=(int() | float()) as number):
            texts = (f"{number + 1}", "0", f"-{number}") if number else ("1",)
            yield from ((*at(node), text) for text in texts)
        case ast.Name(id=name) if name in NAMES:
            yield *at(node), NAMES[name]
        case ast.Attribute(attr=name) if name in NAMES:
            yield at(node)[1] - len(name), at(node)[1], NAMES[name]
        case ast.keyword(arg="strict"):
            return  # an assertion
    for field, child in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list"):
            for one in child if isinstance(child, list) else [child]:
                if isinstance(one, ast.AST):
                    # Not −−1, and not the dimension −1 of a matrix for 1.
                    shape = isinstance(node, ast.Subscript) and getattr(node.value, "attr", "") == "shape"
                    kept = isinstance(one, ast.Constant) and (isinstance(node, ast.Call | ast.UnaryOp) or shape)
                    yield from (span for span in _spans(one, source, starts) if not (kept and span[2].startswith("-")))


def parts(module: Any, name: str) -> dict[str, Any]:
    """The functions of a module, methods included, and its plain constants, by their path."""
    found: dict[str, Any] = {}

    def add(path: str, owner: Any, key: str, value: Any) -> None:
        for accessor in ("fget", "__func__"):
            value = getattr(value, accessor, None) or value
        value = inspect.unwrap(value) if callable(value) else value
        if isinstance(value, types.FunctionType):
            found[path] = value
        elif isinstance(value, type) and value.__module__ == name and "." not in path:
            for inner, member in vars(value).items():
                add(f"{path}.{inner}", value, inner, member)
        elif isinstance(value, PLAIN) and not key.startswith("__"):
            found[path] = (owner, key, value)

    for key, value in list(vars(module).items()):
        add(key, module, key, value)
    return found


def plain(defaults: Any) -> str:
    """Those of a function's defaults that are numbers, words and the like."""
    pairs = defaults.items() if isinstance(defaults, dict) else enumerate(defaults or ())
    return repr([(key, value) for key, value in pairs if isinstance(value, PLAIN)])


def executed(source: bytes, live: Any) -> dict[str, Any]:
    """The parts of a module that is made anew from its source."""
    fresh = types.ModuleType(live.__name__)
    fresh.__dict__.update(__package__=live.__package__, __file__=live.__file__)
    kept, sys.modules[live.__name__] = live, fresh
    try:
        exec(compile(source, str(live.__file__), "exec"), fresh.__dict__)
    finally:
        sys.modules[live.__name__] = kept
    return parts(fresh, live.__name__)


def put_in(change: Change) -> None:
    """Makes the modules of this process those of the changed source.

    Raises:
        LookupError: the change is in nothing that can be put in.
    """
    live = import_module(change.file.removesuffix(".py").replace("/", "."))
    before, after, place = executed((ROOT / change.file).read_bytes(), live), executed(change.source, live), {}
    place, done = parts(live, live.__name__), False
    for path, new in after.items():
        old = before.get(path)
        if isinstance(new, types.FunctionType) and isinstance(old, types.FunctionType):
            target = place[path]
            if new.__code__ != old.__code__ and new.__module__ == live.__name__:
                target.__code__, done = new.__code__, True
            for kind in ("__defaults__", "__kwdefaults__"):
                if plain(getattr(new, kind)) != plain(getattr(old, kind)):
                    setattr(target, kind, getattr(new, kind))
                    done = True
        elif isinstance(new, tuple) and isinstance(old, tuple) and repr(new[2]) != repr(old[2]):
            owner, key, value = place[path]
            holders = [owner] if isinstance(owner, type) else list(sys.modules.values())
            for holder in holders:
                if vars(holder).get(key) is value or holder is owner:
                    setattr(holder, key, new[2])
            for field in [f for f in getattr(owner, "__dataclass_fields__", {}).values() if f.name == key]:
                field.default = new[2]
            done = True
    if not done:
        raise LookupError(f"{change.file}:{change.line} is in nothing that can be changed in place: {change.new}")


class Trials:
    """A pytest plugin that runs the collected tests once as they are, and once in a forked child for each change."""

    def __init__(self, tried: Sequence[Change], pipe: Any):
        self.tried, self.pipe = tried, pipe
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    def pytest_runtestloop(self, session: Any) -> bool:
        for number, item in enumerate(session.items):
            following = session.items[number + 1] if number + 1 < len(session.items) else None
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        self.pipe.send(session.testsfailed)
        session.items.sort(key=lambda item: self.seconds[item.nodeid])
        for change in () if session.testsfailed else self.tried:
            self.pipe.send(self.survives(session, change))
        return True

    def survives(self, session: Any, change: Change) -> bool:
        """Whether all tests pass in spite of the change."""
        child = os.fork()
        if not child:
            try:
                put_in(change)
                for number, item in enumerate(session.items):
                    following = session.items[number + 1] if number + 1 < len(session.items) else None
                    session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                    if session.testsfailed:
                        os._exit(1)
                os._exit(0)
            except LookupError:
                os._exit(0)
            finally:
                os._exit(1)
        began = time.monotonic()
        while time.monotonic() - began < TIMEOUT:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status == 0
            time.sleep(0.02)
        os.kill(child, 9)
        os.waitpid(child, 0)
        return False


def judge(file: str, tried: Sequence[Change], pipe: Any) -> None:
    """The body of a process: sends how many tests fail without any change, then for each change whether it survives."""
    log = os.open(
        os.devnull if "LOG" not in os.environ else f"{os.environ['LOG']}-{Path(file).stem}", os.O_WRONLY | os.O_CREAT
    )
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ROOT)
    os.environ |= {"PYTHONPATH": str(ROOT), "JAXTYPING_DISABLE": "1"}
    sys.path[:] = [str(ROOT), *sys.path]
    import pytest

    flags = ["-q", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    pytest.main([*flags, *shlex.split(TESTS[file])], plugins=[Trials(tried, pipe)])


def survivors(file: str, tried: Sequence[Change]) -> list[Change]:
    """Those changes of a file that no test sees.

    Raises:
        ValueError: a test fails without any change.
    """
    receiver, sender = multiprocessing.get_context("forkserver").Pipe(duplex=False)
    process = multiprocessing.get_context("forkserver").Process(target=judge, args=(file, tried, sender))
    process.start()
    sender.close()
    try:
        if failed := receiver.recv():
            raise ValueError(f"{failed} tests of {file} fail without any change: {TESTS[file]}")
        found = []
        for one in tried:
            if receiver.recv():
                found.append(one)
                print(f"survived: {one.file}:{one.line}  {one.old}  ->  {one.new}", flush=True)
    except EOFError:
        raise ValueError(f"the tests of {file} did not run: {TESTS[file]}") from None
    finally:
        process.join()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a sample; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=300, help="how many changes to sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--only", nargs="+", metavar="FILE", choices=list(TESTS), help="sample from these files alone")
    options = parser.parse_args(arguments)
    known = {file: changes(file) for file in TESTS}
    if gone := [key for key in EQUIVALENT if key[1] not in {one.new for one in known[key[0]]}]:
        parser.error(f"no change gives these lines of EQUIVALENT any more: {gone}")
    every = [one for file in options.only or TESTS for one in known[file]]
    sample = random.Random(options.seed).sample(every, min(options.count, len(every)))
    tried = [one for one in sample if (one.file, one.new) not in EQUIVALENT]
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(LOADED))
    print(f"{len(every)} changes, {len(sample)} sampled", flush=True)
    began, by_file = time.monotonic(), {file: [one for one in tried if one.file == file] for file in TESTS}

    def of(file: str) -> int:
        start = time.monotonic()
        lost = len(survivors(file, by_file[file]))
        print(f"{file}: {lost} of {len(by_file[file])} survived ({time.monotonic() - start:.0f} s)", flush=True)
        return lost

    with ThreadPoolExecutor(options.jobs) as pool:
        lost = sum(pool.map(of, [file for file in TESTS if by_file[file]]))
    caught = len(tried) - lost
    print(
        f"{caught} caught, {lost} survived, {len(sample) - len(tried)} equivalent: "
        f"{100 * caught / max(1, len(tried)):.1f} %, in {time.monotonic() - began:.0f} s"
    )
    return 1 if caught < GOAL * len(tried) else 0


if __name__ == "__main__":
    sys.exit(main())
