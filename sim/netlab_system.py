"""What the NAT lab needs of this machine: commands, network namespaces, and a guardian that clears up after us."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..transport.errors import ConfigError, ShoalError
from . import defaults

#: Where `ip netns` keeps the names.
NAMESPACES = Path("/run/netns")

_CLONE_NEWNET = 0x40000000
_NAME = re.compile(r"shoal-(\d+)-[a-z0-9_-]+")

#: Reads names of namespaces until its standard input ends, which it does however the lab's process ends; then removes
#: them with what runs in them. Deaf to Ctrl-C, which reaches the lab's process too.
_GUARDIAN = """
trap '' INT TERM HUP
names=
while read -r name; do names="$names $name"; done
for name in $names; do
    [ -e "/run/netns/$name" ] || continue
    for pid in $(ip netns pids "$name"); do kill -9 "$pid"; done
    ip netns del "$name"
done
"""


class NetLabUnavailable(ConfigError):
    """This machine cannot run the lab (not root, no `ip`, no NAT in its kernel …); the text names what is missing."""


class NetLabError(ShoalError):
    """A command that builds the lab failed; the text holds it and its complaint."""


def run(arguments: Sequence[str], text: str = "") -> str:
    """Run a short command with ``text`` on its standard input; its output. Raises :class:`NetLabError`.

    Blocks, for milliseconds: a trio program calls what builds a lab in a worker thread.
    """
    try:
        done = subprocess.run(
            arguments, input=text, capture_output=True, text=True, timeout=defaults.LAB_COMMAND, check=False
        )
    except subprocess.TimeoutExpired:
        raise NetLabError(f"`{' '.join(arguments)}` still runs after {defaults.LAB_COMMAND:g} s") from None
    except OSError as error:
        raise NetLabError(f"`{' '.join(arguments)}` does not start: {error.strerror}") from None
    if done.returncode:
        complaint = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise NetLabError(f"`{' '.join(arguments)}` failed: {complaint}" + (f"; its input:\n{text}" if text else ""))
    return done.stdout


def ip(namespace: str, *lines: str) -> None:
    """Run lines of `ip` in a namespace, as one process. Raises :class:`NetLabError`."""
    run(["ip", "-n", namespace, "-batch", "-"], "\n".join(lines) + "\n")


def missing() -> str | None:
    """Why there can be no lab on this machine, or None."""
    if not hasattr(os, "geteuid") or not Path("/proc/self/ns/net").exists():
        return "network namespaces are a feature of Linux, and this is another system or its kernel has none"
    if os.geteuid() != 0:
        return "not root: building network namespaces needs root (try sudo)"
    for tool, package in (("ip", "iproute2"), ("iptables", "iptables"), ("ip6tables", "iptables")):
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed (Debian package {package})"
    return None


def missing_upnp() -> str | None:
    """Why there can be no router with UPnP in a lab on this machine, or None."""
    for tool, package in (("miniupnpd", "miniupnpd"), ("nft", "nftables")):
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed (Debian package {package})"
    version = run(["miniupnpd", "--version"])
    if "nftables" not in version:
        return "miniupnpd was built for another packet filter than nftables (Debian package miniupnpd-nftables)"
    return None


def add_namespace(name: str) -> None:
    """Raises :class:`NetLabUnavailable` where the kernel or a container's seal forbids it."""
    try:
        run(["ip", "netns", "add", name])
    except NetLabError as error:
        raise NetLabUnavailable(f"network namespaces cannot be made here: {error}") from error


def remove_namespace(name: str) -> None:
    """Kill what runs in it and remove it; nothing happens where there is none, or where somebody else (the guardian of
    its lab, the sweep of another lab that begins) removes it meanwhile. Raises :class:`NetLabError`."""
    if not (NAMESPACES / name).exists():
        return
    try:
        for pid in run(["ip", "netns", "pids", name]).split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass  # it ended meanwhile
        run(["ip", "netns", "del", name])
    except NetLabError:
        if (NAMESPACES / name).exists():
            raise


