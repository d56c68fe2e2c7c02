"""Ordered delivery of small messages: one queue and one task per peer."""

from __future__ import annotations

import logging
from typing import Any

import trio

from ...transport.endpoint import Endpoint
from ...transport.errors import RemoteError, RemoteRefused
from ...transport.identity import PeerId
from .. import defaults
from .messages import Waiting
from .methods import SAY

log = logging.getLogger(__name__)


class Post:
    """Sends round messages to peers in order. What cannot be delivered is dropped: the cores send it again in time."""

    def __init__(self, endpoint: Endpoint, nursery: trio.Nursery) -> None:
        self._endpoint, self._nursery = endpoint, nursery
        self._queues: dict[PeerId, trio.MemorySendChannel[Any]] = {}
        self._under_way = 0  # messages that nobody has answered yet

    def send(self, to: PeerId, message: Any) -> None:
        queue = self._queues.get(to)
        if queue is None:
            queue, receive = trio.open_memory_channel[Any](defaults.MAX_QUEUED_MESSAGES)
            self._queues[to] = queue
            self._nursery.start_soon(self._deliver, to, receive)
        try:
            queue.send_nowait(message)
            self._under_way += 1
        except trio.BrokenResourceError:
            # The run is being cancelled and whoever delivered has ended already: nothing is sent any more.
            del self._queues[to]
        except trio.WouldBlock:
            log.warning("%s: dropped %s, too many messages are waiting", to.short, type(message).__name__)

    async def leave_first(self) -> None:
        """Return when the messages given to :meth:`send` just now have been written to their links.

        A plan that leaves behind the leader's own bulk, on lines that a second of it has filled, holds up all others.
        Where all have been answered there is nothing to wait for: most members, most of the time.
        """
        if not self._under_way:
            return
        for _ in range(defaults.TURNS_TO_LEAVE):
            await trio.lowlevel.checkpoint()

    async def _deliver(self, to: PeerId, queue: trio.MemoryReceiveChannel[Any]) -> None:
        with queue:
            while True:
                message = None
                if queue.statistics().current_buffer_used:
                    message = queue.receive_nowait()
                else:
                    with trio.move_on_after(defaults.IDLE_QUEUE):
                        message = await queue.receive()
                if message is None:
                    if queue.statistics().current_buffer_used:
                        continue
                    del self._queues[to]
                    return
                if isinstance(message, Waiting):
                    # Word for people, sent all the time: what comes after it must not wait a round trip for it.
                    self._nursery.start_soon(self._tell, to, message)
                else:
                    await self._tell(to, message)

    async def _tell(self, to: PeerId, message: Any) -> None:
        try:
            await self._endpoint.call(to, SAY[type(message)], message)
        except RemoteRefused as error:
            log.debug("%s refused %s: %s", to.short, type(message).__name__, error.reason)
        except RemoteError as error:
            log.debug("%s not told %s: %s", to.short, type(message).__name__, error.message)
        finally:
            self._under_way -= 1
