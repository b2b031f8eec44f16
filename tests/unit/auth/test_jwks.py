"""Which keys of a set verify tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from anynode.server.auth import signing_keys


def rsa_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


def rsa_jwk(key: rsa.RSAPrivateKey, **changes: Any) -> dict[str, Any]:
    return {**RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), **changes}


def ec_jwk(curve: ec.EllipticCurve, **changes: Any) -> dict[str, Any]:
    public = ec.generate_private_key(curve).public_key()
    return {**ECAlgorithm.to_jwk(public, as_dict=True), **changes}


def test_only_keys_that_verify_rs256_or_es256_are_used() -> None:
    rsa_public = rsa_jwk(rsa_key())
    private = RSAAlgorithm.to_jwk(rsa_key(), as_dict=True)
    entries: list[Any] = [
        {**rsa_public, "kid": "rsa"},
        ec_jwk(ec.SECP256R1(), kid="ec"),
        {**rsa_public, "kid": "signing", "use": "sig", "alg": "RS256", "key_ops": ["verify"], "x5c": ["junk"]},
        {**rsa_public, "kid": "encryption", "use": "enc"},
        {**rsa_public, "kid": "other algorithm", "alg": "PS256"},
        {**rsa_public, "kid": "wrong algorithm", "alg": "HS256"},
        {**rsa_public, "kid": "unhashable algorithm", "alg": {"a": 1}},
        {**rsa_public, "kid": "other operation", "key_ops": ["encrypt"]},
        {**rsa_public, "kid": "no modulus", "n": None},
        {**rsa_public, "kid": "number as modulus", "n": 3},
        {**rsa_public, "kid": "zero", "n": "AA", "e": "AA"},
        {**rsa_public, "kid": "operations", "key_ops": 3},
        {**rsa_public, "kid": "list as kind", "kty": ["RSA"]},
        rsa_jwk(rsa_key(1024), kid="short"),
        ec_jwk(ec.SECP384R1(), kid="other curve"),
        {**ec_jwk(ec.SECP256R1()), "kid": "not on the curve", "x": "A" * 43},
        {"kty": "EC", "kid": "no curve", "x": "AA", "y": "AA"},
        {"kty": "oct", "kid": "secret", "k": "c2VjcmV0"},
        {"kty": "OKP", "crv": "Ed25519", "kid": "edwards", "x": "A" * 43},
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
