"""Coverage-guided fuzzing of every decoder that tests/hostile/decoders.py lists: one child process after the other.

The parent hands out the time, prints what was found and keeps the bytes; a child (``--one``) is libFuzzer itself.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: All message classes are one target: the first two bytes choose the class, so that coverage of one serves all.
MESSAGES = "messages"
#: Parts of the time: what is decoded by a walk of our own, before anybody is known, gets more.
WEIGHTS = {MESSAGES: 4.0, "mux": 2.0, "secure responder": 2.0, "stun": 1.0}
#: Crashes of one target after which it is left alone.
ENOUGH = 3
SEEDS = 40


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="in all (default 600)")
    parser.add_argument("--only", default="", help="decoders whose name holds this text")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "fuzz", help="corpus and crashes")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="name the targets and end")
    options = parser.parse_args()
    if options.one:
        fuzz(options.one, options.folder, options.seconds, options.seed)
        return 0
    listed = subprocess.run([sys.executable, "-c", _LIST], check=True, capture_output=True, text=True, cwd=ROOT)
    names = [name for name in [MESSAGES, *listed.stdout.splitlines()] if options.only in name]
    if options.list:
        print("\n".join(names))
        return 0
    total = sum(WEIGHTS.get(name, 1.0) for name in names)
    crashes: list[Path] = []
    for name in names:
        seconds = options.seconds * WEIGHTS.get(name, 1.0) / total
        crashes += campaign(name, options.folder / name.replace(" ", "-"), seconds, options.seed)
    print(f"\n{len(names)} targets, {options.seconds:.0f} s, {len(crashes)} crashes")
    for crash in crashes:
        print(f"  {crash}")
    return 1 if crashes else 0


_LIST = """
import sys; sys.path.insert(0, "tests")
from hostile.decoders import decoders
print("\\n".join(name for name in decoders() if not name.startswith("message ")))
"""


def campaign(name: str, folder: Path, seconds: float, seed: int) -> list[Path]:
    """Fuzz one target for ``seconds``, again after a crash; the files that crash it."""
    end = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    old = {path.name for path in folder.iterdir()}
    runs, found = 0, list[Path]()
    while (left := end - time.monotonic()) > 1.0 and len(found) < ENOUGH:
        command = [sys.executable, __file__, "--one", name, "--folder", str(folder), "--seconds", f"{left:.0f}"]
        child = subprocess.run([*command, "--seed", str(seed)], check=False, capture_output=True, text=True, cwd=ROOT)
        runs += _executed(child.stderr)
        new = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in old)
        old |= {path.name for path in new}
        found += new
        if not new:
            if child.returncode:
                print(f"\n{name}: the fuzzer itself ended with {child.returncode}\n{child.stderr[-3000:]}")
                found.append(folder)
            break
        print(f"\n{name}: {new[0]}\n{_why(child.stdout + child.stderr)}")
    print(f"{name}: {runs} inputs in {seconds:.0f} s, {len(found)} crashes", flush=True)
    return found


def _executed(text: str) -> int:
    done = [line.split()[1] for line in text.splitlines() if line.startswith("stat::number_of_executed_units")]
    if done:
        return int(done[-1])
    counts = [line[1:].split()[0] for line in text.splitlines() if line.startswith("#")]
    return int(counts[-1]) if counts and counts[-1].isdigit() else 0


def _why(text: str) -> str:
    lines = text.splitlines()
    start = next((at for at, line in enumerate(lines) if "Traceback" in line or "ERROR: libFuzzer" in line), 0)
    return "\n".join(lines[start : start + 40])


# --- the child -------------------------------------------------------------------------------------------------------


def fuzz(name: str, folder: Path, seconds: float, seed: int) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    import atheris

    sys.path.insert(0, str(ROOT / "tests"))
    with atheris.instrument_imports(include=["shoal"]):
        from hostile.decoders import TYPED, decoders
        from hostile.samples import bent, retyped
    found = decoders()
    messages = sorted(each for each in found if each.startswith("message "))
    rng = random.Random(seed or os.urandom(8))

    def target(data: bytes) -> None:
        if name == MESSAGES:
            if len(data) < 2:
                return
            feed, data = found[messages[int.from_bytes(data[:2], "big") % len(messages)]].feed, data[2:]
        else:
            feed = found[name].feed
        try:
            feed(data)
        except TYPED:
            pass

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if draw.random() < 0.5:
            return bytes(atheris.Mutate(data, max_size))
        if name == MESSAGES and len(data) > 2 and draw.random() < 0.5:
            return _retyped(retyped, data, draw)[:max_size]
        return bent(data, draw)[:max_size]

    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number in range(len(messages) * 4 if name == MESSAGES else SEEDS):
        if name == MESSAGES:
            which = number % len(messages)
            data = which.to_bytes(2, "big") + found[messages[which]].seed(rng)
        else:
            data = found[name].seed(rng)
        (corpus / f"seed-{number:03}").write_bytes(data)
    flags = [f"-max_total_time={max(1, int(seconds))}", f"-artifact_prefix={folder}/", "-timeout=10"]
    flags += ["-rss_limit_mb=2048", "-max_len=65536", "-print_final_stats=1", *([f"-seed={seed}"] if seed else [])]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], target, custom_mutator=mutate)
    atheris.Fuzz()


def _retyped(change: Callable[[bytes, random.Random], bytes], data: bytes, draw: random.Random) -> bytes:
    try:
        return data[:2] + change(data[2:], draw)
    except (ValueError, TypeError, OverflowError):  # not a whole message any more
        return data


if __name__ == "__main__":
    sys.exit(main())
