"""Hearing the first peers of a swarm: bootstrap addresses and contacts of an earlier life, several at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from ...transport.address import Address
from ...transport.endpoint import Endpoint
from ...transport.errors import Overloaded, PeerUnreachable, RemoteError
from ...transport.identity import PeerId
from . import defaults
from .walk import Walker


async def reach(
    endpoint: Endpoint,
    walker: Walker,
    ping: Callable[[PeerId], Awaitable[None]],
    addresses: Sequence[Address],
    lost: Sequence[PeerId],
) -> list[tuple[str, str, bool]]:
    """Try to hear ``addresses`` and ``lost`` contacts, ALPHA_MAX at a time. What failed, why, would it again?

    In the order given, not as they fail: the same failures read the same the next time.
    """
    failures: dict[str, tuple[str, bool] | None] = dict.fromkeys((*map(str, addresses), *(peer.short for peer in lost)))
    # As they are now: one that waits for its turn may come by itself meanwhile, or be forgotten for others.
    records = {peer: walker.lost[peer] for peer in lost if peer in walker.lost}
    limit = trio.CapacityLimiter(defaults.ALPHA_MAX)

    async def attempt_addresses() -> None:
        """One way in is enough: a ticket's other addresses may be in networks that are not here, where nobody says
        no. They get a moment more.
        """
        async with trio.open_nursery() as dials:

            async def first_answer() -> None:
                await answered.wait()
                await trio.sleep(defaults.BOOTSTRAP_GRACE)
                dials.cancel_scope.cancel()

            async with trio.open_nursery() as attempts:
                dials.start_soon(first_answer)
                for address in addresses:
                    attempts.start_soon(attempt, str(address), partial(identify, address))
            dials.cancel_scope.cancel()

    answered = trio.Event()

    async def attempt(name: str, reach: Callable[[], Awaitable[PeerId]]) -> None:
        async with limit:
            try:
                await ping(await reach())
                answered.set()
            except PeerUnreachable as error:
                failures[name] = (error.reason, error.lasting)
            except (RemoteError, Overloaded) as error:
                failures[name] = (str(error), isinstance(error, RemoteError) and error.lasting)

    async def identify(address: Address) -> PeerId:
        return (await endpoint.identify(address)).peer

    async def connect(peer: PeerId) -> PeerId:
        # The record may have run out while we were away; its addresses are still the best guess, and the
        # handshake proves who answers there.
        known = records[peer].open(-float("inf"))
        return (await endpoint.connect(peer, known.addresses, timeout=walker.patience(endpoint.link(peer)))).peer

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt_addresses)
        for peer in records:
            nursery.start_soon(attempt, peer.short, partial(connect, peer))
    return [(name, *failure) for name, failure in failures.items() if failure is not None]
