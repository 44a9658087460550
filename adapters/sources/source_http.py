"""HTTP GET that follows redirects to public addresses only."""

import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import anyio
import httpx2

from infuse.adapters.errors import SourceFailed

_MAX_REDIRECTS = 5
_NAT64 = IPv6Network("64:ff9b::/96")
_LOCAL_NAT64 = IPv6Network("64:ff9b:1::/48")


@dataclass(frozen=True, slots=True)
class Answer:
    response: httpx2.Response
    """The response after all redirects; its body is not yet read."""
    first: httpx2.Headers
    """The headers of the first response, which may be a redirect."""


class GuardedHttp:
    """The HTTP connections of one fetch.

    The operator has allowed the server of the URL itself, which may be anywhere. A redirect to
    another server must lead to a public address, and the connection goes to exactly the address
    that was checked, so that a name cannot resolve to another one later. Headers go to the first
    server alone. Proxies of the environment are not used: they would resolve names themselves.
    """

    def __init__(self, tls: ssl.SSLContext) -> None:
        self._transport = httpx2.AsyncHTTPTransport(verify=tls)

    async def aclose(self) -> None:
        await self._transport.aclose()

    @asynccontextmanager
    async def get(self, url: str, headers: Mapping[str, str]) -> AsyncIterator[Answer]:
        """Get a URL. Raises SourceFailed. Sets no timeout: the caller has one for the whole fetch.

        Callers read the body as it comes over the wire (`aiter_raw`): nothing is unpacked.
        """
        try:
            here = start = httpx2.URL(url)
            trusted, first = True, httpx2.Headers()
            for hop in range(_MAX_REDIRECTS + 1):
                trusted = trusted and here.is_absolute_url and here.origin == start.origin
                request = _request(here, headers) if trusted else await _pinned(here, start)
                response = await self._transport.handle_async_request(request)
                try:
                    if hop == 0:
                        first = response.headers
                    if not response.has_redirect_location:
                        yield Answer(response, first)
                        return
                    here = here.join(response.headers["Location"])
                finally:
                    await response.aclose()
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            # The error's text may contain a signed URL.
            raise SourceFailed(f"the connection failed ({type(error).__name__})") from None
        raise SourceFailed("it redirects too often")


def _request(
    url: httpx2.URL, headers: Mapping[str, str], address: str | None = None
) -> httpx2.Request:
    """Make a request that connects to `address`, if given; all else is as for the URL's host."""
    target = url if address is None else url.copy_with(host=address)
    return httpx2.Request(
        "GET",
        target,
        headers={**headers, "Accept-Encoding": "identity", "Host": url.netloc.decode("ascii")},
        extensions={"sni_hostname": url.raw_host.decode("ascii")},
    )


async def _pinned(url: httpx2.URL, start: httpx2.URL) -> httpx2.Request:
    if url.scheme not in ("https", start.scheme):
        raise SourceFailed("it redirects to no HTTPS")
    if url.userinfo or not url.host:
        raise SourceFailed("it redirects to no plain host")
    return _request(url, {}, address=await _public_address(url.raw_host.decode("ascii"), url.port))


async def _public_address(host: str, port: int | None) -> str:
    try:
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise SourceFailed("it redirects to a host that is not known") from None
    addresses = [ip_address(address[0]) for *_, address in found]
    if not all(map(is_public, addresses)):
        raise SourceFailed("it redirects to a private address")
    return str(addresses[0])


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address is public; an IPv6 address that contains an IPv4 one is judged by that."""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = IPv4Address(int(address) & 0xFFFF_FFFF)
        if inner is not None:
            return is_public(inner)
        if address in _LOCAL_NAT64:
            return False
    return address.is_global and not address.is_multicast
