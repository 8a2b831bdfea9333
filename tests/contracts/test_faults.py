"""Planted faults are up to date: each can be planted, and the tests that must notice it are there."""

from __future__ import annotations

import pytest
from fault import ROOT, Planted, every_fault


@pytest.mark.parametrize("planted", every_fault(), ids=lambda planted: planted.fault.name)
def test_a_fault_can_be_planted_and_has_its_tests(planted: Planted):
    fault, command = planted
    assert (ROOT / "rankflow" / fault.file).read_text().count(fault.old) == 1
    assert fault.old != fault.new
    for word in command.split():
        if word.startswith("tests/"):
            assert (ROOT / word.partition("::")[0]).is_file()
