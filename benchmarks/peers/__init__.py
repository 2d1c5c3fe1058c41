"""Contenders that others wrote, each a process of its own (`benchmarks.worker`)."""
