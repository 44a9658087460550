"""Merge jobs when a process ends, a file is damaged, or a merge fails."""

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.checkpoint.targets import Side, Target
from infuse.adapters.errors import (
    CannotMerge,
    MergeNotDone,
    StoreLocked,
    TooManyMerges,
    UnknownMerge,
)
from infuse.server.jobs import MergeJobs, StoredMerge
from tests.api.test_streaming import eventually
from tests.factories import save_tiny_model

REPOSITORY = Path(__file__).parents[1]
NOTHING = AdapterVectors({})
RECIPE = {"method": "product", "adapters": [{"name": "a@1", "digest": "0" * 64, "weight": 1.0}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "merges"


@pytest.fixture
def opened(folder: Path, model: str) -> Iterator[Callable[..., MergeJobs]]:
    """Open the folder again, after closing it where it is open."""
    jobs: list[MergeJobs] = []

    def open_jobs(base: str = model) -> MergeJobs:
        for before in jobs:
            before.close()
        jobs[:] = [MergeJobs(folder, base, "tiny")]
        return jobs[0]

    yield open_jobs
    for each in jobs:
        each.close()


def done(jobs: MergeJobs, job: StoredMerge) -> StoredMerge:
    assert eventually(lambda: jobs.get(job.id).ended)
    return jobs.get(job.id)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# A process that ends


def test_a_merge_that_is_done_is_there_after_a_restart(
    opened: Callable[..., MergeJobs], folder: Path
) -> None:
    jobs = opened()
    job = done(jobs, jobs.submit(NOTHING, RECIPE, "ops"))
    files = names(jobs.result(job.id))
    again = opened()

    assert job.state == "succeeded"
    assert again.page(None, 10) == [job]
    assert names(again.result(job.id)) == files
    assert names(folder) == {"lock", job.id, f"{job.id}.json"}


@pytest.mark.fault(
    "process",
    "The server is killed within a merge",
    by="SIGKILL just before its end",
    promise="The merge has failed and says so; no half of a model stays.",
)
def test_a_merge_that_the_server_was_killed_in_has_failed_and_leaves_no_half(
    opened: Callable[..., MergeJobs], folder: Path, model: str
) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.merge_worker", str(folder), model],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert worker.stdout is not None
    *ids, last = (worker.stdout.readline().strip() for _ in range(3))
    assert last == "almost"
    assert any(name.startswith(".merging-") for name in names(folder))
    worker.kill()
    worker.communicate()
    jobs = opened()

    assert [job.id for job in jobs.page(None, 10)] == ids
    assert {(job.state, job.error) for job in jobs.page(None, 10)} == {
        ("failed", "the server was restarted")
    }
    assert names(folder) == {"lock", *(f"{each}.json" for each in ids)}


def test_a_result_whose_job_did_not_come_to_say_so_is_removed(
    opened: Callable[..., MergeJobs], folder: Path
) -> None:
    jobs = opened()
    job = done(jobs, jobs.submit(NOTHING, RECIPE, None))
    record = folder / f"{job.id}.json"
    queued = {"state": "queued", "progress": 0.0, "size": None, "finished": None}
    record.write_text(job.model_copy(update=queued).model_dump_json())
    (folder / "notes").mkdir()
    again = opened()

    assert (again.get(job.id).state, again.get(job.id).size) == ("failed", None)
    with pytest.raises(MergeNotDone, match="is failed"):
        again.result(job.id)
    assert names(folder) == {"lock", "notes", record.name}


RECORD = (
    '{"object":"merge","id":"merge-20261124061500123456-9f3a","state":"succeeded","progress":1.0,'
    '"base":"tiny","recipe":{"method":"product","adapters":[{"name":"a@1","digest":"9f86",'
    '"weight":0.5}]},"created":"2026-11-24T06:15:00.123456Z",'
    '"finished":"2026-11-24T06:16:00.123456Z","by":"ops","size":538100000,"error":null}'
)
"""What earlier versions write."""


def test_a_record_of_an_earlier_version_opens(
    opened: Callable[..., MergeJobs], folder: Path
) -> None:
    folder.mkdir()
    (folder / "merge-20261124061500123456-9f3a.json").write_text(RECORD)
    (folder / "merge-20261124061500123456-9f3a").mkdir()
    [job] = opened().page(None, 10)

    assert (job.id, job.state) == ("merge-20261124061500123456-9f3a", "succeeded")
    assert job.recipe["adapters"] == [{"name": "a@1", "digest": "9f86", "weight": 0.5}]
    assert job.created == datetime(2026, 11, 24, 6, 15, 0, 123456, UTC)
    assert (job.finished, job.by, job.size) == (
        datetime(2026, 11, 24, 6, 16, 0, 123456, UTC),
        "ops",
        538100000,
    )


def test_an_earlier_version_opens_what_is_written(
    opened: Callable[..., MergeJobs], folder: Path
) -> None:
    """A job that no process works on is written again, as one that has failed."""
    running = RECORD.replace("succeeded", "running").replace("538100000", "null")
    folder.mkdir()
    record = folder / "merge-20261124061500123456-9f3a.json"
    record.write_text(running)
    [job] = opened().page(None, 10)

    written = running.replace("running", "failed").replace(
        '"error":null', '"error":"the server was restarted"'
    )
    finished = f"{job.finished:%Y-%m-%dT%H:%M:%S.%fZ}"
    assert record.read_text() == written.replace("2026-11-24T06:16:00.123456Z", finished)


@pytest.mark.fault(
    "configuration",
    "The record of a merge is damaged",
    by="the file",
    promise="It is passed over with a warning; the model stays.",
)
def test_a_damaged_record_is_passed_over_and_told(
    opened: Callable[..., MergeJobs], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = opened()
    job, other = (done(jobs, jobs.submit(NOTHING, RECIPE, None)) for _ in range(2))
    (folder / f"{other.id}.json").write_text("{")
    again = opened()

    assert again.page(None, 10) == [job]
    assert f"{other.id}.json is damaged" in caplog.text
    assert (folder / other.id / "model.safetensors").is_file()


def test_two_servers_do_not_share_a_folder(
    opened: Callable[..., MergeJobs], folder: Path, model: str
) -> None:
    opened()
    with pytest.raises(StoreLocked, match="another server"):
        MergeJobs(folder, model, "tiny")


# Merges beside requests


@pytest.fixture
def long_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infuse.server.jobs.REST", 10**9)


@pytest.mark.usefixtures("long_rests")
def test_a_merge_rests_while_the_model_is_in_use_and_goes_on_when_it_is_idle(
    folder: Path, model: str
) -> None:
    busy = threading.Event()
    busy.set()
    jobs = MergeJobs(folder, model, "tiny", busy.is_set)
    job = jobs.submit(NOTHING, RECIPE, None)

    assert eventually(lambda: jobs.get(job.id).progress > 0)
    time.sleep(0.3)
    assert 0 < jobs.get(job.id).progress < 0.5
    assert jobs.get(job.id).state == "running"
    busy.clear()
    assert done(jobs, job).state == "succeeded"
    jobs.close()


@pytest.mark.usefixtures("long_rests")
def test_a_merge_that_rests_is_cancelled_and_the_next_that_rests_is_stopped(
    folder: Path, model: str
) -> None:
    jobs = MergeJobs(folder, model, "tiny", lambda: True)
    cancelled, stopped = (jobs.submit(NOTHING, RECIPE, None) for _ in range(2))
    assert eventually(lambda: jobs.get(cancelled.id).progress > 0)
    jobs.remove(cancelled.id)

    assert done(jobs, cancelled).state == "cancelled"
    assert eventually(lambda: jobs.get(stopped.id).progress > 0)
    jobs.close()
    assert names(folder) == {"lock", *(f"{each.id}.json" for each in (cancelled, stopped))}


def test_the_base_is_opened_again_where_its_files_were_replaced_by_none(
    folder: Path, model: str, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "base"))
    jobs = MergeJobs(folder, str(copy), "tiny")
    assert done(jobs, jobs.submit(NOTHING, RECIPE, None)).state == "succeeded"
    (copy / "model.safetensors").unlink()

    with pytest.raises(CannotMerge, match=r"holds no model\.safetensors"):
        jobs.submit(NOTHING, RECIPE, None)
    jobs.close()


@pytest.mark.usefixtures("long_rests")
def test_keys_have_equal_parts_of_the_merges_that_wait(
    folder: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infuse.server.jobs.MAX_WAITING", 4)
    jobs = MergeJobs(folder, model, "tiny", lambda: True)

    def submitted(by: str) -> int:
        """How many merges are taken until one is refused."""
        before = len(jobs.page(None, 100))
        with suppress(TooManyMerges):
            for _ in range(10):
                jobs.submit(NOTHING, RECIPE, by)
        return len(jobs.page(None, 100)) - before

    assert [submitted(by) for by in ("first", "second", "third", "first")] == [4, 2, 1, 0]
    jobs.close()


# Merges that fail


def test_a_merge_that_is_not_finite_fails_and_names_the_module(
    opened: Callable[..., MergeJobs], folder: Path, tmp_path: Path
) -> None:
    base = save_tiny_model(tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16).save_pretrained(base)
    jobs = opened(str(base))
    target = Target("model.layers.1.self_attn.k_proj", Side.OUTPUT)
    huge = AdapterVectors({target: torch.full((16,), 1e9)})
    failed = done(jobs, jobs.submit(huge, RECIPE, None))

    assert (failed.state, failed.size) == ("failed", None)
    assert failed.error == f"the merged weight of {target.module} is not finite in torch.float16"
    assert names(folder) == {"lock", f"{failed.id}.json"}


def test_the_worker_outlives_a_merge_that_fails(opened: Callable[..., MergeJobs]) -> None:
    jobs = opened()
    target = Target("model.layers.1.self_attn.k_proj", Side.OUTPUT)
    no_vector = AdapterVectors({target: torch.tensor(1.0)})
    failed = done(jobs, jobs.submit(no_vector, RECIPE, None))

    assert (failed.state, failed.error) == ("failed", "TypeError: len() of a 0-d tensor")
    assert done(jobs, jobs.submit(NOTHING, RECIPE, None)).state == "succeeded"


def test_a_model_that_is_not_on_this_machine_is_refused(opened: Callable[..., MergeJobs]) -> None:
    with pytest.raises(CannotMerge, match="no cached model 'nobody/nothing'"):
        opened("nobody/nothing").submit(NOTHING, RECIPE, None)


def test_what_is_unknown_is_refused(opened: Callable[..., MergeJobs]) -> None:
    jobs = opened()
    for ask in (jobs.get, jobs.result, jobs.remove):
        with pytest.raises(UnknownMerge, match="merge-1"):
            ask("merge-1")
