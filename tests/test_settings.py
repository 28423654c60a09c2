"""What a command line sets, on methods of every kind."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import SchedulerType, TrainerCallback

from lightweight import corpus, methods, names, record, settings, training_arguments
from lightweight.corpus import Long, LossOn
from lightweight.corpus.rows import MIN_LENGTH
from lightweight.methods import BASELINE, LORA, QLORA, Method, MethodError
from lightweight.preload import peft
from lightweight.settings import SETTINGS, Settings, as_typed
from lightweight.trial import Padding

RECORDS = Path(__file__).parents[1] / "experiments" / "records"

EVERY: dict[str, tuple[str, Any]] = {
    "max_length": ("512", 512),
    "loss_on": ("last", "last"),
    "long": ("split", "split"),
    "padding": ("max", "max"),
    "batch_size": ("4", 4),
    "accumulation": ("2", 2),
    "learning_rate": ("1e-3", 1e-3),
    "schedule": ("cosine", "cosine"),
    "warmup": ("0.1", 0.1),
    "lora_rank": ("64", 64),
    "lora_alpha": ("16", 16),
    "lora_dropout": ("0.05", 0.05),
    "lora_layers": ("v_proj, k_proj", ("k_proj", "v_proj")),
    "scale": ("batch-sqrt", "batch-sqrt"),
    "placement": ("sharded", "sharded"),
}
"""Every setting as text, and what it says."""

OF_ROWS = {"max_length", "loss_on", "long", "padding"}
"""Those of a Trial, which a record has beside the method's digest."""

OF_RANKS = {"scale", "placement"}
"""Those that say something where there are several."""


def read(**said: str) -> Settings:
    return Settings.read(said.get)


def every() -> Settings:
    return read(**{name: text for name, (text, _) in EVERY.items()})


def test_every_setting_is_read():
    assert [setting.name for setting in SETTINGS] == list(EVERY)
    assert vars(every()) == {name: value for name, (_, value) in EVERY.items()}
    assert read() == Settings()


@pytest.mark.parametrize("method", methods.METHODS.values(), ids=lambda method: method.name)
def test_what_is_set_is_in_the_method_and_its_digest(method):
    changed = every().apply(method)
    said = changed.training_arguments
    assert (changed.sequences_per_pass, changed.passes_per_step) == (4, 2)
    assert (said["learning_rate"], said["lr_scheduler_type"], said["warmup_steps"]) == (1e-3, "cosine", 0.1)
    of_lora = {name for name in EVERY if name.startswith("lora_")}
    if method.adapter is not None:
        adapter: Any = changed.adapter
        assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (64, 16, 0.05)
        assert adapter.target_modules == {"k_proj", "v_proj"}
        of_lora = set()
    assert set(changed.changed) == set(EVERY) - OF_ROWS - OF_RANKS - of_lora
    assert changed.name == method.name
    assert record.method_digest(changed) != record.method_digest(method)
    assert every().apply(changed) == changed  # once is enough
    on_two = every().apply(method, world_size=2)
    assert on_two == changed.scaled(2, "batch-sqrt") != changed
    assert set(on_two.changed) == {*changed.changed, "scale"}
    assert (on_two.sequences_per_pass, on_two.passes_per_step) == (4, 4)
    assert record.method_digest(on_two) != record.method_digest(changed)


@pytest.mark.parametrize("name", EVERY)
def test_each_setting_alone_makes_another_digest(name):
    changed = read(**{name: EVERY[name][0]}).apply(LORA)
    assert (record.method_digest(changed) == record.method_digest(LORA)) == (name in OF_ROWS | OF_RANKS)
    assert read(**{name: EVERY[name][0]}).rows == ({name: EVERY[name][1]} if name in OF_ROWS else {})


def test_without_settings_the_suites_methods_have_the_digests_of_the_committed_record():
    stored = {entry.method: entry.method_digest for entry in record.load(RECORDS / "h100-t4.json").entries}
    assert stored.keys() >= {"baseline", "lora", "lora-captured", "qlora-captured"}
    for name, method in methods.METHODS.items():
        assert Settings().applied([method]) == [method]
        assert record.method_digest(method) == stored.get(name, record.method_digest(method)), name


