"""No technique escapes the contract: those found in the package are those that have a case, and each case is run."""

import inspect
import pkgutil
from importlib import import_module
from pathlib import Path

import pytest

import lightning_ft.callbacks
from lightning_ft.cli.slots import techniques
from lightning_ft.engine.technique import Technique
from tests.contract import CHECKS, checks_for

CASES = sorted((Path(__file__).parent / "callbacks").glob("test_*.py"))
ROWS = {
    "builds", "stores", "refuses", "round_trip", "idle", "acts", "plain_module", "composes", "counts", "dtypes",
    "saves", "leaves", "leaves_after_an_exception", "second_fit", "validate_before_fit", "documented",
}  # fmt: skip


def modules_with_a_case():
    found = [import_module(f"tests.callbacks.{path.stem}") for path in CASES]
    return [module for module in found if hasattr(module, "CASE")]


def test_every_technique_has_a_case():
    cases = [module.CASE.cls for module in modules_with_a_case()]
    assert sorted(cls.__name__ for cls in cases) == sorted(cls.__name__ for cls in techniques().values())


def test_every_technique_class_declares_traits():
    """A `Technique` without traits of its own would be no slot, and so would escape the test above."""
    for info in pkgutil.walk_packages(lightning_ft.callbacks.__path__, "lightning_ft.callbacks."):
        for cls in vars(import_module(info.name)).values():
            if isinstance(cls, type) and issubclass(cls, Technique) and cls.__module__ == info.name:
                assert cls in techniques().values(), f"{cls.__name__} declares no traits."


@pytest.mark.parametrize("module", modules_with_a_case(), ids=lambda module: module.__name__)
def test_every_case_runs_the_whole_contract(module):
    assert module.CASE.cls.__module__.endswith(f".{module.__name__.rpartition('.test_')[2]}")
    (mark,) = [mark for mark in module.test_contract.pytestmark if mark.name == "parametrize"]
    ran = [parameter.id for parameter in mark.args[1]]
    assert ran == [parameter.id for parameter in checks_for(module.CASE)]
    assert set(module.CASE.known) <= set(ran), "A known failure names a check that does not run."
    assert "check(CASE, place)" in inspect.getsource(module.test_contract)


def test_the_contract_has_every_row():
    assert {check.name for check in CHECKS} == ROWS
    assert all(check.run.__doc__ for check in CHECKS)
