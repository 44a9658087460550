"""How OpenTelemetry names this server in all that is sent."""

from uuid import uuid4

from opentelemetry.sdk.resources import OTELResourceDetector, Resource

_INSTANCE = str(uuid4())
"""One id for the traces and the metrics of this process."""


def own_resource(version: str) -> Resource:
    own = {"service.name": "infuse", "service.version": version}
    resource = Resource.create(own | {"service.instance.id": _INSTANCE})
    # What the environment says counts more.
    return resource.merge(OTELResourceDetector().detect())
