"""The only place with timeout arithmetic: from round trip, bytes, bandwidth and loop lag to seconds.

Every function returns seconds from now. Floors stand in ``defaults.py`` with their reasons. ``rtt`` is in seconds,
``bandwidth`` in bytes per second (None: not measured yet), ``lag`` in seconds (:class:`LoopLag`).
"""

from __future__ import annotations

from . import defaults


class LoopLag:
    """How late our own event loop runs: the largest recent overshoot of a sleep, fading with a half-life.

    A busy machine answers late and hears answers late; deadlines add this so that a busy peer is not a dead one.
    """

    def __init__(self) -> None:
        self._peak = 0.0
        self._at = 0.0

    def note(self, overshoot: float, now: float) -> None:
        """A sleep ended ``overshoot`` seconds after it should have."""
        if overshoot >= self.value(now):
            self._peak = min(overshoot, defaults.MAX_LAG)
            self._at = now

    def value(self, now: float) -> float:
        """Seconds to add to a deadline."""
        if not self._peak:
            return 0.0
        return float(self._peak * 0.5 ** ((now - self._at) / defaults.LAG_HALF_LIFE))


def transfer(size: int, bandwidth: float | None) -> float:
    """Seconds for ``size`` bytes: twice what the measured bandwidth says; a slow line when nothing is known."""
    return 2.0 * size / max(bandwidth or defaults.ASSUMED_BANDWIDTH, defaults.MIN_BANDWIDTH)


def record_size(bandwidth: float, last: int) -> int:
    """Bytes of the next record at most: none may take the line for long, as control waits behind it.

    ``last``: the limit before; it at most doubles, as the first records vanish in the kernel's buffer.
    """
    return max(defaults.MIN_RECORD, min(defaults.MAX_RECORD, 2 * last, int(bandwidth * defaults.RECORD_TIME)))


def unsent(bandwidth: float, last: int) -> int:
    """Bytes that may wait unsent in the kernel, by the line's bytes per second; ``last``: before."""
    allowed = max(size for rate, size in defaults.UNSENT if bandwidth > rate or not rate)
    keeps = max(size for rate, size in defaults.UNSENT if bandwidth > rate / 4 or not rate)
    return max(allowed, min(last, keeps))


