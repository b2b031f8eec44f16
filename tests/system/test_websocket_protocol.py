"""The connections that serve speak RFC 6455, case by case as sections 1 to 7 and 9 of Autobahn's test suite have it.

Each case sends what a client may or must not send to an echo on the very class that serves, over raw sockets. In three
ways `websockets` differs from the RFC or from Autobahn, and the table says what it does:

- A close between the fragments of a message (7.1.5) fails with 1002, and is not answered with the code that it has.
- A length that is not as short as it can be (RFC 6455, 5.2) is accepted. Autobahn has no such case.
- Invalid UTF-8 is found at the end of a message, not as soon as it has come. Autobahn calls that non-strict.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Final, NamedTuple

import pytest
import pytest_asyncio

from tests.kit.listening import LONGER_MESSAGE_BYTES, LONGER_PATH, PATIENCE_SECONDS, echo, frame, listening, raw_socket

TEXT: Final = 1
BINARY: Final = 2
CONT: Final = 0
CLOSE: Final = 8
PING: Final = 9
PONG: Final = 10
Frames = Sequence[tuple[int, bytes]]

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Case(NamedTuple):
    """What a client sends, and what it is sent.

    `code` is the code with which the server fails the connection. Where there is none, the client closes it with 1000
    in the end, unless it `is_closing` already.
    """

    name: str
    sent: bytes
    replies: Frames = ()
    code: int | None = None
    chop: int | None = None
    is_closing: bool = False


def close(code: int | None = None, reason: bytes = b"") -> bytes:
    """A close frame."""
    return frame(CLOSE, b"" if code is None else code.to_bytes(2, "big") + reason)


def fragments(opcode: int, *payloads: bytes, between: bytes = b"") -> bytes:
    """A message in pieces, with other frames between them."""
    made = [
        frame(CONT if number else opcode, payload, fin=number == len(payloads) - 1)
        for number, payload in enumerate(payloads)
    ]
    return between.join(made)


def framing() -> Iterator[Case]:
    """Section 1: messages of all sizes."""
    for section, opcode in ((1, TEXT), (2, BINARY)):
        for size in (0, 1, 125, 126, 127, 128, 65_535, 65_536):
            payload = b"*" * size
            yield Case(f"1.{section} {size} bytes", frame(opcode, payload), [(opcode, payload)])
        payload = b"*" * 65_536
        yield Case(f"1.{section} in chops of 997", frame(opcode, payload), [(opcode, payload)], chop=997)


def pings() -> Iterator[Case]:
    """Section 2: pings and pongs."""
    for number, payload in enumerate((b"", b"Hello, world!", b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff", b"\xfe" * 125), 1):
        yield Case(f"2.{number} ping", frame(PING, payload), [(PONG, payload)])
    yield Case("2.5 too long a ping", frame(PING, b"\xfe" * 126), code=1002)
    yield Case("2.6 a ping in bytes", frame(PING, b"\xfe" * 125), [(PONG, b"\xfe" * 125)], chop=1)
    yield Case("2.7 a pong that nobody asked for", frame(PONG))
    yield Case("2.8 the same with a payload", frame(PONG, b"unsolicited"))
    yield Case("2.9 a pong, then a ping", frame(PONG, b"x") + frame(PING, b"ping"), [(PONG, b"ping")])
    many = [b"payload-%d" % number for number in range(10)]
    sent = b"".join(frame(PING, each) for each in many)
    yield Case("2.10 ten pings", sent, [(PONG, each) for each in many])
    yield Case("2.11 ten pings in bytes", sent, [(PONG, each) for each in many], chop=1)


def reserved() -> Iterator[Case]:
    """Sections 3 and 4: bits and opcodes that mean nothing."""
    hello = frame(TEXT, b"Hello")
    for rsv in range(1, 8):
        for opcode in (TEXT, BINARY, PING, CLOSE):
            bad = frame(opcode, b"\x03\xe8" if opcode == CLOSE else b"x", rsv=rsv)
            yield Case(f"3 bits {rsv} of opcode {opcode}", bad, code=1002)
        bad = hello + frame(TEXT, b"Hello", rsv=rsv) + frame(PING)
        yield Case(f"3 bits {rsv} behind a message", bad, [(TEXT, b"Hello")], 1002)
        yield Case(f"3 bits {rsv} in bytes", bad, [(TEXT, b"Hello")], 1002, chop=1)
    for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15):
        for payload in (b"", b"reserved"):
            bad = hello + frame(opcode, payload) + frame(PING)
            yield Case(f"4 opcode {opcode}, {len(payload)} bytes", bad, [(TEXT, b"Hello")], 1002)
    yield Case("4 no mask", frame(TEXT, b"Hello", mask=None), code=1002)
    yield Case("4 no mask behind a message", hello + frame(TEXT, mask=None), [(TEXT, b"Hello")], 1002)


def fragmentation() -> Iterator[Case]:
    """Section 5: messages in pieces."""
    for opcode in (PING, PONG):
        bad = frame(opcode, b"a", fin=False) + frame(CONT, b"b")
        yield Case(f"5.1 opcode {opcode} in pieces", bad, code=1002)
    both, echoed = fragments(TEXT, b"frag1", b"frag2"), [(TEXT, b"frag1frag2")]
    pinged = fragments(TEXT, b"frag1", b"frag2", between=frame(PING, b"ping"))
    five = fragments(TEXT, *(b"fragment%d" % n for n in range(1, 6)), between=frame(PING, b"p"))
    whole = [(PONG, b"p")] * 4 + [(TEXT, b"".join(b"fragment%d" % n for n in range(1, 6)))]
    orphan = frame(CONT, b"orphan")
    for chop in (None, 1):
        how = "in bytes" if chop else "at once"
        yield Case(f"5.3 two pieces {how}", both, echoed, chop=chop)
        yield Case(f"5.6 a ping in between {how}", pinged, [(PONG, b"ping"), *echoed], chop=chop)
        yield Case(f"5.9 no first piece {how}", orphan + frame(TEXT, b"x"), code=1002, chop=chop)
        unended = frame(CONT, b"orphan", fin=False) + frame(TEXT, b"x")
        yield Case(f"5.12 no first piece, and no last {how}", unended, code=1002, chop=chop)
        yield Case(f"5.15 a piece too many {how}", both + orphan, echoed, 1002, chop=chop)
        twice = frame(TEXT, b"frag1", fin=False) + frame(TEXT, b"frag2")
        yield Case(f"5.18 two first pieces {how}", twice, code=1002, chop=chop)
        yield Case(f"5.19 five pieces and four pings {how}", five, whole, chop=chop)
    yield Case("5 empty pieces", fragments(TEXT, b"", b"", b""), [(TEXT, b"")])
    yield Case("5 pieces of binary", fragments(BINARY, b"\xff", b"", b"\x00"), [(BINARY, b"\xff\x00")])


# RFC 3629 and Markus Kuhn's stress test, as Autobahn has them.
VALID: Final = (
    *("κόσμε", "Hello-µ@ßöäüàá-UTF-8!!", "\x00", "\x7f", "\x80", "\u07ff", "\u0800", "\uffff", "\U00010000"),
    *("\ud7ff", "\ue000", "\ufffd", "\U0010ffff", "\ufffe", "\U0001fffe", "\U0002ffff", "\U000ffffe", "\U0010fffe"),
)
INVALID: Final = (
    *(b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited", b"\xf4\x90\x80\x80", b"\xf5", b"\xfe"),
    *(b"\xff", b"\xfe\xfe\xff\xff", b"\x80", b"\xbf", b"\x80\xbf", b"\x80\xbf\x80", b"\xc0 \xc1 ", b"\xce"),
    *(b"\xe1\xbd", b"\xf0\x90\x8d", b"\xc2", b"\xe0\xa0", b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80"),
    *(b"\xf7\xbf\xbf\xbf", b"\xfb\xbf\xbf\xbf\xbf", b"\xfd\xbf\xbf\xbf\xbf\xbf", b"\xc0\xaf", b"\xe0\x80\xaf"),
    *(b"\xf0\x80\x80\xaf", b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf", b"\xc0\x80", b"\xe0\x80\x80"),
    *(b"\xed\xa0\x80", b"\xed\xad\xbf", b"\xed\xae\x80", b"\xed\xaf\xbf", b"\xed\xb0\x80", b"\xed\xbf\xbf"),
    *(b"\xed\xa0\x80\xed\xb0\x80", b"\xed\xaf\xbf\xed\xbf\xbf"),
)


def utf8() -> Iterator[Case]:
    """Section 6: text is UTF-8, however it is cut into pieces."""
    for text in VALID:
        payload = text.encode()
        octets = [bytes([octet]) for octet in payload]
        yield Case(f"6 valid {payload!r}", frame(TEXT, payload), [(TEXT, payload)])
        yield Case(f"6 valid {payload!r} in pieces", fragments(TEXT, *octets, b""), [(TEXT, payload)])
    for payload in INVALID:
        octets = [bytes([octet]) for octet in payload]
        yield Case(f"6 invalid {payload!r}", frame(TEXT, payload), code=1007)
        yield Case(f"6 invalid {payload!r} in pieces", fragments(TEXT, *octets, b""), code=1007)
        behind = frame(TEXT, b"good") + frame(TEXT, b"before " + payload + b" behind")
        yield Case(f"6 invalid {payload!r} behind a message", behind, [(TEXT, b"good")], 1007, chop=1)
        yield Case(f"6 binary {payload!r}", frame(BINARY, payload), [(BINARY, payload)])


def closing() -> Iterator[Case]:
    """Section 7: the end of a connection."""
    hello, end = frame(TEXT, b"Hello"), [(CLOSE, b"\x03\xe8")]
    yield Case("7.1.1 a message, then a close", hello + close(1000), [(TEXT, b"Hello"), *end], is_closing=True)
    yield Case("7.1.2 two closes", close(1000) * 2, end, is_closing=True)
    yield Case("7.1.3 a ping behind a close", close(1000) + frame(PING, b"x"), end, is_closing=True)
    yield Case("7.1.4 a message behind a close", close(1000) + hello, end, is_closing=True)
    begun = frame(TEXT, b"frag1", fin=False)
    yield Case("7.1.5 a close between two pieces", begun + close(1000) + frame(CONT, b"frag2"), code=1002)
    long = b"*" * 262_144
    yield Case(
        "7.1.6 a long message and a close",
        frame(TEXT, long) + close(1000) + frame(PING),
        [(TEXT, long), *end],
        is_closing=True,
    )
    for reason in (b"", b"Hello World!", b"*" * 123, "κόσμε".encode()):
        echoed = [(CLOSE, b"\x03\xe8" + reason)]
        yield Case(f"7.3 a reason of {len(reason)} bytes", close(1000, reason), echoed, is_closing=True)
    yield Case("7.3.1 no code", close(), [(CLOSE, b"")], is_closing=True)
    yield Case("7.3.2 half a code", frame(CLOSE, b"\x03"), code=1002)
    yield Case("7.3.6 too long a reason", close(1000, b"*" * 124), code=1002)
    yield Case("7.5.1 a reason that is no UTF-8", close(1000, b"\xce\xba\xed\xa0\x80"), code=1007)
    for code in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999):
        for reason in (b"", b"why"):
            echoed = [(CLOSE, code.to_bytes(2, "big") + reason)]
            yield Case(f"7.7 code {code}, {len(reason)} bytes", close(code, reason), echoed, is_closing=True)
    for code in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65_535):
        yield Case(f"7.9 code {code}", close(code), code=1002)


def limits() -> Iterator[Case]:
    """Section 9, as far as messages may be long here; and lengths that cannot be."""
    for opcode in (TEXT, BINARY):
        for size in (65_536, 1_048_576, LONGER_MESSAGE_BYTES):
            payload = b"*" * size
            yield Case(f"9.{opcode} {size} bytes", frame(opcode, payload), [(opcode, payload)])
        payload = b"*" * LONGER_MESSAGE_BYTES
        parts = [payload[at : at + 65_536] for at in range(0, len(payload), 65_536)]
        yield Case(f"9.{opcode} in pieces of 65536", fragments(opcode, *parts), [(opcode, payload)])
        yield Case(f"9.{opcode} in chops of 65536", frame(opcode, payload), [(opcode, payload)], chop=65_536)
        yield Case(f"9.{opcode} a byte too long", frame(opcode, payload + b"*"), code=1009)
        yield Case(f"9.{opcode} pieces that are too long", fragments(opcode, *parts, b"*"), code=1009)
    for length in (2**32, 2**63 - 1, 2**63, 2**64 - 1):
        yield Case(f"9 a length of {length}", b"\x82\xff" + length.to_bytes(8, "big"), code=1009)
    many = 1000
    yield Case("9.7 a thousand messages", frame(TEXT, b"x" * 16) * many, [(TEXT, b"x" * 16)] * many)
    # Accepted, though a length should be written as short as it can be.
    mask = b"\0\0\0\0"
    yield Case("an empty message with a length of two bytes", b"\x82\xfe\0\0" + mask, [(BINARY, b"")])
    yield Case("five bytes with a length of two", b"\x82\xfe\0\x05" + mask + b"Hello", [(BINARY, b"Hello")])
    eight = b"\x82\xff" + (5).to_bytes(8, "big") + mask + b"Hello"
    yield Case("five bytes with a length of eight", eight, [(BINARY, b"Hello")])


CASES: Final = [
    case for section in (framing, pings, reserved, fragmentation, utf8, closing, limits) for case in section()
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port() -> AsyncIterator[int]:
    """The port of an echo."""
    async with listening(echo) as (_, port):
        yield port


@pytest.mark.parametrize("case", CASES, ids=[case.name.encode("ascii", "replace").decode() for case in CASES])
async def test_a_case_of_the_protocol(port: int, case: Case) -> None:
    is_closing = case.is_closing or case.code is not None
    sent = case.sent if is_closing else case.sent + close(1000)
    replies = [*case.replies] if is_closing else [*case.replies, (CLOSE, b"\x03\xe8")]
    async with raw_socket(port, LONGER_PATH) as raw, asyncio.TaskGroup() as group:
        received = group.create_task(raw.rest())
        chop = case.chop or len(sent)
        for at in range(0, len(sent), chop):
            await raw.send(sent[at : at + chop])
        async with asyncio.timeout(PATIENCE_SECONDS):
            frames = await received
    if case.code is None:
        assert frames == replies
    else:
        assert frames[:-1] == replies
        assert (frames[-1][0], int.from_bytes(frames[-1][1][:2], "big")) == (CLOSE, case.code)
