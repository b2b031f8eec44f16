"""One node of `anynode dev`: what `anynode serve` runs, and the routes by which the page gives orders.

`anynode dev` starts it as `python -P -m anynode.server.dev.node`. With `-P` Python does not put the current folder on
its path, so that no file of the user's runs in place of a module of ours. The variable PYTHONSAFEPATH would do it too,
but programs that an agent or a tool starts would inherit it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import click
from starlette.routing import BaseRoute

from anynode.server.api.page import page_routes
from anynode.server.auth import Authenticator
from anynode.server.dev.orders import Orders, order_routes
from anynode.server.serve import run_node
from anynode.server.startup import one_line_errors


@click.command()
@click.option("--orders", "pipe", type=int, required=True, help="The inherited pipe that takes the page's orders.")
@click.option("--neighbours", required=True, help="The names of all nodes, separated by commas.")
def node(pipe: int, neighbours: str) -> None:
    """Run one node of `anynode dev`; it stops when its standard input ends."""
    orders = Orders(pipe, neighbours.split(","))

    def dev_routes(authenticator: Authenticator) -> Sequence[BaseRoute]:
        return [*order_routes(orders, authenticator), *page_routes(is_dev=True)]

    run_node(os.environ, log_level=logging.WARNING, stop_with_input=True, extra_routes=dev_routes)


if __name__ == "__main__":
    with one_line_errors():
        node()
