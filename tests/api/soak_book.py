"""What each answer of a soak must be, by PEFT, whichever revision gave it."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infuse.adapters.storage.folder import digest_of
from tests.api.oracle import Oracle

TEMPLATE = "chat_template.jinja"
LONGEST = 64
"""The most tokens that are compared."""
_REVISION = re.compile(r"([\w./-]+@\d+)")


@dataclass(frozen=True)
class Asked:
    """A greedy request: a prompt, or a chat of one message."""

    text: str
    is_chat: bool
    tokens: int
    """How many are answered."""


class Book:
    """Learns what revisions contain and how they answered; compares with PEFT at the end."""

    def __init__(self, model_folder: Path, kinds: Mapping[str, Path]) -> None:
        """`kinds`: name -> a folder with an adapter's files, and nothing else."""
        self.kinds = kinds
        self._model_folder = model_folder
        self._contents = {digest_of(folder)[0]: (name,) for name, folder in kinds.items()}
        """Digest -> the kinds whose product it is."""
        self._digests: dict[str, str] = {}
        """`name@revision` -> digest."""
        self._answers: Counter[tuple[str, Asked, str]] = Counter()
        """What the header names, what was asked, and the text."""

    def learn(self, name: str, revision: dict[str, Any]) -> None:
        """`revision`: as the API shows it."""
        self._digests[f"{name}@{revision['revision']}"] = revision["digest"]
        if revision["recipe"] is not None:
            parts = [self._contents[part["digest"]] for part in revision["recipe"]["adapters"]]
            self._contents[revision["digest"]] = tuple(sorted(sum(parts, ())))

    def answered(self, header: str, asked: Asked, text: str) -> None:
        """`header`: Infuse-Adapter, empty for the base."""
        self._answers[header, asked, text] += 1

    @property
    def answers(self) -> int:
        return self._answers.total()

    def wrong(self) -> list[str]:
        """The answers that are not those of PEFT."""
        found = []
        expected: dict[tuple[tuple[str, ...], Asked], str] = {}
        for (header, asked, text), count in self._answers.items():
            key = self.parts_of(header), asked
            if key not in expected:
                expected |= self._expected(*key)
            if text != expected[key]:
                found.append(f"{count} times {header} ({key[0]}) answered {text!r} to {asked}")
        return found

    def parts_of(self, header: str) -> tuple[str, ...]:
        """The kinds whose product answered."""
        digests = [self._digests[each] for each in _REVISION.findall(header)]
        return tuple(sorted(sum((self._contents[each] for each in digests), ())))

    def _expected(
        self, kinds: tuple[str, ...], asked: Asked
    ) -> dict[tuple[tuple[str, ...], Asked], str]:
        """PEFT's text of every length that is asked for."""
        oracle = self.oracle(*kinds)
        prompt = self._prompt(oracle, kinds, asked) if asked.is_chat else asked.text
        ids = oracle.greedy(prompt, LONGEST)
        return {
            (kinds, Asked(asked.text, asked.is_chat, count)): oracle.text(ids[:count])
            for count in range(1, LONGEST + 1)
        }

    def oracle(self, *kinds: str) -> Oracle:
        return Oracle(self._model_folder, *(self.kinds[each] for each in kinds))

    def _prompt(self, oracle: Oracle, kinds: tuple[str, ...], asked: Asked) -> str:
        """The conversation in the template of a single adapter that brings one, or the base's."""
        template = self.kinds[kinds[0]] / TEMPLATE if len(kinds) == 1 else None
        own = template.read_text() if template is not None and template.exists() else None
        conversation = [{"role": "user", "content": asked.text}]
        rendered = oracle.tokenizer.apply_chat_template(
            conversation, chat_template=own, tokenize=False, add_generation_prompt=True
        )
        return str(rendered)
