"""Signs adapters and verifies signatures, by sigstore's model-signing and without a network.

A signature is a file beside the adapter's own. It holds the digests of all of them.
"""

from collections.abc import Sequence
from pathlib import Path

from model_signing import hashing, signing, verifying

from infuse.adapters.checkpoint.config import FILES, SIGNATURE_FILE
from infuse.adapters.errors import CannotSign, NotSigned, SignersUnreadable

_MOST_BYTES = 1 << 20
"""How large a signature may be."""


class _AdapterFiles(hashing.Config):
    """Hashes all files of an adapter, whatever else a signature says to leave out."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        others = [path.name for path in folder.iterdir() if path.name not in FILES]
        self.set_ignored_paths(paths=[*others, SIGNATURE_FILE], ignore_git_paths=False)
        self.are_hashed = False
        """Whether the signature itself was found to be right."""

    def add_ignored_paths(self, **_: object) -> None:
        """What a signature asks to ignore would not be signed, and be served all the same."""

    def hash(self, *given: object, **named: object) -> object:
        self.are_hashed = True
        return super().hash(*given, **named)


class Signers:
    """Those whose signatures are trusted, each by a PEM file with a public key or with certificates
    of authorities. The files are read each time: a change of them counts at once."""

    def __init__(self, place: Path) -> None:
        """`place`: a PEM file, or a folder of them. Raises SignersUnreadable."""
        self._place = place
        self._verifiers()

    def verify(self, folder: Path) -> str:
        """Return who has signed exactly an adapter's files: the name of a PEM file. Raises
        NotSigned, SignersUnreadable."""
        signature = folder / SIGNATURE_FILE
        if not signature.is_file():
            raise NotSigned(f"The adapter is not signed: it has no {SIGNATURE_FILE}.")
        if signature.stat().st_size > _MOST_BYTES:
            raise NotSigned(f"{SIGNATURE_FILE} is larger than {_MOST_BYTES} bytes.")
        verifiers = self._verifiers()
        for name, verifier in verifiers.items():
            files = _AdapterFiles(folder)
            try:
                verifier.set_hashing_config(files).verify(folder, signature)
                return name
            except Exception as error:
                # The library promises no set of errors for what is no signature of this signer.
                if files.are_hashed:
                    said = str(error).replace(f" in model '{folder.name}'", "")
                    raise NotSigned(f"'{name}' has signed other files: {said}.") from None
        trusted = ", ".join(verifiers)
        raise NotSigned(f"{SIGNATURE_FILE} is no signature by a trusted signer ({trusted}).")

    def _verifiers(self) -> dict[str, verifying.Config]:
        try:
            files = [self._place]
            if self._place.is_dir():
                # Kubernetes keeps what it mounts in hidden folders.
                files = [p for p in sorted(self._place.iterdir()) if not p.name.startswith(".")]
            found = {file.stem: _verifier(file) for file in files}
        except OSError as error:
            raise SignersUnreadable(f"{error.filename}: {error.strerror}") from None
        if not found:
            raise SignersUnreadable(f"{self._place} holds no PEM file")
        return found


def _verifier(file: Path) -> verifying.Config:
    """Raises OSError, SignersUnreadable."""
    text = file.read_bytes()
    try:
        if b"BEGIN CERTIFICATE" in text:
            return verifying.Config().use_certificate_verifier(certificate_chain=[file])
        return verifying.Config().use_elliptic_key_verifier(public_key=file)
    except Exception as error:
        # What OpenSSL and others say of what is no key has no common class.
        raise SignersUnreadable(
            f"{file} is neither a public key (ECDSA on P-256, P-384 or P-521) nor certificates, in "
            f"PEM: {error}"
        ) from None


def sign(folder: Path, key: Path, certificates: Sequence[Path] = ()) -> Path:
    """Sign an adapter's files with a private key; return the file of the signature.

    `certificates`: the key's own, and those of authorities between it and a trusted one. Raises
    CannotSign.
    """
    config = signing.Config().set_hashing_config(_AdapterFiles(folder))
    try:
        if certificates:
            own, *chain = certificates
            config.use_certificate_signer(
                private_key=key, signing_certificate=own, certificate_chain=chain
            )
        else:
            config.use_elliptic_key_signer(private_key=key)
    except Exception as error:
        raise CannotSign(
            f"{key} is no private key (ECDSA on P-256, P-384 or P-521; PEM, no password), "
            f"or not that of the certificate: {error}"
        ) from None
    signature = folder / SIGNATURE_FILE
    config.sign(folder, signature)
    return signature
