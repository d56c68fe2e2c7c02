"""Flower's simulation of federated averaging on digits: one line of JSON.

For an interpreter that has flwr[simulation], torch and numpy, and not Shoal. Usage: flower.py FILE.npz, which holds the
images and labels, the weights of the beginning, and which images are in each batch of each client (``picks``: (clients,
batches, images), -1: none).

A client has its optimiser anew in each round, as in Flower's own examples: its clients keep nothing. Timed is
``run_simulation``, with the start of Ray; a round ends when its mean has been evaluated.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
# Nothing is told to anybody; and Ray's workers are not to stand behind all others, as they do by themselves.
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}

#: Of the task ``digits``.
LEARNING_RATE = 3e-3

#: The file's arrays, read once by each process that needs them.
_DATA: dict[str, Any] = {}


def data(file: str) -> dict[str, Any]:
    if not _DATA:
        import numpy as np
        import torch

        torch.set_num_threads(1)
        with np.load(file) as arrays:
            _DATA.update({name: arrays[name] for name in arrays.files})
        _DATA.update({name: torch.from_numpy(_DATA[name]) for name in ("train_x", "train_y", "test_x", "test_y")})
    return _DATA


def model() -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def load(net: Any, arrays: Any) -> None:
    import torch

    with torch.no_grad():
        for parameter, array in zip(net.parameters(), arrays, strict=True):
            parameter.copy_(torch.from_numpy(array))


def run(file: str) -> dict[str, Any]:
    import flwr
    import torch
    import torch.nn.functional as F
    from flwr.client import ClientApp, NumPyClient
    from flwr.common import Context, ndarrays_to_parameters
    from flwr.server import ServerApp, ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.simulation import run_simulation

    found = data(file)
    clients, batches, _ = found["picks"].shape
    steps, rounds = int(found["steps"]), batches // int(found["steps"])

    class Client(NumPyClient):  # type: ignore[misc]
        def __init__(self, number: int) -> None:
            self._number = number

        def fit(self, parameters: Any, config: Any) -> Any:
            own = data(file)
            net = model()
            load(net, parameters)
            optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE)
            first = (config["round"] - 1) * steps
            for picks in own["picks"][self._number, first : first + steps]:
                picks = picks[picks >= 0]
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(net(own["train_x"][picks]), own["train_y"][picks]).backward()
                optimizer.step()
            # A weight of 1 for everybody: the plain mean, as in the loop.
            return [parameter.detach().numpy() for parameter in net.parameters()], 1, {}

    ends: list[float] = []
    accuracies: list[float] = []
    referee = model()
    cpu = [0.0]

    def evaluate(round: int, parameters: Any, config: Any) -> Any:
        load(referee, parameters)
        with torch.no_grad():
            right = (referee(found["test_x"]).argmax(1) == found["test_y"]).float().mean()
        accuracies.append(float(right))
        ends.append(time.monotonic())
        if round == rounds:
            cpu[0] = cpu_of_all()
        return 0.0, {"accuracy": float(right)}

    def server(context: Context) -> Any:
        strategy = FedAvg(
            fraction_fit=1.0,
            fraction_evaluate=0.0,
            min_fit_clients=clients,
            min_available_clients=clients,
            initial_parameters=ndarrays_to_parameters([found[f"start{i}"] for i in range(6)]),
            on_fit_config_fn=lambda round: {"round": round},
            evaluate_fn=evaluate,
        )
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=rounds))

    def client(context: Context) -> Any:
        return Client(int(context.node_config["partition-id"])).to_client()

    began = time.monotonic()
    run_simulation(
        server_app=ServerApp(server_fn=server),
        client_app=ClientApp(client_fn=client),
        num_supernodes=clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"logging_level": 40}},
    )
    wall = time.monotonic() - began
    return {
        "wall_s": wall,
        "cpu_s": cpu[0],
        "first_s": ends[1] - began,
        "round_s": [later - sooner for sooner, later in itertools.pairwise(ends[1:])],
        "accuracy": accuracies[-1],
        "version": flwr.__version__,
    }


def cpu_of_all() -> float:
    """CPU seconds so far of this process and all below it: Ray's, and those in which clients train."""
    parents, spent = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            parents[int(folder.name)] = int(fields[1])
            # With those of its children that have ended.
            spent[int(folder.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    below, total = [os.getpid()], 0.0
    for pid in below:
        total += spent.get(pid, 0.0)
        below += [child for child, parent in parents.items() if parent == pid]
    return total


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # Ray's workers and Flower write where they like; the line is ours.
    line, out = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(out, 1)
    os.write(line, json.dumps(run(sys.argv[1])).encode() + b"\n")
