"""The checker: test cases, limits derived from the arithmetic, and a diagnosis of wrong results."""

from glu4.verify.case import Case
from glu4.verify.cases import (
    exact_sum_case,
    full_range_case,
    one_hot_case,
    random_cases,
    saturated_exact_case,
)
from glu4.verify.checker import Diagnosis, Finding, Report, Verdict, check, check_backend

__all__ = [
    "Case",
    "Diagnosis",
    "Finding",
    "Report",
    "Verdict",
    "check",
    "check_backend",
    "exact_sum_case",
    "full_range_case",
    "one_hot_case",
    "random_cases",
    "saturated_exact_case",
]
