"""Headers that every answer has."""

SAFE = {
    # Answers are somebody's own: no cache on the way may keep them.
    "Cache-Control": "no-store",
    # No browser may take an answer for something else than its Content-Type says.
    "X-Content-Type-Options": "nosniff",
}
RAW_SAFE = [(name.lower().encode(), value.encode()) for name, value in SAFE.items()]
"""As ASGI writes them."""
