"""The errors that this package raises on purpose.

AdapterError
├── InvalidAdapter       an upload that must not be served; carries every fault found
├── UnknownAdapter       no adapter of that name
├── UnknownRevision      the name exists, that revision of it does not
├── AdapterExists        the name is taken
├── RevisionConflict     the adapter changed since the caller last looked
├── RevisionDamaged      the stored files of a revision are not those that were uploaded
├── AdapterDisabled      an operator has switched the adapter off
├── TooManyPinned        one more pinned adapter would leave no slot for the others
├── CannotCombine        whole modules cannot be mixed or weighted
├── CombinedNotFinite    weights so large that the result cannot be an adapter
├── CannotMerge          the base's files cannot be merged, or the result is not finite
├── UnknownMerge         no merge of that id
├── MergeNotDone         the merge has no result, or none yet
├── TooManyMerges        too many merges wait already
├── QuotaExceeded        more adapters, bytes or merges than the key's scope allows
├── WrongCall            IA3Model cannot do that now, or not with these values; a ValueError
├── WrongType            IA3Model was given something of another type; a TypeError
├── BaseNameTaken        an adapter has the name that the base model is to be served under
├── StoreLocked          another process owns the store's folder or bucket
├── StoreFull            the disk or the bucket has no room left
├── StoreUnreachable     the bucket refuses or does not answer, or the folder was removed
├── TemplateRefused      a chat template refuses a conversation, or takes too long to render it
├── NotSigned            no trusted signer has signed exactly the files of an upload
├── SignersUnreadable    the keys of those who are trusted to sign adapters cannot be read
├── CannotSign           the private key or its certificate cannot be used
├── SandboxUnavailable   no process is available to read an adapter's tokenizer or chat template
├── StoreDamaged         files that were stored in the bucket are missing or changed
├── BackupRefused        there is no backup or store to copy, or something at the destination
├── Overtaken            another server changed the store first; the store decides again
└── SourceError          an adapter cannot be fetched from where it was published
    ├── BadSource          the URL has a form that this server does not read
    ├── SourceNotAllowed   the operator has not allowed that source
    ├── SourceNotFound     there is no adapter at that URL
    ├── SourceRefused      the source denies this server access
    ├── SourceTooLarge     the files are larger than an upload may be
    ├── SourceTimeout      the files did not arrive in time
    └── SourceFailed       the source failed, or its answer cannot be used
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One thing wrong with an upload: where, what, and how to mend it."""

    field: str
    problem: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}" + (f" ({self.fix})" if self.fix else "")


class AdapterError(Exception):
    """The root of all errors that this package raises on purpose.

    Where PEFT raises a ValueError or a TypeError, so does this package: code that catches PEFT's
    errors catches these.
    """


class InvalidAdapter(AdapterError):
    def __init__(self, faults: Sequence[Fault]) -> None:
        assert faults, "an invalid adapter has at least one fault"
        self.faults = tuple(faults)
        super().__init__("; ".join(str(fault) for fault in self.faults))


class UnknownAdapter(AdapterError, ValueError):
    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"There is no adapter named '{name}'.")


class UnknownRevision(AdapterError):
    def __init__(self, name: str, revision: int) -> None:
        self.name = name
        self.revision = revision
        super().__init__(f"The adapter '{name}' has no revision {revision}.")


class AdapterExists(AdapterError, ValueError):
    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"An adapter named '{name}' exists already; replace it with PUT or delete it first."
        )


class RevisionConflict(AdapterError):
    def __init__(self, name: str, current: str) -> None:
        self.name = name
        self.current = current
        super().__init__(f"The adapter '{name}' has changed; its ETag is now {current}.")


class RevisionDamaged(AdapterError):
    def __init__(self, name: str, revision: int) -> None:
        self.name = name
        self.revision = revision
        super().__init__(
            f"The stored files of '{name}@{revision}' are damaged, so it is not served: upload "
            f"the same files again (PUT /v1/adapters/{name}), or roll back to another revision."
        )


class AdapterDisabled(AdapterError):
    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"The adapter '{name}' is disabled.")


