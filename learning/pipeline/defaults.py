"""Constants of the pipeline, each with its unit and reason."""

from __future__ import annotations

#: Peers of one run with stages that a peer knows of at once.
MAX_CREW = 256

#: Seconds between two beats to everybody when nothing changes. Deaths are seen by the links, not by silence.
BEAT_EVERY = 1.0

#: Seconds without a beat, after which a peer whose link is up counts no longer: its event loop hangs or it is stopped.
BEAT_LOST = 5.0

#: Seconds for an answer to a beat, at least.
BEAT_TIMEOUT = 3.0

#: Seconds that a stage must have no holder before somebody takes it over: a link that only broke is up again by then.
LOST_GRACE = 0.4

#: The same at the beginning, for a stage that nobody was ever seen to hold: who is to have it builds its model first.
#: And for who comes later: until its holder is linked and has shown its run, a stage looks as if nobody had it.
BEGIN_GRACE = 20.0

#: The same when peers start again: somebody who held the stage before loads what it kept, its run may have to wait for
#: a lease of others to end, and it may itself start later than we.
RESUME_GRACE = 60.0

#: Seconds that a holder must be the one that is to take a lost stage over before it leaves its own: word of who has
#: just become ready may be under way, and those that have it name another one.
NAMED = 0.1

#: Seconds between two looks at who holds what.
LOOK_EVERY = 0.1

#: Seconds between two searches of the DHT for further peers of the run.
SCOUT_EVERY = 10.0

#: Micro-batches of one step of one feeder.
MAX_MICRO_BATCHES = 256

#: Micro-batches of one sender that wait here; one more is refused, and it takes another way or waits.
MAX_WAITING = 512

#: Steps that micro-batches and words of their ways may be ahead of us: feeders wait for each other at every step, and
#: who has just joined goes through the steps that it missed without any.
MAX_AHEAD = 8

#: Bytes of micro-batches that wait here, or are being read, of all senders; and of one of them.
MAX_HELD, MAX_HELD_OF_ONE = 2 << 30, 1 << 30

#: Looks through the stages, and answers with a stage's weights, at a time.
MAX_SERVED = 8

#: Tensors of one micro-batch, their dimensions, elements and bytes.
MAX_TENSORS, MAX_DIMS = 16, 8
MAX_ELEMENTS, MAX_BODY = 1 << 28, 1 << 28

#: Characters that describe how a batch is nested; levels of nesting.
MAX_NEST, MAX_DEPTH = 4096, 8

#: Seconds that a micro-batch may be away, at least, before it is sent another way as well.
TURN_FLOOR = 1.0

#: Times the usual time that a micro-batch is away, after which it is sent another way as well.
TURN_FACTOR = 6.0

#: Seconds for a micro-batch to be taken, beyond what its bytes take.
PUSH_FLOOR = 3.0

#: Seconds between two attempts to send a micro-batch when no peer takes it.
RETRY = 0.05

#: Seconds for the weights of a stage to come, beyond what their bytes take.
STATE_FLOOR = 5.0

#: Times as great the learning rate of a stage that was recovered (ALGORITHMS.md section 4; CheckFree Alg. 1).
RECOVERED_RATE = 1.1

#: Calls of the model in one evaluation, at most: each repeats what the evaluation does beside them.
MAX_LOOKS = 1024

#: Seconds for a look through all stages that are left.
LOOK_FLOOR = 60.0

#: Rounds from one copy of an inner stage to the next: it is wanted only when two neighbours are lost at once.
GUARD_EVERY = 5

#: Seconds until a copy that could not be renewed is tried again: its holders may not have the round's digest yet.
GUARD_AGAIN = 0.5

#: Seconds for word of which state of a stage a peer has: who takes the stage over waits for all of them.
ASK_KEPT = 1.0

#: Seconds that a copy is fetched for without any holder.
KEPT_PATIENCE = 5.0

#: Power of the gradient norms by which CheckFree weighs the neighbours of a lost stage.
NORM_EXPONENT = 1.0

#: Seconds that a restarted peer waits for word of the others, before it goes on with the stage it had.
RESUME_WAIT = 3.0

#: Times as fast the slowest stage must become at least for holders to be moved by a plan (:func:`planner.assign`): a
#: move costs the transfer of a state and a pause of all replicas of the stage, and the measured rates that plans are
#: made of vary by about as much from one round to the next.
MOVE_GAIN = 1.2

#: Partial plans that the planner tries to find the best one; where it takes more, a good one is taken. About 15 ms.
MAX_PLANS = 4096

#: Peers that may move in a plan for which the best one is searched for; with more the search never ends in time.
MAX_FEW = 16

#: Moves and swaps of peers between stages in one plan, at most: what bounds its time. 64 peers at 8 stages take 30.
MAX_EXCHANGES = 256

#: Turns in which prices of stages are found for many peers, and how much less than the most a peer may earn.
PRICE_TURNS, PRICE_SLACK = 40, 0.9

#: Bits of the greatest rate where rates are whole numbers; of what costs nothing.
RATE_BITS, FREE_BITS = 40, 60

#: Generations of a stage that a peer can have missed.
MAX_SKIPPED = 64

#: Seconds after which a peer that is not there any more is forgotten, so that its place is free for others.
FORGET = 60.0

#: How far measured speeds are believed: times the median, and its part.
MAX_RATIO = 8.0

#: Change of the speed that a peer says of itself, as a part of it, from which on it says so.
RATE_CHANGE = 0.25

#: Seconds between two looks whether peers should hold other stages, and that all must have seen the same for.
REPLAN_EVERY, REPLAN_STEADY = 10.0, 5.0

#: Who moved before takes twice as long for the next look, so many times.
MAX_DOUBLINGS = 6

#: Runs of stages that are remembered, as long as somebody says to be in them.
MAX_PARTS = 4 * MAX_CREW

#: Seconds until a peer is asked again for the spec of a run that it did not show.
PROVE_AGAIN = 2.0

#: Runs that one peer is asked to show within that time: who changes its word all the time takes no place of others.
PROVE_AT_ONCE = 4
