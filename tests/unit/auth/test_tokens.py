"""Tokens without a network: claims, signatures, and what may not crash the verifier."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from dataclasses import replace
from typing import Any

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from anynode.server.auth import (
    TOKEN_CHARACTERS_MAX,
    Authenticator,
    Identity,
    make_token,
)
from anynode.server.errors import ConfigurationError, Unauthorized
from anynode.server.limits import LIMIT_MAX
from anynode.server.settings import Settings

SECRET = secrets.token_urlsafe(32)
MISSING = object()


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    given_claims = {"sub": "ada", "aud": "anynode", "iss": "anynode", "iat": now, "exp": now + 60, **changes}
    return {name: value for name, value in given_claims.items() if value is not MISSING}


def segment(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def signed(payload: str, header: str = '{"alg":"HS256","typ":"JWT"}', key: bytes | None = None) -> str:
    """A token whose JSON is written by hand, with a right HS256 signature: for what PyJWT would not encode."""
    signing_input = segment(header.encode("utf-8", "surrogatepass")) + b"." + segment(payload.encode())
    signature = hmac.digest(SECRET.encode() if key is None else key, signing_input, hashlib.sha256)
    return (signing_input + b"." + segment(signature)).decode()


def payload_with(name: str, literal: str) -> str:
    return json.dumps(claims(**{name: "LITERAL"})).replace('"LITERAL"', literal)


def authenticator() -> Authenticator:
    return Authenticator(Settings(jwt_secret=SECRET))


async def refusal(token: str) -> str:
    with pytest.raises(Unauthorized) as refused:
        await authenticator().authenticate(token)
    return refused.value.message


async def test_a_made_token_proves_its_user_until_it_expires() -> None:
    before = time.time()
    token = make_token(SECRET, user_id="ada", audience="anynode", issuer="anynode", ttl_seconds=60)
    identity = await authenticator().authenticate(token)
    assert identity.user_id == "ada"
    assert before + 59.9 <= identity.expires_at <= time.time() + 60.1


async def test_an_expired_token_is_refused() -> None:
    token = make_token(SECRET, user_id="ada", audience="anynode", issuer="anynode", ttl_seconds=-0.01)
    assert await refusal(token) == "the token has expired"


@pytest.mark.parametrize("name", ["exp", "iat", "sub", "aud", "iss"])
@pytest.mark.parametrize("value", [MISSING, None])
async def test_a_token_without_a_required_claim_is_refused(name: str, value: Any) -> None:
    token = signed(json.dumps(claims(**{name: value})))
    assert await refusal(token) == f"the token has no {name} claim"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("aud", "other", "the token is for another audience (aud)"),
        ("aud", ["other", "another"], "the token is for another audience (aud)"),
        ("aud", {"anynode": 1}, "the token is for another audience (aud)"),
        ("aud", "anynode2", "the token is for another audience (aud)"),
        ("iss", "other", "the token is from another issuer (iss)"),
        ("iss", "any", "the token is from another issuer (iss)"),
        ("iss", ["anynode"], "the token is from another issuer (iss)"),
        pytest.param("nbf", time.time() + 3600, "the token is not valid yet (nbf)", id="nbf-in an hour"),
        ("exp", 0, "the token has expired"),
        ("exp", -1, "the token has expired"),
    ],
)
async def test_a_wrong_claim_is_refused_with_its_name(name: str, value: Any, message: str) -> None:
    assert await refusal(signed(json.dumps(claims(**{name: value})))) == message


@pytest.mark.parametrize("name", ["exp", "iat", "nbf"])
@pytest.mark.parametrize(
    "literal",
    [
        *("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "true", '"9999999999"', '"inf"', "[1]", "{}", "1e300"),
        *("1" + "0" * 400, "-1" + "0" * 400, "1800000000000"),
    ],
)
async def test_a_time_that_is_none_is_refused(name: str, literal: str) -> None:
    message = await refusal(signed(payload_with(name, literal)))
    assert message == f"the token's {name} claim must be a time in Unix seconds"


@pytest.mark.parametrize(
    "literal",
    [
        *("1", "true", '["ada"]', "{}", '""', '"%s"' % ("a" * 256), r'"a\u0000"', r'"a\ud800"', r'"a\n"', r'"\u202e"'),
        r'"\u001b[31m"',
    ],
)
async def test_a_sub_that_cannot_be_a_user_id_is_refused(literal: str) -> None:
    message = await refusal(signed(payload_with("sub", literal)))
    assert message == "the token's sub claim must be 1 to 255 printable characters"


@pytest.mark.parametrize("user_id", ["a" * 255, "auth0|5f7", "Ада Лавлейс", "😀"])
async def test_any_printable_sub_of_up_to_255_characters_is_a_user(user_id: str) -> None:
    token = signed(json.dumps(claims(sub=user_id)))
    assert (await authenticator().authenticate(token)).user_id == user_id


# In seconds from now, with a leeway of 10; a second is left to the test.
@pytest.mark.parametrize(
    ("name", "ahead", "message"),
    [
        ("nbf", 9, None),
        ("nbf", 11, "the token is not valid yet (nbf)"),
        ("nbf", -1e6, None),
        ("iat", 9, None),
        ("iat", 11, "the token was issued in the future (iat): the clock of its issuer is ahead"),
        ("exp", -0.1, "the token has expired"),  # no leeway
        ("exp", 1, None),
    ],
)
async def test_a_time_may_be_ahead_of_the_clock_by_the_leeway(name: str, ahead: float, message: str | None) -> None:
    token = signed(json.dumps(claims(**{name: time.time() + ahead})))
    if message is None:
        assert (await authenticator().authenticate(token)).user_id == "ada"
    else:
        assert await refusal(token) == message


async def test_the_leeway_is_a_setting() -> None:
    strict = Authenticator(Settings(jwt_secret=SECRET, jwt_leeway_seconds=0.0))
    for name in ("nbf", "iat"):
        with pytest.raises(Unauthorized, match=name):
            await strict.authenticate(signed(json.dumps(claims(**{name: time.time() + 5}))))


async def test_a_null_is_no_time() -> None:
    assert await refusal(signed(json.dumps(claims(nbf=None)))) == "the token's nbf claim must be a time in Unix seconds"


@pytest.mark.parametrize(
    ("claim", "given", "message"),
    [
        ("client_id", {"client_id": "anynode"}, None),  # an access token of Amazon Cognito
        ("azp", {"azp": "anynode"}, None),  # a session token of Clerk
        ("client_id", {"client_id": "anynode", "aud": "other"}, None),
        ("client_id", {"aud": "anynode"}, "the token has no client_id claim"),
        ("client_id", {"client_id": None}, "the token has no client_id claim"),
        ("client_id", {"client_id": "other"}, "the token is for another audience (client_id)"),
        ("client_id", {"client_id": ["anynode"]}, "the token is for another audience (client_id)"),
        ("client_id", {"client_id": {"anynode": 1}}, "the token is for another audience (client_id)"),
        ("aud", {"aud": ["other", "anynode"]}, None),
        ("aud", {"aud": []}, "the token is for another audience (aud)"),
        ("aud", {"aud": [["anynode"]]}, "the token is for another audience (aud)"),
    ],
)
async def test_the_audience_is_in_the_claim_that_the_settings_name(
    claim: str, given: dict[str, Any], message: str | None
) -> None:
    verifier = Authenticator(Settings(jwt_secret=SECRET, jwt_audience_claim=claim))
    token = signed(json.dumps(claims(**{"aud": MISSING, **given})))
    if message is None:
        assert (await verifier.authenticate(token)).user_id == "ada"
        return
    with pytest.raises(Unauthorized) as refused:
        await verifier.authenticate(token)
    assert refused.value.message == message


async def test_a_token_is_made_with_the_audience_in_that_claim() -> None:
    verifier = Authenticator(Settings(jwt_secret=SECRET, jwt_audience_claim="azp"))
    token = make_token(
        SECRET, user_id="ada", audience="anynode", audience_claim="azp", issuer="anynode", ttl_seconds=60
    )
    assert (await verifier.authenticate(token)).user_id == "ada"


# Limits.


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        ({}, {}),
        ({"turns": 5}, {"turns": 5}),
        ({"turns": 0, "connections": LIMIT_MAX}, {"turns": 0, "connections": LIMIT_MAX}),
        ({"turns_per_minute": 1, "tokens_per_day": 2}, {"turns_per_minute": 1, "tokens_per_day": 2}),
    ],
)
async def test_a_token_carries_limits_and_the_settings_say_the_others(
    claim: dict[str, int], expected: dict[str, int]
) -> None:
    given = Settings(jwt_secret=SECRET)
    token = make_token(SECRET, user_id="ada", audience="anynode", issuer="anynode", ttl_seconds=60, limits=claim)
    identity = await Authenticator(given).authenticate(token)
    assert identity.limits == msgspec.structs.replace(given.user_limits, **expected)


@pytest.mark.parametrize(
    "literal",
    [
        *("null", "[]", "7", '"turns"', "true", '{"turns": null}', '{"turns": "5"}', '{"turns": true}'),
        *('{"turns": -1}', '{"turns": 1.5}', '{"turns": 1000000000001}', '{"turns": 1%s}' % ("0" * 400)),
        *('{"turns": NaN}', '{"turns": 1e400}', '{"turn": 5}', '{"turns": 5, "more": 1}', '{"turns": {}}'),
        '{"connections": [1]}',
    ],
)
async def test_limits_that_are_none_are_refused_with_the_name_of_the_claim(literal: str) -> None:
    message = await refusal(signed(payload_with("anynode_limits", literal)))
    assert message == (
        "the token's anynode_limits claim must be an object with any of turns, turns_per_minute, tokens_per_day, "
        "connections, each an integer from 0 to 1000000000000"
    )


# Revocations.


async def test_a_revoked_token_is_refused_and_told_to_nobody() -> None:
    told: list[Identity] = []
    verifier = Authenticator(
        Settings(jwt_secret=SECRET),
        on_verified=told.append,
        is_revoked=lambda identity: identity.issued_at < time.time() - 100,
    )
    new = await verifier.authenticate(signed(json.dumps(claims())))
    with pytest.raises(Unauthorized, match="the token was revoked"):
        await verifier.authenticate(signed(json.dumps(claims(iat=time.time() - 101))))
    assert told == [new]
    verifier.check(new)
    with pytest.raises(Unauthorized, match="the token was revoked"):
        verifier.check(replace(new, issued_at=1.0))


async def test_one_of_several_audiences_is_enough() -> None:
    token = signed(json.dumps(claims(aud=["other", "anynode"])))
    assert (await authenticator().authenticate(token)).user_id == "ada"


async def test_a_token_of_another_secret_is_refused() -> None:
    assert await refusal(signed(json.dumps(claims()), key=b"x" * 32)) == "the token's signature is wrong"


@pytest.mark.parametrize("alg", ["none", "None", "HS512", "RS256", "", None, 1, ["HS256"], {"HS256": 1}])
async def test_no_other_algorithm_than_that_of_the_key_is_accepted(alg: Any) -> None:
    message = await refusal(signed(json.dumps(claims()), header=json.dumps({"alg": alg})))
    assert message == "the token is signed with an algorithm that its key is not for (alg)"


async def test_an_unsigned_token_is_refused() -> None:
    unsigned = jwt.encode(claims(), "", algorithm="none")
    assert await refusal(unsigned) == "the token is signed with an algorithm that its key is not for (alg)"


@pytest.mark.parametrize(
    "extra",
    [
        *({"crit": ["exp"]}, {"crit": ["b64"]}, {"crit": ["b64"], "b64": True}, {"crit": ["b64"], "b64": False}),
        *({"b64": False}, {"crit": []}, {"crit": None}, {"crit": "b64"}, {"kid": 7}, {"kid": ["a"]}),
    ],
)
async def test_a_header_that_must_not_be_ignored_is_refused(extra: dict[str, Any]) -> None:
    await refusal(signed(json.dumps(claims()), header=json.dumps({"alg": "HS256", **extra})))


@pytest.mark.parametrize(
    "token",
    [
        *("", ".", "..", "...", "a.b.c", "a" * 1000, "\x00", "\ud800.a.b", "é.é.é", "Bearer x", "eyJ9.eyJ9.eyJ9"),
        *("." * TOKEN_CHARACTERS_MAX, "=" * 100, " . . ", "\n.\n.\n"),
        signed("[]"),
        signed("null"),
        signed("1"),
        signed("[" * 5000),
        signed('{"a":' * 1500),
        signed("{}", header="[]"),
        signed("{}", header="[" * 5000),
        signed("{}", header="null"),
        signed('{"exp":' + "9" * 5000 + "}"),
        signed(json.dumps(claims(jti=1))),
        signed(signed(json.dumps(claims()))),
    ],
    ids=lambda token: f"{len(token)} characters",  # the tokens are new in each run
)
async def test_what_is_no_token_is_called_malformed(token: str) -> None:
    assert await refusal(token) == "the token is malformed"


async def test_a_token_is_at_most_16_384_characters_long() -> None:
    empty = len(signed(json.dumps(claims(more=""))))
    token = signed(json.dumps(claims(more="a" * ((TOKEN_CHARACTERS_MAX - empty) * 3 // 4))))
    assert TOKEN_CHARACTERS_MAX - 3 < len(token) <= TOKEN_CHARACTERS_MAX
    assert (await authenticator().authenticate(token)).user_id == "ada"
    longer = signed(json.dumps(claims(more="a" * (TOKEN_CHARACTERS_MAX - empty))))
    for refused in (longer, "a" * 10_000_000):
        assert await refusal(refused) == "the token is longer than 16384 characters"


# The first use of st.text builds tables for a second; a loaded machine is no failure.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
CLAIMS = st.dictionaries(
    st.sampled_from(["sub", "aud", "iss", "iat", "exp", "nbf", "jti", "email", "anynode_limits"]), JSON
)
HEADERS = st.dictionaries(st.sampled_from(["alg", "kid", "crit", "b64", "typ", "cty", "zip", "jwk"]), JSON)


@given(changes=CLAIMS, header=HEADERS, right_algorithm=st.booleans())
async def test_signed_claims_of_any_kind_are_accepted_or_unauthorized(
    changes: dict[str, Any], header: dict[str, Any], right_algorithm: bool
) -> None:
    header = {**header, "alg": "HS256"} if right_algorithm else header
    try:
        identity = await authenticator().authenticate(signed(json.dumps(claims(**changes)), header=json.dumps(header)))
    except Unauthorized:
        return
    assert 0 < len(identity.user_id) <= 255
    assert "\x00" not in identity.user_id
    identity.user_id.encode()  # no lone surrogate
    assert time.time() - 5 < identity.expires_at < 1e12


@given(token=st.text(st.characters(exclude_categories=[])) | st.from_regex(r"[\w-]*\.[\w-]*\.[\w-]*"))
async def test_any_text_is_unauthorized(token: str) -> None:
    with pytest.raises(Unauthorized):
        await authenticator().authenticate(token)


@given(position=st.integers(0, 400), character=st.characters(codec="ascii"))
async def test_a_token_with_another_character_anywhere_is_unauthorized(position: int, character: str) -> None:
    token = signed('{"sub":"ada","aud":"anynode","iss":"anynode","iat":1,"exp":9999999999}')
    position %= len(token)
    changed = token[:position] + character + token[position + 1 :]
    if changed == token:
        assert await authenticator().authenticate(token) == Identity(
            "ada", 9999999999.0, issued_at=1.0, limits=Settings().user_limits
        )
    else:
        with pytest.raises(Unauthorized):
            await authenticator().authenticate(changed)


async def test_a_refusal_does_not_show_the_secret_or_the_token() -> None:
    token = signed(json.dumps(claims(sub="")))
    message = await refusal(token)
    assert SECRET not in message
    assert token not in message


def test_an_authenticator_without_a_key_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="JWT_SECRET or JWT_JWKS_URL"):
        Authenticator(Settings())


def test_a_public_key_as_secret_is_a_configuration_error() -> None:
    public = rsa.generate_private_key(65537, 2048).public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for secret in (pem.decode(), "", "\udc80" * 32):
        with pytest.raises(ConfigurationError, match="JWT_SECRET"):
            Authenticator(Settings(jwt_secret=secret))


# E-mail addresses.


async def identity_with(email: object) -> Identity:
    return await authenticator().authenticate(jwt.encode(claims(email=email), SECRET, algorithm="HS256"))


@pytest.mark.parametrize("email", ["a@b", "ada@example.org", "Ada Lovelace <ada@example.org>", "ä@ö", "a" * 252 + "@b"])
async def test_an_address_in_the_token_is_in_the_identity(email: str) -> None:
    assert (await identity_with(email)).email == email


@pytest.mark.parametrize(
    "email",
    [
        *(MISSING, None, True, 7, ["ada@example.org"], {"address": "ada@example.org"}),
        *("", "a@", "ada", "ada@home@example.org", "a" * 253 + "@b", "ada\0@example.org"),
    ],
)
async def test_what_cannot_be_stored_as_an_address_is_ignored_and_the_token_is_good(email: object) -> None:
    identity = await identity_with(email)
    assert (identity.user_id, identity.email) == ("ada", None)


async def test_half_a_character_in_an_address_is_ignored() -> None:
    identity = await authenticator().authenticate(signed(payload_with("email", r'"\ud800@example.org"')))
    assert (identity.user_id, identity.email) == ("ada", None)


async def test_a_token_is_made_with_an_address_or_without() -> None:
    def made(email: str | None) -> str:
        return make_token(SECRET, user_id="ada", audience="anynode", issuer="anynode", ttl_seconds=60, email=email)

    assert (await authenticator().authenticate(made("ada@example.org"))).email == "ada@example.org"
    assert "email" not in jwt.decode(made(None), options={"verify_signature": False})


async def test_each_good_token_is_told_and_no_other() -> None:
    told: list[Identity] = []
    verifier = Authenticator(Settings(jwt_secret=SECRET), on_verified=told.append)
    good = jwt.encode(claims(email="ada@example.org"), SECRET, algorithm="HS256")
    for token in (good, jwt.encode(claims(exp=1), SECRET, algorithm="HS256"), good[:-4] + "AAAA", good):
        try:
            await verifier.authenticate(token)
        except Unauthorized:
            pass
    assert [(identity.user_id, identity.email) for identity in told] == [("ada", "ada@example.org")] * 2