class TooManyPinned(AdapterError):
    def __init__(self, most: int) -> None:
        super().__init__(
            f"{most} adapters are pinned already, and one slot must stay for the others: unpin "
            "one, or raise --max-resident-adapters."
        )


class CannotCombine(AdapterError, ValueError):
    def __init__(self, module: str) -> None:
        super().__init__(
            f"An adapter brings its own copy of {module}, which cannot be mixed or weighted; use "
            "that adapter alone."
        )


class CombinedNotFinite(AdapterError, ValueError):
    def __init__(self, module: str) -> None:
        super().__init__(f"The combined vector of {module} is not finite; take smaller weights.")


class CannotMerge(AdapterError):
    pass


class UnknownMerge(AdapterError):
    def __init__(self, merge: str) -> None:
        super().__init__(f"There is no merge '{merge}'.")


class MergeNotDone(AdapterError):
    def __init__(self, merge: str, state: str) -> None:
        super().__init__(f"The merge '{merge}' is {state}; only one that succeeded has an archive.")


class TooManyMerges(AdapterError):
    def __init__(self, waiting: int, seconds: float) -> None:
        self.retry_after = min(max(math.ceil(seconds), 1), 3600)
        """Whole seconds until the running merge is likely to have ended."""
        super().__init__(
            f"{waiting} of your merges wait already; cancel some, or ask again in "
            f"{self.retry_after} s."
        )


class QuotaExceeded(AdapterError):
    def __init__(self, wanted: str, most: str) -> None:
        super().__init__(
            f"With this you would have {wanted}, and the scope of your key allows {most}: delete "
            "some first."
        )


class BaseNameTaken(AdapterError):
    pass


class WrongCall(AdapterError, ValueError):
    pass


class WrongType(AdapterError, TypeError):
    pass


class StoreLocked(AdapterError):
    pass


class StoreFull(AdapterError):
    pass


class StoreUnreachable(AdapterError):
    pass


class StoreDamaged(AdapterError):
    pass


class BackupRefused(AdapterError):
    pass


class Overtaken(AdapterError):
    pass


class TemplateRefused(AdapterError):
    pass


class NotSigned(AdapterError):
    def __init__(self, problem: str) -> None:
        super().__init__(
            f"{problem} Have a trusted signer sign the folder (`infuse adapters sign`), and upload "
            "all of it, as an archive."
        )


class SignersUnreadable(AdapterError):
    def __init__(self, problem: str) -> None:
        super().__init__(f"The trusted signers of adapters cannot be read: {problem}.")


class CannotSign(AdapterError):
    pass


class SandboxUnavailable(AdapterError):
    def __init__(self, reason: str) -> None:
        super().__init__(
            "The process that reads adapters' own tokenizers and chat templates is not available "
            f"now ({reason}); try again."
        )


class SourceError(AdapterError):
    pass


class BadSource(SourceError):
    def __init__(self, problem: str, shape: str = "") -> None:
        super().__init__(f"The URL {problem}" + (f"; write {shape}" if shape else "."))


class SourceNotAllowed(SourceError):
    def __init__(self) -> None:
        super().__init__(
            "This server may not fetch from there: an operator must add the URL to "
            "--source-prefixes (INFUSE_SOURCE_PREFIXES), and to the sources of a key that has a "
            "scope; or upload the adapter's files."
        )


class SourceNotFound(SourceError):
    def __init__(self, source: str) -> None:
        super().__init__(
            f"There is no adapter at {source}: check the name, the folder, and the revision. PEFT "
            "writes an adapter that is not called 'default' to a folder of its name: add that."
        )


class SourceRefused(SourceError):
    pass


class SourceTooLarge(SourceError):
    def __init__(self, limit: int) -> None:
        super().__init__(
            f"The adapter's files are larger than this server's limit of {limit} bytes."
        )


class SourceTimeout(SourceError):
    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"The adapter was not fetched within {seconds:g} seconds: try again, or raise "
            "--source-timeout."
        )


class SourceFailed(SourceError):
    def __init__(self, problem: str) -> None:
        super().__init__(
            f"The adapter cannot be fetched: {problem}; try again later, or upload its files."
        )
