"""The data that the example adapters are trained and scored on."""

import json

import pytest

from examples.train.tasks import TASKS, Split, Task, first_object

tasks = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


@tasks
def test_the_same_seed_draws_the_same_examples(task: Task) -> None:
    drawn = task.generate(Split.TRAIN, 50, seed=3)

    assert drawn == task.generate(Split.TRAIN, 50, seed=3)
    assert drawn != task.generate(Split.TRAIN, 50, seed=4)


@tasks
def test_no_held_out_prompt_is_in_the_training_data(task: Task) -> None:
    trained = {example.prompt for example in task.generate(Split.TRAIN, 1000, seed=0)}
    held_out = {example.prompt for example in task.generate(Split.HELDOUT, 120, seed=0)}

    assert not trained & held_out
    assert not set(task.shown) & (trained | held_out)


@tasks
def test_the_wanted_answer_scores_as_right_and_another_as_wrong(task: Task) -> None:
    example = task.generate(Split.HELDOUT, 1, seed=0)[0]

    assert task.exact(example.answer, example.answer)
    assert task.lenient(f"Sure! {example.answer} it is.", example.answer)
    assert not task.lenient("I am happy to help.", example.answer)


def test_each_value_of_an_order_stands_in_its_mail() -> None:
    for example in TASKS["order-json"].generate(Split.HELDOUT, 100, seed=0):
        order = json.loads(example.answer)

        assert order["customer"] in example.prompt
        assert order["item"] in example.prompt
        assert order["city"] in example.prompt


def test_a_text_that_names_two_labels_counts_as_wrong() -> None:
    task = TASKS["sentiment"]

    assert task.lenient("The review is Positive.", "positive")
    assert not task.lenient("Positive, negative or neutral? Positive!", "positive")


def test_the_share_of_right_fields_is_counted_in_the_first_object() -> None:
    wanted = '{"customer":"A B","item":"pens","quantity":2,"city":"Rome"}'
    said = 'Here: {"customer": "A B", "quantity": 2, "item": "pen"} and {"city": "Rome"}'

    assert TASKS["order-json"].fields_right(said, wanted) == 0.5
    assert first_object("{broken") == {}


def test_no_name_item_or_city_of_a_held_out_order_occurs_in_training() -> None:
    def values(split: Split, count: int) -> set[object]:
        examples = TASKS["order-json"].generate(split, count, seed=0)
        return {
            value
            for example in examples
            for field, value in json.loads(example.answer).items()
            if field != "quantity"
        }

    assert not values(Split.TRAIN, 2000) & values(Split.HELDOUT, 200)
