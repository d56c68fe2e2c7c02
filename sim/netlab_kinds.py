"""The kinds of hosts in the NAT lab: what each is, its packet filter's rules, its router's UPnP configuration."""

from __future__ import annotations

from collections.abc import Mapping

import attrs


@attrs.frozen
class Kind:
    """One way to be connected to the lab's internet. ``nat``: behind a router of its own with NAT for IPv4.

    ``fresh_ports``: the router gives every connection another external port. ``carrier``: a second NAT stands between
    router and internet. ``udp``: UDP passes. ``upnp``: the router runs miniupnpd. ``six_lan``: its LAN has public
    IPv6 addresses behind a stateful firewall.
    """

    name: str
    what: str
    four: bool = True
    six: bool = False
    nat: bool = False
    fresh_ports: bool = False
    carrier: bool = False
    udp: bool = True
    upnp: bool = False

    @property
    def six_lan(self) -> bool:
        return self.nat and self.six


_ALL = (
    Kind("public", "IPv4 and IPv6, nothing in the way", six=True),
    Kind("public4", "IPv4 only, nothing in the way"),
    Kind("cone", "IPv4 behind a home router: NAT keeps the port, new connections from outside are dropped", nat=True),
    Kind("symmetric", "IPv4 behind a NAT with another external port per connection", nat=True, fresh_ports=True),
    Kind("cgnat", "IPv4 behind a home router behind a carrier's NAT (100.64.0.0/10)", nat=True, carrier=True),
    Kind("udp_blocked", "cone, and UDP is dropped", nat=True, udp=False),
    Kind("upnp", "cone, and the router maps ports on request (miniupnpd: UPnP-IGD, NAT-PMP, PCP)", nat=True, upnp=True),
    Kind("dual", "cone for IPv4, and public IPv6 behind a stateful firewall", nat=True, six=True),
    Kind("ipv6", "IPv6 only, nothing in the way", four=False, six=True),
)

#: Every kind by its name, in the order of the matrix.
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in _ALL}


def router_rules(kind: Kind) -> str:
    """`iptables-restore` input of a home router: NAT towards ``wan``, and the usual stateful firewall."""
    masquerade = "-A POSTROUTING -o wan -j MASQUERADE" + (" --random-fully" if kind.fresh_ports else "")
    udp = [] if kind.udp else ["-A FORWARD -p udp -j DROP"]
    return _table("nat", masquerade) + _table("filter", *_STATEFUL_POLICY, *udp, *_STATEFUL)


def carrier_rules() -> str:
    """`iptables-restore` input of a carrier's NAT."""
    return _table("nat", "-A POSTROUTING -o wan -j MASQUERADE") + _table("filter", *_STATEFUL_POLICY, *_STATEFUL)


def six_rules() -> str:
    """`ip6tables-restore` input of a home router: no NAT, new connections from outside are dropped."""
    return _table("filter", *_STATEFUL_POLICY, "-A INPUT -p icmpv6 -j ACCEPT", *_STATEFUL)


_STATEFUL_POLICY = (":INPUT DROP", ":FORWARD DROP", ":OUTPUT ACCEPT")
_STATEFUL = (
    "-A INPUT -i lo -j ACCEPT",
    "-A INPUT -i lan -j ACCEPT",
    "-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
    "-A FORWARD -i lan -j ACCEPT",
    "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
)


def _table(name: str, *lines: str) -> str:
    return "\n".join((f"*{name}", *lines, "COMMIT", ""))


#: `nft` input of a router with miniupnpd, which keeps its rules in the three chains that are empty here. One table for
#: everything: what one base chain accepts another may still drop.
UPNP_RULES = """\
table inet filter {
    chain miniupnpd {}
    chain prerouting_miniupnpd {}
    chain postrouting_miniupnpd {}
    chain input {
        type filter hook input priority 0; policy drop;
        iifname { "lo", "lan" } accept
        ct state established,related accept
    }
    chain forward {
        type filter hook forward priority 0; policy drop;
        iifname "lan" accept
        ct state established,related accept
        jump miniupnpd
    }
    chain prerouting {
        type nat hook prerouting priority -100; policy accept;
        jump prerouting_miniupnpd
    }
    chain postrouting {
        type nat hook postrouting priority 100; policy accept;
        jump postrouting_miniupnpd
        oifname "wan" masquerade
    }
}
"""

#: miniupnpd's own configuration.
UPNP_CONFIGURATION = """\
ext_ifname=wan
listening_ip=lan
http_port=0
enable_natpmp=yes
enable_upnp=yes
secure_mode=yes
system_uptime=yes
notify_interval=900
uuid=5d1c57a0-3c15-4b2a-9f5e-000000000001
friendly_name=NAT lab
upnp_table_name=filter
upnp_nat_table_name=filter
allow 1024-65535 192.168.0.0/16 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
"""
