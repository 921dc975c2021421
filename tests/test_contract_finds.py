"""The contract can fail: for each fault there is a check that finds it and says so."""

import pytest

from tests.contract import CHECKS, Case, broken
from tests.contract.fixtures import chat, place  # noqa: F401  (fixtures)

RUN = {check.name: check for check in CHECKS}
SMALL = {"r": 2}


@pytest.mark.parametrize(
    ("cls", "check", "words"),
    [
        (broken.Undescribed, "builds", "takes .* by position; at most one may be"),
        (broken.Clamps, "stores", "does not keep r as it was given"),
        (broken.Remembers, "stores", "has changed public attributes"),
        (broken.Unchecked, "refuses", "DID NOT RAISE"),
        (broken.StartsElsewhere, "idle", "first forward with StartsElsewhere is not the one without it"),
        (broken.Meddles, "acts", "changed the frozen net.0.base.weight"),
        (broken.Stubborn, "acts", "net.unused.* are trainable and got no gradient"),
        (broken.OrderMatters, "composes", "depend on the order of callbacks"),
        (broken.Reduced, "dtypes", "in torch.bfloat16, not in fp32"),
        (broken.Forgets, "saves", "state comes back as .*0.*, not .*3"),
        (broken.LeavesHook, "leaves", "leaves hooks behind"),
        (broken.LeavesWrapper, "leaves", "leaves wrappers behind"),
        (broken.LeavesMode, "leaves", "leaves modes behind"),
        (broken.LeavesTrainer, "leaves", "leaves fields of the Trainer behind"),
        (broken.LeavesSeed, "leaves", "leaves a global generator elsewhere"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else getattr(value, "__name__", ""),
)
def test_a_fault_is_found(cls, check, words, place):  # noqa: F811
    case = Case(cls, small={} if cls is broken.Undescribed else SMALL)
    with pytest.raises((AssertionError, pytest.fail.Exception), match=words):
        RUN[check](case, place)
