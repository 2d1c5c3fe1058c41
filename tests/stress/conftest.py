"""Fuzzing and soaking, by `pytest -m stress` alone: as users have the library, without the tests' own type checks."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _as_users_have_it() -> None:
    if any(type(finder).__module__.startswith("jaxtyping") for finder in sys.meta_path):
        pytest.skip("the tests' type checks are on: run these by `pytest -m stress` alone")
