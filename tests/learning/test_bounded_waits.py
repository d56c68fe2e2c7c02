"""No wait of a round without something that ends it: every await of the code of rounds is looked at.

An await of another function of these modules is followed there. Any other is inside a scope with a deadline, or is
listed here with what ends it; what is listed and gone fails too. What these bounds come to: ``test_silences.py``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = [
    *sorted((ROOT / "learning" / "rounds").glob("*.py")),
    *sorted((ROOT / "learning" / "reduce").glob("*.py")),
    ROOT / "learning" / "exchange.py",
]

#: Calls that open a scope with a deadline.
SCOPES = ("trio.move_on_after", "trio.fail_after", "trio.CancelScope")

#: Names that functions here share with waits of others: never followed.
WAITS = ("wait", "receive", "call", "connect", "read_into", "write", "result")

#: Ends of what is awaited, anywhere: text of the function → what ends it.
ANYWHERE = {
    "self._host.run_blocking": "arithmetic or a write of this machine: no peer is waited for",
    "self._run.host.run_blocking": "arithmetic of this machine",
    "trio.lowlevel.checkpoint": "no wait: the others get their turn",
    "trio.lowlevel.checkpoint_if_cancelled": "no wait",
    "self._endpoint.call": "Endpoint.call: deadlines.call, by the link's round trip, lag, bandwidth and the body",
    "self._endpoint.connect": "Endpoint.connect: deadlines.connect",
    "endpoint.stream": "download gives it the deadline of all its pieces",
    "call.read_into": "serving.py: the time that the caller gave its call",
    "call.write": "serving.py: the time that the caller gave its call",
    "reply.result": "within the block of a stream, whose deadline is that of the whole",
}
#: Single waits: (module, function, text) → what ends it.
HERE = {
    ("rounds/instance.py", "Instance.outcome", "self.decided.wait"): "attempts of the voter, as long as a majority "
    "lives; Membership.guard where it does not",
    ("rounds/instance.py", "Instance._wait_for", "trio.sleep_forever"): "a fault that a test asked for",
    ("rounds/presence.py", "Presence._watch", "link.closed.wait"): "the link's keepalive: deadlines.sign_of_life",
    (
        "rounds/results.py",
        "Results.own_fingerprint",
        "printed.done.wait",
    ): "set by whoever computes it, also when it is cancelled",
    ("rounds/hub.py", "Hub._on_want", "handler"): "Traffic.on_want, followed there",
    ("reduce/filling.py", "Filling.wait", "self._changed.wait"): "Exchange._fill, which gives up after the run's "
    "patience; _filled has a deadline of its own",
    ("rounds/audits.py", "Auditor._ask", "self._endpoint.stream"): "deadlines.call for the whole body; half a phase "
    "around the look",
    (
        "rounds/audits.py",
        "Auditor._ask",
        "reply.read_into",
    ): "within the block of a stream, whose deadline is the whole's",
    ("exchange.py", "Reducing._wait", "self._ended.wait"): "the end of the round; or close()",
    ("exchange.py", "Exchange.settle", "self._decided.wait"): "Exchange._drive, which sets it however it ends",
    ("exchange.py", "Exchange.gather", "self._decided.wait"): "Exchange._collect, which sets it however it ends",
    ("exchange.py", "Exchange._deliver", "self._decided.wait"): "Exchange._drive, which sets it however it ends",
    ("exchange.py", "Exchange._looked_at", "given.filling.wait"): "Exchange._fill, after the run's patience",
    ("exchange.py", "Exchange._agree", "self._run.agree"): "Instance.outcome and Membership.guard",
}


class Finder(ast.NodeVisitor):
    """Awaits of one module that no scope with a deadline is around: (function, text of what is called)."""

    def __init__(self, followed: set[str]) -> None:
        self.found: list[tuple[str, str]] = []
        self._followed = followed
        self._names: list[str] = []
        self._bounded = [False]

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._names.append(node.name)
        self.generic_visit(node)
        self._names.pop()

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._names.append(node.name)
        self._bounded.append(False)  # a scope around the definition is none around the call
        self.generic_visit(node)
        self._bounded.pop()
        self._names.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = _function

    def _with(self, node: ast.With | ast.AsyncWith) -> None:
        before = self._bounded[-1]
        for item in node.items:
            if isinstance(item.context_expr, ast.Call):
                text = ast.unparse(item.context_expr.func)
                if text in SCOPES and (item.context_expr.args or item.context_expr.keywords):
                    self._bounded[-1] = True
                if isinstance(node, ast.AsyncWith) and not text.endswith("open_nursery"):
                    self._note(item.context_expr.func)  # a nursery ends with its tasks, which are looked at themselves
        for child in node.body:
            self.visit(child)
        self._bounded[-1] = before

    visit_With = visit_AsyncWith = _with

    def visit_AsyncFor(self, node: ast.AsyncFor) -> None:
        self._note(node.iter)
        self.generic_visit(node)

    def visit_Await(self, node: ast.Await) -> None:
        self._note(node.value.func if isinstance(node.value, ast.Call) else node.value)
        self.generic_visit(node)

    def _note(self, what: ast.expr) -> None:
        name = what.attr if isinstance(what, ast.Attribute) else what.id if isinstance(what, ast.Name) else ""
        if not self._bounded[-1] and (name in WAITS or name not in self._followed):
            self.found.append((".".join(self._names), ast.unparse(what)))


def coroutines(trees: list[ast.Module]) -> set[str]:
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef)}


def waits(sources: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    trees = {name: ast.parse(text) for name, text in sources.items()}
    followed = coroutines(list(trees.values()))
    for name, tree in trees.items():
        finder = Finder(followed)
        finder.visit(tree)
        for function, text in finder.found:
            yield name, function, text


def sources() -> dict[str, str]:
    return {str(path.relative_to(ROOT / "learning")): path.read_text("utf-8") for path in MODULES}


def test_every_wait_of_a_round_has_a_deadline_or_is_listed_with_what_ends_it() -> None:
    found = list(waits(sources()))
    assert len(found) > 30, "it looks at nothing any more"
    open_ended = [wait for wait in found if wait not in HERE and wait[2] not in ANYWHERE]
    assert not open_ended, f"no deadline is around these, and nothing is said of what ends them: {open_ended}"


def test_what_is_listed_is_there() -> None:
    found = list(waits(sources()))
    assert set(HERE) <= set(found), f"gone: {set(HERE) - set(found)}"
    texts = {text for _, _, text in found}
    assert set(ANYWHERE) <= texts, f"gone: {set(ANYWHERE) - texts}"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("async def f():\n    await event.wait()", ["event.wait"]),
        ("async def f():\n    with trio.move_on_after(3):\n        await event.wait()", []),
        ("async def f():\n    with trio.CancelScope():\n        await event.wait()", ["event.wait"]),
        ("async def f():\n    with trio.CancelScope(deadline=3):\n        await event.wait()", []),
        ("async def f():\n    with trio.fail_after(3):\n        pass\n    await event.wait()", ["event.wait"]),
        (
            "async def f():\n    with trio.fail_after(3):\n        async def g():\n            await event.wait()",
            ["event.wait"],
        ),
        ("async def f():\n    async for x in channel:\n        pass", ["channel"]),
        ("async def f():\n    async with endpoint.stream(a) as reply:\n        pass", ["endpoint.stream"]),
        ("async def g():\n    pass\nasync def f():\n    await self.g()\n    await trio.sleep(1)", ["trio.sleep"]),
        ("async def f():\n    return await call.read_into(x) if y else await park()", ["call.read_into", "park"]),
    ],
)
def test_a_wait_without_a_deadline_is_found(code: str, expected: list[str]) -> None:
    """The search itself, on code of which one sees what it must find."""
    assert [text for _, _, text in waits({"m.py": code})] == expected
