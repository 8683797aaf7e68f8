"""The rules of the layout: imports run down the data's way, torch begins with the model, starting is quick."""

import ast
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import instil

SOURCE = Path(instil.__file__).parent
ROOMS = (
    "errors",
    "conversation",
    "data",
    "prompt",
    "packing",
    "model",
    "objectives",
    "training",
    "inference",
    "serving",
    "synthesis",
    "evaluation",
    "export",
    "pocket",
    "cli",
)
TORCH_BEGINS = ROOMS.index("model")


def module_name(root: Path, file: Path) -> str:
    parts = [root.name, *file.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.Module, name: str, is_package: bool) -> Iterator[tuple[str, str | None]]:
    """Every `(module, name taken from it)` that the file imports, at any depth, relative imports resolved."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def faults(root: Path) -> list[str]:
    """What the package at `root` does against the rules."""
    files = {module_name(root, file): file for file in sorted(root.rglob("*.py"))}
    graph: dict[str, set[str]] = {name: set() for name in files}
    found = []
    for name, file in files.items():
        room = name.split(".")[1] if "." in name else ""
        if room in ("", "__main__"):  # the public names, which are lazy, and `python -m instil`
            continue
        if room not in ROOMS:
            found.append(f"{name}: {room!r} is no room of the layout")
            continue
        for module, taken in imports_of(ast.parse(file.read_text("utf-8")), name, file.name == "__init__.py"):
            top = module.split(".")[0]
            if top == "torch" and ROOMS.index(room) < TORCH_BEGINS:
                found.append(f"{name}: torch before model")
            if top != root.name:
                continue
            target = f"{module}.{taken}" if taken and f"{module}.{taken}" in files else module
            if target == root.name:
                if taken != "__version__":
                    found.append(f"{name}: {taken} from the package itself, which stands above every room")
                continue
            target_room = target.split(".")[1]
            if target_room not in ROOMS:
                found.append(f"{name}: imports {target}, in no room of the layout")
            elif ROOMS.index(target_room) > ROOMS.index(room):
                found.append(f"{name}: upward arrow to {target}")
            elif room in ("errors", "conversation"):
                found.append(f"{name}: imports {target}, and must import nothing of the package")
            graph[name].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("cycle: " + " -> ".join(error.args[1]))
    return found


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout


def test_the_layout_is_kept():
    assert faults(SOURCE) == []


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("data/a.py", "from instil.prompt import b", "instil.data.a: upward arrow to instil.prompt.b"),
        ("data/a.py", "def f():\n    import instil.prompt.b", "instil.data.a: upward arrow to instil.prompt.b"),
        ("data/a.py", "from ..prompt.b import x", "instil.data.a: upward arrow to instil.prompt.b"),
        ("packing/a.py", "def f():\n    from torch.nn import Module", "instil.packing.a: torch before model"),
        ("prompt/a.py", "import torch", "instil.prompt.a: torch before model"),
        ("prompt/a.py", "from instil import read", "instil.prompt.a: read from the package itself"),
        ("conversation.py", "import instil.errors", "instil.conversation: imports instil.errors"),
        ("utils/a.py", "", "instil.utils.a: 'utils' is no room"),
        ("prompt/b.py", "from . import c", "cycle: "),
        ("prompt/b.py", "def f():\n    from instil.prompt.c import x", "cycle: "),
    ],
)
def test_each_rule_is_seen_broken(tmp_path, file, text, fault):
    root = tmp_path / "instil"
    files = {
        "errors.py": "",
        "prompt/b.py": "",
        "prompt/c.py": "from instil.prompt import b",
        "model/m.py": "import torch",
    }
    for name, content in {**files, "__init__.py": "", "prompt/__init__.py": "", file: text}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    (found,) = faults(root)
    assert found.startswith(fault)


def test_rooms_before_the_model_run_without_torch():
    early = [
        module_name(SOURCE, file) for room in ROOMS[:TORCH_BEGINS] for file in sorted(SOURCE.glob(f"{room}/**/*.py"))
    ]
    assert len(early) > 5
    code = (
        "import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint('torch' in sys.modules)"
    )
    assert run("-c", code, *early) == "False\n"


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, instil; print(sorted({'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)))"
    assert run("-c", code) == "[]\n"


def test_all_is_what_is_exported():
    values = {name: getattr(instil, name) for name in instil.__all__}
    assert all(value is not None for value in values.values())
    assert instil.__all__ == sorted(set(instil.__all__))
    module = type(sys)
    helpers = {"TYPE_CHECKING", "import_module"}
    public = {name for name, value in vars(instil).items() if name[0] != "_" and not isinstance(value, module)}
    assert public - helpers == set(instil.__all__)
    assert {name for name in dir(instil) if name[0] != "_"} == set(instil.__all__)
    with pytest.raises(AttributeError, match="'instil' has no attribute 'raed'"):
        _ = instil.raed


def test_help_answers_at_once():
    """Against the interpreter's own start, the best of several: the machine may be busy with other things."""

    def best_of(count: int, *command: str) -> float:
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - begin)
        return min(times)

    command = Path(sysconfig.get_path("scripts")) / "instil"
    start = best_of(5, sys.executable, "-c", "import json, subprocess, typing, asyncio")
    assert best_of(5, str(command), "--help") < max(0.7, 6 * start)


def test_help_loads_no_model_library():
    code = (
        "import sys\nfrom instil.cli.main import main\nsys.argv = ['instil', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    assert run("-c", code).splitlines()[-1] == "[]"
