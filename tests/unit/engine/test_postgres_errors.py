"""Where what Postgres cannot do at the moment becomes an error that clients can be told of."""

from __future__ import annotations

import logging

import pytest

from anynode.models.database import Unavailable
from anynode.server.engine.postgres_errors import unavailable_as_client_error, warn_of_wait
from anynode.server.errors import DatabaseUnavailable, NotFound
from tests.kit.turns import CONVERSATION


def test_an_unavailable_postgres_is_told_to_clients_with_the_conversation_and_without_its_details() -> None:
    cause = Unavailable("ConnectionRefusedError: 10.0.0.7")
    with pytest.raises(DatabaseUnavailable) as raised, unavailable_as_client_error(CONVERSATION):
        raise cause
    assert raised.value.conversation_id == CONVERSATION
    assert raised.value.__cause__ is cause
    assert "10.0.0.7" not in raised.value.message


def test_without_a_conversation_none_is_named() -> None:
    with pytest.raises(DatabaseUnavailable) as raised, unavailable_as_client_error():
        raise Unavailable
    assert raised.value.conversation_id is None


@pytest.mark.parametrize("error", [NotFound(), KeyError("broken"), OSError()])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, unavailable_as_client_error():
        raise error
    assert raised.value is error


def test_what_works_works() -> None:
    with unavailable_as_client_error():
        pass


def test_all_that_waits_for_the_same_reason_is_one_kind_of_line(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("anynode.test")
    for what, cause in (("a beat waits", OSError()), ("a flush waits", OSError()), ("a beat waits", TimeoutError())):
        error = Unavailable("because")
        error.__cause__ = cause
        warn_of_wait(logger, what, error)
    kinds = [record.__dict__["seldom"] for record in caplog.records]
    assert kinds == ["Postgres: OSError", "Postgres: OSError", "Postgres: TimeoutError"]
    assert caplog.messages[0] == "a beat waits for Postgres: because"
