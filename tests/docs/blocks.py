"""The fenced blocks of Markdown pages: what a reader would copy."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDE = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / "guide" / f"{name}.md"
        for name in (
            "installing",
            "quickstart",
            "console",
            "your-adapters",
            "generation",
            "combine-and-merge",
            "command-line",
            "production",
            "operations",
            "alerts",
            "vllm",
            "clients",
            "as-a-library",
            "troubleshooting",
        )
    ),
]
"""In the order of reading: an adapter that one page adds is there on the next."""
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    """`bash` and `python` are run. `console` is not: its lines begin with `$`. `text` is what the
    block before it prints. `yaml` is a file of values for the Helm chart, `toml` a config
    file."""
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(found[1], found[2], text.count("\n", 0, found.start()) + 2)
        for found in _FENCE.finditer(text)
    ]


def shown_commands(page: Path) -> Iterator[str]:
    """Each command of the blocks that are not run, on one line."""
    for block in blocks(page):
        if block.language == "console":
            for line in block.text.replace("\\\n", " ").splitlines():
                yield line.removeprefix("$ ")
