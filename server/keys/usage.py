"""What a tenant uses of the server, for the limits of its scope."""

from infuse.server.engine.token_bucket import Bucket


class Usage:
    """What the requests of one tenant use. Belongs to one event loop."""

    def __init__(self) -> None:
        self.requests = Bucket()
        self.tokens = Bucket()
        self.at_once = 0
        """HTTP requests that are not answered yet."""
        self.queued = 0
        """Requests to the engine that have not ended."""
