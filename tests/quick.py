"""The inner loop: runs the tests of what differs from a revision (`make quick`), as the map below tells.

    python tests/quick.py            # what is not committed, and the last commit if everything is
    python tests/quick.py main       # what differs from main

The map is also the table "Where is it tested?" of CONTRIBUTING.md; tests/test_quick.py compares the two.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TESTED_BY: dict[str, tuple[str, ...]] = {
    "lmgym/env/": ("test_env", "test_action_masks", "test_gymnasium"),
    "lmgym/rollout/": ("test_rollout", "test_cuda_graph", "test_ranks"),
    "lmgym/models/": (
        "test_models",
        "test_architectures",
        "test_safe_weights",
        "test_special_text",
        "test_adapter_base",
    ),
    "lmgym/models/chat.py": ("test_chat", "test_chat_cli"),
    "lmgym/fused/": ("test_fast", "test_onednn", "test_memory"),
    "lmgym/reward/": ("test_reward", "test_reward_model", "test_ensemble"),
    "lmgym/reward/trl.py": ("test_answers",),
    "lmgym/policy.py": ("test_policy", "test_sampling"),
    "lmgym/critic.py": ("test_policy",),
    "lmgym/sampling.py": ("test_sampling", "test_policy"),
    "lmgym/devices.py": ("test_rollout", "test_memory"),
    "lmgym/ranks.py": ("test_ranks",),
    "lmgym/tasks/": ("test_tasks", "test_data"),
    "lmgym/tasks/letters.py": ("test_letters", "test_benchmark"),
    "lmgym/tasks/tuning.py": ("test_letters", "test_benchmark"),
    "lmgym/tasks/messages.py": ("test_messages", "test_chat"),
    "lmgym/tasks/conversational.py": ("test_messages", "test_chat"),
    "lmgym/tasks/answers.py": ("test_answers",),
    "lmgym/tasks/reasoning_gym.py": ("test_answers",),
    "lmgym/preferences/": (
        "test_preferences",
        "test_data",
        "test_labels",
        "test_label_figures",
        "test_label_files",
        "test_ensemble",
    ),
    "lmgym/exact.py": ("test_exact",),
    "lmgym/reasoning_names.py": ("test_answers",),
    "lmgym/registry.py": ("test_gymnasium", "test_plugins"),
    "lmgym/testing/": ("test_testing",),
    "lmgym/io/": ("test_data", "test_atomic_files", "test_display", "test_redact"),
    "lmgym/__init__.py": ("test_gymnasium",),
    "agents/functional.py": ("test_functional", "test_oracles"),
    "agents/learner.py": ("test_ppo", "test_learner"),
    "agents/training/": ("test_ppo", "test_learner", "test_memory", "test_ranks"),
    "agents/evaluate.py": ("test_evaluate", "test_experiments_measures"),
    "agents/sft.py": ("test_sft",),
    "agents/reward_modelling.py": ("test_reward_model", "test_ensemble"),
    "agents/ppo.py": ("test_ppo", "test_docs"),
    "agents/": ("test_learner", "test_docs"),
    "agents/pipeline/": ("test_alarms", "test_plugins"),
    "agents/runs/": ("test_survival", "test_paths", "test_saved_runs", "test_memory"),
    "agents/report/": ("test_report",),
    "agents/report/planned.py": ("test_plan",),
    "agents/pipeline/planning.py": ("test_plan",),
    "agents/runs/costs.py": ("test_plan",),
    "agents/runs/meter.py": ("test_plan",),
    "agents/cli/plan.py": ("test_plan",),
    "agents/benchmark/": ("test_benchmark", "test_benchmark_results"),
    "agents/experiments/": ("test_experiments_runner", "test_experiments_statistics", "test_experiments_measures"),
    "agents/experiments/extrapolation.py": ("test_extrapolation", "test_experiments_measures"),
    "agents/experiments/comparison.py": ("test_comparison",),
    "agents/experiments/comparison_page.py": ("test_comparison",),
    "agents/cli/several_runs.py": ("test_comparison",),
    "agents/cli/compare.py": ("test_comparison",),
    "agents/cli/sweep.py": ("test_comparison",),
    "agents/cli/check.py": ("test_comparison",),
    "agents/cli/": ("test_cli", "test_saved_runs"),
    "agents/cli/chat.py": ("test_chat_cli",),
    "agents/distributed/": ("test_ranks", "test_ranks_cli"),
    "agents/cli/label.py": ("test_labelling_page",),
    "agents/cli/label_data.py": ("test_labelling_page",),
    "agents/cli/questions.py": ("test_labelling_page",),
    "agents/cli/loop.py": ("test_labelling_page",),
    "agents/labelling/": ("test_labelling_page", "test_labelling_browser"),
    "agents/integrations/": ("test_sb3",),
    "agents/tools/": (),
    "agents/tools/make_pipeline_page.py": ("test_docs",),
    "examples/": ("test_notebooks",),
    "README.md": ("test_examples",),
    "mkdocs.yml": ("test_site",),
    "docs/site/": ("test_site",),
    "docs/site/spelling.txt": ("test_docs",),
    "docs/reference/": ("test_site",),
    "docs/lessons/": ("test_lesson_pages", "test_notebooks"),
    "docs/glossary.md": ("test_lesson_pages",),
    "docs/teaching.md": ("test_lesson_pages",),
    "docs/": ("test_docs", "test_correctness"),
    "docs/other_libraries.md": ("test_sb3", "test_answers"),
    "docs/benchmark.md": ("test_experiments_statistics", "test_benchmark_results"),
    "pyproject.toml": ("test_architecture",),
    "constraints.txt": (),
    "benchmarks/gpu.py": ("test_gpu_script",),
    "benchmarks/tuning.py": ("test_tuning",),
    "benchmarks/": (),
    "agents/pipeline/queries.py": ("test_ensemble",),
    "agents/studies/": ("test_studies",),
    "agents/cli/study.py": ("test_studies",),
    "docs/studies/": ("test_studies",),
    "docs/measuring.md": ("test_experiments_measures",),
    "agents/lessons/": ("test_lessons",),
    "tests/answers/": ("test_lessons",),
    "agents/lessons/play.py": ("test_play",),
    "agents/cli/play.py": ("test_play",),
    "agents/pipeline/replay.py": ("test_step",),
    "agents/runs/stored.py": ("test_step",),
    "agents/lessons/walk.py": ("test_step",),
    "agents/cli/step.py": ("test_step",),
    "agents/cli/exercise.py": ("test_lessons",),
}
"""What a file's tests are: the longest entry that its path starts with. `tests/test_x.py` are their own tests."""


