"""Whatever is in a file that somebody else has written, it is read or refused, in time and without
a trace: adapters and their archives, conversations, journals, and what a bucket answers.

tests/api/test_fuzz.py does the same over HTTP, and
tests/adapters/vocabulary/test_own_files_fuzz.py for tokenizers and templates.
"""

import io
import json
import random
import shutil
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore

from infuse.adapters.errors import AdapterError, TemplateRefused
from infuse.adapters.storage.bucket import BucketStorage
from infuse.adapters.storage.objects import Objects
from infuse.adapters.storage.store import AdapterStore
from infuse.adapters.vocabulary.vocabulary import Vocabulary
from infuse.server.errors import ApiError
from infuse.server.uploads import unpack
from tests.adapters.house import House
from tests.adapters.kinds import Known
from tests.adapters.vocabulary.test_own_files_fuzz import mutate
from tests.api.archives import CONFIG, WEIGHTS, read_adapter, tar_of, zip_of
from tests.chat_templates import HERMES, LLAMA, MISTRAL
from tests.factories import CHAT_TEMPLATE, tiny_tokenizer

SECONDS = 5
"""More of this processor's time for one case is a hang."""
FEW, MANY = 60, 12_000
LIMIT = 1 << 16
"""The most bytes that an archive may unpack to."""
NAMES = ["../x", "/tmp/x", "a/../../x", ".", "adapter_config.json/x", "é" * 200, "con", "a\\b"]
JSON = dict[str, Any]

Case = Callable[[random.Random], bool]
"""Tries one case; whether it was accepted."""


def flipped(data: bytes, choose: random.Random) -> bytes:
    """Some bytes changed, or the end missing."""
    changed = bytearray(data)
    for _ in range(choose.randint(0, 4)):
        changed[choose.randrange(len(changed))] = choose.randrange(256)
    return bytes(changed[: choose.choice([None, None, choose.randrange(len(changed))])])


def mutated_json(data: bytes, choose: random.Random) -> bytes:
    value = json.loads(data)
    for _ in range(choose.randint(1, 3)):
        value = mutate(value, choose)
    written = json.dumps(value).encode()
    if choose.random() < 0.2:
        # The largest numbers that JSON can carry are no integers.
        written = written.replace(b"1", b"1e999", 1)
    return flipped(written, choose) if choose.random() < 0.2 else written


def mutated_weights(data: bytes, choose: random.Random) -> bytes:
    """The header of safetensors changed, which says where each tensor is."""
    if choose.random() < 0.3:
        return flipped(data, choose)
    size = struct.unpack("<Q", data[:8])[0]
    header = mutated_json(data[8 : 8 + size], choose)
    return struct.pack("<Q", choose.choice([len(header), size])) + header + data[8 + size :]


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return Known.saved_in(tmp_path_factory.mktemp("kinds"))


@pytest.fixture
def adapters(known: Known, tmp_path: Path) -> Iterator[Case]:
    """An adapter's config or weights, uploaded. One that is refused leaves the store as it was."""
    house = House(tmp_path / "store", known)
    kinds = [
        read_adapter(folder) for folder in known.folders.values() if (folder / CONFIG).exists()
    ]
    house.add("a", "default")

    def case(choose: random.Random) -> bool:
        files = dict(choose.choice(kinds))
        changed = choose.choice([CONFIG, WEIGHTS])
        change = mutated_json if changed == CONFIG else mutated_weights
        files[changed] = change(files[changed], choose)
        before, current = files_in(tmp_path), house.store.current("a")
        try:
            with house.store.staging() as staged:
                for name, data in files.items():
                    (staged / name).write_bytes(data)
                house.registry.replace("a", staged)
        except AdapterError:
            assert (files_in(tmp_path), house.store.current("a")) == (before, current)
            return False
        house.registry.lease("a").release()
        return True

    yield case
    house.store.close()


@pytest.fixture
def archives(known: Known, tmp_path: Path) -> Case:
    """Archives, unpacked. Nothing is written elsewhere, and nothing beyond the limit."""
    files = read_adapter(known.folders["default"])
    folder = tmp_path / "in" / "here"
    kinds = ["w", "w:gz", "w:bz2", "w:xz"]

    def case(choose: random.Random) -> bool:
        named = {choose.choice(["", "a/", *NAMES]) + name: data for name, data in files.items()}
        named |= {choose.choice(NAMES): bytes(choose.choice([0, 9, 2 * LIMIT]))}
        pack = choose.choice(
            [zip_of, *[lambda each, kind=kind: tar_of(each, kind) for kind in kinds]]
        )
        packed = pack(files if choose.random() < 0.3 else named)
        data = flipped(packed, choose) if choose.random() < 0.8 else packed
        folder.mkdir(parents=True)
        try:
            unpack(io.BytesIO(data), folder, LIMIT, lambda _: None)
            return True
        except (AdapterError, ApiError):
            return False
        finally:
            written = files_in(tmp_path)
            assert all(name.startswith("in/here/") for name in written)
            assert sum(map(len, written.values())) <= LIMIT
            shutil.rmtree(folder)

    return case


