"""The house's own rules: arrows point one way, imports stay light, only sd_mini goes into the wheel."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOTS = {"sd_mini": {"sd_mini"}, "training": {"training", "sd_mini"}, "eval": {"eval", "sd_mini"}}
# inside sd_mini a room may import only rooms of a lower floor, or itself; single files stand on the ground floor
FLOORS = [
    {
        "errors",
        "openmp",
        "remarks",
        "processes",
        "draws",
        "memory",
        "offload",
        "texts",
        "files",
        "config",
        "images",
        "weights",
        "lora",
    }
    | {"weights", "lora", "timing", "progress", "png"},
    {"shapes", "data", "cpu"},
    {"diffusion", "autoencoder", "text_encoder"},
    {"noise_predictor", "vision"},
    {"stages", "sampling", "generators"},
    {"pipelines"},
    {"app"},
    {"cli"},
    {"__main__"},
]


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at the top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


# from training to eval: the evaluators in the loop, the judge and CLIP as rewards, the guards beside them
DOORS = [ROOT / "training" / path for path in ("engine/evaluation.py", "reward/rewards.py", "reward/guards.py")]


@pytest.mark.parametrize("root", ROOTS)
def test_roots_import_only_what_they_may(root):
    for path in (ROOT / root).rglob("*.py"):
        found = {name.split(".")[0] for name in imported(path)} & {"sd_mini", "training", "eval", "tests"}
        allowed = ROOTS[root] | ({"eval"} if path in DOORS else set())
        assert found <= allowed, f"{path} imports {found - allowed}"


@pytest.mark.parametrize("door", DOORS)
def test_a_door_to_the_evaluators_is_inside_a_function(door):
    """Training that does not evaluate imports no evaluator."""
    tree = ast.parse(door.read_text(encoding="utf-8"))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    doors = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module.split(".")[0] == "eval"]
    assert doors and all(id(node) in inside for node in doors)


def test_floors_inside_the_library():
    floor = {name: i for i, rooms in enumerate(FLOORS) for name in rooms}
    library = ROOT / "sd_mini"
    for path in library.rglob("*.py"):
        room = path.relative_to(library).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "sd_mini" and len(parts) > 1 and parts[1] in floor:
                assert floor[parts[1]] <= floor[room], f"{path} imports {name} from a higher floor"


def test_import_and_help_load_no_torch():
    code = (
        "import sys, sd_mini, sd_mini.cli.commands\n"
        "try: sd_mini.cli.commands.main(['--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


def test_only_the_library_goes_into_the_wheel():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert tools["setuptools"]["packages"]["find"]["include"] == ["sd_mini", "sd_mini.*"]


def test_nothing_that_is_loaded_can_execute_code():
    """`torch.load` only with `weights_only=True`, which builds nothing but tensors."""
    forbidden = {"pickle", "register_for_checkpointing"}
    for root in ROOTS:
        for path in (ROOT / root).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            used = imported(path) | {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
            assert not used & forbidden, f"{path} uses {used & forbidden}"
            for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
                if "torch.load" in ast.unparse(call.func) or "load_state_dict_from_url" in ast.unparse(call.func):
                    options = {k.arg: ast.unparse(k.value) for k in call.keywords}
                    assert options.get("weights_only") == "True", f"{path}:{call.lineno}"
            assert "allow_pickle" not in {k.arg for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords}
