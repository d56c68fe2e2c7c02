"""torchft: a step of its manager over gloo, with a lighthouse that says who takes part."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torchft.coordination import LighthouseServer
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

from .reduce_base import BlockingPeer

PATIENCE = timedelta(seconds=60)


class TorchftReduce(BlockingPeer):
    """Every peer is a replica group of one rank. The quorum is there before the clock starts, as it comes while a model
    trains; what is timed is the reduce that the manager watches, and its decision to commit."""

    def begin_blocking(self) -> dict[str, Any]:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        # Each offers one, the first one's is used: who is which rank is not known yet.
        self._lighthouse = LighthouseServer("127.0.0.1:0", min_replicas=1, join_timeout_ms=2000, quorum_tick_ms=10)
        return {"port": self._store.port, "lighthouse": self._lighthouse.address()}

    def meet_blocking(self, everybody: list[dict[str, Any]], rank: int) -> None:
        self._manager = Manager(
            pg=ProcessGroupGloo(timeout=PATIENCE),
            load_state_dict=lambda state: None,
            state_dict=dict,
            min_replica_size=len(everybody),
            timeout=PATIENCE,
            init_sync=False,
            rank=0,
            world_size=1,
            store_addr="127.0.0.1",
            store_port=everybody[rank]["port"],
            lighthouse_addr=everybody[0]["lighthouse"],
            replica_id=f"peer_{rank}",
            hostname="127.0.0.1",
        )

    def open_blocking(self, run: int) -> None:
        self._manager.start_quorum()
        self._manager.wait_quorum()

    def reduce_blocking(self, tensor: Tensor) -> Tensor:
        self._manager.allreduce(tensor).wait()
        if not self._manager.should_commit():
            raise AssertionError("torchft did not commit")
        return tensor
