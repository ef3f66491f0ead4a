"""JupyterLab's connection to a kernel, with messages sent as they come; `make lab` names it to the server."""

from asyncio import Future

from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection


class PromptConnection(ZMQChannelsWebsocketConnection):
    """Sends each message at once, by TCP_NODELAY.

    Otherwise a small message waits until the browser has acknowledged the one before, which it may put off by 40 ms:
    longer than a widget takes to answer.
    """

    def connect(self) -> Future[None] | None:
        """Connect to the kernel; see the class above."""
        self.websocket_handler.set_nodelay(True)
        return super().connect()
