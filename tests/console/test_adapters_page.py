"""The page of the adapters: search, upload, details and revisions, in a browser."""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.api.conftest import RunningServer
from tests.api.oracle import upload
from tests.console.screen import PHONE, Screen

ADAPTERS = "/v1/adapters"
_NAMES = itertools.count()


@pytest.fixture
def client(console: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=console.base_url, timeout=60) as client:
        yield client


@pytest.fixture
def name(client: httpx.Client, adapter_folder: Path) -> Iterator[str]:
    """An adapter with two revisions, which a test may change."""
    # A name that was deleted goes on counting.
    name = f"changing-{next(_NAMES)}"
    upload(client, name, adapter_folder)
    upload(client, name, adapter_folder.parent / "mlp", "PUT")
    yield name
    client.delete(f"{ADAPTERS}/{name}")


def test_the_list_is_searched_by_name_and_tag(
    screen: Screen, client: httpx.Client, name: str
) -> None:
    client.patch(f"{ADAPTERS}/{name}", json={"tags": ["german"], "description": "Support"})
    screen.open("adapters")
    rows = screen.page.get_by_role("group", name="Adapters").get_by_role("row")
    screen.button("german").click()

    rows.nth(2).wait_for(state="detached")
    assert rows.nth(1).get_by_role("link", name=name).is_visible()
    assert screen.page.get_by_role("searchbox").input_value() == "german"
    screen.check_for_everybody()


def test_what_is_on_the_device_and_asked_for_is_shown(
    screen: Screen, client: httpx.Client, name: str
) -> None:
    body = {"model": name, "prompt": "x", "max_tokens": 1}
    assert client.post("/v1/completions", json=body).is_success
    screen.open("adapters")
    row = screen.page.get_by_role("row").filter(has_text=name)

    row.get_by_text("on the device").wait_for()
    assert row.get_by_role("cell").last.inner_text() != "0"


def test_on_a_phone_names_stay_in_view_while_the_other_columns_scroll(screen: Screen) -> None:
    screen.page.set_viewport_size(PHONE)
    screen.open("adapters")
    table = screen.page.get_by_role("group", name="Adapters")
    table.get_by_role("columnheader", name="Requests").wait_for()
    table.evaluate("wide => wide.scrollLeft = wide.scrollWidth")

    for role, name in (("columnheader", "Name"), ("columnheader", "Requests"), ("link", "queries")):
        place = table.get_by_role(role, name=name).bounding_box()
        assert place["x"] >= 0
        assert place["x"] + place["width"] <= PHONE["width"]


def test_a_folder_is_uploaded(screen: Screen, client: httpx.Client, adapter_folder: Path) -> None:
    screen.open("adapters")
    screen.page.get_by_label("Choose a folder").set_input_files(adapter_folder)
    screen.page.get_by_label("Name", exact=True).fill("uploaded")
    screen.button("Check only").click()
    screen.page.get_by_text("It fits: it rescales").wait_for()
    screen.button("Add").click()

    screen.page.get_by_text("uploaded is now revision 1.").wait_for()
    screen.page.get_by_role("link", name="uploaded").wait_for()
    assert client.delete(f"{ADAPTERS}/uploaded").is_success


def test_an_archive_of_a_known_name_becomes_its_next_revision(
    screen: Screen, name: str, adapter_folder: Path, tmp_path: Path
) -> None:
    archive = shutil.make_archive(str(tmp_path / name), "zip", adapter_folder)
    screen.open("adapters")
    screen.page.get_by_role("link", name=name).wait_for()
    screen.page.get_by_label("Choose files").set_input_files(archive)
    screen.button("Replace: a new revision").click()

    screen.page.get_by_text(f"{name} is now revision 3.").wait_for()


def test_faults_of_an_upload_are_shown_in_place(
    screen: Screen, adapter_folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(adapter_folder, broken)
    (broken / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with screen.page.expect_response(lambda answer: answer.status == 400):
        screen.open("adapters")
        screen.page.get_by_label("Choose a folder").set_input_files(broken)
        screen.button("Add").click()

    alert = screen.page.get_by_role("alert").filter(has_text="peft_type")
    alert.get_by_text("Mend:").first.wait_for()
    screen.check_for_everybody()


def test_a_dropped_folder_is_taken(screen: Screen) -> None:
    """A browser's test cannot drop a folder, but files."""
    screen.open("adapters")
    screen.page.get_by_role("heading", name="Add an adapter").wait_for()
    transfer = screen.page.evaluate_handle(
        """() => {
            const transfer = new DataTransfer();
            for (const name of ["adapter_config.json", "adapter_model.safetensors"])
                transfer.items.add(new File(["{}"], name));
            return transfer;
        }"""
    )
    screen.page.dispatch_event(".drop", "drop", {"dataTransfer": transfer})

    screen.page.get_by_text("adapter_config.json, adapter_model.safetensors").wait_for()


def test_details_are_changed(screen: Screen, client: httpx.Client, name: str) -> None:
    screen.open(f"adapters/{name}")
    panel = screen.page.get_by_role("region", name=name, exact=True)
    panel.get_by_label("Description").fill("German support")
    panel.get_by_label("Tags, with commas between").fill("de, support")
    panel.get_by_role("button", name="Save texts").click()
    panel.get_by_text("The texts are saved.").wait_for()
    panel.get_by_label("Pinned on the device").click()
    panel.get_by_text("It is pinned.").wait_for()
    panel.get_by_label("Enabled").click()
    panel.get_by_text("It is disabled.").wait_for()

    shown = client.get(f"{ADAPTERS}/{name}").json()
    assert (shown["description"], shown["tags"]) == ("German support", ["de", "support"])
    assert (shown["pinned"], shown["enabled"]) == (True, False)
    screen.check_for_everybody()


def test_an_old_revision_is_rolled_back_to(screen: Screen, client: httpx.Client, name: str) -> None:
    screen.open(f"adapters/{name}")
    screen.button("Roll back to revision 1").click()
    screen.page.get_by_text("It has the content of revision 1 again.").wait_for()

    digests = [each["digest"] for each in client.get(f"{ADAPTERS}/{name}/revisions").json()["data"]]
    assert len(digests) == 3
    assert digests[0] == digests[2]


def test_an_adapter_is_deleted_after_a_second_click(
    screen: Screen, client: httpx.Client, name: str
) -> None:
    screen.open(f"adapters/{name}")
    screen.button("Delete").click()
    assert client.get(f"{ADAPTERS}/{name}").is_success
    screen.button(f"Delete {name} for good").click()

    screen.page.get_by_role("link", name=name).wait_for(state="detached")
    assert client.get(f"{ADAPTERS}/{name}").status_code == 404
