"""The house stands as drawn: imports only go down, the world comes in through Host, nothing lies about in the root."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: The table of the architecture, from the ground up: a floor imports itself and the floors listed.
MAY_IMPORT = {
    "transport": (),
    "dht": ("transport",),
    "learning": ("dht", "transport"),
    "node": ("learning", "dht", "transport"),
    "sim": ("node", "learning", "dht", "transport"),
}
#: Imports inside functions that go up, each with its reason. (node/api is the face of all floors below sim.)
UPWARD: dict[tuple[str, str], str] = {}

#: What may stand at the top of the repository.
TOP = {
    *MAY_IMPORT,
    "tests",
    "scripts",
    "docs",
    ".ci",
    ".gitignore",
    "pyproject.toml",
    "setup.py",
    "constraints.txt",
    "README.md",
    "LICENSE",
}

MAX_LINES = 500

#: Modules that are the edge to the real world, with the reason. Everything else asks its Host.
WORLD = {
    "transport/host.py": "the real Host itself",
    "transport/tcp.py": "kernel sockets",
    "transport/interfaces.py": "the addresses of this machine's network interfaces, for tcp.py",
    "transport/gateway.py": "the default route of this machine, for portmap.py",
    "transport/upnp.py": "starts the child process that talks to a UPnP router",
    "transport/webrtc_process.py": "starts the engine of a WebRTC connection, a child process",
    "transport/webrtc_child.py": "that child process: asyncio, and no node",
    "transport/webrtc_sctp.py": "the datagram sockets of that child process",
}
#: Single uses outside of those: (module or folder, what) → reason.
WORLD_USES = {
    ("node/local_socket.py", "socket"): "the control socket of this machine, not the swarm's network",
    ("node/local_socket.py", "trio.socket"): "the control socket of this machine, not the swarm's network",
    ("node/doctor_system.py", "socket"): "asks for the addresses of both IP versions; it opens nothing",
    ("node/doctor_system.py", "trio.run_process"): "torch is looked at in a child process",
    ("node/commands.py", "time"): "a command that waits for a node from outside; it is no node",
    ("node/doc_commands.py", "time"): "a command that shows local times and reads files from outside; it is no node",
    ("sim/netlab_delay.py", "time"): "a cable of the NAT lab; it is no node",
    ("sim/lab_dht.py", "time"): "how long a virtual world takes in real seconds; it is no node",
    ("sim/sweep.py", "time"): "how long a sweep takes in real seconds, for who waits for it; it is no node",
    ("sim/simulate.py", "time"): "how long the whole simulation takes, before and after its event loop; it is no node",
}
WORLD_CALLS = (
    "time.time",
    "time.time_ns",
    "time.monotonic",
    "time.monotonic_ns",
    "time.sleep",
    "datetime.datetime.now",
    "datetime.datetime.utcnow",
    "datetime.datetime.today",
    "datetime.date.today",
    "os.urandom",
    "uuid.uuid1",
    "uuid.uuid4",
)
WORLD_MODULES = ("socket", "secrets")
#: Generators of one's own, when they are given a seed. Everything else in these modules is global state.
RANDOM_MODULES = ("random", "numpy.random")
SEEDED = {
    "random": ("Random",),
    "numpy.random": ("Generator", "PCG64", "Philox", "RandomState", "SeedSequence", "default_rng"),
}


@functools.cache
def modules() -> dict[str, Path]:
    """Path relative to the root (``transport/link.py``) → file, of all five floors, in order."""
    files = [path for floor in MAY_IMPORT for path in (ROOT / floor).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path for path in sorted(files)}


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text("utf-8"), filename=name)


MODULES = sorted(modules())


def importing_package(name: str) -> list[str]:
    """The package that relative imports of a module start from, below ``shoal``."""
    parts = name.split("/")[:-1]
    return [] if parts[:2] == ["node", "api"] else parts


def our_imports(name: str) -> Iterator[tuple[ast.stmt, str, bool]]:
    """(statement, floor it reaches, relative?) of every import of ours, also those within functions and type checks."""
    for statement in ast.walk(tree(name)):
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                parts = alias.name.split(".")
                if parts[0] == "shoal":
                    yield statement, parts[1] if len(parts) > 1 else "api", False
        elif isinstance(statement, ast.ImportFrom):
            if statement.level:
                package = importing_package(name)
                assert statement.level <= len(package) + 1, (
                    f"{name}:{statement.lineno} imports from outside the package"
                )
                target = package[: len(package) + 1 - statement.level]
            else:
                target = (statement.module or "").split(".")
                if target[0] != "shoal":
                    continue
                target = target[1:]
                yield from ((statement, floor, False) for floor in [*target, *(a.name for a in statement.names)][:1])
                continue
            target += statement.module.split(".") if statement.module else []
            for floor in [target[0]] if target else [alias.name for alias in statement.names]:
                yield statement, floor, True


def is_within(name: str, place: str) -> bool:
    return name == place or name.removesuffix(".py") == place or name.startswith(place + "/")


def wrong_ways(name: str) -> Iterator[str]:
    floor = name.split("/")[0]
    for statement, reached, relative in our_imports(name):
        where = f"{name}:{statement.lineno}"
        if not relative:
            yield f"{where} imports shoal by its full name; inside the package imports are relative"
        if name.startswith("node/api/") and reached not in MAY_IMPORT:
            continue  # one module of the public face to another
        if any(is_within(name, place) and reached == target for place, target in UPWARD):
            if statement in tree(name).body:
                yield f"{where} goes up to {reached}: only inside a function"
        elif reached not in (floor, *MAY_IMPORT[floor]):
            yield f"{where}: {floor} may not import {reached}"
    for node in ast.walk(tree(name)):  # "shoal.sim.command" for importlib is an import too
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            match = re.fullmatch(r"shoal\.(\w+)(?:\.\w+)*(?::\w+)?", node.value)
            if match is None or match[1] not in MAY_IMPORT or match[1] in (floor, *MAY_IMPORT[floor]):
                continue
            if not any(is_within(name, place) and match[1] == target for place, target in UPWARD):
                yield f"{name}:{node.lineno} names {node.value}: {floor} may not import {match[1]}"


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_go_down_and_are_relative(name: str) -> None:
    found = list(wrong_ways(name))
    assert not found, "\n".join(found)


def test_the_public_face_loads_nothing_of_ours_when_it_is_imported() -> None:
    # It gives names lazily; at import time nothing but its own light modules.
    for name in (name for name in MODULES if name.startswith("node/api/")):
        for statement, reached, _ in our_imports(name):
            if reached in MAY_IMPORT and statement in tree(name).body:
                pytest.fail(f"{name}:{statement.lineno} imports {reached} eagerly")


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_short_and_its_first_line_says_what_it_does(name: str) -> None:
    lines = modules()[name].read_text("utf-8").splitlines()
    if not name.endswith("/defaults.py"):  # a list, not a program
        assert len(lines) <= MAX_LINES, f"{name} has {len(lines)} lines: split it"
    assert (ast.get_docstring(tree(name)) or "").strip(), f"{name} has no docstring"
    assert lines[0].startswith(('"""', 'r"""')), f"{name} does not begin with its docstring"


def test_entry_modules_of_child_processes_are_not_named_main() -> None:
    assert [name for name in MODULES if name.endswith("__main__.py")] == []


def dotted(node: ast.AST, aliases: dict[str, str]) -> str | None:
    """``time.time`` for an attribute chain or a name, import aliases resolved; None for anything else."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, aliases)
        return None if base is None else f"{base}.{node.attr}"
    return None