@pytest.fixture
def conversations() -> Case:
    """Messages and tools, rendered by the base's template."""
    tokenizer = tiny_tokenizer()
    message = {"role": "user", "content": "Hi."}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    whole: JSON = {
        "messages": [
            message,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            message,
        ],
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        ],
    }

    def case(choose: random.Random) -> bool:
        tokenizer.chat_template = choose.choice([CHAT_TEMPLATE, HERMES, LLAMA, MISTRAL])
        given = whole
        for _ in range(choose.randint(0, 3)):
            given = mutate(given, choose)
        if not isinstance(given, dict):
            return False
        try:
            Vocabulary(tokenizer, len(tokenizer)).render(given.get("messages"), given.get("tools"))
            return True
        except TemplateRefused:
            return False

    return case


@pytest.fixture
def journals(known: Known, tmp_path: Path) -> Case:
    """The journal of a folder. The store opens, and nothing outside of it changes."""
    made, store = tmp_path / "made", tmp_path / "store"
    fill(made, known)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_bytes(b"mine")
    lines = (made / "journal.jsonl").read_bytes().splitlines()

    def case(choose: random.Random) -> bool:
        changed = list(lines)
        for _ in range(choose.randint(1, 3)):
            changed[choose.randrange(len(changed))] = mutated_line(choose.choice(lines), choose)
        shutil.copytree(made, store)
        (store / "journal.jsonl").write_bytes(b"".join(line + b"\n" for line in changed))
        with closing(AdapterStore(store)) as opened:
            is_whole = read_all(opened)
        shutil.rmtree(store)
        assert sorted(each.name for each in tmp_path.iterdir()) == ["made", "victim"]
        assert (tmp_path / "victim" / "file").read_bytes() == b"mine"
        return is_whole

    return case


def mutated_line(line: bytes, choose: random.Random) -> bytes:
    """An event whose digest may lead elsewhere."""
    if choose.random() < 0.2:
        event = json.loads(line)
        event["digest"] = choose.choice(["../../victim", "..", ".", "", "/tmp", event["name"]])
        return json.dumps(event).encode()
    return mutated_json(line, choose).replace(b"\n", b" ")


@pytest.fixture
def buckets(known: Known, tmp_path: Path) -> Case:
    """Objects of a bucket: journal, lease and contents. The store opens or says why not."""
    objects = MemoryStore()
    fill(BucketStorage(Objects(objects, "memory://"), tmp_path / "first"), known)
    keys = [each["path"] for each in objects.list().collect()]
    whole = {key: objects.get(key).bytes().to_bytes() for key in keys}
    numbers = count()

    def case(choose: random.Random) -> bool:
        changed = MemoryStore()
        for key, data in whole.items():
            changed.put(key, data)
        for key in choose.sample(keys, choose.randint(1, 2)):
            change = choose.choice([flipped, mutated_any])
            if choose.random() < 0.1:
                changed.delete(key)
            else:
                changed.put(key, change(whole[key], choose))
        cache = tmp_path / f"cache{next(numbers)}"
        try:
            storage = BucketStorage(Objects(changed, "memory://"), cache, lease_seconds=0.2)
            with closing(AdapterStore(storage)) as opened:
                return read_all(opened)
        except AdapterError:
            return False
        finally:
            shutil.rmtree(cache, ignore_errors=True)

    return case


def mutated_any(data: bytes, choose: random.Random) -> bytes:
    with suppress(ValueError):
        return mutated_json(data, choose)
    return flipped(data, choose)


def fill(where: Path | BucketStorage, known: Known) -> None:
    with closing(AdapterStore(where, keep_revisions=2)) as store:
        for name, kind in [("a", "default"), ("b", "default"), ("c", "mlp_out"), ("c", "default")]:
            with store.staging() as staged:
                for file, data in read_adapter(known.folders[kind]).items():
                    (staged / file).write_bytes(data)
                if name in store:
                    store.replace(name, staged)
                else:
                    store.create(name, staged)
        store.delete("b")


def read_all(store: AdapterStore) -> bool:
    """Whether everything that there should be is there, undamaged."""
    is_whole = store.names() == ["a", "c"]
    for name in store.names():
        for revision in store.revisions(name):
            try:
                store.read(revision, (CONFIG,))
            except AdapterError:
                is_whole = False
    return is_whole


@pytest.mark.parametrize(
    "cases", [FEW, pytest.param(MANY, marks=[pytest.mark.full, pytest.mark.timeout(4 * 3600)])]
)
@pytest.mark.parametrize("kind", ["adapters", "archives", "conversations", "journals", "buckets"])
def test_whatever_is_in_them_they_are_read_or_refused_and_harm_nothing_else(
    kind: str,
    cases: int,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    case: Case = request.getfixturevalue(kind)
    choose, outcomes = random.Random(0), Counter[bool]()
    for number in range(cases):
        began = time.process_time()
        outcomes[case(choose)] += 1
        assert time.process_time() - began < SECONDS, f"case {number} of {kind} hangs"
    print(f"{cases} cases of {kind}: {outcomes[True]} accepted, {outcomes[False]} refused")
    record_property("cases", cases)
    assert outcomes[False] > cases // 10
    assert outcomes[True] > cases // 100
