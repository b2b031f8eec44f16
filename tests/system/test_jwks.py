"""Tokens of an issuer with a JWKS: a real HTTP server on this machine, and a clock that the test turns."""

from __future__ import annotations

import asyncio
import gzip
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

import anynode.server.auth.jwks
from anynode.server.auth import Authenticator, make_token
from anynode.server.errors import KeysUnavailable, Unauthorized
from anynode.server.settings import Settings

PrivateKey: TypeAlias = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | Ed25519PrivateKey

RSA_1, RSA_2 = (rsa.generate_private_key(65537, 2048) for _ in range(2))
EC_1 = ec.generate_private_key(ec.SECP256R1())
EC_384, ED_1 = ec.generate_private_key(ec.SECP384R1()), Ed25519PrivateKey.generate()
RSA_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
UNREACHABLE = "The signing keys cannot be fetched at the moment; try again."
NOT_YET = "The signing key is not known yet; try again."
UNKNOWN = "the signing key is unknown"


class Clock:
    """A monotonic clock that stands still until it is turned."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Issuer:
    """Serves `body`; counts requests; holds them back while `open_gate` is clear."""

    def __init__(self) -> None:
        self.body: bytes = b""
        self.status, self.headers, self.requests = 200, dict[str, str](), 0
        self.asked, self.open_gate = asyncio.Event(), asyncio.Event()
        self.open_gate.set()
        application = web.Application()
        application.router.add_get("/jwks", self._answer)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)

    async def _answer(self, request: web.Request) -> web.Response:
        self.requests += 1
        self.asked.set()
        await self.open_gate.wait()
        return web.Response(body=self.body, status=self.status, headers=self.headers)

    async def start(self, port: int = 0) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        self.port: int = self._runner.addresses[0][1]

    async def stop(self) -> None:
        self.open_gate.set()
        await self._runner.cleanup()

    def publish(self, *entries: Any) -> None:
        self.body = json.dumps({"keys": entries}).encode()


def jwk(key: PrivateKey, kid: str | None) -> dict[str, Any]:
    if isinstance(key, rsa.RSAPrivateKey):
        entry = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    elif isinstance(key, Ed25519PrivateKey):
        entry = OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)
    else:
        entry = ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    return entry if kid is None else {**entry, "kid": kid}


def token_of(key: PrivateKey, kid: str | None, **changes: Any) -> str:
    now = int(time.time())
    claims = {"sub": "ada", "aud": "anynode", "iss": "anynode", "iat": now, "exp": now + 60, **changes}
    algorithm = "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"
    return jwt.encode(claims, key, algorithm=algorithm, headers=None if kid is None else {"kid": kid})


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    issuer = Issuer()
    issuer.publish(jwk(RSA_1, "one"), jwk(EC_1, "curve"))
    await issuer.start()
    yield issuer
    await issuer.stop()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def authenticator(issuer: Issuer, clock: Clock) -> AsyncIterator[Authenticator]:
    authenticator = Authenticator(Settings(jwt_jwks_url=f"http://127.0.0.1:{issuer.port}/jwks"), monotonic=clock)
    yield authenticator
    await authenticator.close()


async def user_of(authenticator: Authenticator, token: str) -> str:
    return (await authenticator.authenticate(token)).user_id


async def refusal(authenticator: Authenticator, token: str) -> str:
    with pytest.raises((Unauthorized, KeysUnavailable)) as refused:
        await authenticator.authenticate(token)
    assert isinstance(refused.value, KeysUnavailable) == (refused.value.message in (UNREACHABLE, NOT_YET))
    return refused.value.message


@pytest.mark.parametrize(
    ("key", "alg", "header"),
    [
        *((RSA_1, alg, alg) for alg in RSA_ALGORITHMS),
        (EC_1, None, "ES256"),
        (EC_384, None, "ES384"),
        (ED_1, None, "EdDSA"),
        (ED_1, "EdDSA", "Ed25519"),  # one algorithm with two names (RFC 9864)
        (ED_1, "Ed25519", "EdDSA"),
    ],
)
async def test_a_key_verifies_the_algorithm_that_it_is_for_and_no_other(
    authenticator: Authenticator, issuer: Issuer, key: PrivateKey, alg: str | None, header: str
) -> None:
    issuer.publish({**jwk(key, "key"), **({} if alg is None else {"alg": alg})})
    assert await user_of(authenticator, signed_with(key, header)) == "ada"
    for other in set(RSA_ALGORITHMS) - {header} if isinstance(key, rsa.RSAPrivateKey) else ():
        message = await refusal(authenticator, signed_with(key, other))
        assert message == "the token is signed with an algorithm that its key is not for (alg)"
    # The signature is right, and the header calls it another one.
    for other in ("RS256", "ES256", "EdDSA", "Ed25519", "none", "HS256"):
        if {other, header} - {"EdDSA", "Ed25519"} and other != header:
            message = await refusal(authenticator, signed_with(key, header, called=other))
            assert message == "the token is signed with an algorithm that its key is not for (alg)"


def signed_with(key: PrivateKey, algorithm: str, called: str | None = None) -> str:
    """A token signed with an algorithm, which its header may call by another name."""
    signer = jwt.get_algorithm_by_name("EdDSA" if algorithm == "Ed25519" else algorithm)
    encode = jwt.utils.base64url_encode
    claims = jwt.decode(token_of(EC_1, None), options={"verify_signature": False})
    parts = [{"alg": called or algorithm, "kid": "key"}, claims]
    signing_input = b".".join(encode(json.dumps(part).encode()) for part in parts)
    return (signing_input + b"." + encode(signer.sign(signing_input, key))).decode()


@pytest.mark.parametrize(("key", "kid"), [(RSA_1, "one"), (EC_1, "curve")])
async def test_a_token_of_a_published_key_is_accepted(authenticator: Authenticator, key: PrivateKey, kid: str) -> None:
    assert await user_of(authenticator, token_of(key, kid)) == "ada"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exp": 1}, "the token has expired"),
        ({"aud": "other"}, "the token is for another audience (aud)"),
        ({"iss": "other"}, "the token is from another issuer (iss)"),
        ({"sub": ""}, "the token's sub claim must be 1 to 255 printable characters"),
    ],
)
async def test_a_wrong_claim_is_refused(authenticator: Authenticator, changes: dict[str, Any], message: str) -> None:
    assert await refusal(authenticator, token_of(EC_1, "curve", **changes)) == message


async def test_a_key_signs_for_no_other_kid(authenticator: Authenticator) -> None:
    assert await refusal(authenticator, token_of(RSA_2, "one")) == "the token's signature is wrong"


async def test_many_tokens_take_one_fetch(authenticator: Authenticator, issuer: Issuer) -> None:
    for _ in range(3):
        await authenticator.authenticate(token_of(RSA_1, "one"))
    assert issuer.requests == 1


async def test_concurrent_callers_share_the_first_fetch(authenticator: Authenticator, issuer: Issuer) -> None:
    issuer.open_gate.clear()
    callers = [asyncio.create_task(user_of(authenticator, token_of(EC_1, "curve"))) for _ in range(50)]
    await issuer.asked.wait()
    assert not any(caller.done() for caller in callers)
    issuer.open_gate.set()
    assert await asyncio.gather(*callers) == ["ada"] * 50
    assert issuer.requests == 1


async def test_a_caller_that_goes_away_does_not_end_the_fetch_for_others(
    authenticator: Authenticator, issuer: Issuer
) -> None:
    issuer.open_gate.clear()
    leaving, staying = (asyncio.create_task(user_of(authenticator, token_of(EC_1, "curve"))) for _ in range(2))
    await issuer.asked.wait()
    leaving.cancel()
    await asyncio.wait([leaving])
    issuer.open_gate.set()
    assert await staying == "ada"
    assert leaving.cancelled()
    assert issuer.requests == 1


async def test_a_slow_first_fetch_is_not_started_again(
    authenticator: Authenticator, issuer: Issuer, clock: Clock
) -> None:
    issuer.open_gate.clear()
    first = asyncio.create_task(user_of(authenticator, token_of(EC_1, "curve")))
    await issuer.asked.wait()
    clock.now += 2
    tasks = asyncio.all_tasks()
    second = asyncio.create_task(user_of(authenticator, token_of(EC_1, "curve")))
    await asyncio.sleep(0)  # its first step
    assert asyncio.all_tasks() == tasks | {second}
    issuer.open_gate.set()
    assert await first == await second == "ada"
    assert issuer.requests == 1


async def test_the_only_key_needs_no_kid(authenticator: Authenticator, issuer: Issuer) -> None:
    issuer.publish(jwk(RSA_1, None), {**jwk(RSA_2, "encryption"), "use": "enc"}, {"kty": "EC", "crv": "P-256"})
    assert await user_of(authenticator, token_of(RSA_1, None)) == "ada"


async def test_a_token_without_kid_is_refused_when_there_are_several_keys(authenticator: Authenticator) -> None:
    message = "the token does not say which key signed it (kid)"
    assert await refusal(authenticator, token_of(RSA_1, None)) == message  # while the first fetch is awaited
    assert await refusal(authenticator, token_of(RSA_1, None)) == message


async def test_a_new_key_is_found_at_once_and_the_next_one_ten_seconds_later(
    authenticator: Authenticator, issuer: Issuer, clock: Clock
) -> None:
    await authenticator.authenticate(token_of(RSA_1, "one"))
    issuer.publish(jwk(RSA_1, "one"), jwk(RSA_2, "two"))
    assert await user_of(authenticator, token_of(RSA_2, "two")) == "ada"
    assert issuer.requests == 2

    issuer.publish(jwk(RSA_2, "two"), jwk(EC_1, "three"))
    clock.now += 9.9
    assert await refusal(authenticator, token_of(EC_1, "three")) == NOT_YET
    assert await user_of(authenticator, token_of(RSA_2, "two")) == "ada"
    assert issuer.requests == 2
    clock.now += 0.2
    assert await user_of(authenticator, token_of(EC_1, "three")) == "ada"
    assert issuer.requests == 3
    assert await refusal(authenticator, token_of(RSA_1, "one")) == NOT_YET  # withdrawn, which is looked up …
    clock.now += 10
    assert await refusal(authenticator, token_of(RSA_1, "one")) == UNKNOWN
    assert await refusal(authenticator, token_of(RSA_1, "one")) == UNKNOWN  # … once
    assert issuer.requests == 4


async def test_made_up_keys_do_not_keep_a_new_one_waiting_and_cost_the_issuer_a_request_in_ten_seconds(
    authenticator: Authenticator, issuer: Issuer, clock: Clock
) -> None:
    await authenticator.authenticate(token_of(RSA_1, "one"))
    await refusal(authenticator, token_of(RSA_2, "made up"))
    issuer.publish(jwk(RSA_1, "one"), jwk(RSA_2, "two"))
    assert await refusal(authenticator, token_of(RSA_2, "two")) == NOT_YET
    for number in range(50):
        clock.now += 0.2
        await refusal(authenticator, token_of(RSA_2, f"made up {number}"))
    assert await user_of(authenticator, token_of(RSA_2, "two")) == "ada"
    assert issuer.requests == 3


async def test_the_key_that_was_asked_for_is_fetched_by_itself_when_the_node_may_ask_again(
    authenticator: Authenticator, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anynode.server.auth.jwks, "JWKS_COOLDOWN_SECONDS", 0.3)
    ticking = Authenticator(Settings(jwt_jwks_url=f"http://127.0.0.1:{issuer.port}/jwks"))
    keeping = asyncio.create_task(ticking.run())
    try:
        assert not ticking.has_keys
        await issuer.asked.wait()  # nobody has come with a token
        await user_of(ticking, token_of(RSA_1, "one"))
        assert ticking.has_keys
        await refusal(ticking, token_of(RSA_2, "made up"))
        issuer.publish(jwk(RSA_1, "one"), jwk(RSA_2, "two"))
        assert await refusal(ticking, token_of(RSA_2, "two")) == NOT_YET
        issuer.asked.clear()
        await issuer.asked.wait()
        assert issuer.requests == 3
        assert await user_of(ticking, token_of(RSA_2, "two")) == "ada"
    finally:
        keeping.cancel()
        await asyncio.wait((keeping,))
        await ticking.close()


async def test_keys_that_cannot_be_confirmed_for_a_day_are_trusted_no_more(
    authenticator: Authenticator, issuer: Issuer, clock: Clock
) -> None:
    await authenticator.authenticate(token_of(RSA_1, "one"))
    issuer.status = 500
    clock.now += 86_399
    assert await user_of(authenticator, token_of(RSA_1, "one")) == "ada"
    assert await refusal(authenticator, token_of(RSA_2, "two")) == NOT_YET  # waits for the fetch
    clock.now += 2
    assert not authenticator.has_keys
    assert await refusal(authenticator, token_of(RSA_1, "one")) == UNREACHABLE
    issuer.status = 200
    clock.now += 1
    assert await user_of(authenticator, token_of(RSA_1, "one")) == "ada"
    assert authenticator.has_keys


async def test_concurrent_callers_share_the_fetch_for_a_new_key(authenticator: Authenticator, issuer: Issuer) -> None:
    await authenticator.authenticate(token_of(RSA_1, "one"))
    issuer.publish(jwk(RSA_1, "one"), jwk(RSA_2, "two"))
    issuer.open_gate.clear()
    issuer.asked.clear()
    callers = [asyncio.create_task(user_of(authenticator, token_of(RSA_2, "two"))) for _ in range(50)]
    await issuer.asked.wait()
    assert await user_of(authenticator, token_of(RSA_1, "one")) == "ada"  # known keys do not wait
    issuer.open_gate.set()
    assert await asyncio.gather(*callers) == ["ada"] * 50
    assert issuer.requests == 2


async def test_an_unknown_kid_on_a_first_fetch_is_not_fetched_twice(
    authenticator: Authenticator, issuer: Issuer
) -> None:
    assert await refusal(authenticator, token_of(RSA_2, "two")) == UNKNOWN
    assert issuer.requests == 1


async def test_old_keys_serve_while_a_refresh_is_under_way(
    authenticator: Authenticator, issuer: Issuer, clock: Clock
) -> None:
    await authenticator.authenticate(token_of(RSA_1, "one"))
    clock.now += 599
    await authenticator.authenticate(token_of(RSA_1, "one"))
    assert issuer.requests == 1
    issuer.publish(jwk(RSA_2, "two"))
    issuer.open_gate.clear()
    issuer.asked.clear()
    clock.now += 2
    assert await user_of(authenticator, token_of(RSA_1, "one")) == "ada"
    await issuer.asked.wait()
    waiting = asyncio.create_task(user_of(authenticator, token_of(RSA_2, "two")))
    issuer.open_gate.set()
    assert await waiting == "ada"
    assert issuer.requests == 2


async def test_keys_go_on_serving_when_the_issuer_is_gone(
    authenticator: Authenticator, issuer: Issuer, clock: Clock
) -> None:
    await authenticator.authenticate(token_of(RSA_1, "one"))
    await issuer.stop()
    for _ in range(3):
        clock.now += 601
        assert await user_of(authenticator, token_of(RSA_1, "one")) == "ada"
        assert await refusal(authenticator, token_of(RSA_2, "two")) == NOT_YET  # waits for the refresh to fail
    assert await user_of(authenticator, token_of(RSA_1, "one")) == "ada"


async def test_an_issuer_that_breaks_does_not_spoil_the_keys(
    authenticator: Authenticator, issuer: Issuer, clock: Clock
) -> None:
    await authenticator.authenticate(token_of(RSA_1, "one"))
    issuer.body = b'{"keys": []}'
    clock.now += 601
    assert await refusal(authenticator, token_of(RSA_2, "two")) == NOT_YET  # waits for the fetch to fail
    assert issuer.requests == 2
    assert await user_of(authenticator, token_of(RSA_1, "one")) == "ada"
    clock.now += 9.9  # a failed one is repeated after 10 seconds where a key is wanted
    tasks = asyncio.all_tasks()
    await authenticator.authenticate(token_of(RSA_1, "one"))
    assert asyncio.all_tasks() == tasks
    clock.now += 0.2
    issuer.asked.clear()
    await authenticator.authenticate(token_of(RSA_1, "one"))
    await issuer.asked.wait()
    assert issuer.requests == 3


async def test_a_failed_first_fetch_is_refused_and_repeated_after_a_second(
    authenticator: Authenticator, issuer: Issuer, clock: Clock
) -> None:
    issuer.status = 503
    for _ in range(3):
        assert await refusal(authenticator, token_of(RSA_1, "one")) == UNREACHABLE
    assert issuer.requests == 1
    issuer.status = 200
    clock.now += 1
    assert await user_of(authenticator, token_of(RSA_1, "one")) == "ada"
    assert issuer.requests == 2


async def test_an_issuer_that_is_down_at_first_is_used_when_it_comes_up(
    authenticator: Authenticator, issuer: Issuer, clock: Clock
) -> None:
    await issuer.stop()
    assert await refusal(authenticator, token_of(RSA_1, "one")) == UNREACHABLE
    revived = Issuer()
    revived.publish(jwk(RSA_1, "one"))
    await revived.start(issuer.port)
    clock.now += 1
    assert await user_of(authenticator, token_of(RSA_1, "one")) == "ada"
    await revived.stop()


@pytest.mark.parametrize(
    "body", [b"", b"junk", b"[]", b"<html>", b"\xff\xfe\x00", b'{"keys":[{"kty":"RSA"}]}', b"[" * 100_000]
)
async def test_a_garbage_body_is_a_failed_fetch(authenticator: Authenticator, issuer: Issuer, body: bytes) -> None:
    issuer.body = body
    assert await refusal(authenticator, token_of(RSA_1, "one")) == UNREACHABLE


@pytest.mark.parametrize("compressed", [False, True])
async def test_a_body_over_1_mebibyte_is_a_failed_fetch(
    authenticator: Authenticator, issuer: Issuer, clock: Clock, compressed: bool
) -> None:
    fitting = issuer.body + b" " * (1_048_576 - len(issuer.body))
    issuer.body = fitting + b" "
    if compressed:
        issuer.body, issuer.headers = gzip.compress(issuer.body), {"Content-Encoding": "gzip"}
    assert await refusal(authenticator, token_of(RSA_1, "one")) == UNREACHABLE
    issuer.body, issuer.headers = fitting, {}
    clock.now += 1
    assert await user_of(authenticator, token_of(RSA_1, "one")) == "ada"


async def test_a_redirect_is_not_followed(authenticator: Authenticator, issuer: Issuer) -> None:
    issuer.status, issuer.headers = 302, {"Location": "/jwks?elsewhere"}
    assert await refusal(authenticator, token_of(RSA_1, "one")) == UNREACHABLE
    assert issuer.requests == 1


async def test_an_issuer_that_does_not_answer_is_left(
    authenticator: Authenticator, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anynode.server.auth.jwks, "JWKS_SECONDS_MAX", 0.05)
    issuer.open_gate.clear()
    async with asyncio.timeout(2):
        assert await refusal(authenticator, token_of(RSA_1, "one")) == UNREACHABLE


async def test_one_bad_key_does_not_spoil_the_others(authenticator: Authenticator, issuer: Issuer) -> None:
    bad: list[Any] = [
        None,
        {},
        {"kty": "RSA", "n": 7, "e": []},
        {"kty": "EC", "crv": "P-256", "x": "!", "y": "!"},
        {"kty": {}},
    ]
    issuer.publish(*bad, jwk(EC_1, "curve"))
    assert await user_of(authenticator, token_of(EC_1, "curve")) == "ada"


async def test_the_public_key_is_no_secret(authenticator: Authenticator, issuer: Issuer) -> None:
    public = RSA_1.public_key()
    subject = serialization.PublicFormat.SubjectPublicKeyInfo
    candidates = [
        public.public_bytes(serialization.Encoding.PEM, subject),
        public.public_bytes(serialization.Encoding.DER, subject),
        json.dumps(jwk(RSA_1, "one")).encode(),
    ]
    for candidate in candidates:
        message = await refusal(authenticator, confused_token(candidate))
        assert message == "the token is signed with an algorithm that its key is not for (alg)"


def confused_token(key: bytes, header: dict[str, Any] | None = None) -> str:
    """HS256 with a public key as its secret, which PyJWT refuses to make."""
    signer = jwt.PyJWS(algorithms=[])
    signer.register_algorithm("HS256", AnyKey(AnyKey.SHA256))
    claims = jwt.decode(token_of(RSA_1, "one"), options={"verify_signature": False})
    return signer.encode(json.dumps(claims).encode(), key, "HS256", headers=header or {"kid": "one"})


class AnyKey(jwt.algorithms.HMACAlgorithm):
    def prepare_key(self, key: str | bytes) -> bytes:
        assert isinstance(key, bytes)
        return key


@pytest.mark.parametrize(("key", "kid"), [(RSA_1, "curve"), (EC_1, "one")])
async def test_the_algorithm_follows_from_the_key_and_not_from_the_token(
    authenticator: Authenticator, key: PrivateKey, kid: str
) -> None:
    message = await refusal(authenticator, token_of(key, kid))
    assert message == "the token is signed with an algorithm that its key is not for (alg)"


@pytest.mark.parametrize("algorithm", ["RS384", "RS512", "PS256"])
async def test_an_rsa_key_without_an_algorithm_is_used_with_rs256_only(
    authenticator: Authenticator, algorithm: str
) -> None:
    claims = jwt.decode(token_of(RSA_1, "one"), options={"verify_signature": False})
    token = jwt.encode(claims, RSA_1, algorithm=algorithm, headers={"kid": "one"})
    message = await refusal(authenticator, token)
    assert message == "the token is signed with an algorithm that its key is not for (alg)"


async def test_a_secret_beside_the_address_serves_its_own_tokens_only(issuer: Issuer) -> None:
    secret = secrets.token_urlsafe(32)
    both = Authenticator(Settings(jwt_jwks_url=f"http://127.0.0.1:{issuer.port}/jwks", jwt_secret=secret))
    made = make_token(secret, user_id="bob", audience="anynode", issuer="anynode", ttl_seconds=60)
    assert await user_of(both, made) == "bob"
    assert issuer.requests == 0
    assert await user_of(both, token_of(RSA_1, "one")) == "ada"
    pem = RSA_1.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert await refusal(both, confused_token(pem)) == "the token's signature is wrong"
    await both.close()


async def test_close_ends_a_fetch_and_its_callers(authenticator: Authenticator, issuer: Issuer, clock: Clock) -> None:
    issuer.open_gate.clear()
    caller = asyncio.create_task(refusal(authenticator, token_of(RSA_1, "one")))
    await issuer.asked.wait()
    async with asyncio.timeout(2):  # less than the fetch may take
        await authenticator.close()
    assert await caller == UNREACHABLE
    clock.now += 1
    issuer.open_gate.set()
    assert await refusal(authenticator, token_of(RSA_1, "one")) == UNREACHABLE
    assert issuer.requests == 1


async def test_close_before_anything_was_fetched_is_harmless(authenticator: Authenticator) -> None:
    await authenticator.close()
    await authenticator.close()


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text(), max_size=2)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(st.sampled_from(["sub", "aud", "iss", "iat", "exp", "nbf"]), JSON),
    header=st.dictionaries(st.sampled_from(["kid", "alg", "crit", "b64", "jku", "jwk", "x5u"]), JSON),
)
async def test_any_signed_token_is_accepted_or_unauthorized(
    authenticator: Authenticator, changes: dict[str, Any], header: dict[str, Any]
) -> None:
    token = signed_by_hand(RSA_1, changes, {"alg": "RS256", "kid": "one", **header})
    try:
        identity = await authenticator.authenticate(token)
    except (Unauthorized, KeysUnavailable):
        return
    assert identity.user_id.isprintable()


def signed_by_hand(key: rsa.RSAPrivateKey, changes: dict[str, Any], header: dict[str, Any]) -> str:
    claims = {**jwt.decode(token_of(key, None), options={"verify_signature": False}), **changes}
    encode = jwt.utils.base64url_encode
    signing_input = encode(json.dumps(header).encode()) + b"." + encode(json.dumps(claims).encode())
    signature = RSAAlgorithm(RSAAlgorithm.SHA256).sign(signing_input, key)
    return (signing_input + b"." + encode(signature)).decode()
