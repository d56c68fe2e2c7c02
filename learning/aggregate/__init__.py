"""Rules that combine contributions of which some may lie: coordinate-wise or on the Gram matrix, distributed or not."""

from .aggregator import Aggregator, Decision
from .base import Before, CoordinateRule, GramRule, Remembering, Stage, Verdict
from .central import Result, aggregate
from .linear import fault, linear_combination, partial_gram
from .names import BEFORE, RULES, resolve

__all__ = [
    "BEFORE",
    "RULES",
    "Aggregator",
    "Before",
    "CoordinateRule",
    "Decision",
    "GramRule",
    "Remembering",
    "Result",
    "Stage",
    "Verdict",
    "aggregate",
    "fault",
    "linear_combination",
    "partial_gram",
    "resolve",
]
