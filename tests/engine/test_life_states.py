"""An adapter's whole life through any sequence of changes, requests and restarts.

Through the real registry, store and engine on one folder, against `Life`, which is dictionaries.
Requests run on while names change; what each of them generates is judged by the plain base model.
"""

import copy
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from transformers import AutoModelForCausalLM

from infuse.adapters.derive.combine import METHODS, SPARSE, Recipe
from infuse.adapters.derive.merge import merge
from infuse.adapters.errors import (
    AdapterError,
    AdapterExists,
    CannotMerge,
    InvalidAdapter,
    RevisionConflict,
    TooManyPinned,
    UnknownAdapter,
    UnknownRevision,
)
from infuse.adapters.registry import Composition, Part
from infuse.adapters.residency import Lease
from infuse.adapters.storage.revision import DetailsChange
from infuse.server.engine import FinishReason
from tests.engine.harness import Harness, Oracle
from tests.engine.life import BASE, KINDS, Effect, Life, World
from tests.factories import run_by_modules

PROMPTS = ([7, 8, 9], [40, 30, 20, 10, 40], list(range(100, 112)))
KEEP, SLOTS, ROWS = 3, 3, 4
TOKENS = 6

names = st.sampled_from("abc")
kinds = st.sampled_from(sorted(KINDS))
prompts = st.sampled_from(PROMPTS)
numbers = st.sampled_from([None, None, None, 1, 2, 3, 4])
weights = st.sampled_from([0.5, 1.0, 1.5, 0.7, -0.5, 1e39])
ingredients = st.lists(st.tuples(names, numbers, weights), min_size=1, max_size=3)
recipes = st.builds(
    Recipe,
    method=st.sampled_from(METHODS),
    weights=st.just(()),
    density=st.sampled_from([0.5, 1.0]),
    seed=st.integers(0, 1),
)


def model_of(name: str, number: int | None) -> str:
    return name if number is None else f"{name}@{number}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.saved_in(tmp_path_factory.mktemp("world"))


@contextmanager
def refused_as(expected: Effect | type[AdapterError]) -> Iterator[bool]:
    """Within: raises this error, if it is one. Gives whether it is not."""
    if isinstance(expected, Effect):
        yield True
    else:
        with pytest.raises(expected):
            yield False