def test_what_a_method_has_anyway_does_not_change_it():
    as_it_is = Settings(
        batch_size=8,
        accumulation=1,
        learning_rate=5e-5,
        schedule="linear",
        warmup=0,
        lora_rank=8,
        lora_alpha=32,
        lora_dropout=0.1,
    )
    assert as_it_is.apply(LORA) is LORA
    assert Settings(lora_layers="all-linear").apply(QLORA) is QLORA


MINE = Method(
    name="mine",
    adapter=peft.LoraConfig(task_type="CAUSAL_LM", r=64, target_modules=["q_proj"], alpha_pattern={"fc1": 4}),
    training_arguments={"learning_rate": 1e-4},
)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            {"learning_rate": "1e-3"},
            "method mine says learning_rate=0.0001, and the command line --learning-rate 0.001",
        ),
        ({"lora_rank": "16"}, "method mine says r=64, and the command line --lora-rank 16: leave out one of them"),
        ({"lora_alpha": "16"}, "method mine says alpha_pattern={'fc1': 4}, and the command line --lora-alpha 16"),
        ({"lora_layers": "k_proj,v_proj"}, "says target_modules={'q_proj'}, .* --lora-layers k_proj,v_proj"),
    ],
)
def test_what_a_method_of_ones_own_says_otherwise_is_one_line_that_names_both(said, expected):
    with pytest.raises(MethodError, match=expected) as raised:
        read(**said).apply(MINE)
    assert "\n" not in str(raised.value)


def test_where_a_method_of_ones_own_says_nothing_or_the_same_it_is_changed():
    changed = read(learning_rate="1e-4", lora_rank="64", lora_dropout="0.1", batch_size="2").apply(MINE)
    assert changed.changed == {"batch_size": 2, "lora_dropout": 0.1}
    mine, adapter = MINE.adapter, changed.adapter
    assert isinstance(mine, peft.LoraConfig) and isinstance(adapter, peft.LoraConfig)
    assert (changed.sequences_per_pass, adapter.lora_dropout, mine.lora_dropout) == (2, 0.1, 0.0)


def test_loras_settings_leave_alone_what_has_no_lora():
    ia3 = Method(name="ia3", adapter=peft.IA3Config(task_type="CAUSAL_LM"))
    adapter = peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=10)  # r says nothing there
    ada = Method(name="ada", adapter=adapter, callbacks=(TrainerCallback,))
    rank = Settings(lora_rank=4)
    assert rank.applied([BASELINE, ia3, ada, LORA])[:3] == [BASELINE, ia3, ada]
    with pytest.raises(MethodError, match="--lora-rank 4: method baseline, ia3, ada has no LoRA adapter: leave it out"):
        rank.applied([BASELINE, ia3, ada])
    assert rank.applied([]) == []


