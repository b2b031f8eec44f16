"""Which keys of a set verify tokens, and when sets are fetched."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from anynode.server.auth import signing_keys
from anynode.server.auth.jwks import KIDS_MAX, Schedule

RSA_ALGORITHMS = ("RS384", "RS512", "PS256", "PS384", "PS512")
NOW = 1000.0
DAY = 86_400.0


def rsa_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


def rsa_jwk(key: rsa.RSAPrivateKey, **changes: Any) -> dict[str, Any]:
    return {**RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), **changes}


def ec_jwk(curve: ec.EllipticCurve, **changes: Any) -> dict[str, Any]:
    public = ec.generate_private_key(curve).public_key()
    return {**ECAlgorithm.to_jwk(public, as_dict=True), **changes}


def okp_jwk(key: Ed25519PrivateKey | ed448.Ed448PrivateKey, **changes: Any) -> dict[str, Any]:
    return {**OKPAlgorithm.to_jwk(key.public_key(), as_dict=True), **changes}


def test_a_key_is_used_with_the_one_algorithm_that_it_is_for() -> None:
    rsa_public = rsa_jwk(rsa_key())
    ed25519 = Ed25519PrivateKey.generate()
    private = RSAAlgorithm.to_jwk(rsa_key(), as_dict=True)
    entries: list[Any] = [
        {**rsa_public, "kid": "rsa"},
        ec_jwk(ec.SECP256R1(), kid="ec"),
        {**rsa_public, "kid": "signing", "use": "sig", "alg": "RS256", "key_ops": ["verify"], "x5c": ["junk"]},
        {**rsa_public, "kid": "encryption", "use": "enc"},
        *({**rsa_public, "kid": name, "alg": name} for name in RSA_ALGORITHMS),
        {**rsa_public, "kid": "wrong algorithm", "alg": "HS256"},
        {**rsa_public, "kid": "unhashable algorithm", "alg": {"a": 1}},
        {**rsa_public, "kid": "other operation", "key_ops": ["encrypt"]},
        {**rsa_public, "kid": "no modulus", "n": None},
        {**rsa_public, "kid": "number as modulus", "n": 3},
        {**rsa_public, "kid": "zero", "n": "AA", "e": "AA"},
        {**rsa_public, "kid": "operations", "key_ops": 3},
        {**rsa_public, "kid": "list as kind", "kty": ["RSA"]},
        rsa_jwk(rsa_key(1024), kid="short"),
        ec_jwk(ec.SECP384R1(), kid="larger curve"),
        ec_jwk(ec.SECP384R1(), kid="another's algorithm", alg="ES256"),
        ec_jwk(ec.SECP256R1(), kid="another's algorithm", alg="ES384"),
        ec_jwk(ec.SECP521R1(), kid="other curve"),
        ec_jwk(ec.SECP256K1(), kid="other curve"),
        {**ec_jwk(ec.SECP256R1()), "kid": "not on the curve", "x": "A" * 43},
        {"kty": "EC", "kid": "no curve", "x": "AA", "y": "AA"},
        {"kty": "oct", "kid": "secret", "k": "c2VjcmV0"},
        *(okp_jwk(ed25519, kid="edwards", **alg) for alg in ({}, {"alg": "EdDSA"}, {"alg": "Ed25519"})),
        okp_jwk(ed25519, kid="edwards", alg="ES256"),
        okp_jwk(ed448.Ed448PrivateKey.generate(), kid="Ed448"),
        {"kty": "OKP", "crv": "X25519", "kid": "exchange", "x": "A" * 43},
        {"kty": "OKP", "crv": "Ed25519", "kid": "short", "x": "AAAA"},
        {},
        None,
        7,
        "RSA",
        [],
        {**private, "kid": "private", "key_ops": ["verify"]},
    ]
    keys = signing_keys(json.dumps({"keys": entries}).encode())
    assert [(key.key_id, key.algorithm_name) for key in keys] == [
        ("rsa", "RS256"),
        ("ec", "ES256"),
        ("signing", "RS256"),
        *((name, name) for name in RSA_ALGORITHMS),
        ("larger curve", "ES384"),
        *[("edwards", "EdDSA")] * 3,
        ("private", "RS256"),
    ]
    assert all(not hasattr(key.key, "sign") for key in keys)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"junk", b"[]", b"null", b"{}", b'{"keys":{}}', b'{"keys":[]}', b'{"keys":null}', b'{"keys":7}'),
        *(b'{"keys":[{}]}', b"\xff\xfe", b"[" * 100_000, b'{"keys":' + b"[" * 100_000, b'{"keys":"RSA"}'),
    ],
)
def test_a_body_without_a_usable_key_is_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # of json, or ours
        signing_keys(body)


# The schedule.


def fetched(schedule: Schedule, now: float, *kids: str) -> Schedule:
    schedule.begin(now)
    schedule.end(now, kids)
    return schedule


def test_without_keys_a_fetch_is_due_at_once_and_then_every_second() -> None:
    schedule = Schedule()
    assert schedule.due_at(NOW) < NOW
    schedule.begin(NOW)
    schedule.fail()
    assert schedule.due_at(NOW) == NOW + 1
    assert not schedule.is_trusted(NOW)


def test_a_set_is_fetched_again_after_ten_minutes_and_after_a_failure_every_thirty_seconds() -> None:
    schedule = fetched(Schedule(), NOW, "one")
    assert schedule.due_at(NOW) == NOW + 600
    schedule.begin(NOW + 600)
    schedule.fail()
    assert schedule.due_at(NOW + 600) == NOW + 630


def test_keys_are_trusted_for_a_day_after_the_last_fetch_and_then_looked_for_every_second() -> None:
    schedule = fetched(Schedule(), NOW, "one")
    schedule.begin(NOW + DAY - 10)
    schedule.fail()
    assert schedule.is_trusted(NOW + DAY - 0.1)
    assert not schedule.is_trusted(NOW + DAY)
    assert schedule.due_at(NOW + DAY) == NOW + DAY - 9
    assert fetched(schedule, NOW + DAY + 1, "one").is_trusted(NOW + DAY + 2)


def test_an_unknown_key_is_looked_for_at_once_and_the_next_one_ten_seconds_later() -> None:
    schedule = fetched(Schedule(), NOW, "one")
    schedule.ask("two")
    assert schedule.due_at(NOW + 1) <= NOW + 1
    fetched(schedule, NOW + 1, "one")
    assert schedule.due_at(NOW + 1) == NOW + 601
    schedule.ask("three")
    assert schedule.due_at(NOW + 2) == NOW + 11


def test_a_key_is_absent_only_where_a_fetch_that_began_after_it_was_wanted_has_not_brought_it() -> None:
    schedule = fetched(Schedule(), NOW, "one")
    schedule.ask("two")
    schedule.begin(NOW + 1)
    schedule.ask("three")
    assert not schedule.is_absent("two")
    schedule.end(NOW + 2, ["one"])
    assert schedule.is_absent("two")
    assert not schedule.is_absent("three")
    assert schedule.due_at(NOW + 2) == NOW + 11
    schedule.begin(NOW + 11)
    schedule.fail()
    assert not schedule.is_absent("three")  # the issuer was not to be asked
    assert schedule.is_absent("two")
    assert schedule.due_at(NOW + 12) == NOW + 21


def test_a_key_that_comes_and_goes_is_absent_only_once_it_was_looked_for_again() -> None:
    schedule = Schedule()
    schedule.ask("one")
    fetched(schedule, NOW, "one")
    assert not schedule.is_absent("one")
    fetched(schedule, NOW + 600, "two")
    assert not schedule.is_absent("one")
    schedule.ask("one")
    fetched(schedule, NOW + 601, "two")
    assert schedule.is_absent("one")
    fetched(schedule, NOW + 1201, "one")
    assert not schedule.is_absent("one")


def test_a_key_that_came_with_a_fetch_under_way_is_not_looked_for_again() -> None:
    schedule = fetched(Schedule(), NOW, "one")
    schedule.begin(NOW + 1)
    schedule.ask("two")
    schedule.end(NOW + 2, ["one", "two"])
    assert schedule.due_at(NOW + 2) == NOW + 602


def test_the_memory_of_made_up_keys_is_bounded_and_the_next_one_is_not_called_absent() -> None:
    schedule = fetched(Schedule(), NOW, "one")
    for round in range(5):
        for number in range(3 * KIDS_MAX):
            schedule.ask(f"{round} {number}")
        schedule.begin(NOW + round)
        schedule.fail() if round % 2 else schedule.end(NOW + round, ["one"])
    kept = [len(kids) for kids in (schedule._asked, schedule._sought, schedule._absent)]
    assert max(kept) <= 2 * KIDS_MAX
    schedule.ask("another")
    assert not schedule.is_absent("another")
