"""The tasks of the example adapters: what a user sends, what the adapter answers, how it is scored.

Every task draws its examples from sentence fragments with a seed. The `train` and `heldout` splits
share no fragment and no name, so that a held-out score says something about new text.
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from peft import IA3Config

from examples.train import intents, orders, reviews


class Split(StrEnum):
    TRAIN = "train"
    HELDOUT = "heldout"


@dataclass(frozen=True)
class Example:
    """One user message, sent with no instruction around it, and the answer wanted."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained; `batch` is in examples."""

    config: IA3Config
    learning_rate: float
    steps: int
    batch: int


@dataclass(frozen=True)
class Task:
    name: str
    description: str
    instruction: str
    """What the base model is told when it is scored with the task spelled out."""
    labels: tuple[str, ...]
    """The answers there are; empty where the answer is JSON."""
    max_new_tokens: int
    """Room for an answer; more than the wanted ones need, so that a chatty base can get there."""
    draw: Callable[[Split, random.Random], tuple[str, str]]
    recipe: Recipe
    shown: tuple[str, str]
    """Two prompts, in no split, for the model card and the end-to-end test."""

    def generate(self, split: Split, count: int, seed: int) -> list[Example]:
        """`count` different examples; the same seed gives the same ones."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        drawn: dict[str, str] = {}
        while len(drawn) < count:
            prompt, answer = self.draw(split, rng)
            drawn[prompt] = answer
        return [Example(prompt, answer) for prompt, answer in drawn.items()]

    def exact(self, answer: str, wanted: str) -> bool:
        return answer.strip() == wanted

    def lenient(self, answer: str, wanted: str) -> bool:
        """Whether a chatty answer can be read as right.

        A label counts when it is the only label mentioned, in any case and with spaces for
        underscores; JSON counts when the first object in the text has the right fields.
        """
        if self.labels:
            said = answer.lower().replace("_", " ")
            return [label for label in self.labels if label.replace("_", " ") in said] == [wanted]
        return self.fields_right(answer, wanted) == 1.0

    def fields_right(self, answer: str, wanted: str) -> float:
        """The share of the wanted JSON fields that the first object in the text has right."""
        fields: Mapping[str, object] = json.loads(wanted)
        found = first_object(answer)
        return sum(found.get(key) == value for key, value in fields.items()) / len(fields)


def first_object(text: str) -> Mapping[str, object]:
    """The first JSON object in a text, or an empty one."""
    start = text.find("{")
    if start < 0:
        return {}
    try:
        found, _ = json.JSONDecoder().raw_decode(text[start:])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


TASKS = {
    task.name: task
    for task in (
        Task(
            name="order-json",
            description="reads an order mail and answers with one line of JSON: "
            "customer, item, quantity, city",
            instruction="Extract the order from this mail. Answer with nothing but one line of "
            'JSON such as {"customer":"Jane Doe","item":"wall clocks","quantity":2,'
            '"city":"Berlin"}.\n\nMail: ',
            labels=(),
            max_new_tokens=80,
            draw=orders.draw,
            recipe=Recipe(
                IA3Config(
                    task_type="CAUSAL_LM",
                    target_modules=[
                        "q_proj",
                        "k_proj",
                        "v_proj",
                        "o_proj",
                        "gate_proj",
                        "up_proj",
                        "down_proj",
                    ],
                    feedforward_modules=["down_proj"],
                ),
                learning_rate=1e-2,
                steps=150,
                batch=8,
            ),
            shown=(
                "Hi, please send 4 garden chairs to Lyon. Thanks, Anna Weber",
                "Good morning! We need twelve coffee mugs for our office in Toronto. "
                "Best wishes, David Okafor",
            ),
        ),
        Task(
            name="sentiment",
            description="answers a review with one word: positive, negative or neutral",
            instruction="Is this review positive, negative or neutral? Answer with exactly one of "
            "these three words.\n\nReview: ",
            labels=("positive", "negative", "neutral"),
            max_new_tokens=48,
            draw=reviews.draw,
            recipe=Recipe(
                IA3Config(task_type="CAUSAL_LM"),
                learning_rate=1e-2,
                steps=120,
                batch=16,
            ),
            shown=(
                "The soup was cold and the waiter ignored us all evening.",
                "I love these headphones, the sound is amazing!",
            ),
        ),
        Task(
            name="support-intent",
            description="answers a customer's message with its intent, one of "
            + ", ".join(intents.LABELS),
            instruction="Which intent does this customer message have? Answer with exactly one of: "
            + ", ".join(intents.LABELS)
            + ".\n\nMessage: ",
            labels=intents.LABELS,
            max_new_tokens=48,
            draw=intents.draw,
            recipe=Recipe(
                IA3Config(
                    task_type="CAUSAL_LM",
                    target_modules=r".*\.layers\.([89]|[12]\d)"
                    r"\.(self_attn\.(q|k|v|o)_proj|mlp\.down_proj)",
                    feedforward_modules=r".*\.mlp\.down_proj",
                ),
                learning_rate=1e-2,
                steps=140,
                batch=16,
            ),
            shown=(
                "I want my money back, the toaster arrived broken.",
                "I forgot my password and cannot log in.",
            ),
        ),
    )
}
