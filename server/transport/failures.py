"""What can go wrong while something is shown to a client, told in one place."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from anynode.server.errors import ClientError, InternalError
from anynode.server.transport.connection import Closed
from anynode.server.transport.refusals import count_refusal


async def show_to_end(
    showing: Awaitable[None], last_words: Callable[[ClientError], Awaitable[None]], logger: logging.Logger, what: str
) -> bool:
    """Await what shows something to a client, and return whether it came to its end.

    | what goes wrong | what happens |
    |---|---|
    | the client has gone (OSError, Closed) | nothing: the reader of the connection learns of it |
    | a ClientError | `last_words` tells the client |
    | anything else | it is logged as the failure of `what`, and `last_words` tells of an InternalError |
    """
    try:
        await showing
        return True
    except (OSError, Closed):
        return False
    except ClientError as refused:
        count_refusal(refused)
        error = refused
    except Exception:
        logger.exception("showing %s failed", what)
        error = InternalError()
    try:
        await last_words(error)
    except (OSError, Closed):
        pass
    return False
