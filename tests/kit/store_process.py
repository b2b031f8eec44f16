"""An application's process that has a `Store`: a test starts it, asks it for things, pauses it and kills it.

The processes are forked from one that has loaded what they need, so each is there at once.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from typing import Any, Final

import anynode
import anynode.server.store.rows  # so that no process loads it by itself
from anynode import ClientError, Store, message_to_dict
from anynode.models.tables import Conversation, Message
from anynode.server.agents.agent import Agent
from tests.agents.scripted import Strings, script

_FORKS: Final = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])


class StoreProcess:
    """One process; its store's methods are called by their names. What they return comes as plain values, and what
    they raise as an error of the same class."""

    def __init__(self, connection: Connection, process: multiprocessing.process.BaseProcess) -> None:
        self._connection = connection
        self._process = process
        self._calls: list[asyncio.Future[Any]] = []
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection.fileno(), self._take)

    def ask(self, method: str, *arguments: Any, **named: Any) -> asyncio.Future[Any]:
        """Call a method of the store. `chat` has the agent of the process."""
        answer = self._loop.create_future()
        self._calls.append(answer)
        self._connection.send((len(self._calls) - 1, method, arguments, named))
        return answer

    def kill(self) -> None:
        """kill -9; returns when it is gone."""
        self._process.kill()
        self._process.join()

    def pause(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def _take(self) -> None:
        try:
            call, is_error, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self.forget()
            return
        answer = self._calls[call]
        if answer.done():
            return
        if is_error:
            name, message = value
            answer.set_exception(getattr(anynode, name, RuntimeError)(message))
        else:
            answer.set_result(value)

    def forget(self) -> None:
        """Listen no more; calls that have no answer are cancelled."""
        self._loop.remove_reader(self._connection.fileno())
        for answer in self._calls:
            answer.cancel()


@asynccontextmanager
async def store_process(
    url: str, strings: Strings | None = None, *, agent: Agent = script, **options: Any
) -> AsyncIterator[StoreProcess]:
    """Run a process whose store is open, made with `options`; it is killed at the end. `agent` is that of `chat`."""
    ours, theirs = _FORKS.Pipe()
    environment = {} if strings is None else strings.environment
    process = _FORKS.Process(target=_run, args=(theirs, url, agent, environment, options), daemon=True)
    await asyncio.to_thread(process.start)
    theirs.close()
    running = StoreProcess(ours, process)
    try:
        await running.ask("list_conversations", "nobody")
        yield running
    finally:
        process.kill()
        await asyncio.to_thread(process.join)
        running.forget()
        ours.close()


def _run(
    connection: Connection, url: str, agent: Agent, environment: Mapping[str, str], options: Mapping[str, Any]
) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_serve(connection, url, agent, options))


async def _serve(connection: Connection, url: str, agent: Agent, options: Mapping[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    is_over = loop.create_future()
    calls: set[asyncio.Task[None]] = set()

    async def answer(store: Store, call: int, method: str, arguments: Any, named: Any) -> None:
        if method == "chat":
            named = {"agent": agent, **named}
        try:
            value = await getattr(store, method)(*arguments, **named)
        except ClientError as error:
            connection.send((call, True, (type(error).__name__, error.message)))
        except Exception as error:  # noqa: BLE001  (the test has to see it)
            connection.send((call, True, ("RuntimeError", repr(error))))
        else:
            connection.send((call, False, _plain(value)))

    async with Store(url, **options) as store:

        def take() -> None:
            try:
                call, method, arguments, named = connection.recv()
            except EOFError:
                loop.remove_reader(connection.fileno())
                is_over.set_result(None)
                return
            task = loop.create_task(answer(store, call, method, arguments, named))
            calls.add(task)
            task.add_done_callback(calls.discard)

        loop.add_reader(connection.fileno(), take)
        await is_over


def _plain(value: Any) -> Any:
    match value:
        case Message():
            return message_to_dict(value)
        case Conversation():
            return {"id": str(value.id), "client_id": value.client_id, "title": value.title}
        case list() | tuple():
            return [_plain(item) for item in value]
    return value
