"""Adapters that let other RL libraries train on the token environments."""
