"""Recognises panics of libraries that are written in Rust."""


def is_panic(error: BaseException) -> bool:
    """Whether a library's Rust code (tokenizers, llguidance, safetensors) has panicked.

    A panic is not an Exception, and each library has its own type, which cannot be imported.
    """
    return type(error).__name__ == "PanicException"
