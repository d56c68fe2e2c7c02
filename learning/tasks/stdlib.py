"""``stdlib``: a byte-level GPT on the source text of Python's standard library, which is on every machine."""

from __future__ import annotations

import functools
import itertools
import math
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ...transport.errors import ConfigError
from ..shard import Shard, frozen_random
from ..task import Task

#: Folders and files left out: tests, what distributions package apart or generate per platform, and installed packages.
EXCLUDED = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "idlelib", "tkinter", "turtledemo",
     "turtle.py", "lib2to3", "distutils", "ensurepip", "venv", "pydoc_data", "sitecustomize.py")
)  # fmt: skip
#: Every HELD_OUT-th file (by sorted path) is never trained on.
HELD_OUT = 10
#: Windows of the held-out text that one evaluation reads; evenly spaced.
EVALUATION_WINDOWS = 128


@attrs.frozen
class Corpus:
    """Source files as byte arrays (uint8). Which files there are depends on the Python version."""

    train: tuple[NDArray[np.uint8], ...]
    held_out: NDArray[np.uint8]


@functools.cache
def corpus() -> Corpus:
    """The text on this machine. Raises :class:`ConfigError` when the standard library has no source files."""
    root = Path(sysconfig.get_path("stdlib"))
    relative = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    kept = [path for path in relative if not EXCLUDED.intersection(path.split("/")) and "_sysconfigdata" not in path]
    kept = [path for path in kept if not path.startswith("config-")]
    if len(kept) < 2 * HELD_OUT:
        raise ConfigError(f"the standard library at {root} has no source files to train on; use another task")
    return corpus_of([root / path for path in kept])


def corpus_of(files: Sequence[Path]) -> Corpus:
    """Of source files, in this order."""
    texts = [np.frombuffer(path.read_bytes(), dtype=np.uint8) for path in files]
    held_out = [text for i, text in enumerate(texts) if i % HELD_OUT == HELD_OUT - 1]
    train = [text for i, text in enumerate(texts) if i % HELD_OUT != HELD_OUT - 1 and len(text)]
    return Corpus(train=tuple(train), held_out=np.concatenate(held_out))


