"""`shoal dht get|put|providers|table|walk`: asks the running node. Needs neither torch nor trio."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from typing import Any, TypeVar

import attrs

from ..transport.errors import ConfigError
from ..transport.identity import PeerId
from . import defaults
from .commands import duration
from .commands import table as columns
from .control import ControlClient
from .datadir import DataDir
from .dht_cli import FILE, STDIN, path_of
from .dht_messages import (
    DhtFound,
    DhtGet,
    DhtProviderList,
    DhtProviders,
    DhtPut,
    DhtRecord,
    DhtStored,
    DhtTable,
    DhtTableInfo,
    DhtWalk,
    DhtWalked,
)
from .ticket import PREFIX, Ticket

M = TypeVar("M")

#: Whose records `shoal dht get` asks for.
NAMESPACES = ("owned", "run")


def get(options: argparse.Namespace) -> int:
    if options.namespace not in NAMESPACES:
        raise ConfigError(f"there is no namespace {options.namespace!r}: expected {' or '.join(NAMESPACES)}")
    found = _ask(options, DhtGet(options.namespace, _record_key(options.key)), DhtFound)
    if options.json:
        _say_json(found)
    elif found.record is None:
        sys.stderr.write(f"not found: {found.queries} queries in {_ms(found.seconds)}, and nobody asked holds it\n")
    elif options.raw:
        sys.stdout.buffer.write(found.record.value)
    else:
        _say(_render_record(found.record))
        _say(f"found with {found.queries} queries in {_ms(found.seconds)}")
    return 0 if found.record is not None else 1


def put(options: argparse.Namespace) -> int:
    stored = _ask(options, DhtPut(options.name.encode(), _value(options.value)), DhtStored)
    if options.json:
        _say_json(stored)
        return 0
    copies = f"stored by {stored.copies} other peers" if stored.copies else "kept here: there is nobody else yet"
    _say(f"{copies}, version {stored.record.seq}, {stored.queries} queries in {_ms(stored.seconds)}")
    _say(f"get it with: shoal dht get owned {shlex.quote(f'{stored.record.author}/{options.name}')}")
    return 0


def providers(options: argparse.Namespace) -> int:
    text = options.topic
    topic = Ticket.parse(text).run_id if text.startswith(PREFIX) else _hex(text, "a topic")
    found = _ask(options, DhtProviders(topic, options.limit), DhtProviderList)
    if options.json:
        _say_json(found)
    elif not found.providers:
        sys.stderr.write(f"no other provider found: {found.queries} queries in {_ms(found.seconds)}\n")
    else:
        rows = [("PROVIDER", "ADDRESSES"), *((p.peer, ", ".join(p.addresses) or "-") for p in found.providers)]
        _say(columns(rows))
        _say(f"{len(found.providers)} found with {found.queries} queries in {_ms(found.seconds)}")
    return 0 if found.providers else 1


def table(options: argparse.Namespace) -> int:
    found = _ask(options, DhtTable(), DhtTableInfo)
    if options.json:
        _say_json(found)
    else:
        _say(render_table(found))
    return 0


def walk(options: argparse.Namespace) -> int:
    if (options.what is None) != options.random:
        raise ConfigError(
            "name what to look for, or say --random: a peer, a ticket, PEER/NAME, or 64 hexadecimal digits"
        )
    found = _ask(options, DhtWalk(b"" if options.random else _place(options.what), options.paths), DhtWalked)
    if options.json:
        _say_json(found)
    else:
        _say(render_walk(found))
    return 0 if found.closest else 1


# --- what is asked for ------------------------------------------------------------------------------------------------


def _ask(options: argparse.Namespace, request: Any, kind: type[M]) -> M:
    return ControlClient(DataDir(options.data_dir), timeout=defaults.DHT_TIMEOUT).ask(request, kind)


def _hex(text: str, what: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if not 0 < len(key) <= defaults.MAX_DHT_KEY:
        shown = text if len(text) <= 160 else f"{text[:160]}…"
        raise ConfigError(f"{shown!r} is not {what}: expected up to {2 * defaults.MAX_DHT_KEY} hexadecimal digits")
    return key


def _record_key(text: str) -> bytes:
    peer, slash, name = text.partition("/")
    return PeerId.parse(peer).key + name.encode() if slash else _hex(text, "a key or PEER/NAME")


def _place(text: str) -> bytes:
    """Where in the key space, 32 bytes."""
    from ..dht.kademlia.keys import node_key, record_key, to_bytes, topic_key

    if text.startswith(PREFIX):
        return to_bytes(topic_key(Ticket.parse(text).run_id))
    if "/" in text:
        return to_bytes(record_key("owned", _record_key(text)))
    if len(text) == 64:
        return _hex(text, "a place")
    return to_bytes(node_key(PeerId.parse(text)))


def _value(text: str) -> bytes:
    if text == STDIN:
        return sys.stdin.buffer.read()
    if not text.startswith(FILE):
        return text.encode()
    path = path_of(text)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


# --- what is shown ----------------------------------------------------------------------------------------------------


def _render_record(record: DhtRecord) -> str:
    try:
        text = record.value.decode()
        shown = text if all(c.isprintable() or c in "\n\t" for c in text) else record.value.hex()
    except UnicodeDecodeError:
        shown = record.value.hex()
    return "\n".join(
        (
            f"author   {record.author}",
            f"version  {record.seq}, ends in {duration(max(0.0, record.expires_in))}",
            f"value    {len(record.value)} bytes",
            shown.rstrip("\n"),
        )
    )


def render_table(found: DhtTableInfo) -> str:
    contacts = [contact for bucket in found.buckets for contact in bucket.contacts]
    failing = sum(contact.failures > 0 for contact in contacts)
    waiting = sum(bucket.waiting for bucket in found.buckets)
    lines = [
        f"node      {found.peer}",
        f"key       {found.key.hex()}",
        f"contacts  {len(contacts)} in {len(found.buckets)} buckets of up to {found.k}; {waiting} wait for a place",
        f"health    {_health(len(contacts), failing, found.lost)}",
        "swarm     " + ("too little is known" if found.swarm is None else f"about {found.swarm:.0f} peers"),
        f"holds     {found.records} records, {found.announcements} announcements",
        "since it began  " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in found.counters if count),
    ]
    rows = [("DEPTH", "PEER", "ADDRESS", "RTT", "HEARD", "FAILED", "NETWORKS")]
    for bucket in found.buckets:
        looked = "never" if bucket.refreshed is None else f"{duration(bucket.refreshed)} ago"
        rows.append(
            (str(bucket.depth), f"{len(bucket.contacts)} of {found.k}", f"looked into {looked}", "", "", "", "")
        )
        rows += [
            (
                "", contact.peer[:8], contact.address or "-",
                "-" if contact.rtt_ms is None else f"{contact.rtt_ms:.1f} ms",
                f"{duration(contact.age)} ago", str(contact.failures or "-"), ", ".join(contact.networks) or "-",
            )
            for contact in bucket.contacts
        ]  # fmt: skip
        if bucket.waiting:
            rows.append(("", f"{bucket.waiting} waiting", "", "", "", "", ""))
    return "\n".join([*lines, "", columns(rows)] if contacts else lines)


def _health(contacts: int, failing: int, lost: int) -> str:
    if not contacts:
        return f"alone: nobody answers ({lost} lost contacts are tried again)" if lost else "alone: it knows nobody"
    if 2 * failing > contacts:
        return f"poor: {failing} of {contacts} did not answer the last time, {lost} lost"
    return f"good: {contacts - failing} of {contacts} answered the last time, {lost} lost and tried again"


def render_walk(found: DhtWalked) -> str:
    rows = [("AT", "PEER", "HOP", "DISTANCE", "TOOK", "NAMED", "NEAREST", "")]
    rows += [
        (
            _ms(query.began), query.peer[:8], str(query.hop), f"{query.bits} bits", _ms(query.seconds),
            "-" if query.failure else f"{query.named} peers",
            "-" if query.nearest is None else f"{query.nearest} bits",
            f"failed: {query.failure}" if query.failure else "",
        )
        for query in found.queries
    ]  # fmt: skip
    failed = sum(bool(query.failure) for query in found.queries)
    lines = [
        f"looking for {found.target.hex()}" + (f" on {found.paths} disjoint paths" if found.paths > 1 else ""),
        columns(rows),
        f"{len(found.queries)} queries, {failed} failed, {found.hops} hops to the nearest, {_ms(found.seconds)}",
        f"the {len(found.closest)} closest peers:",
    ]
    return "\n".join(lines + [f"  {peer}  {bits} bits" for peer, bits in found.closest])


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _say_json(found: Any) -> None:
    """Bytes as hexadecimal digits."""
    _say(json.dumps(attrs.asdict(found), indent=2, default=lambda value: value.hex()))
