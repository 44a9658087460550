"""The page that compares answers, in a browser."""

from typing import TYPE_CHECKING

import pytest

from tests.console.screen import Screen

if TYPE_CHECKING:
    from playwright.sync_api import Locator

PROMPT = "Where is my order?"


def card(screen: Screen, name: str) -> "Locator":
    return screen.page.get_by_role("region", name=name, exact=True)


def tokens(screen: Screen, name: str) -> "Locator":
    return card(screen, name).get_by_role("option")


def ask(screen: Screen, tokens: int = 8) -> None:
    screen.page.get_by_label("Prompt").fill(PROMPT)
    screen.page.get_by_label("Tokens at most").fill(str(tokens))
    screen.button("Run").click()


def add(screen: Screen, name: str) -> None:
    screen.page.get_by_label("Adapter", exact=True).fill(name)
    screen.button("Add a column").click()


def text_of(screen: Screen, name: str) -> str:
    card(screen, name).get_by_text("tokens, then").wait_for()
    return card(screen, name).get_by_role("listbox").inner_text()


@pytest.mark.parametrize("way", ["chat", "plain"])
def test_the_base_and_an_adapter_answer_side_by_side(screen: Screen, way: str) -> None:
    screen.open("compare/queries")
    screen.page.get_by_role("combobox", name="As").select_option(way)
    ask(screen)

    assert text_of(screen, "Base model") != text_of(screen, "queries")
    screen.page.get_by_text("Base model has answered. queries has answered.").wait_for()


def test_a_token_s_probabilities_are_shown_by_mouse_and_keyboard(screen: Screen) -> None:
    screen.open("compare")
    ask(screen)
    text_of(screen, "Base model")
    place = card(screen, "Base model").get_by_role("status")
    tokens(screen, "Base model").first.hover()
    place.get_by_role("listitem").nth(4).wait_for()
    assert "%" in place.inner_text()
    screen.page.get_by_role("heading", name="Compare").hover()
    place.get_by_text("Point at a token").wait_for()
    card(screen, "Base model").get_by_role("listbox").focus()
    screen.page.keyboard.press("End")
    place.get_by_role("listitem").first.wait_for()

    assert tokens(screen, "Base model").last.get_attribute("aria-selected") == "true"
    screen.check_for_everybody()


def test_a_moved_slider_asks_its_column_again(screen: Screen) -> None:
    screen.open("compare/queries")
    ask(screen)
    base, adapted = text_of(screen, "Base model"), text_of(screen, "queries")
    assert base != adapted
    with screen.page.expect_request("**/v1/chat/completions") as asked:
        card(screen, "queries").get_by_label("Weight of queries").fill("0")

    assert asked.value.post_data_json["strength"] == 0
    # Both columns show the base's answer then.
    texts = "[...document.querySelectorAll('.tokens')].map(each => each.innerText)"
    both = f"base => String({texts}) === String([base, base])"
    screen.page.wait_for_function(both, arg=base)


def test_a_mixture_is_asked_with_its_weights(screen: Screen) -> None:
    screen.open("compare/queries")
    card(screen, "queries").get_by_label("Adapter to mix in").fill("mlp")
    card(screen, "queries").get_by_role("button", name="Mix in").click()
    mixture = card(screen, "queries + mlp")
    mixture.get_by_label("Weight of mlp").fill("0.5")
    mixture.get_by_label("Mixed as").select_option("linear")
    with screen.page.expect_request(lambda asked: "adapters" in (asked.post_data or "")) as asked:
        ask(screen)

    body = asked.value.post_data_json
    assert body["adapters"] == [{"name": "queries", "weight": 1}, {"name": "mlp", "weight": 0.5}]
    assert (body["model"], body["composition"]) == ("tiny", "linear")
    assert text_of(screen, "queries + mlp")


def test_a_sweep_asks_eight_strengths(screen: Screen) -> None:
    screen.open("compare/queries")
    screen.page.get_by_label("Prompt").fill(PROMPT)
    screen.page.get_by_label("Tokens at most").fill("4")
    card(screen, "queries").get_by_role("button", name="Sweep the strength").click()
    cards = card(screen, "queries")
    cards.get_by_text("tokens, then").nth(7).wait_for()

    weights = [each.input_value() for each in cards.get_by_role("slider").all()]
    assert weights == ["0", "0.25", "0.5", "0.75", "1", "1.25", "1.5", "2"]
    assert not screen.button("Add a column").is_visible()


def test_an_answer_is_stopped(screen: Screen) -> None:
    screen.open("compare")
    # The server's answer never comes.
    screen.page.route("**/v1/chat/completions", lambda _: None)
    ask(screen)
    screen.button("Stop").click()

    card(screen, "Base model").get_by_text("0 tokens, then stopped").wait_for()


def test_what_is_refused_is_said_in_its_column(screen: Screen) -> None:
    screen.open("compare")
    add(screen, "nobody")
    ask(screen, tokens=4096)

    card(screen, "Base model").get_by_role("alert").wait_for()
    card(screen, "nobody").get_by_role("alert").wait_for()
