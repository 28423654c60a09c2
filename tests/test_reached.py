"""The digest of an author's code: whatever changes what it does changes it, and nothing else does."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightweight import importable

BEGIN = """
import dataclasses, enum, functools, re
import torch
def base(network, rate, times): return torch.optim.SGD(network.parameters(), lr=rate * times)
"""

HELD = {
    "a partial": """
made = functools.partial(base, times=1.0)
def loss(network, rate): return made(network, rate)
""",
    "a function in a table": """
def other(rate): return rate * 1.0
TABLE = {"a": other}
def loss(network, rate): return base(network, rate, TABLE["a"](rate))
""",
    "another name for an installed function": """
ROOT_OF = torch.sqrt if 1.0 < 2 else torch.exp
def loss(network, rate): return ROOT_OF(rate)
""",
    "a closure": """
def factory(times):
    def inside(network, rate): return base(network, rate, times)
    return inside
made, unused = factory(1.0), factory(3.0)
def loss(network, rate): return made(network, rate)
""",
    "which of two closures": """
def factory(times):
    def inside(network, rate): return base(network, rate, times)
    return inside
one, two = factory(2.0), factory(3.0)
made, other = (one, two) if 1.0 < 2 else (two, one)
def loss(network, rate): return made(network, rate) - other(network, rate)
""",
    "a decorator of one's own": """
def scaled(function):
    @functools.wraps(function)
    def wrapper(network, rate): return function(network, rate * 1.0)
    return wrapper
def plain(network, rate): return base(network, rate, 2.0)
made = scaled(plain)
def loss(network, rate): return made(network, rate)
""",
    "a cached function": """
@functools.cache
def times(rate): return rate * 1.0
def loss(network, rate): return base(network, rate, times(rate))
""",
    "a lambda in a list": """
FACTORS = [lambda rate: rate, lambda rate: rate * 1.0]
def loss(network, rate): return base(network, rate, FACTORS[1](rate))
""",
    "a dataclass": """
@dataclasses.dataclass
class Settings:
    times: float = 5.0
SETTINGS = Settings(1.0)
def loss(network, rate): return base(network, rate, SETTINGS.times)
""",
    "an object of one's own": """
class Made:
    def __init__(self, times): self.times = times
    def optimizer(self, network, rate): return base(network, rate, self.times)
made = Made(1.0).optimizer
def loss(network, rate): return made(network, rate)
""",
    "an enum": """
class Times(enum.Enum):
    ONE = 1.0
    FEW = 3.0
TIMES = Times.ONE if 1.0 < 2 else Times.FEW
def loss(network, rate): return base(network, rate, TIMES.value)
""",
    "a set": """
NAMES = {"q", "k", "v", "o1.0"}
def loss(network, rate): return [name in NAMES for name in network]
""",
    "a tensor": """
WEIGHTS = torch.full((2000,), 2.0)
WEIGHTS[1000] = 1.0
def loss(network, rate): return WEIGHTS * rate
""",
    "a tensor in bfloat16 without dimensions": """
WEIGHT = torch.tensor(1.0, dtype=torch.bfloat16)
def loss(network, rate): return WEIGHT * rate
""",
    "a module of a network": """
CRITERION = torch.nn.CrossEntropyLoss(label_smoothing=1.0 / 10)
def loss(network, rate): return CRITERION(network, rate)
""",
    "a pattern": """
LAYERS = re.compile("layer.1.0")
def loss(network, rate): return LAYERS.match(network)
""",
    "an import in a function": """
def loss(network, rate):
    from beside import times
    return base(network, rate, times())
""",
    "a module that a module imports": """
import package.inner
def loss(network, rate): return base(network, rate, package.inner.times())
""",
}

ASIDE = {
    "beside.py": "from deeper import TIMES\ndef times(): return TIMES\n",
    "deeper.py": "TIMES = 1.0\n",
    "package/__init__.py": "",
    "package/inner.py": "from . import innermost\ndef times(): return innermost.TIMES\n",
    "package/innermost.py": "TIMES = 1.0\n",
}


def write(folder: Path, source: str, times: str) -> None:
    """The module `mine` with that number, and those beside it."""
    for name, text in {"mine.py": BEGIN + source, **ASIDE}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.replace("1.0", times), "utf-8")


def digest_in(folder: Path, source: str, times: str, hash_seed: int) -> str:
    """What a process of its own finds."""
    write(folder, source, times)
    script = "import mine; from lightweight import importable; print(importable.source_digest(mine.loss))"
    path = os.pathsep.join([str(folder), *sys.path])
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def digest_of(tmp_path, monkeypatch):
    """The digest of a module in a folder of its own."""

    def digest(source: str, times: str) -> str | None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write(folder, source, times)
        monkeypatch.syspath_prepend(folder)
        for name in ("mine", "beside", "deeper", "package", "package.inner", "package.innermost"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        return importable.source_digest(importlib.import_module("mine").loss)

    return digest


@pytest.mark.parametrize("source", HELD.values(), ids=HELD)
def test_a_number_that_code_reaches_changes_the_digest(digest_of, source):
    first = digest_of(source, "1.0")
    assert digest_of(source, "1.0") == first  # in another folder, too
    assert digest_of(source, "8.0") != first


def test_every_process_finds_the_same_digest(tmp_path):
    whole = "".join(source.replace("def loss", f"def loss{number}") for number, source in enumerate(HELD.values()))
    whole += "from pathlib import Path\nFILE = str(Path(__file__).parent)\ndef read(): return Path(__file__), FILE\n"
    names = [f"loss{number}" for number in range(len(HELD))]
    whole += f"def loss(): return {', '.join(names)}, read\n"
    first, second = (digest_in(tmp_path / str(seed), whole, "1.0", seed) for seed in (1, 2))
    assert first == second and len(first) == 64
    assert digest_in(tmp_path / "3", whole, "8.0", 1) != first


def test_what_code_does_not_reach_changes_nothing(digest_of):
    source = HELD["a partial"] + "UNUSED = 1.0\n"
    assert digest_of(source, "1.0") != digest_of(source, "2.0")
    apart = HELD["a partial"].replace("1.0", "5.0")
    assert digest_of(apart + "UNUSED = 1.0\n", "1.0") == digest_of(apart + "UNUSED = 1.0\n", "2.0")


def test_an_import_in_a_function_is_not_made_to_be_looked_at(digest_of):
    digest_of(HELD["an import in a function"], "1.0")
    assert "beside" not in sys.modules
