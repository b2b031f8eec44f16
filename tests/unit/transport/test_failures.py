"""What can go wrong while something is shown to a client."""

from __future__ import annotations

import asyncio
import logging

import pytest

from anynode.server.errors import ClientError, InternalError, NotFound
from anynode.server.transport.connection import Closed
from anynode.server.transport.failures import show_to_end

logger = logging.getLogger("anynode.test")


class Client:
    """Keeps the last words that it is told; once it `is_gone` they fail."""

    def __init__(self, gone: Exception | None = None) -> None:
        self.told: list[ClientError] = []
        self.gone = gone

    async def last_words(self, error: ClientError) -> None:
        self.told.append(error)
        if self.gone is not None:
            raise self.gone


async def show(error: BaseException | None = None) -> None:
    if error is not None:
        raise error


async def test_what_is_shown_to_its_end_is_whole_and_needs_no_last_words() -> None:
    client = Client()
    assert await show_to_end(show(), client.last_words, logger, "a turn") is True
    assert client.told == []


@pytest.mark.parametrize("error", [OSError("gone"), ConnectionResetError("gone"), Closed(), Closed(1008, "limits")])
async def test_a_client_that_has_gone_is_told_nothing_and_nothing_is_logged(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    client = Client()
    assert await show_to_end(show(error), client.last_words, logger, "a turn") is False
    assert client.told == []
    assert caplog.records == []


async def test_an_error_that_clients_can_be_told_of_is_told_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    client, error = Client(), NotFound()
    assert await show_to_end(show(error), client.last_words, logger, "a turn") is False
    assert client.told == [error]
    assert caplog.records == []


async def test_any_other_error_is_logged_and_told_as_an_internal_one(caplog: pytest.LogCaptureFixture) -> None:
    client = Client()
    assert await show_to_end(show(KeyError("secret")), client.last_words, logger, "a turn") is False
    (told,) = client.told
    assert isinstance(told, InternalError)
    assert "secret" not in told.message
    (record,) = caplog.records
    assert record.message == "showing a turn failed"
    assert record.exc_info is not None


@pytest.mark.parametrize("gone", [OSError("gone"), Closed()])
@pytest.mark.parametrize("error", [NotFound(), KeyError("broken")])
async def test_a_client_that_goes_before_the_last_words_is_no_trouble(error: Exception, gone: Exception) -> None:
    client = Client(gone)
    assert await show_to_end(show(error), client.last_words, logger, "a turn") is False
    assert len(client.told) == 1


async def test_a_cancellation_goes_through() -> None:
    client = Client()
    with pytest.raises(asyncio.CancelledError):
        await show_to_end(show(asyncio.CancelledError()), client.last_words, logger, "a turn")
    assert client.told == []
