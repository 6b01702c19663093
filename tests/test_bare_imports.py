"""What must run on a bare GPU image imports with torch, numpy and Pillow alone."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "ijepa_enhanced"


def modules() -> list[str]:
    """All of these places, files that are written later too."""
    files = [ROOT / "packed.py", ROOT / "jepa.py", ROOT / "data" / "decode.py"]
    for folder in ("ops", "models", "benchmarks"):
        files += sorted((ROOT / folder).rglob("*.py"))
    names = [path.relative_to(ROOT.parent).with_suffix("").parts for path in files]
    return [".".join(name[:-1] if name[-1] == "__init__" else name) for name in names]


# torch's own requirements come with it, though the package is not to lean on fsspec, which is one of them.
ALLOWED = (
    *("torch", "torchgen", "functorch", "numpy", "PIL", "ijepa_enhanced"),
    *("typing_extensions", "filelock", "sympy", "mpmath", "networkx", "jinja2", "markupsafe"),
)
REFUSED = (
    *("pyarrow", "safetensors", "huggingface_hub", "fsspec", "jsonargparse", "rich", "yaml", "matplotlib"),
    *("tensorboard", "sklearn", "datasets", "pandas", "scipy", "torchvision", "transformers"),
)

PROGRAM = """
import importlib, json, sys

allowed = {*sys.stdlib_module_names, *json.loads(sys.argv[1])}
finders = sys.meta_path[:]

class Bare:
    # Says of all else what an image says that lacks it: that it is not there, whether imported or looked for.
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in allowed or name.startswith("_sysconfigdata"):
            return next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)

sys.meta_path[:] = [Bare]
failures = {}
for name in json.loads(sys.argv[2]):
    try:
        importlib.import_module(name)
    except ImportError as error:
        failures[name] = str(error)
print(json.dumps({"failures": failures, "loaded": sorted(sys.modules)}))
"""


@cache
def bare(*names: str) -> tuple[dict[str, str], list[str]]:
    """Why modules fail to import in a process that has nothing but `ALLOWED`, and all modules it then has."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(ALLOWED), json.dumps(names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return answer["failures"], answer["loaded"]


@pytest.mark.parametrize("name", modules())
def test_it_imports_on_a_bare_image(name: str) -> None:
    failures, loaded = bare(*modules())
    assert name not in failures, failures[name]
    assert name in loaded


def test_nothing_else_came_along() -> None:
    # Whatever was loaded before the hook would be free to import.
    _, loaded = bare(*modules())
    assert not {module.partition(".")[0] for module in loaded} & set(REFUSED)


def test_a_bare_image_lacks_what_it_should_lack() -> None:
    failures, _ = bare(*REFUSED, "ijepa_enhanced.cli")
    assert {*failures} == {*REFUSED, "ijepa_enhanced.cli"}
    assert all(failures[name] == f"No module named '{name}'" for name in REFUSED)
