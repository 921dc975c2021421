"""What every technique must keep to: each check takes a `Case`, proves one property and says in a sentence what failed.

A technique's own test file holds its case and runs the list, so that there is no central table of techniques::

    CASE = Case(EWC, small={"lam": 1.0}, idle={"lam": 0.0})

    @pytest.mark.parametrize("check", checks_for(CASE))
    def test_contract(check, place):
        check(CASE, place)

Which checks run follows from the technique's traits; `tests/test_contract_coverage.py` sees to it that none escapes.
"""

from tests.contract import arguments, documents, leaving, ranks, training
from tests.contract.case import Case, Check, Place

CHECKS: list[Check] = [
    *arguments.CHECKS,
    *training.CHECKS,
    *leaving.CHECKS,
    *ranks.CHECKS,
    *documents.CHECKS,
]


def checks_for(case: Case) -> list:
    """One pytest parameter for each check that fits what the technique declares."""
    return [check.parameter(case) for check in CHECKS if check.fits(case.cls.traits)]


__all__ = ["CHECKS", "Case", "Place", "checks_for"]