class Stdlib(Task):
    """Next-byte prediction; metric: bits per byte on held-out files. About 1 M parameters."""

    name: ClassVar[str] = "stdlib"
    metric: ClassVar[str] = "bits_per_byte"
    higher_is_better: ClassVar[bool] = False
    step_seconds: ClassVar[float] = 0.05
    #: 4 peers, 28 rounds: 1.96 bits per byte; with the paper's 0.7/0.9 it stays at 3.5 in so few rounds.
    recommended: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "diloco": {"inner_steps": 25, "outer_lr": 1.0, "momentum": 0.0}
    }

    width: ClassVar[int] = 192
    layers: ClassVar[int] = 2
    heads: ClassVar[int] = 4
    context: ClassVar[int] = 128
    batch: ClassVar[int] = 4
    learning_rate: ClassVar[float] = 2e-3
    warmup: ClassVar[int] = 20

    def corpus(self) -> Corpus:
        """What it learns from."""
        return corpus()

    def model(self) -> nn.Module:
        return ByteGPT(self.width, self.layers, self.heads)

    def stages(self, n: int) -> list[nn.Module]:
        """Embedding, blocks, head: the first stage has the embedding, the last one the head, and blocks are dealt to
        those between; with 2 stages, to both."""
        model = self.model()
        assert isinstance(model, ByteGPT)
        if not 2 <= n <= self.layers + 2:
            raise ConfigError(f"task {self.name} cannot be cut into {n} stages: from 2 to {self.layers + 2}")
        blocks, inner = list(model.blocks), max(1, n - 2)
        sizes = [len(blocks) // inner + (i < len(blocks) % inner) for i in range(inner)]
        cuts = [0, *itertools.accumulate(sizes)]
        pieces: list[nn.Module] = [Blocks(blocks[a:b]) for a, b in itertools.pairwise(cuts)]
        front, head = Front(model.embed, model.mix, model.reach), nn.Sequential(model.norm, model.head)
        return [front, *pieces, head] if n > 2 else [nn.Sequential(front, *pieces), head]

    def silence(self, stage: nn.Module) -> None:
        """Zeros where the branches of its blocks end. The first and the last stage cannot: see :class:`Task`."""
        if not isinstance(stage, Blocks):
            raise ConfigError(f"task {self.name}: the stages with the embedding and the head cannot be skipped")
        for block in stage.blocks:
            assert isinstance(block, Block)
            block.silence_()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        matrices = [p for p in model.parameters() if p.dim() == 2]
        others = [p for p in model.parameters() if p.dim() != 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        return WarmupAdamW(groups, self.learning_rate, self.warmup)

    def batches(self, shard: Shard) -> Iterator[Tensor]:
        """Endless: int64 ``(batch, context + 1)``, random windows of this peer's files (each file is one peer's)."""
        files = self.corpus().train
        order = frozen_random(shard.seed, "stdlib files", shard.count).permutation(len(files))
        text = np.concatenate([files[i] for i in order[shard.index :: shard.count]])
        rng = shard.rng("windows")
        reach = np.arange(self.context + 1)
        while True:
            starts = rng.integers(0, len(text) - self.context - 1, size=self.batch)
            yield torch.from_numpy(text[starts[:, None] + reach].astype(np.int64))

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        windows = torch.from_numpy(windows_of(self.corpus().held_out, self.context).astype(np.int64))
        pieces = [windows[i : i + 32].to(device) for i in range(0, len(windows), 32)]
        nats = [float(self.loss(model, piece)) * len(piece) for piece in pieces]
        return {"bits_per_byte": sum(nats) / len(windows) / math.log(2)}


class StdlibSmall(Stdlib):
    """About 0.2 M parameters, for tests and slow machines."""

    name: ClassVar[str] = "stdlib-small"
    width: ClassVar[int] = 96
    layers: ClassVar[int] = 2
    heads: ClassVar[int] = 3
    step_seconds: ClassVar[float] = 0.02


class StdlibLarge(Stdlib):
    """About 10 M parameters, for a GPU."""

    name: ClassVar[str] = "stdlib-large"
    width: ClassVar[int] = 384
    layers: ClassVar[int] = 6
    heads: ClassVar[int] = 6
    context: ClassVar[int] = 256
    batch: ClassVar[int] = 32
    learning_rate: ClassVar[float] = 1e-3
    warmup: ClassVar[int] = 100
    step_seconds: ClassVar[float] = 0.2


@functools.cache
def held_out_windows(context: int, before: int = 0) -> NDArray[np.uint8]:
    """``(EVALUATION_WINDOWS, before + context + 1)`` bytes of held-out text, evenly spaced.

    The last ``context`` bytes of a window are scored. ``before`` (at most 2) bytes more of what stands before.
    """
    return windows_of(corpus().held_out, context, before)


def windows_of(text: NDArray[np.uint8], context: int, before: int = 0) -> NDArray[np.uint8]:
    """See :func:`held_out_windows`: of any text."""
    starts = np.linspace(2, len(text) - context - 1, EVALUATION_WINDOWS).astype(np.int64)
    windows: NDArray[np.uint8] = text[starts[:, None] + np.arange(-before, context + 1)]
    return windows


@functools.cache
def ngram_baseline(order: int = 2, context: int = 128) -> float:
    """Bits per byte of an order-``order`` model (0 to 2: how many bytes before are its context), for comparison.

    Interpolated absolute discounting (Ney, Essen and Kneser, 1994): each order's estimate is discounted by
    ``n1 / (n1 + 2 n2)``, with n1 and n2 how many grams occur once and twice, and the mass freed goes to the order
    below; the lowest is uniform. Counts come from the whole training text; scored are the very bytes that
    :meth:`Stdlib.evaluate` scores, each with its full context (a model sees less at the start of a window).
    """
    if not 0 <= order <= 2:
        raise ValueError("order is 0, 1 or 2")
    text = np.concatenate(corpus().train)
    windows = held_out_windows(context, before=1)
    chance: NDArray[np.float64] = np.full((len(windows), context), 1 / 256)
    for n in range(order + 1):
        counts = np.bincount(_grams(text, n), minlength=256 ** (n + 1)).reshape(-1, 256)
        total = counts.sum(1)
        kinds = (counts > 0).sum(1)
        # At least 1: without any discount a gram that was never seen would have no chance at all.
        once, twice = max(int((counts == 1).sum()), 1), int((counts == 2).sum())
        discount = once / (once + 2 * twice)
        grams = _grams(windows, n)[:, -context:]
        seen, before = counts.reshape(-1)[grams], grams // 256
        known = np.maximum(total[before], 1)
        estimate = np.maximum(seen - discount, 0) / known + discount * kinds[before] / known * chance
        chance = np.where(total[before] > 0, estimate, chance)
    return float(-np.log2(chance).mean())


def _grams(text: NDArray[np.uint8], n: int) -> NDArray[np.int64]:
    """Each byte with the ``n`` before it, as one number in base 256; along the last axis, shorter by ``n``."""
    length = text.shape[-1] - n
    grams = np.zeros((*text.shape[:-1], length), dtype=np.int64)
    for i in range(n + 1):
        grams = grams * 256 + text[..., i : i + length]
    return grams


# --- the model --------------------------------------------------------------------------------------------------------


class WarmupAdamW(torch.optim.AdamW):
    """AdamW whose learning rate rises linearly over its first ``warmup`` steps, counted by its own state: whoever takes
    that over goes on with the same rate."""

    def __init__(self, params: list[dict[str, object]], lr: float, warmup: int) -> None:
        super().__init__(params, lr=lr, betas=(0.9, 0.95))
        self._peak, self._warmup, self._done = lr, warmup, 0

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        before = max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)
        self._done = done = max(before, self._done if not self.state else 0) + 1
        for group in self.param_groups:
            group["lr"] = self._peak * min(1.0, done / self._warmup)
        super().step(closure)


class ByteGPT(nn.Module):
    """A pre-norm causal transformer over bytes.

    Small and meant to learn within minutes on a CPU core, hence: rotary positions, normalised queries and keys,
    output projections that start at zero, and a causal convolution over the last bytes before the first block, which
    hands the model short contexts that attention would need hundreds of steps to find.
    """

    def __init__(self, width: int, layers: int, heads: int, reach: int = 4) -> None:
        super().__init__()
        self.reach = reach
        self.embed = nn.Embedding(256, width)
        nn.init.normal_(self.embed.weight, std=1.0)
        self.mix = nn.Linear(reach * width, width, bias=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens``: int64 ``(batch, time)``; returns logits ``(batch, time, 256)``."""
        x = through_blocks(self.blocks, embedded(tokens, self.embed, self.mix, self.reach))
        logits: Tensor = self.head(self.norm(x))
        return logits


class Front(nn.Module):
    """The first stage of a :class:`ByteGPT`: tokens ``(batch, time)`` to ``(batch, time, width)``."""

    def __init__(self, embed: nn.Embedding, mix: nn.Linear, reach: int) -> None:
        super().__init__()
        self.embed, self.mix, self.reach = embed, mix, reach

    def forward(self, tokens: Tensor) -> Tensor:
        return embedded(tokens, self.embed, self.mix, self.reach)


class Blocks(nn.Module):
    """A stage of blocks of a :class:`ByteGPT`, with names that count from 0 in each stage."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        return through_blocks(self.blocks, x)


def embedded(tokens: Tensor, embed: nn.Module, mix: nn.Module, reach: int) -> Tensor:
    """Embedding, and the causal convolution over the last ``reach`` bytes."""
    x: Tensor = embed(tokens)
    time = x.shape[1]
    padded = F.pad(x, (0, 0, reach - 1, 0))
    mixed: Tensor = mix(torch.cat([padded[:, i : i + time] for i in range(reach)], dim=-1))
    return x + mixed


def through_blocks(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    angles = rotary(x.shape[1], blocks[0].size, x.device)  # type: ignore[arg-type]
    for block in blocks:
        x = block(x, *angles)
    return x


class Block(nn.Module):
    """Attention, then a squared-ReLU MLP, each added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.size = width // heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.silence_()

    def silence_(self) -> None:
        """Let it hand on what it gets: both branches end in zeros, from which they can learn."""
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, self.size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = (rotate(F.layer_norm(t, (self.size,)), cos, sin) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
        y = F.relu(self.up(self.norm2(x)))
        down: Tensor = self.down(y * y)
        return x + down


def rotary(time: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin ``(time, size / 2)`` of rotary positions (Su et al., 2021, arXiv 2104.09864)."""
    frequency = 1000.0 ** -(torch.arange(0, size, 2, device=device) / size)
    angle = torch.arange(time, device=device)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of features of ``x`` ``(…, time, size)`` by its position's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
