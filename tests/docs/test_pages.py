"""The pages under docs/ say what the code says, and lead to where they say."""

import re
import runpy
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

DOCS = ROOT / "docs"
FOLDERS = (DOCS, ROOT / "docker", ROOT / "examples")
PAGES = sorted([*ROOT.glob("*.md"), *(page for each in FOLDERS for page in each.rglob("*.md"))])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def test_the_generated_pages_are_what_the_code_gives() -> None:
    generate = runpy.run_path(str(DOCS / "generate.py"), run_name="generate")

    for path, text in generate["pages"]().items():
        assert path.read_text() == text, f"{path} is old: run python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    for link in LINK.findall(without_code(page.read_text())):
        if "://" not in link:
            name, _, heading = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page}: {link}"
            assert not heading or heading in headings(target), f"{page}: {link}"


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_a_page_of_the_site_leads_to_pages_of_the_site_only(page: Path) -> None:
    for link in LINK.findall(without_code(page.read_text())):
        if "://" not in link:
            assert (page.parent / link.partition("#")[0]).resolve().is_relative_to(DOCS), link


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def headings(page: Path) -> set[str]:
    """What links name a page's headings by, on GitHub as on the site."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in found}


def test_the_readme_has_at_most_600_words() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 600
