"""The page that looks inside adapters, in a browser."""

from typing import TYPE_CHECKING

import httpx

from tests.console.screen import Screen

if TYPE_CHECKING:
    from playwright.sync_api import Locator

PAINTED = """canvas => {
    const {width, height} = canvas;
    const {data} = canvas.getContext("2d").getImageData(0, 0, width, height);
    return [...Array(width * height).keys()].map(at => [...data.slice(4 * at, 4 * at + 4)]);
}"""
AMPLIFIED, INHIBITED = "190, 82, 8", "29, 78, 216"


def inside(screen: Screen, name: str) -> "Locator":
    return screen.page.get_by_role("region", name=f"Inside {name}", exact=True)


def test_each_kind_of_module_has_a_map_of_its_layers(screen: Screen) -> None:
    screen.open("look/queries")
    maps = inside(screen, "queries").locator("canvas")
    maps.first.wait_for()
    [module, *_] = modules = httpx.get(
        f"{screen.url}/v1/adapters/queries/vectors?columns=96"
    ).json()["modules"]

    assert maps.count() == 1
    assert "2 layers" in str(maps.first.get_attribute("aria-label"))
    pixels = maps.first.evaluate(PAINTED)
    assert len(pixels) == len(modules) * len(module["columns"])
    # A pixel's colour is rounded by its transparency, so only strong ones tell amplified apart.
    for (red, _, blue, alpha), value in zip(pixels, module["columns"], strict=False):
        if alpha > 60:
            assert (red > blue) is (value > 0)


def test_the_value_under_the_mouse_is_told(screen: Screen) -> None:
    screen.open("look/queries")
    region = inside(screen, "queries")
    region.locator("canvas").hover()

    region.get_by_text("times").wait_for()


def test_charts_and_numbers_tell_of_every_module(screen: Screen) -> None:
    screen.open("look/default")
    region = inside(screen, "default")
    region.get_by_role("img", name="The largest norm is").wait_for()
    histogram = region.get_by_role("img", name="factors between")
    of_all = histogram.get_attribute("aria-label")
    region.get_by_label("Histogram of the factors").select_option(index=1)
    region.get_by_text("All vectors in numbers").click()

    region.get_by_role("row").nth(6).wait_for()
    assert histogram.get_attribute("aria-label") != of_all
    screen.check_for_everybody()


def test_the_adapter_is_chosen_by_the_keyboard(screen: Screen) -> None:
    screen.open("look/default")
    inside(screen, "default").wait_for()
    screen.page.get_by_role("combobox", name="Adapter").focus()
    screen.page.keyboard.press("ArrowDown")

    inside(screen, "mlp").wait_for()


def test_a_combination_is_shown_and_not_stored(screen: Screen) -> None:
    screen.open("look/mlp")
    screen.page.get_by_label("With").select_option("queries")
    screen.page.get_by_label("Method").select_option("ties")
    screen.button("Show").click()
    inside(screen, "ties of the above").wait_for()

    listed = httpx.get(f"{screen.url}/v1/adapters").json()["data"]
    assert [each["name"] for each in listed] == ["default", "mlp", "queries"]


def test_similarity_is_a_table(screen: Screen) -> None:
    screen.open("look/mlp")
    row = screen.page.get_by_role("row").filter(has=screen.page.get_by_role("rowheader")).nth(0)

    row.get_by_role("cell", name="1.00").wait_for()
    assert row.get_by_role("rowheader").inner_text() == "mlp@1"
