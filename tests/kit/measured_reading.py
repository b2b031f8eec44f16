"""Reads all messages of a conversation in a process of its own, and prints what that took: `{"count", "mib"}`.

`python -m tests.kit.measured_reading URL FEW MANY USER` first reads a conversation of a few messages, so that only what
the one of many adds is counted.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from typing import Final

from anynode import Store

MIB: Final = 2**20


def peak_mib() -> float:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


async def measure(url: str, few: str, many: str, user: str) -> None:
    """Read the many messages, and print how many there were and how the peak of the memory grew."""
    async with Store(url) as store:
        assert [message.position async for message in store.get_messages(few, user)]
        before = peak_mib()
        count = bytes = 0
        async for message in store.get_messages(many, user):
            count += 1
            bytes += len(message.content)
            assert message.position == count
        resident = peak_mib() - before
    print(json.dumps({"count": count, "bytes": bytes, "mib": resident}))


if __name__ == "__main__":
    asyncio.run(measure(*sys.argv[1:]))
