"""The address that a client is counted by: of the peer, or what trusted proxies say."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anynode.server.transport.addresses import address_of

TRUSTED = (ip_network("10.0.0.0/8"), ip_network("192.0.2.7/32"), ip_network("fd00::/8"))

addresses = st.ip_addresses().map(str)
proxies = st.integers(0, 2**24 - 1).map(lambda number: str(IPv4Address((10 << 24) + number)))
public = st.ip_addresses().filter(lambda address: not any(address in network for network in TRUSTED)).map(str)
# What a client may have put into the header before the first trusted proxy saw it.
rubbish = st.lists(st.text(st.characters(max_codepoint=255)), max_size=3)


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "address"),
    [
        ("198.51.100.1", [], "198.51.100.1"),
        ("198.51.100.1", ["203.0.113.9"], "198.51.100.1"),  # it is no proxy of ours
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["1.2.3.4, 203.0.113.9"], "203.0.113.9"),  # what the client had written itself comes first
        ("10.0.0.1", ["1.2.3.4", "203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["203.0.113.9, 10.2.3.4", "192.0.2.7"], "203.0.113.9"),
        ("10.0.0.1", ["10.2.3.4, 10.2.3.5"], "10.2.3.4"),  # all are ours: the first of them
        ("10.0.0.1", ["203.0.113.9:4711"], "203.0.113.9"),
        ("10.0.0.1", ["203.0.113.9, ,"], "203.0.113.9"),
        ("10.0.0.1", ["203.0.113.9, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9, rubbish, 10.2.3.4"], "10.2.3.4"),
        ("10.0.0.1", ["_hidden"], "10.0.0.1"),
        ("10.0.0.1", ["2001:db8:1:2:3:4:5:6"], "2001:db8:1:2::/64"),
        ("10.0.0.1", ["[2001:db8:1:2::6]:443"], "2001:db8:1:2::/64"),
        ("10.0.0.1", ["[2001:db8:1:2::6]"], "2001:db8:1:2::/64"),
        ("fd00::1", ["203.0.113.9"], "203.0.113.9"),
        ("fe80::1%eth0", [], "fe80::/64"),
        ("::ffff:10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("::ffff:198.51.100.1", ["203.0.113.9"], "198.51.100.1"),
        ("10.0.0.1", ["::ffff:203.0.113.9"], "203.0.113.9"),
        ("", ["203.0.113.9"], ""),  # a Unix socket
    ],
)
def test_a_client_is_the_first_address_from_the_end_that_is_no_proxy(
    peer: str, forwarded_for: Sequence[str], address: str
) -> None:
    assert address_of(peer, forwarded_for, TRUSTED) == address


@given(peer=addresses, forwarded_for=st.lists(st.text()))
def test_without_trusted_proxies_only_the_peer_counts(peer: str, forwarded_for: list[str]) -> None:
    assert address_of(peer, forwarded_for, ()) == address_of(peer, [], ())


@given(client=public, through=st.lists(proxies), said=rubbish, peer=proxies)
def test_nothing_that_a_client_says_changes_the_address_that_our_proxy_saw(
    client: str, through: list[str], said: list[str], peer: str
) -> None:
    joined = ", ".join([*said, client, *through])
    assert address_of(peer, [joined], TRUSTED) == address_of(client, [], TRUSTED)
    assert address_of(peer, [*said, client, *through], TRUSTED) == address_of(client, [], TRUSTED)


@given(peer=proxies, forwarded_for=st.lists(st.text()))
def test_whatever_a_header_holds_there_is_an_address(peer: str, forwarded_for: list[str]) -> None:
    found = address_of(peer, forwarded_for, TRUSTED)
    assert ip_network(found)


@given(network=st.integers(0, 2**64 - 1), hosts=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)))
def test_all_addresses_of_an_ipv6_network_count_as_one(network: int, hosts: tuple[int, int]) -> None:
    first, second = (IPv6Address((network << 64) + host) for host in hosts)
    if first.ipv4_mapped is None and second.ipv4_mapped is None:
        assert address_of(str(first), [], ()) == address_of(str(second), [], ())