def under_way(bandwidth: float | None, rtt: float, links: int = 1) -> int:
    """Bytes of bulk that may be sent and not acknowledged: twice what the line holds, or a few records.

    More fills buffers on the way, and here the cache: records are sealed into memory that an acknowledgement frees.
    ``rtt``: the least that was seen; time in which the other side was busy fills no line. ``links``: that send bulk.
    """
    part = min(defaults.LEAST_UNDER_WAY, max(defaults.SHARED_UNDER_WAY // max(links, 1), defaults.ONE_UNDER_WAY))
    return max(part, int(2.0 * (bandwidth or defaults.ASSUMED_BANDWIDTH) * rtt))


def dial(lag: float = 0.0) -> float:
    """For one attempt to open a byte stream."""
    return defaults.DIAL_FLOOR + lag


def dial_once(lag: float = 0.0) -> float:
    """For a dial, or a handshake, that only finds out whether it can be done."""
    return defaults.DIAL_ONCE_FLOOR + lag


def dial_for(rtt: float, lag: float = 0.0) -> float:
    """For a peer that tries some addresses at once."""
    return 2.0 * dial_once(lag) + 4.0 * rtt


def dial_back(rtt: float, lag: float = 0.0) -> float:
    """For a peer that asks others to dial us, and then dials itself."""
    return (1.0 + defaults.DIAL_BACK_THIRDS) * dial_for(rtt, lag)


def signal(lag: float = 0.0) -> float:
    """For the answer to a signal that a common peer forwards, connecting to that peer included."""
    return defaults.SIGNAL_TIME + lag


def reversal(lag: float = 0.0) -> float:
    """For the connection of a peer that has agreed to dial us."""
    return defaults.DIAL_FLOOR + lag


def handshake(lag: float = 0.0) -> float:
    """For a whole handshake, whose round trip nobody knows yet."""
    return defaults.HANDSHAKE_FLOOR + lag


def sign_of_life(rtt: float, lag: float = 0.0, unheard: int = 0, bandwidth: float | None = None) -> float:
    """For the answer to a keepalive ping; ``unheard``: bytes sent since the peer was last heard, queued before it."""
    queue = transfer(unheard, bandwidth) if bandwidth is not None else 0.0
    return max(defaults.PING_FLOOR, 4.0 * rtt) + lag + min(queue, defaults.MAX_QUEUE_ALLOWANCE)


def query(rtt: float, lag: float = 0.0) -> float:
    """For one question among many, which another peer can answer as well; the dial included."""
    return max(defaults.QUERY_FLOOR, 8.0 * rtt) + lag


def probe(rtt: float, lag: float = 0.0) -> float:
    """For an answer to what was sent, before a ping asks for one."""
    return max(defaults.PROBE_FLOOR, 4.0 * rtt) + lag


def suspect(rtt: float, lag: float = 0.0, unheard: int = 0, bandwidth: float | None = None) -> float:
    """For the answer to a ping, before another way is tried beside."""
    queue = transfer(unheard, bandwidth) if bandwidth is not None else 0.0
    return max(defaults.SUSPECT_FLOOR, 4.0 * rtt) + lag + min(queue, defaults.MAX_QUEUE_ALLOWANCE)


def resume(rtt: float, lag: float = 0.0) -> float:
    """For another pipe of a link that has lost its last one."""
    return max(defaults.RESUME_FLOOR, 16.0 * rtt) + lag


def call(rtt: float, lag: float = 0.0, size: int = 0, bandwidth: float | None = None) -> float:
    """For a call whose caller named no timeout: ``size`` bytes of body travel with it."""
    return max(defaults.CALL_FLOOR, 8.0 * rtt) + lag + transfer(size, bandwidth)


def progress(rtt: float, lag: float = 0.0, size: int = 0) -> float:
    """For the next ``size`` bytes of something that is under way, on a slow line."""
    return max(defaults.PING_FLOOR, 4.0 * rtt) + lag + transfer(size, None)


def request_header(rtt: float, lag: float = 0.0) -> float:
    """For the head of a request after its stream was opened: both travel together."""
    return max(defaults.HEADER_FLOOR, 4.0 * rtt) + lag


def goodbye() -> float:
    """For saying goodbye on all links of a node that stops."""
    return defaults.GOODBYE_TIME


def connect(lag: float = 0.0) -> float:
    """For a link to a peer by any of its addresses."""
    return defaults.CONNECT_FLOOR + lag


def bulk_phase(floor: float, size: int, rtt: float, bandwidth: float | None, lag: float = 0.0) -> float:
    """For a phase in which every member of a group sends ``size`` bytes in all; ``bandwidth``: of the slowest link."""
    return floor + 8.0 * rtt + lag + transfer(size, bandwidth)


def planned_phase(floor: float, expected: float, rtt: float) -> float:
    """For a phase of bulk that should take ``expected`` seconds by what was measured on all lines."""
    return floor + 8.0 * rtt + 1.5 * expected


def silence(floor: float, rtt: float, lag: float = 0.0) -> float:
    """Without a word from a peer that owes one every quarter of ``floor``."""
    return floor + 8.0 * rtt + lag


def stragglers(floor: float, worked: float, rtt: float, lag: float = 0.0) -> float:
    """For those that are not ready when a quorum is; ``worked``: seconds that the work took here."""
    return max(floor, worked) + 4.0 * rtt + lag


def last_words(floor: float, rtt: float, lag: float = 0.0) -> float:
    """For answers that are on their way and wanted, but not needed."""
    return floor + 2.0 * rtt + lag


def stun_repeats() -> tuple[float, ...]:
    """Seconds to wait after each sending of a STUN request: doubling, as RFC 8489 6.2.1 says, but fewer of them."""
    return tuple(defaults.STUN_RTO * 2**sent for sent in range(defaults.STUN_REQUESTS))


def stun() -> float:
    """For the answer to a STUN request, repetitions included."""
    return sum(stun_repeats())


def webrtc_setup(lag: float = 0.0) -> float:
    """For the engine of a WebRTC connection to start and to gather candidates."""
    return defaults.WEBRTC_SETUP + lag


def webrtc_connect(lag: float = 0.0) -> float:
    """For ICE, DTLS and SCTP to come up between two ends that know each other's candidates."""
    return defaults.WEBRTC_CONNECT + lag


def webrtc_close() -> float:
    """For the last bytes of a WebRTC connection that is closed, and its engine's end."""
    return defaults.WEBRTC_CLOSE


def punch(rtt: float, lag: float = 0.0) -> float:
    """For knocking at a peer's addresses through both NATs; ``rtt`` by way of the common peer."""
    return defaults.PUNCH_FLOOR + 8.0 * rtt + lag


def punch_start(rtt: float) -> float:
    """From sending "punch-go" until it has arrived."""
    return rtt / 2.0


def punch_go() -> float:
    """From an offer that was answered until its go: a message there and one back."""
    return defaults.PUNCH_GO_TIME


def punch_attempt(rtt: float, before: int, draw: float) -> float:
    """For one request to connect; ``before``: how many were not answered, ``draw``: uniform in 0 to 1.

    Must outlast the direct round trip and a half, which is mostly shorter than that by way of the common peer; it grows
    in case it is not. The spread keeps two sides from missing each other in step.
    """
    return max(defaults.PUNCH_ATTEMPT, 2.0 * rtt) * (1.6**before + 0.2 * draw)


def punch_pause(refused: int, draw: float) -> float:
    """After the ``refused``th refusal, until the next request: short, as it leaves the hole closed."""
    return defaults.PUNCH_PAUSE * (1.0 + refused / 10.0) * draw


def punch_rest(rtt: float) -> float:
    """After the first stream, for the others that the peer may choose instead."""
    return defaults.PUNCH_REST + 2.0 * rtt


def webrtc_abort() -> float:
    """For an engine to tell the far side that it goes, and go."""
    return defaults.WEBRTC_ABORT


def webrtc_ice() -> float:
    """For ICE to find a pair of addresses that works: the part of ``webrtc_connect`` in which paths differ."""
    return defaults.WEBRTC_ICE