def aliases_of(name: str) -> dict[str, str]:
    """Local name → dotted origin of all absolute imports of a module."""
    result: dict[str, str] = {}
    for statement in ast.walk(tree(name)):
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                result[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            for alias in statement.names:
                result[alias.asname or alias.name] = f"{statement.module}.{alias.name}"
    return result


def in_scope(node: ast.AST, hidden: frozenset[str]) -> Iterator[tuple[ast.AST, frozenset[str]]]:
    """Every node below with the names that parameters of enclosing functions hide there."""
    yield node, hidden
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        a = node.args
        parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        inside = hidden | {parameter.arg for parameter in parameters}
        body = node.body if isinstance(node.body, list) else [node.body]
        for child in ast.iter_child_nodes(node):
            yield from in_scope(child, inside if child in body else hidden)
        return
    for child in ast.iter_child_nodes(node):
        yield from in_scope(child, hidden)


def uses(name: str) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted origin, not a call without arguments) of everything imported that a module uses."""
    aliases = aliases_of(name)
    bare = [node.func for node in ast.walk(tree(name)) if isinstance(node, ast.Call) and not node.args + node.keywords]
    for node, hidden in in_scope(tree(name), frozenset()):
        visible = {local: origin for local, origin in aliases.items() if local not in hidden}
        if isinstance(node, ast.Name | ast.Attribute) and (origin := dotted(node, visible)) is not None:
            yield node.lineno, origin, node not in bare


def is_world(origin: str, seeded: bool) -> bool:
    """Whether something imported reaches the clock, the network or a random source of the machine."""
    module, _, last = origin.rpartition(".")
    if module in RANDOM_MODULES:
        return last not in SEEDED[module] or not seeded
    return (
        origin in WORLD_CALLS
        or origin.split(".")[0] in WORLD_MODULES
        or origin.startswith("trio.socket")
        or origin in ("trio.open_tcp_stream", "trio.open_tcp_listeners", "trio.serve_tcp", "trio.run_process")
    )


@pytest.mark.parametrize("name", [name for name in MODULES if name not in WORLD])
def test_clocks_sockets_and_randomness_come_through_the_host(name: str) -> None:
    found = [
        f"{name}:{line} uses {origin}"
        for line, origin, seeded in uses(name)
        if is_world(origin, seeded)
        and not any(is_within(name, place) and f"{origin}.".startswith(f"{what}.") for place, what in WORLD_USES)
    ]
    assert not found, "\n".join([*found, "ask the Host, or give the reason in WORLD_USES"])


def forbidden(name: str) -> Iterator[tuple[int, str]]:
    source = modules()[name].read_text("utf-8").splitlines()
    aliases = aliases_of(name)
    for node in ast.walk(tree(name)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in imported:
                if module.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"):
                    yield line, f"{module} (runs code from its input)"
        elif isinstance(node, ast.Call):
            origin = dotted(node.func, aliases) or getattr(node.func, "id", "")
            if origin in ("torch.load", "torch.jit.load", "eval", "exec", "numpy.load"):
                yield line, f"{origin} (may run code from its input)"
        elif isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = node.type is None or any(
                isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException") for kind in kinds
            )
            # An `except BaseException` that only cleans up and raises again swallows nothing.
            raises = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if broad and not raises and "# boundary:" not in source[node.lineno - 1]:
                yield line, "a blind except without `# boundary: why` on its line"


@pytest.mark.parametrize("name", MODULES)
def test_no_code_from_bytes_and_no_blind_except(name: str) -> None:
    found = [f"{name}:{line}: {what}" for line, what in forbidden(name)]
    assert not found, "\n".join(found)


def git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


def test_only_the_house_and_its_tools_stand_in_the_root() -> None:
    assert sorted({path.split("/")[0] for path in git("ls-files")} - TOP) == []


def test_reasons_stand_for_exceptions_that_exist() -> None:
    # An allowance whose place is gone is a hole: take it out.
    places = [*WORLD, *(place for place, _ in WORLD_USES), *(place for place, _ in UPWARD)]
    gone = [place for place in places if not any(is_within(name, place) for name in MODULES)]
    assert gone == []


def in_a_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.process
@pytest.mark.parametrize("module", ["shoal", "shoal.sim.cli", "shoal.node.commands"])
def test_light_commands_load_no_torch(module: str) -> None:
    heavy = ("torch", "sklearn", "scipy", "matplotlib", "numpy", "pandas")
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    assert in_a_fresh_python(code) == "[]"


def test_every_name_of_the_public_face_can_be_had() -> None:
    import shoal

    for name in getattr(shoal, "__all__", ()):
        assert getattr(shoal, name) is not None
    unknown = "no_such_name"
    with pytest.raises(AttributeError, match=unknown):
        getattr(shoal, unknown)


@pytest.mark.parametrize("name", [name for name in MODULES if name.endswith("defaults.py")])
def test_no_constant_stands_twice_in_its_module(name: str) -> None:
    # The second would silently replace the first for everybody.
    seen: dict[str, int] = {}
    for node in ast.parse((ROOT / name).read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for part in (part for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)):
                assert part.id not in seen, f"{name}:{node.lineno}: {part.id} stands in line {seen[part.id]} already"
                seen[part.id] = node.lineno
