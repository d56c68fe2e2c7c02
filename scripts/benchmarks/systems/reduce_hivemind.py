"""hivemind's averaging, its transfer alone: no matchmaking, no DHT, no background process, no pipe to it."""

from __future__ import annotations

import asyncio
from typing import Any

import torch
import uvloop
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.p2p import P2P, PeerID
from multiaddr import Multiaddr
from torch import Tensor

from .hivemind import LOOPBACK, PLAIN
from .reduce_base import ReducePeer, cpu_of

# As hivemind's averager does in its process.
asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


class HivemindReduce(ReducePeer):
    """`AllReduceRunner`, which an averager runs once it has found its group; equal parts, no compression.

    Its timeouts stay off, as they are by default: a peer that dies would be waited for.
    """

    framework = "asyncio"

    def __init__(self) -> None:
        super().__init__()
        self._opened = 0

    async def begin(self) -> dict[str, Any]:
        self._node = await P2P.create(host_maddrs=LOOPBACK, **PLAIN)
        addresses = await self._node.get_visible_maddrs(latest=True)
        return {"peer": self._node.peer_id.to_base58(), "address": str(addresses[0]).rsplit("/p2p/", 1)[0]}

    async def meet(self, everybody: list[dict[str, Any]], rank: int) -> None:
        self._peers = [PeerID.from_base58(hello["peer"]) for hello in everybody]
        for number in range(rank + 1, len(everybody)):
            await self._node._client.connect(self._peers[number], [Multiaddr(everybody[number]["address"])])

    async def open(self, run: int) -> None:
        """The group is formed: all know who is in it, and listen."""
        count = len(self._peers)
        self._opened += 1  # runs of another size have the same numbers; a name is taken for good
        name = f"round{self._opened}"
        self._runner = AllReduceRunner(
            p2p=self._node,
            servicer_type=AllReduceRunner,
            prefix=name,
            group_id=name.encode(),
            tensors=[self._tensor],
            ordered_peer_ids=self._peers,
            peer_fractions=(1 / count,) * count,
        )
        await self._runner.add_p2p_handlers(self._node, namespace=name)

    async def reduce(self, tensor: Tensor) -> Tensor:
        with torch.inference_mode():
            async for delta in self._runner:
                tensor += delta
        return tensor

    def cpu(self) -> float:
        return super().cpu() + cpu_of(self._node._child.pid)
