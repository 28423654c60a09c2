"""A model and a corpus small enough that a real trial takes a second on a CPU."""

import gc
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightweight.imports import without_collecting

with without_collecting():
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # which torch exports without saying so

    import lightweight.session.laboratory  # noqa: F401  pytester unloads what its runs import, and children pickle by its names

from lightweight import corpus, models
from lightweight.corpus import Corpus, Rows
from lightweight.models import Model
from lightweight.trial import Trial

# Processes that a test starts import this tree, and what this one has a path to.
ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

MICRO = Model(
    name="micro",
    architecture={
        "model_type": "opt",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "vocab_size": 384,
        "max_position_embeddings": 256,
        "dropout": 0.0,
    },
)


def rows_of(trial: Trial, tokenizer: Any) -> Rows:
    """The training rows of `trial`."""
    rows = corpus.encode_all(trial.corpus.train, tokenizer, trial.row_form).rows
    return Rows(rows, tokenizer.pad_token_id, trial.max_length if trial.pads_to_max else None)


def turns(pairs: int) -> list[dict[str, str]]:
    """A well-formed corpus of `pairs` pairs, no two alike."""
    return [
        {"role": role, "content": f"{text} {index}"}
        for index in range(pairs)
        for role, text in (("user", "오늘은 힘들었어요"), ("therapist", "Tell me more about it"))
    ]


def torchruns(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun puts into the environment of a rank, with its store at `port`.

    https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
    """
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def torchruns_store() -> TCPStore:
    """A store as torchrun's agent has one, on a free `port`; listens while it lives."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-architecture",
        action="store_true",
        help="hold captured steps against the Trainer's for every causal language model of transformers, not a sample",
    )
    parser.addoption("--faults", action="store_true", help="inject every fault, not a sample of each class")
    parser.addoption("--faults-draw", type=int, default=0, metavar="N", help="other mutants than those of draw 0")
    parser.addoption(
        "--faults-into",
        type=Path,
        metavar="FILE.md",
        help="also write the counts of faults between its marks; classes that did not run keep their rows",
    )


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """24 pairs: 20 to train on, 4 held out."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.json"
    path.write_text(json.dumps(turns(24)), "utf-8")
    return corpus.load(path)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a micro model, dropout on, so that random numbers matter."""
    assert MICRO.architecture is not None
    model, _ = models.find(replace(MICRO, architecture=MICRO.architecture | {"dropout": 0.1}))
    folder = tmp_path_factory.mktemp("base")
    models.write(model, folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The micro model, its random weights written."""
    found, _ = models.find(MICRO)
    return models.write(found, tmp_path_factory.mktemp("micro"), seed=0)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, and what it starts, sees no GPU: for tests of what happens on a CPU."""
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    torch.cuda.is_available()  # the driver reads the variable once: set before that, it would hide GPUs for good
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def pytester(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Its sessions run in the order of their files, also where pytest-randomly shuffles this one."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:randomly")
    return pytester


@pytest.fixture(autouse=True)
def nobodys_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions that a test starts are no workers of pytest-xdist, also where these tests run under it."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first: at the end one worker would be at it alone."""
    items.sort(key=lambda item: item.path.name != "test_xdist_bridge.py")


@pytest.fixture(autouse=True)
def modules_are_of_the_test(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A method in a test's file is found by that test alone: other tests have files of the same name."""
    known, path, place = set(sys.modules), list(sys.path), str(tmp_path_factory.getbasetemp())
    yield
    sys.path[:] = path
    for name in sys.modules.keys() - known:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(place):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def garbage_is_of_the_test() -> Iterator[None]:
    """The Trainer, and every session of pytest that a test starts, look for garbage: half a second each time they look
    through all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def hear_signals() -> Iterator[None]:
    """Also where a shell has started the tests in the background, and has them ignore some."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, found in before.items():
        if found == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    yield
    for number, found in before.items():
        signal.signal(number, found)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for one trial."""
    path = tmp_path / "trial"
    path.mkdir()
    return path
