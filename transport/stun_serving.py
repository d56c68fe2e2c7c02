"""STUN for others at the UDP ports beside our TCP listeners, while it is wanted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from .address import Address
from .errors import ConfigError
from .stun_service import StunServer

if TYPE_CHECKING:
    from .endpoint import Endpoint

log = logging.getLogger(__name__)


class StunServing:
    """``changed`` is called when :attr:`serving` has become another."""

    def __init__(self, endpoint: Endpoint, changed: Callable[[], None]) -> None:
        #: True while at least one port answers.
        self.serving = False
        self._wanted = self._provided = False
        self._endpoint, self._changed = endpoint, changed
        self._news = trio.Event()

    @property
    def wanted(self) -> bool:
        return self._wanted

    @wanted.setter
    def wanted(self, wanted: bool) -> None:
        if wanted != self._wanted:
            self._wanted = wanted
            self._news.set()

    def provide(self) -> None:
        """Somebody else of this process answers at those ports already: say so in our record when that is wanted."""
        self._provided = True
        self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._news = trio.Event()
            async with trio.open_nursery() as nursery:
                if self._wanted and self._provided:
                    self.serving = True
                    self._changed()
                elif self._wanted:
                    for address in self._endpoint.listening():
                        nursery.start_soon(self._serve, address)
                await self._news.wait()
                nursery.cancel_scope.cancel()
            if self.serving:
                self.serving = False
                self._changed()

    async def _serve(self, address: Address) -> None:
        host = self._endpoint.host
        try:
            async with await host.network.open_datagrams(address) as datagrams:
                if not self.serving:
                    self.serving = True
                    self._changed()
                await StunServer(host, datagrams).run()
        except ConfigError as error:
            log.info("no STUN for others: %s", error)
