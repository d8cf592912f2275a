"""Properties that hold on every backbone AIM works with: what `aim check` runs, and the tests on each family.

A property is a function that takes a `Case` and raises where it does not hold; `holds` registers it with the sentence
that a user reads. Nothing here needs a trained projector.
"""

from . import answering, reading
from .case import PROPERTIES, QUESTION, Answer, Case, NotApplicable, Property, difference, require
from .run import Outcome, check_model, run_checks, try_properties

__all__ = [
    "PROPERTIES",
    "QUESTION",
    "Answer",
    "Case",
    "NotApplicable",
    "Outcome",
    "Property",
    "answering",
    "check_model",
    "difference",
    "reading",
    "require",
    "run_checks",
    "try_properties",
]
