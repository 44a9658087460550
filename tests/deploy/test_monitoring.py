"""The alerts: promtool accepts and tests them, and each has a section that says what to do."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.test_pages import headings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "monitoring"
PAGE = ROOT / "docs" / "guide" / "alerts.md"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
TESTS = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())["tests"]


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus"
)
@pytest.mark.parametrize(
    "command", [("check", "rules", "alerts.yaml"), ("test", "rules", "alerts_test.yaml")]
)
def test_promtool_accepts_the_rules_and_their_tests_pass(command: tuple[str, ...]) -> None:
    ran = subprocess.run(
        ["promtool", *command], cwd=FOLDER, capture_output=True, text=True, check=False
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_leads_to_a_section_that_says_what_to_do(rule: dict[str, Any]) -> None:
    page, _, heading = rule["annotations"]["runbook_url"].partition("#")

    assert ROOT / page == PAGE
    assert heading == rule["alert"].lower()
    assert heading in headings(PAGE)
    assert rule["labels"]["severity"] in ("critical", "warning")


def test_every_section_is_of_an_alert() -> None:
    assert headings(PAGE) - {"alerts"} == {rule["alert"].lower() for rule in RULES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_is_seen_to_fire_on_the_server_with_the_trouble_alone(
    rule: dict[str, Any],
) -> None:
    fired = [
        alert["exp_labels"]["instance"]
        for test in TESTS
        for each in test["alert_rule_test"]
        if each["alertname"] == rule["alert"]
        for alert in each["exp_alerts"]
    ]

    assert fired
    assert "good" not in fired