def relevant_tests(path: str) -> tuple[str, ...]:
    """The test files of a changed file, from the root of the repository."""
    if re.fullmatch(r"tests/test_\w+\.py", path):
        return (Path(path).stem,)
    entries = [entry for entry in TESTED_BY if path.startswith(entry)]
    return TESTED_BY[max(entries, key=len)] if entries else ()


def changed(base: str | None) -> list[str]:
    """The files that differ from a revision; without one, what is not committed, or else the last commit."""

    def git(*arguments: str) -> list[str]:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return run.stdout.splitlines()

    if base is not None:
        return git("diff", "--name-only", base)
    present = [*git("diff", "--name-only", "HEAD"), *git("ls-files", "--others", "--exclude-standard")]
    return present or git("diff", "--name-only", "HEAD~1")


def main(arguments: Sequence[str]) -> int:
    """Runs the tests; returns pytest's exit status."""
    files = changed(arguments[0] if arguments else None)
    chosen = sorted({f"tests/{test}.py" for file in files for test in relevant_tests(file)})
    chosen = [file for file in chosen if (ROOT / file).exists()]
    print(f"{len(files)} changed files, tests: {' '.join(chosen) or 'none'}", flush=True)
    if not chosen:
        return 0
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "--dist", "worksteal", *chosen]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
