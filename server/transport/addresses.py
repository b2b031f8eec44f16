"""The address of a client, which may be behind proxies. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final, TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

IPV6_PREFIX_BITS: Final = 64  # one host is given at least as many addresses (RFC 6177), so it could use them in turn


def address_of(peer: str, forwarded_for: Sequence[str], trusted: Sequence[Network]) -> str:
    """Return the address that a client is counted by: an IPv4 address, or the /64 network of an IPv6 address.

    `forwarded_for` are the values of all headers `X-Forwarded-For` in their order. Each proxy appends the address that
    it saw, so the list is read from its end, for as long as the address that wrote an entry is `trusted`. The first
    address that is not trusted is the client's. Where an entry is no address, the client is the proxy that wrote it.
    A peer that is no IP address, such as a Unix socket, is returned as it is.
    """
    address = _parsed(peer)
    if address is None:
        return peer
    for entry in reversed(",".join(forwarded_for).split(",")) if trusted else ():
        if not _is_in(address, trusted):
            break
        if not entry.strip():
            continue  # an empty element of a list counts for nothing (RFC 9110, 5.6.1)
        forwarded = _parsed(entry)
        if forwarded is None:
            break
        address = forwarded
    if isinstance(address, IPv6Address):
        return str(IPv6Network((address.packed, IPV6_PREFIX_BITS), strict=False))
    return str(address)


def _parsed(entry: str) -> Address | None:
    """Return the address in an entry, which may have a port: `192.0.2.7:4711`, `[2001:db8::1]:4711`."""
    text = entry.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped  # as a socket for both versions names an IPv4 peer
    return address


def _is_in(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)
