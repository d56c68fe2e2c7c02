"""Constants of the learning floor, each with unit, reason and source."""

from __future__ import annotations

# --- data -----------------------------------------------------------------------------------------------------------

#: Samples that a part of a Dirichlet split has at least: one minibatch. A peer with three samples learns noise.
MIN_PART = 32

# --- training -------------------------------------------------------------------------------------------------------

#: Seconds of one uninterrupted slice of training on the worker thread. Cancellation (Ctrl-C, a lost quorum) waits for
#: the slice to end, and the promise is to be gone within 2 s; entering and leaving the thread costs about 0.1 ms.
TRAIN_SLICE = 0.05

#: Seconds of compute that one training step is modelled to take in virtual time, unless the task says otherwise.
STEP_SECONDS = 0.05

# --- messages to people -----------------------------------------------------------------------------------------------

#: Differing parameters named in full when a model does not match the run's; the rest are counted.
SHOWN_DIFFERENCES = 4

# --- exact arithmetic, digests ----------------------------------------------------------------------------------------

#: Elements of one pass of exact arithmetic: 256 KiB of float32, so that sum, product and input share an L2 of 1 MiB
#: (mean of 8 vectors of 64 MiB: 57 ms; 96 ms unchunked).
EXACT_CHUNK = 1 << 16

#: Bytes of a chunk of the state digest: what a joiner fetches and checks at a time. The same as for blobs.
DIGEST_CHUNK = 1 << 20

#: Bytes under one AEGIS tag in a fingerprint. Fixed: it is part of what the fingerprint is.
FINGERPRINT_PIECE = 4 << 20

#: Bytes per second above which AEGIS must be running on AES instructions (5 GB/s with them, 10 MB/s without).
AEGIS_MIN_RATE = 200e6
