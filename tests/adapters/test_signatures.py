"""Signatures of adapters: who is trusted, over which files, and what is none."""

import base64
import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("model_signing", reason="pip install 'infuse-server[signing]'")

from model_signing import hashing, signing, verifying

from infuse.adapters.checkpoint.config import SIGNATURE_FILE, WEIGHTS_FILE
from infuse.adapters.errors import CannotSign, NotSigned, SignersUnreadable
from infuse.adapters.signatures import Signers, sign
from tests.signers import new_certificate, new_key


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / WEIGHTS_FILE).write_bytes(b"weights")
    (folder / "README.md").write_text("# Mine")
    return folder


def test_an_adapter_is_signed_by_whom_the_public_key_is_named_after(
    adapter: Path, tmp_path: Path
) -> None:
    key, public = new_key(tmp_path, "release")
    sign(adapter, key)

    assert Signers(public).verify(adapter) == "release"


def test_a_certificate_is_as_good_as_the_authority_above_it(adapter: Path, tmp_path: Path) -> None:
    key, certificates, authority = new_certificate(tmp_path, "acme")
    *_, another = new_certificate(tmp_path, "another")
    sign(adapter, key, certificates)

    assert Signers(authority).verify(adapter) == "acme"
    with pytest.raises(NotSigned, match="no signature by a trusted signer"):
        Signers(another).verify(adapter)


def test_each_signer_of_a_folder_is_trusted_and_a_change_of_it_counts_at_once(
    adapter: Path, tmp_path: Path
) -> None:
    trusted = tmp_path / "trusted"
    trusted.mkdir()
    (trusted / ".hidden").write_text("what Kubernetes keeps beside")
    new_key(tmp_path, "first")[1].rename(trusted / "first.pub")
    signers = Signers(trusted)
    key, public = new_key(tmp_path, "second")
    sign(adapter, key)

    with pytest.raises(NotSigned, match=r"no signature by a trusted signer \(first\)"):
        signers.verify(adapter)
    public.rename(trusted / "second.pub")
    assert signers.verify(adapter) == "second"
    (trusted / "second.pub").unlink()
    with pytest.raises(NotSigned):
        signers.verify(adapter)


CHANGES: dict[str, Callable[[Path], object]] = {
    "changed": lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"other"),
    "added": lambda folder: (folder / "chat_template.jinja").write_text("{{ evil }}"),
    "removed": lambda folder: (folder / "README.md").unlink(),
    "renamed": lambda folder: (folder / "README.md").rename(folder / "tokenizer.json"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_signature_is_over_exactly_the_files(adapter: Path, tmp_path: Path, change: str) -> None:
    key, public = new_key(tmp_path, "release")
    sign(adapter, key)
    CHANGES[change](adapter)

    with pytest.raises(NotSigned, match="'release' has signed other files") as raised:
        Signers(public).verify(adapter)
    assert "infuse adapters sign" in str(raised.value)


def test_files_that_are_not_of_the_adapter_are_neither_signed_nor_looked_at(
    adapter: Path, tmp_path: Path
) -> None:
    key, public = new_key(tmp_path, "release")
    (adapter / "optimizer.pt").write_bytes(b"before")
    sign(adapter, key)
    (adapter / "optimizer.pt").write_bytes(b"after")
    (adapter / "checkpoint-1").mkdir()
    (adapter / "checkpoint-1" / WEIGHTS_FILE).write_bytes(b"older")

    assert Signers(public).verify(adapter) == "release"


def test_a_signature_cannot_leave_out_a_file(adapter: Path, tmp_path: Path) -> None:
    key, public = new_key(tmp_path, "release")
    less = hashing.Config().set_ignored_paths(paths=[WEIGHTS_FILE, SIGNATURE_FILE])
    own = signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(less)
    own.sign(adapter, adapter / SIGNATURE_FILE)
    verifying.Config().use_elliptic_key_verifier(public_key=public).verify(
        adapter, adapter / SIGNATURE_FILE
    )

    with pytest.raises(NotSigned, match=WEIGHTS_FILE):
        Signers(public).verify(adapter)


def test_signatures_are_those_of_model_signing(adapter: Path, tmp_path: Path) -> None:
    """Signed there and verified here, and the other way round."""
    key, public = new_key(tmp_path, "release")
    theirs = signing.Config().use_elliptic_key_signer(private_key=key)
    theirs.sign(adapter, adapter / SIGNATURE_FILE)
    assert Signers(public).verify(adapter) == "release"

    sign(adapter, key)
    own = verifying.Config().use_elliptic_key_verifier(public_key=public)
    own.verify(adapter, adapter / SIGNATURE_FILE)


def test_an_adapter_without_a_signature_is_not_signed(adapter: Path, tmp_path: Path) -> None:
    _, public = new_key(tmp_path, "release")

    with pytest.raises(NotSigned, match=r"it has no model\.sig\. Have a trusted signer sign"):
        Signers(public).verify(adapter)


def test_a_payload_that_was_changed_is_no_signature(adapter: Path, tmp_path: Path) -> None:
    key, public = new_key(tmp_path, "release")
    bundle = json.loads(sign(adapter, key).read_text())
    envelope = bundle["dsseEnvelope"]
    payload = json.loads(base64.b64decode(envelope["payload"]))
    payload["predicate"]["resources"].pop()
    envelope["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    (adapter / SIGNATURE_FILE).write_text(json.dumps(bundle))

    with pytest.raises(NotSigned, match="no signature by a trusted signer"):
        Signers(public).verify(adapter)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_bytes_a_signature_has_it_is_right_or_refused(
    adapter: Path, tmp_path: Path, seed: int
) -> None:
    key, public = new_key(tmp_path, "release")
    *_, authority = new_certificate(tmp_path, "acme")
    chance = random.Random(seed)
    text = bytearray(sign(adapter, key).read_bytes())
    begin = chance.randrange(len(text))
    text[begin : begin + chance.randrange(1, 400)] = chance.randbytes(chance.randrange(3))
    (adapter / SIGNATURE_FILE).write_bytes(chance.choice([text, b"", b"[" * 100_000, b"null"]))

    with suppress(NotSigned):
        assert Signers(public).verify(adapter) == "release"
    with pytest.raises(NotSigned):
        Signers(authority).verify(adapter)


def test_a_signature_that_is_too_large_is_not_read(adapter: Path, tmp_path: Path) -> None:
    _, public = new_key(tmp_path, "release")
    (adapter / SIGNATURE_FILE).write_bytes(b" " * ((1 << 20) + 1))

    with pytest.raises(NotSigned, match="larger than 1048576 bytes"):
        Signers(public).verify(adapter)


def test_signers_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    key, _ = new_key(tmp_path, "release")
    empty = tmp_path / "empty"
    empty.mkdir()

    for place, said in (
        (tmp_path / "nowhere.pub", "No such file"),
        (empty, "holds no PEM file"),
        (key, "release.key is neither a public key"),
    ):
        with pytest.raises(SignersUnreadable, match=said):
            Signers(place)


def test_what_cannot_sign_is_told(adapter: Path, tmp_path: Path) -> None:
    key, public = new_key(tmp_path, "release")
    _, certificates, _ = new_certificate(tmp_path, "acme")

    for given, chain in ((public, []), (tmp_path / "nowhere.key", []), (key, certificates)):
        with pytest.raises(CannotSign, match="is no private key"):
            sign(adapter, given, chain)
    assert not (adapter / SIGNATURE_FILE).exists()
