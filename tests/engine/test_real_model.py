"""The default model with the trained example adapters, against PEFT in float64."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infuse.adapters.checkpoint.checkpoint import effective_vectors, read_checkpoint
from infuse.adapters.derive.base_checkpoint import BaseCheckpoint
from infuse.adapters.derive.merge import merge
from infuse.server.engine.model_files import default_model_folder
from tests.engine.harness import Harness, Oracle

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
ADAPTERS = {path.name: path for path in EXAMPLES.iterdir() if path.is_dir()}
BEST = 200
"""How many of the vocabulary's best tokens are compared at each position."""

pytestmark = pytest.mark.real


def test_float32_logits_err_at_most_twice_as_much_as_pefts_do(
    start: Callable[..., Harness],
) -> None:
    folder = default_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = tokenizer("I ordered twelve coffee mugs a week ago and none has arrived.").input_ids
    exact, peft = {}, {}
    for name in (None, *ADAPTERS):
        adapter = ADAPTERS.get(name or "")
        exact[name] = Oracle(base, adapter, torch.float64).logits(prompt).log_softmax(-1)
        peft[name] = Oracle(base, adapter).in_several_shapes(prompt)
    engine = start(base, ADAPTERS, tokenizer=tokenizer, max_model_len=256, kv_cache_tokens=1024)
    with engine.held():
        for name in exact:
            engine.submit(str(name), prompt, name, max_tokens=1, prompt_logprobs=BEST)
    engine.wait()

    theirs = max(
        (logits.log_softmax(-1) - exact[name]).abs().max().item()
        for name in exact
        for logits in peft[name]
    )
    ours = 0.0
    for name in exact:
        for position, scored in enumerate((engine.answers[str(name)].prompt_logprobs or ())[1:]):
            assert scored is not None
            tokens, values = zip(*scored.top, strict=True)
            error = torch.tensor(values, dtype=torch.float64) - exact[name][position, list(tokens)]
            ours = max(ours, error.abs().max().item())
    assert ours <= 2 * theirs


def test_a_merged_export_yields_the_served_adapters_greedy_tokens(
    start: Callable[..., Harness], tmp_path: Path
) -> None:
    folder = default_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = BaseCheckpoint(folder)
    vectors = effective_vectors(read_checkpoint(ADAPTERS["order-json"]), base.modules)
    merge(base, vectors, tmp_path / "merged", "order-json")
    chat = [{"role": "user", "content": "Hi, please send 4 garden chairs to Lyon. Thanks, Anna"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    served = start(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        ADAPTERS,
        tokenizer=tokenizer,
        max_model_len=256,
        kv_cache_tokens=1024,
    ).ask(prompt, "order-json", max_tokens=20)

    assert tokenizer.decode(served.tokens).startswith('{"customer":"Anna')
    assert served.tokens == Oracle(model).greedy(prompt, 20)


@pytest.mark.usefixtures("free_tokens")
def test_a_copied_text_takes_fewer_steps_and_stays_the_same(start: Callable[..., Harness]) -> None:
    folder = default_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = start(base, {}, tokenizer=tokenizer, max_model_len=512, kv_cache_tokens=1024)
    text = (
        "The harbour was built in 1812 by John Rennie. It has two piers, the older of which is "
        "140 metres long. In the winter of 1884 a storm destroyed the lighthouse at its end."
    )
    asked = f"Repeat the following text exactly, word for word:\n\n{text}"
    turns = [{"role": "user", "content": asked}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    plain = engine.ask(prompt, max_tokens=60, ignore_eos=False)
    before = engine.engine.stats()
    engine.submit("drafted", prompt, max_tokens=60, ignore_eos=False, speculation=True)
    engine.wait()
    after = engine.engine.stats()

    assert engine.answers["drafted"].tokens == plain.tokens
    assert after.accepted_tokens > len(plain.tokens) / 2
    assert after.steps - before.steps < len(plain.tokens) / 2


def test_a_long_prompt_again_computes_one_token_and_answers_the_same(
    start: Callable[..., Harness],
) -> None:
    """And one that ends otherwise computes what is new of it."""
    folder = default_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = (EXAMPLES / "sentiment" / "README.md").read_text()
    prompt = tokenizer(text).input_ids[:300]
    engine = start(base, ADAPTERS, tokenizer=tokenizer, max_model_len=512, kv_cache_tokens=2048)
    computed, answers = [], []
    for asked in (prompt, prompt, [*prompt[:-8], *prompt[:8]]):
        before = engine.engine.stats().prompt_tokens
        answers.append(engine.ask(asked, "sentiment", max_tokens=3).tokens)
        computed.append(engine.engine.stats().prompt_tokens - before)

    assert computed == [300, 1, 8]
    assert answers[0] == answers[1]