def test_what_peft_refuses_together_is_one_line():
    some = Method(name="some", adapter=peft.LoraConfig(task_type="CAUSAL_LM", layers_to_transform=[0]))
    with pytest.raises(MethodError, match=r"method some: --lora-layers all-linear is refused .*layers_to_transform"):
        Settings(lora_layers="all-linear").apply(some)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("max_length", "1", "--max-length 1: give at least 2"),
        ("batch_size", "0", "--batch-size 0: give at least 1"),
        ("batch_size", "9" * 23, f"--batch-size {'9' * 23}: give at most 2147483647"),
        ("lora_rank", "2147483648", "--lora-rank 2147483648: give at most 2147483647"),
        ("batch_size", "2.5", "--batch-size 2.5: give a whole number"),
        ("accumulation", "-1", "--accumulation -1: give at least 1"),
        ("learning_rate", "0", "--learning-rate 0: give a number above 0, such as 1e-3"),
        ("learning_rate", "nan", "--learning-rate nan: give a number above 0, such as 1e-3"),
        ("learning_rate", "inf", "--learning-rate inf: give a number above 0"),
        ("warmup", "-1", "--warmup -1: give a whole number of steps, or a share of them below 1, such as 0.1"),
        ("warmup", "1.5", "--warmup 1.5: give a whole number of steps"),
        ("warmup", "inf", "--warmup inf: give a whole number of steps"),
        ("warmup", "1e30", f"--warmup 1e30: give at most {2**31 - 1}"),
        ("lora_rank", "0", "--lora-rank 0: give at least 1"),
        ("lora_alpha", "1e1", "--lora-alpha 1e1: give a whole number"),
        ("lora_dropout", "1", "--lora-dropout 1: give a share from 0 to below 1, such as 0.05"),
        ("lora_dropout", "nan", "--lora-dropout nan: give a share from 0 to below 1"),
        ("loss_on", "first", "--loss-on first: choose one of all, last$"),
        ("long", "splt", "--long splt: choose one of cut, split, drop; did you mean split[?]"),
        ("padding", "none", "--padding none: choose one of longest, max$"),
        ("lora_layers", " , ", "--lora-layers  , : give names separated by commas, such as q_proj,v_proj"),
        ("lora_layers", "all-linear,q", "--lora-layers all-linear,q: give names .*, or all-linear alone"),
        ("lora_layers", "\x1b[2J,", r"--lora-layers \\x1b\[2J"),
    ],
)
def test_a_value_that_nothing_can_have_is_one_line(name, text, expected):
    if text == "\x1b[2J,":
        assert as_typed(Settings.read({name: text}.get).applied([LORA])[0].changed) == "--lora-layers \x1b[2J"
        return
    with pytest.raises(ValueError, match=f"^{expected}"):
        read(**{name: text})


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("10", 10), ("10.0", 10), ("0.06", 0.06)])
def test_a_warmup_is_of_steps_or_a_share_of_them(text, value):
    assert read(warmup=text).warmup == value
    assert type(read(warmup=text).warmup) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cosin", "--schedule cosin: choose one of linear, cosine, .*; did you mean cosine"),
        ("reduce_lr_on_plateau", "--schedule reduce_lr_on_plateau: choose one of linear"),
    ],
)
def test_a_schedule_that_there_is_not_is_one_line(text, expected):
    with pytest.raises(ValueError, match=expected):
        read(schedule=text)


def test_schedules_are_those_of_transformers_that_need_no_evaluation():
    assert {*names.SCHEDULES, "reduce_lr_on_plateau", "greedy"} == {kind.value for kind in SchedulerType}


def test_settings_are_said_as_they_are_typed():
    said = every().apply(LORA).changed
    assert as_typed(every().rows) == "--max-length 512 --loss-on last --long split --padding max"
    assert as_typed(said) == (
        "--batch-size 4 --accumulation 2 --learning-rate 0.001 --schedule cosine --warmup 0.1 --lora-rank 64 "
        "--lora-alpha 16 --lora-dropout 0.05 --lora-layers k_proj,v_proj"
    )
    assert as_typed(json.loads(json.dumps(record.codec.plain(said)))) == as_typed(said)


def test_the_table_is_read_without_what_takes_long():
    program = "import sys, lightweight.settings; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_every_key_is_one_of_the_library_or_the_trial():
    from lightweight.trial import Trial

    of = {
        "arguments": training_arguments._defaults(),
        "adapter": vars(peft.LoraConfig()),
        "rows": Trial.__dataclass_fields__,
    }
    of["ranks"] = {"placement": Trial, "scale": Method.scaled}
    assert all(key in of[setting.of] for setting in SETTINGS for key in (setting.key, *setting.others))
    assert replace(LORA).changed == {}
    assert read(max_length=str(MIN_LENGTH)).max_length == MIN_LENGTH
    for name, words in (("loss_on", LossOn), ("long", Long), ("padding", Padding), ("placement", settings.Placement)):
        assert [getattr(read(**{name: word}), name) for word in get_args(words)] == [*get_args(words)]


def test_the_formats_that_can_be_said_are_those_that_are_read():
    assert settings.FORMATS == corpus.FORMATS
