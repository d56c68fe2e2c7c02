"""Facts about this machine that the system knows: interfaces, MTU, disk, key files, torch. For `shoal doctor`."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

import trio

from ..transport.address import Address
from ..transport.errors import ConfigError
from ..transport.gateway import Route
from ..transport.identity import Identity
from ..transport.interfaces import local_addresses
from . import defaults
from .datadir import DataDir

_TORCH = """
import json, torch
devices = ["cpu"]
for number in range(torch.cuda.device_count()):
    devices.append(f"cuda:{number} ({torch.cuda.get_device_name(number)})")
if getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available():
    devices.append("mps")
for device in devices:
    torch.ones(2, device=device.split()[0]).sum().item()
print(json.dumps([torch.__version__, devices]))
"""


def interface_addresses() -> tuple[Address, ...]:
    """Of both IP versions, port 0."""
    families = (socket.AF_INET, socket.AF_INET6)
    return tuple(Address("tcp", host, 0) for family in families for host in local_addresses(family))


def path_mtu(route: Route | None) -> tuple[str, int] | None:
    """The default route's interface and its MTU, on Linux; None elsewhere."""
    folder = Path("/sys/class/net")
    if route is None or not folder.is_dir():
        return None
    name = _interface_of_default_route(Path("/proc/net/route"))
    try:
        return name, int((folder / name / "mtu").read_text())
    except (OSError, ValueError):
        return None


def _interface_of_default_route(table: Path) -> str:
    try:
        lines = table.read_text("ascii", "replace").splitlines()[1:]
    except OSError:
        return ""
    fields = [line.split() for line in lines]
    found = sorted((int(f[6]), f[0]) for f in fields if len(f) > 7 and f[1] == "00000000" and f[6].isdigit())
    return found[0][1] if found else ""


def disk_free(path: Path) -> int | None:
    """Bytes free where ``path`` is, or will be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def key_troubles(data: DataDir) -> tuple[str | None, str | None]:
    """What is wrong with the node's key and the swarm's: empty when nothing, None when there is none."""
    return (
        _trouble(lambda: Identity.load_or_create(data.key_path, bytes)) if data.key_path.exists() else None,
        _trouble(data.swarm_key) if data.swarm_key_path.exists() else None,
    )


def _trouble(read: object) -> str:
    try:
        read()  # type: ignore[operator]
    except ConfigError as error:
        return str(error)
    return ""


async def torch_devices() -> tuple[tuple[str, tuple[str, ...]] | None, str]:
    """torch's version and the devices that compute, or why not; in a child process, which can be slow, or crash."""
    with trio.move_on_after(defaults.DOCTOR_TORCH):
        done = await trio.run_process(
            [sys.executable, "-c", _TORCH], capture_stdout=True, capture_stderr=True, check=False
        )
        if done.returncode == 0:
            version, devices = json.loads(done.stdout)
            return (str(version), tuple(map(str, devices))), ""
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        return None, last[0][:300] if last else f"Python ended with code {done.returncode}"
    return None, f"importing it takes longer than {defaults.DOCTOR_TORCH:g} s"
