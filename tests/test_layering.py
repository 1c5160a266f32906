"""The arrows of the house: `cli, demo -> train, evaluate, data -> model -> ops -> fastidc_kernels`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What a room may import, itself aside. A room is the longest prefix of a module's name that stands here.
ALLOWED = {
    "fastidc": {
        "fastidc.config",
        "fastidc.data",
        "fastidc.describe",
        "fastidc.errors",
        "fastidc.model",
        "fastidc.ops",
        "fastidc.packed",
        "fastidc.tokenizer",
    },
    "fastidc.errors": set(),
    "fastidc.files": {"fastidc.errors"},
    "fastidc.host": set(),
    "fastidc.safety": set(),
    "fastidc.config": {"fastidc.errors", "fastidc.safety"},
    "fastidc.packed": {"fastidc.config", "fastidc.errors"},
    "fastidc.picked": {"fastidc.packed"},
    "fastidc.reference": set(),
    "fastidc.ops": {"fastidc.errors", "fastidc.reference", "fastidc_kernels"},
    "fastidc.checkpoint": {"fastidc.config", "fastidc.errors", "fastidc.files", "fastidc.host"},
    "fastidc.tokenizer": {"fastidc.config", "fastidc.errors"},
    "fastidc.generate": {"fastidc.ops", "fastidc.errors"},
    "fastidc.model": {
        "fastidc.ops",
        "fastidc.config",
        "fastidc.errors",
        "fastidc.checkpoint",
        "fastidc.generate",
        "fastidc.packed",
        "fastidc.picked",
    },
    "fastidc.data": {
        "fastidc.config",
        "fastidc.errors",
        "fastidc.files",
        "fastidc.host",
        "fastidc.ops",
        "fastidc.packed",
        "fastidc.picked",
        "fastidc.tokenizer",
    },
    "fastidc.evaluate": {
        "fastidc.data",
        "fastidc.model",
        "fastidc.config",
        "fastidc.errors",
        "fastidc.files",
        "fastidc.packed",
        "fastidc.tokenizer",
    },
    "fastidc.train": {
        "fastidc.data",
        "fastidc.describe",
        "fastidc.evaluate",
        "fastidc.model",
        "fastidc.ops",
        "fastidc.config",
        "fastidc.errors",
        "fastidc.files",
        "fastidc.checkpoint",
        "fastidc.packed",
        "fastidc.tokenizer",
    },
    "fastidc.convert": {"fastidc.checkpoint", "fastidc.config", "fastidc.errors", "fastidc.model"},
    "fastidc.demo": {
        "fastidc.train",
        "fastidc.evaluate",
        "fastidc.data",
        "fastidc.config",
        "fastidc.errors",
        "fastidc.files",
        "fastidc.report",
    },
    "fastidc.describe": {
        "fastidc.checkpoint",
        "fastidc.config",
        "fastidc.data",
        "fastidc.errors",
        "fastidc.evaluate",
        "fastidc.files",
        "fastidc.host",
        "fastidc.model",
        "fastidc.packed",
        "fastidc.tokenizer",
    },
    "fastidc.report": {
        "fastidc.checkpoint",
        "fastidc.config",
        "fastidc.data",
        "fastidc.describe",
        "fastidc.errors",
        "fastidc.evaluate",
        "fastidc.files",
        "fastidc.model",
        "fastidc.packed",
        "fastidc.tokenizer",
    },
    "fastidc.share": {
        "fastidc.checkpoint",
        "fastidc.config",
        "fastidc.convert",
        "fastidc.describe",
        "fastidc.errors",
        "fastidc.files",
        "fastidc.model",
        "fastidc.ops",
        "fastidc.tokenizer",
    },
    "fastidc.doctor": {"fastidc", "fastidc.config", "fastidc.data", "fastidc.errors", "fastidc.evaluate", "fastidc.ops", "fastidc.train"},
    "fastidc.commands": {
        "fastidc.checkpoint",
        "fastidc.config",
        "fastidc.convert",
        "fastidc.train",
        "fastidc.evaluate",
        "fastidc.data",
        "fastidc.demo",
        "fastidc.describe",
        "fastidc.doctor",
        "fastidc.errors",
        "fastidc.files",
        "fastidc.report",
        "fastidc.share",
    },
    "fastidc.cli": {"fastidc.commands", "fastidc.errors"},
    "fastidc_kernels": set(),
}


def room(module: str) -> str:
    parts = module.split(".")
    return next(name for i in range(len(parts), 0, -1) if (name := ".".join(parts[:i])) in ALLOWED)


def sources():
    for base in (ROOT, ROOT / "kernels"):
        for package in ("fastidc", "fastidc_kernels"):
            yield from ((path, base) for path in sorted((base / package).rglob("*.py")))


def imports(path: Path, module: str):
    """Names of our modules that the file imports, relative imports resolved."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("fastidc", "fastidc_kernels"))


def test_every_arrow_points_the_right_way():
    seen, wrong = 0, []
    for path, base in sources():
        module = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
        home = room(module)
        for name in imports(path, module):
            seen += 1
            target = room(name)
            if target != home and target not in ALLOWED[home]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}: {home} may not import {target}")
    assert seen > 50, "the walk found too few imports to mean anything"
    assert not wrong, "\n".join(wrong)


def test_kernels_root_is_no_package():
    """A package named `kernels` would shadow a public one."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("folder", ["fastidc", "kernels", "bench", "tests"])
def test_files_stay_small(folder):
    long = {str(p.relative_to(ROOT)): n for p in (ROOT / folder).rglob("*.py") if (n := len(p.read_text().splitlines())) > 350}
    assert not long, f"each is probably two things: {long}"


FORBIDDEN = {
    "eval", "exec", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.jit.load", "torch.package",
    "marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load",
}  # fmt: skip


def harm(source: str) -> list[str]:
    """Calls in ``source`` that would run code of a file, or a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func) if isinstance(node.func, (ast.Name, ast.Attribute)) else ""
        given = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg in ("weights_only", "shell", "allow_pickle")}
        unsafe = (
            given.get("weights_only", "True") != "True"
            or given.get("shell", "False") != "False"
            or given.get("allow_pickle", "False") != "False"
        )
        if name in FORBIDDEN or unsafe or (name == "torch.load" and "weights_only" not in given):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_nothing_runs_code_of_a_file():
    """Neither pickles nor TorchScript nor a shell, whatever a file says; every torch.load says weights_only=True."""
    files = [path for folder in ("fastidc", "kernels", "bench") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert not {str(path.relative_to(ROOT)): found for path in files if (found := harm(path.read_text()))}


@pytest.mark.parametrize(
    "call",
    [
        "eval(x)",
        "os.system(x)",
        "pickle.load(f)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "run(x, shell=True)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_harm_is_seen(call):
    assert harm(f"def f(x):\n    return {call}\n")
    assert not harm("model.eval()\ntorch.load(f, weights_only=True)\nrun(x, shell=False)\n")