class LifeMachine(RuleBasedStateMachine):
    world: World

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.life = Life(KEEP, most_pinned=SLOTS - 1)
        self.leases: list[tuple[Lease, Effect]] = []
        self.asked: dict[str, tuple[Effect, list[int]]] = {}
        """Request -> what it runs on, and its prompt."""
        self.count = 0
        self.open()
        self.upload("a", "default")
        self.upload("b", "queries")

    def open(self) -> None:
        self.paused = False
        self.server = Harness(
            run_by_modules(copy.deepcopy(self.world.base)),
            self.folder / "store",
            {},
            max_resident=SLOTS,
            keep_revisions=KEEP,
            max_rows=ROWS,
            max_model_len=64,
            kv_cache_tokens=256,
            pack_linears=False,
        )
        self.registry, self.store = self.server.registry, self.server.store

    def close(self) -> None:
        """Requests that still run are cancelled; what they gave until then was right."""
        for lease, _ in self.leases:
            lease.release()
        self.leases.clear()
        self.server.close()
        self.all_end({FinishReason.LENGTH, FinishReason.CANCELLED})

    def teardown(self) -> None:
        self.listen()
        self.close()
        shutil.rmtree(self.folder)

    # Changes.

    def offer(self, name: str, folder: Path, new: bool, if_match: str | None = None) -> Any:
        with self.store.staging() as staged:
            shutil.copytree(folder, staged, dirs_exist_ok=True)
            if new:
                revision, _ = self.registry.add(name, staged)
                return revision, True
            revision, changed, _ = self.registry.replace(name, staged, if_match)
            return revision, changed

    @rule(name=names, kind=kinds)
    def upload(self, name: str, kind: str) -> None:
        effect = self.world.effects[kind]
        with refused_as(AdapterExists if name in self.life.alive else effect) as taken:
            revision, _ = self.offer(name, self.world.folders[kind], new=True)
            if taken:
                assert revision.number == self.life.note(name, effect)

    @rule(name=names, kind=kinds)
    def replace(self, name: str, kind: str) -> None:
        effect = self.world.effects[kind]
        with refused_as(effect if name in self.life.alive else UnknownAdapter) as taken:
            revision, changed = self.offer(name, self.world.folders[kind], new=False)
            if taken:
                self.moved(name, effect, revision.number, changed)

    def moved(self, name: str, effect: Effect, number: int, changed: bool) -> None:
        """The same content makes no revision."""
        known = self.life.alive[name]
        assert changed == (known.effect is not effect)
        assert number == (self.life.note(name, effect) if changed else known.number)

    @precondition(lambda self: self.life.alive)
    @rule(data=st.data(), kind=kinds)
    def replace_what_was_seen(self, data: st.DataObject, kind: str) -> None:
        """With the ETag of any revision: only that of the current one is taken."""
        name = data.draw(st.sampled_from(sorted(self.life.alive)))
        known = self.life.alive[name]
        seen = data.draw(st.sampled_from(sorted(known.revisions)))
        etag = self.store.revision(name, seen).etag
        effect = self.world.effects[kind]
        with refused_as(effect if seen == known.number else RevisionConflict) as taken:
            revision, changed = self.offer(name, self.world.folders[kind], False, etag)
            if taken:
                self.moved(name, effect, revision.number, changed)

    @rule(name=names)
    def offer_what_is_damaged(self, name: str) -> None:
        with pytest.raises(InvalidAdapter):
            self.offer(name, self.world.damaged, new=name not in self.life.alive)

    @rule(name=names, number=st.integers(1, 5))
    def roll_back(self, name: str, number: int) -> None:
        known = self.life.alive.get(name)
        expected: Effect | type[AdapterError] = UnknownAdapter
        if known is not None:
            expected = known.revisions.get(number, UnknownRevision)
        with refused_as(expected) as taken:
            revision, changed = self.registry.roll_back(name, number)
            if taken and isinstance(expected, Effect):
                self.moved(name, expected, revision.number, changed)

    @rule(name=names)
    def delete(self, name: str) -> None:
        with refused_as(BASE if name in self.life.alive else UnknownAdapter) as taken:
            self.registry.delete(name)
            if taken:
                self.life.delete(name)

    @precondition(lambda self: self.life.alive)
    @rule(data=st.data(), pinned=st.booleans(), enabled=st.sampled_from([True, True, False]))
    def describe(self, data: st.DataObject, pinned: bool, enabled: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.life.alive)))
        change = DetailsChange(pinned=pinned, enabled=enabled)
        refused = pinned and not self.life.may_pin(name)
        with refused_as(TooManyPinned if refused else BASE) as taken:
            self.registry.describe(name, change)
            if taken:
                self.life.set(name, pinned=pinned, enabled=enabled)
                self.server.engine.wake()

    @rule(name=names, parts=ingredients, recipe=recipes, zero=st.booleans())
    def combine(self, name: str, parts: list[Any], recipe: Recipe, zero: bool) -> None:
        models = [model_of(part, number) for part, number, _ in parts]
        missing = "zero" if zero and recipe.method == "linear" else "identity"
        density = recipe.density if recipe.method in SPARSE else 1.0
        recipe = replace(
            recipe, weights=tuple(w for *_, w in parts), missing=missing, density=density
        )
        expected = self.life.mixed(models, recipe)
        if name in self.life.alive:
            expected = AdapterExists
        if isinstance(expected, Effect) and not expected.is_tame:
            return
        with refused_as(expected):
            revision, _ = self.registry.combine(
                name,
                [Part(model, w) for model, w in zip(models, recipe.weights, strict=True)],
                recipe.method,
                missing=recipe.missing,
                density=recipe.density,
                seed=recipe.seed,
            )
            assert isinstance(expected, Effect)
            assert revision.number == self.life.note(name, expected)

    @rule(name=names, number=numbers, prompt=prompts)
    def merge(self, name: str, number: int | None, prompt: list[int]) -> None:
        """The merged model needs no adapter; where it stands, no other is written."""
        model = model_of(name, number)
        expected = self.life.asked_for(model)
        output = self.folder / "merged"
        with refused_as(expected) as taken:
            vectors = self.registry.vectors(self.registry.resolve(model))
            if taken and isinstance(expected, Effect):
                merge(self.world.base_files, vectors, output, model)
                with pytest.raises(CannotMerge):
                    merge(self.world.base_files, vectors, output, model)
                merged = AutoModelForCausalLM.from_pretrained(output)
                shutil.rmtree(output)
                tokens = Oracle(merged).greedy(prompt, TOKENS)
                assert self.world.judge.accepts(expected, prompt, tokens)

    @rule()
    def restart(self) -> None:
        self.close()
        self.open()

    # Requests.

    @precondition(lambda self: len(self.leases) < 6)
    @rule(name=names, number=numbers)
    def lease(self, name: str, number: int | None) -> None:
        model = model_of(name, number)
        expected = self.life.asked_for(model)
        with refused_as(expected):
            lease = self.registry.lease(model)
            assert isinstance(expected, Effect)
            assert number is None or lease.label == model
            self.leases.append((lease, expected))

    @precondition(lambda self: len(self.leases) < 6)
    @rule(parts=ingredients, composition=st.sampled_from(["product", "linear"]))
    def lease_a_mixture(self, parts: list[Any], composition: Composition) -> None:
        models = [model_of(name, number) for name, number, _ in parts]
        recipe = Recipe(method=composition, weights=tuple(weight for *_, weight in parts))
        expected = self.life.mixed(models, recipe)
        if isinstance(expected, Effect) and not expected.is_tame:
            return
        with refused_as(expected):
            mixed = [Part(model, w) for model, w in zip(models, recipe.weights, strict=True)]
            lease = self.registry.lease_mixture(mixed, composition)
            assert isinstance(expected, Effect)
            self.leases.append((lease, expected))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        lease, _ = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), prompt=prompts)
    def start(self, data: st.DataObject, prompt: list[int]) -> None:
        """A request for what was leased, perhaps long ago; it runs on beside what comes next."""
        self.submit(prompt, *self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1))))

    @rule(prompt=prompts)
    def start_the_base(self, prompt: list[int]) -> None:
        self.submit(prompt, None, BASE)

    def submit(self, prompt: list[int], lease: Lease | None, effect: Effect) -> None:
        self.count += 1
        self.server.submit(str(self.count), prompt, lease, max_tokens=TOKENS)
        self.asked[str(self.count)] = (effect, prompt)

    @rule(name=names, number=numbers, prompt=prompts, pauses=st.booleans())
    def ask(self, name: str, number: int | None, prompt: list[int], pauses: bool) -> None:
        model = model_of(name, number)
        expected = self.life.asked_for(model)
        with refused_as(expected):
            lease = self.registry.lease(model)
            assert isinstance(expected, Effect)
            self.submit(prompt, lease, expected)
            if pauses and not self.paused:
                self.pause()

    @precondition(lambda self: self.asked and not self.paused)
    @rule()
    def pause(self) -> None:
        """Requests stop in the midst of their tokens, until someone listens."""
        self.paused = True
        self.server.pause()
        if any(answer.finish is None for answer in self.server.answers.values()):
            self.server.read()

    @rule()
    def listen(self) -> None:
        """Until all requests have ended: each with its own tokens, and nothing is held."""
        self.server.resume()
        self.paused = False
        self.all_end({FinishReason.LENGTH})

    def all_end(self, ends: set[FinishReason]) -> None:
        self.server.wait()
        for request, (effect, prompt) in self.asked.items():
            answer = self.server.answers.pop(request)
            assert answer.finish in ends, answer.error
            assert answer.finish is FinishReason.CANCELLED or len(answer.tokens) == TOKENS
            assert self.world.judge.accepts(effect, prompt, answer.tokens)
        self.asked.clear()
        engine, registry = self.server.engine.stats(), self.registry.stats()
        assert (engine.running, engine.kv_tokens_used, registry.pinned) == (0, 0, 0)
        assert registry.leases == len(self.leases)

    @precondition(lambda self: self.life.pinned)
    @rule(prompt=prompts)
    def ask_what_is_pinned(self, prompt: list[int]) -> None:
        """It is on the device: no slot is filled for it."""
        self.submit(prompt, None, BASE)
        self.listen()
        swaps = self.registry.stats().swaps
        for name in self.life.pinned:
            if self.life.alive[name].details.enabled:
                self.submit(prompt, self.registry.lease(name), self.life.alive[name].effect)
                self.listen()
        assert self.registry.stats().swaps == swaps

    # What is true at any time.

    @invariant()
    def names_revisions_and_details_are_the_known_ones(self) -> None:
        assert self.store.names() == sorted(self.life.alive)
        for name, known in self.life.alive.items():
            found = [revision.number for revision in self.store.revisions(name)]
            assert found == sorted(known.revisions, reverse=True)
            assert self.store.details(name) == known.details

    @invariant()
    def the_numbers_are_what_is_held(self) -> None:
        stats = self.registry.stats()
        assert stats.registered == len(self.life.alive)
        assert stats.pinned <= stats.resident <= SLOTS
        assert len(self.leases) <= stats.leases <= len(self.leases) + len(self.asked)


def run(world: World, sequences: int) -> None:
    LifeMachine.world = world
    machine = LifeMachine.TestCase
    machine.settings = settings(max_examples=sequences, stateful_step_count=40)
    machine().runTest()


def test_any_sequence_of_changes_requests_and_restarts(world: World) -> None:
    run(world, 50)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_thousands_of_sequences(world: World) -> None:
    run(world, 2000)


def test_the_judge_takes_what_peft_generates_and_nothing_else(world: World) -> None:
    for kind, folder in world.folders.items():
        peft = Oracle(world.base, folder)
        for prompt in PROMPTS:
            tokens = peft.greedy(prompt, TOKENS)
            taken = [k for k, e in world.effects.items() if world.judge.accepts(e, prompt, tokens)]
            assert taken == [kind]
            assert not world.judge.accepts(BASE, prompt, tokens)