#: How the folder of a lab begins, before the number of its process.
FOLDER = "shoal-lab-of-"


def sweep() -> list[str]:
    """Remove the namespaces and folders of labs whose process is gone (killed with its guardian, say); their names."""
    for folder in sorted(Path(tempfile.gettempdir()).glob(f"{FOLDER}*-*")):
        pid = folder.name.removeprefix(FOLDER).partition("-")[0]
        if pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
    if not NAMESPACES.is_dir():
        return []
    removed = []
    for name in sorted(os.listdir(NAMESPACES)):
        match = _NAME.fullmatch(name)
        if match is not None and not _alive(int(match[1])):
            remove_namespace(name)
            removed.append(name)
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OverflowError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread in a namespace: sockets made meanwhile belong to it for good, and /proc/sys/net is its own."""
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        there = os.open(NAMESPACES / namespace, os.O_RDONLY)
        try:
            _set_namespace(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _set_namespace(here)
    finally:
        os.close(here)


def _set_namespace(descriptor: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.setns(descriptor, _CLONE_NEWNET) != 0:
        raise NetLabError(f"cannot enter a network namespace: {os.strerror(ctypes.get_errno())}")


def sysctl(namespace: str, **values: int) -> None:
    """Set values under /proc/sys/net of a namespace; ``__`` in a name stands for a slash."""
    with inside(namespace):
        for name, value in values.items():
            Path("/proc/sys/net", *name.split("__")).write_text(str(value))


def working_iptables(namespace: str) -> tuple[str, str]:
    """The `iptables` and `ip6tables` whose backend (nft or legacy) can do what the lab asks for, tried in a namespace.

    Raises :class:`NetLabUnavailable` naming each and its complaint.
    """
    complaints = []
    for flavour in ("", "-nft", "-legacy"):
        four, six = f"iptables{flavour}", f"ip6tables{flavour}"
        if shutil.which(f"{four}-restore") is None or shutil.which(f"{six}-restore") is None:
            continue
        masquerade = "*nat\n-A POSTROUTING -o none -j MASQUERADE --random-fully\nCOMMIT\n"
        stateful = "*filter\n-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -i none -j ACCEPT\nCOMMIT\n"
        try:
            run(["ip", "netns", "exec", namespace, f"{four}-restore"], masquerade + stateful)
            run(["ip", "netns", "exec", namespace, f"{six}-restore"], stateful)
            for command in (four, six):
                run(["ip", "netns", "exec", namespace, f"{command}-restore"], "*filter\nCOMMIT\n")
            run(["ip", "netns", "exec", namespace, f"{four}-restore"], "*nat\nCOMMIT\n")
        except NetLabError as error:
            complaints.append(f"{four}: {str(error).partition('; its input')[0]}")
        else:
            return four, six
    raise NetLabUnavailable("no iptables here can do NAT in a namespace: " + "; ".join(complaints))


def delays(namespace: str) -> tuple[str, str]:
    """How packets can be delayed here, and why so: ``netem``, ``tun`` (:mod:`.netlab_delay`), or empty: not at all."""
    if shutil.which("tc") is not None:
        try:
            run(["tc", "-n", namespace, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"])
        except NetLabError:
            without = "this kernel has no netem (CONFIG_NET_SCH_NETEM)"
        else:
            run(["tc", "-n", namespace, "qdisc", "del", "dev", "lo", "root"])
            return "netem", "the kernel's netem"
    else:
        without = "`tc` is not installed (Debian package iproute2)"
    if not Path("/dev/net/tun").exists():
        return "", f"{without}, and there is no /dev/net/tun"
    return "tun", f"{without}; a process of the lab carries delayed packets between TUN devices"


class Guardian:
    """A small shell that removes namespaces once this process has ended, by SIGKILL if need be."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["sh", "-c", _GUARDIAN],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def guard(self, namespace: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(namespace.encode() + b"\n")
        self._process.stdin.flush()

    def dismiss(self) -> None:
        """Wait until it has removed what is left of its namespaces."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
