"""The connection of `make lab`: a message does not wait for the one before."""

import asyncio
import re
import socket
from pathlib import Path

import pytest
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application
from tornado.websocket import WebSocketHandler, websocket_connect
from traitlets import Any
from traitlets.utils.importstring import import_item

from workbench.lab_connection import PromptConnection


class Connection(PromptConnection):
    """At a handler that is not JupyterLab's."""

    websocket_handler = Any()


class Handler(WebSocketHandler):
    """Tells TCP_NODELAY of its own socket before and after the connection is made."""

    def open(self) -> None:
        read = self.ws_connection.stream.socket.getsockopt
        before = read(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        reached = Connection(websocket_handler=self).connect()
        self.write_message(f"{before} {read(socket.IPPROTO_TCP, socket.TCP_NODELAY)} {reached.result()}")


async def told() -> str:
    listening, port = bind_unused_port()
    server = HTTPServer(Application([("/", Handler)]))
    server.add_sockets([listening])
    client = await websocket_connect(f"ws://127.0.0.1:{port}/")
    message = await client.read_message()
    client.close()
    server.stop()
    return message


def test_messages_are_sent_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the server's own connection follows, which would need a kernel."""

    def connect(connection: ZMQChannelsWebsocketConnection) -> asyncio.Future:
        connected = asyncio.get_running_loop().create_future()
        connected.set_result("connected")
        return connected

    monkeypatch.setattr(ZMQChannelsWebsocketConnection, "connect", connect)
    assert asyncio.run(told()) == "0 1 connected"


def test_make_lab_names_it() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    named = re.search(r"--ServerApp.kernel_websocket_connection_class=(\S+)", makefile)
    assert import_item(named[1]) is PromptConnection and "jupyter lab --ip=127.0.0.1 $(PROMPT)" in makefile
