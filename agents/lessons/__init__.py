"""The exercises of docs/lessons, and their grader.

`lmgym exercise list | show N | check N FILE | hint N | grade FOLDER` is built on these functions.
"""

from agents.lessons.catalog import Verdict, all_exercises, check_file, find, number_in
from agents.lessons.exercise import Exercise

__all__ = ["Exercise", "Verdict", "all_exercises", "check_file", "find", "number_in"]
