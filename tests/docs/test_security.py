"""SECURITY.md names a test for each attack, and the test is there."""

import ast
import re

import pytest

from tests.docs.blocks import ROOT

ROWS = re.findall(r"^\| \*\*(.+?)\*\*.*\| .+ \| (.+) \|$", (ROOT / "SECURITY.md").read_text(), re.M)


def test_every_attack_of_the_table_is_looked_at() -> None:
    table = (ROOT / "SECURITY.md").read_text().partition("| --- |")[2].partition("\n\n")[0]
    assert len(ROWS) == table.count("\n") > 20


@pytest.mark.parametrize(("attack", "tests"), ROWS, ids=[attack for attack, _ in ROWS])
def test_an_attack_has_tests_that_are_there(attack: str, tests: str) -> None:
    named = [each.strip("`").split("::") for each in tests.split(", ")]
    assert named, attack
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
