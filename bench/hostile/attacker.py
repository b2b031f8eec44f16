"""One attack, as a process: prepares, attacks when it is told to, writes its figures, and holds what it has until told.

Standard input: the target as a JSON line, a line to begin, and the end of input to let go. Standard output: a line
when it is prepared, and the figures as a JSON line.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
from contextlib import aclosing
from typing import Final

import uvloop

from bench.hostile.attacks import ATTACKS
from bench.hostile.peer import Target

NICENESS: Final = 5  # attackers of other machines would take nothing of the cores that node and bystander have


async def run(name: str) -> None:
    """Run an attack."""
    loop = asyncio.get_running_loop()
    target = Target(**json.loads(sys.stdin.readline()))
    async with aclosing(ATTACKS[name].run(target)) as steps:
        await anext(steps)
        print("prepared", flush=True)
        await loop.run_in_executor(None, sys.stdin.readline)
        print(json.dumps(await anext(steps)), flush=True)
        await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    os.nice(NICENESS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(sys.argv[1]))
