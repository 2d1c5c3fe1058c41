"""Solutions of the exercises, typical wrong answers, and planted bugs. For teachers and tests: learners, look away.

A solution is the exercise's start with some text replaced. Wrong answers and planted bugs are the solution with some
text replaced.
"""

from answers.lessons_00_to_04 import ANSWERS as FIRST
from answers.lessons_05_to_08 import ANSWERS as SECOND
from answers.lessons_09_to_12 import ANSWERS as THIRD

ANSWERS = FIRST | SECOND | THIRD

__all__ = ["ANSWERS"]
