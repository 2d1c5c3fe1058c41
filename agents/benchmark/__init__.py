"""Benchmarks: suites of tasks, agents with a budget of tokens, and a leaderboard with intervals (docs/benchmark.md)."""
