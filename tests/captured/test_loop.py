import contextlib
import copy
import functools
import json
from dataclasses import replace

import pytest
import torch
from training.test_stock import Unattended

from captured.test_graphs import StandInGraph, recording
from conftest import rows_of
from lightweight import corpus, models, record, targets
from lightweight.captured import loop, offload, packing, reference
from lightweight.captured import optimizer as optimizer_module
from lightweight.captured.step import Step
from lightweight.child import owner, worker
from lightweight.corpus import Corpus
from lightweight.methods import BASELINE, LORA, LORA_CAPTURED, QLORA, CapturedStep, Method
from lightweight.models import GPT_NEO_TINY, OPT_TINY, Model
from lightweight.names import SCHEDULES
from lightweight.preload import peft
from lightweight.training import stock
from lightweight.training.meter import Meter
from lightweight.trial import Trial

pytestmark = pytest.mark.usefixtures("without_gpu")

CPU = torch.device("cpu")

LLAMA_TINY = Model(
    name="llama-tiny",
    architecture={
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 384,
        "max_position_embeddings": 512,
    },
)
# Its local layers look back over less than a row; dropout off, so that two ways of computing the same can be compared.
NO_DROPOUT = {
    "opt-tiny": {"dropout": 0.0, "num_hidden_layers": 2},
    "gpt-neo-tiny": {},
    "llama-tiny": {},
}


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """The tiny models without dropout, their random weights written."""
    of_names = {}
    for model in (OPT_TINY, GPT_NEO_TINY, LLAMA_TINY):
        assert model.architecture is not None
        still = replace(model, architecture=model.architecture | NO_DROPOUT[model.name])
        of_names[model.name] = models.write(models.find(still)[0], tmp_path_factory.mktemp(model.name), seed=0)
    return of_names


@pytest.fixture(scope="session")
def dialogues(small_corpus) -> Corpus:
    """36 dialogues of very different lengths to train on, so that packing has something to do."""
    pairs = [
        corpus.pair(talk.messages[0].content, " ".join([talk.messages[1].content] * (1 + index % 5)))
        for index, talk in enumerate(small_corpus.train + small_corpus.train[:16])
    ]
    return replace(small_corpus, train=tuple(pairs))


def prepared(trial, folder):
    tokenizer = models.load_tokenizer(trial.model)
    rows = rows_of(trial, tokenizer)
    meter, owner = Meter(CPU, 0.0), Unattended()
    torch.manual_seed(trial.seed)
    trainer = stock.make_trainer(trial, worker.build(trial, CPU), rows, meter, owner, folder)
    return trainer, rows, meter, owner


def trained(trial, folder):
    """Train `trial` whole, however its method runs its steps."""
    trainer, rows, meter, owner = prepared(trial, folder)
    if trial.method.captured_step is None:
        trainer.train()
    else:
        job = loop.CapturedTraining(trial, trainer, rows, meter)
        job.prepare()
        job.train()
    return trainer, meter, owner


def without_dropout(method: Method) -> Method:
    adapter = copy.deepcopy(method.adapter)
    if adapter is not None:
        adapter.lora_dropout = 0.0  # type: ignore[attr-defined]
    return replace(method, adapter=adapter)


@pytest.mark.parametrize(
    ("model", "method", "size", "accumulation"),
    [
        pytest.param(model, method, size, 8 // size, id=f"{model}-{method.name}-{size}")
        for model in ("opt-tiny", "gpt-neo-tiny", "llama-tiny")
        for method, size in ((BASELINE, 8), (BASELINE, 2), (LORA, 8), (LORA, 2))
        if model == "opt-tiny" or (method is LORA) == (size == 2)
    ],
)
def test_twenty_captured_steps_have_the_trainers_losses(
    written, dialogues, tmp_path, model, method, size, accumulation
):
    """36 dialogues in steps of 8: every fifth step is short, and with accumulation it has two passes of four."""
    arguments = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-3,  # so that a wrong step shows in the next loss
    }
    method = replace(without_dropout(method), training_arguments=arguments)
    trial = Trial(model=written[model], method=method, target=targets.CPU, corpus=dialogues, epochs=4)
    assert trial.steps == 20
    folders = [tmp_path / name for name in ("stock", "captured")]
    theirs, their_meter, _ = trained(trial, folders[0])
    ours, our_meter, owner = trained(replace(trial, method=replace(method, step="captured")), folders[1])
    assert our_meter.facts["capture_note"].startswith("packing makes")
    assert (owner.steps, owner.rounds) == (20, 4)
    expected = their_meter.measurements().train_loss
    assert our_meter.measurements().train_loss == pytest.approx(expected, abs=2e-4)
    assert max(expected) - min(expected) > (0.3 if method.adapter is None else 3e-3)  # there was something to follow
    after = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        assert torch.allclose(parameter, after[name], atol=2e-3), name


@pytest.fixture
def trial(written, dialogues):
    return Trial(
        model=written["opt-tiny"],
        method=replace(LORA, step="captured", training_arguments={"per_device_train_batch_size": 8}),
        target=targets.CPU,
        corpus=dialogues,
        epochs=1,
    )


def job_of(trial, folder):
    trainer, rows, meter, _ = prepared(trial, folder)
    job = loop.CapturedTraining(trial, trainer, rows, meter)
    job.prepare()
    return job


def gradients(job, layout):
    """What one step's backward pass leaves on the trained weights, and its loss, before anything is clipped."""
    found = {}

    def keep():
        found.update({n: p.grad.clone() for n, p in job.network.named_parameters() if p.grad is not None})

    job.step.optimizer.step = keep
    job._run(layout)
    return found, job.step.loss.item()


@pytest.mark.parametrize("model", ["opt-tiny", "gpt-neo-tiny", "llama-tiny"])
def test_packed_rows_have_the_loss_and_gradients_of_rows_of_one_dialogue(trial, written, tmp_path, model):
    method = replace(without_dropout(BASELINE), step=CapturedStep())
    trial = replace(trial, model=written[model], method=method)
    packs = job_of(trial, tmp_path / "packs")
    alone = job_of(replace(trial, method=replace(method, step=CapturedStep(packing=False))), tmp_path / "alone")
    assert packs.step.parts.packing and not alone.step.parts.packing
    packed, unpacked = packs.epochs.layouts[0][0], alone.epochs.layouts[0][0]
    assert len(packed.rows) < len(unpacked.rows) == 8
    assert max(len(row) for row in packed.rows) > 1
    (ours, loss), (expected, expected_loss) = gradients(packs, packed), gradients(alone, unpacked)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        assert torch.allclose(gradient, expected[name], atol=1e-5), name


def test_packing_is_left_out_where_it_saves_no_rows(trial, tmp_path):
    long = tuple(corpus.pair(talk.messages[0].content, talk.messages[1].content * 20) for talk in trial.corpus.train)
    job = job_of(replace(trial, corpus=replace(trial.corpus, train=long)), tmp_path)
    assert not job.step.parts.packing
    assert job.meter.facts["capture_note"].startswith("packing would make 36 rows of 36")


@pytest.mark.parametrize(
    "switched",
    [
        {"loss": "model"},
        {"lean": False},
        {"attention": "model", "packing": False},
        {"attention": "model", "loss": "model", "packing": False, "lean": False},
    ],
)
def test_each_part_can_be_switched_off_without_another_loss(trial, tmp_path, switched):
    method = without_dropout(trial.method)
    losses = []
    for index, step in enumerate((CapturedStep(), CapturedStep(**switched))):
        _, meter, _ = trained(replace(trial, method=replace(method, step=step)), tmp_path / str(index))
        losses.append(meter.measurements().train_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("model", ["opt-tiny", "gpt-neo-tiny", "llama-tiny"])
def test_layers_computed_twice_train_the_same(trial, written, tmp_path, model):
    """Gradient checkpointing, the mask of packed rows and all."""
    losses = []
    for index, twice in enumerate((False, True)):
        arguments = {"gradient_checkpointing": twice, "learning_rate": 1e-3}
        method = replace(without_dropout(trial.method), training_arguments=arguments)
        trainer, meter, _ = trained(replace(trial, model=written[model], method=method), tmp_path / str(index))
        assert trainer.model.is_gradient_checkpointing == twice
        losses.append(meter.measurements().train_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
@pytest.mark.parametrize("model", ["gpt-neo-tiny", "llama-tiny"])
def test_some_layers_computed_twice_train_the_same(trial, written, tmp_path, model, lora_dropout):
    """With dropout too, whose numbers come in the same order and again for the second pass."""
    losses, recomputed = [], []
    for layers in (0, 1, 9):
        adapter = replace(trial.method.adapter, lora_dropout=lora_dropout)
        step = CapturedStep(recompute=layers)
        method = replace(trial.method, adapter=adapter, step=step, training_arguments={"learning_rate": 1e-3})
        trainer, meter, _ = trained(replace(trial, model=written[model], method=method), tmp_path / str(layers))
        flags = [getattr(module, "gradient_checkpointing", None) for module in trainer.model.modules()]
        recomputed.append(flags.count(True))
        losses.append(meter.measurements().train_loss)
        noted = "2 layers at most can be recomputed" in meter.facts["capture_note"]
        assert noted == (layers == 9)
    assert recomputed == [0, 1, 2]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] == pytest.approx(losses[2], abs=1e-5)


@pytest.mark.parametrize("model", ["opt-tiny", "gpt-neo-tiny", "llama-tiny"])
def test_activations_on_the_host_train_the_same(trial, written, tmp_path, monkeypatch, model):
    """Bit for bit, dropout and all; with layers computed again as well."""
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 1)
    losses = []
    for index, step in enumerate((CapturedStep(), CapturedStep(offload=9), CapturedStep(offload=2, recompute=1))):
        method = replace(trial.method, step=step, training_arguments={"learning_rate": 1e-3})
        _, meter, _ = trained(replace(trial, model=written[model], method=method), tmp_path / str(index))
        losses.append(meter.measurements().train_loss)
        noted = "2 layers keep their activations on the host" in (meter.facts["capture_note"] or "")
        assert noted == (index > 0)
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], abs=1e-5)


def test_the_trainers_step_is_compared_with_all_of_it_on_the_device(trial, written, tmp_path, monkeypatch):
    """What went to the host of a step that found no memory would be held there and here while the next is tried."""
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 1)
    gradients, send = reference.Reference._gradients, offload.Offload._send
    sent: list[str] = []
    by_them: list[int] = []

    def noted(self, *given):
        sent.append("a layer")
        return send(self, *given)

    def theirs(self, *given, **options):
        before = len(sent)
        result = gradients(self, *given, **options)
        by_them.append(len(sent) - before)
        return result

    monkeypatch.setattr(offload.Offload, "_send", noted)
    monkeypatch.setattr(reference.Reference, "_gradients", theirs)
    method = replace(trial.method, step=CapturedStep(offload=2))
    trainer, rows, meter, _ = prepared(replace(trial, model=written["llama-tiny"], method=method), tmp_path)
    assert loop.CapturedTraining(replace(trial, method=method), trainer, rows, meter).prepare()
    assert len(by_them) >= 2 and not any(by_them)
    assert sent, "its own step"


@pytest.mark.parametrize(("lora_dropout", "repeats"), [(0.0, True), (0.3, False)])
def test_a_layer_that_would_drop_other_numbers_is_not_captured(trial, written, tmp_path, lora_dropout, repeats):
    """On a CPU dropout is torch's own, as where Triton is not."""
    adapter = replace(trial.method.adapter, lora_dropout=lora_dropout)
    method = replace(trial.method, adapter=adapter, step=CapturedStep(recompute=1))
    trainer, rows, meter, _ = prepared(replace(trial, model=written["llama-tiny"], method=method), tmp_path)
    job = loop.CapturedTraining(replace(trial, method=method), trainer, rows, meter)
    assert job.prepare()
    job.notes.clear()
    assert job._repeats_itself() == repeats
    said = "uncaptured: LlamaDecoderLayer would draw other dropout masks when it is recomputed"
    assert (said in job.notes) != repeats


def test_a_captured_cell_completes_in_a_child_and_its_record_says_how_it_ran(trial, folder):
    small = replace(trial, method=LORA_CAPTURED)
    with owner.Child(small, folder) as child:
        outcome = child.finish()
    assert outcome.kind == "completed", outcome
    entry = record.entry(small, outcome, targets.Device(name="a CPU"), None)
    assert (entry.captured, entry.compiled, entry.steps) == (False, False, 5)
    assert entry.capture_note is not None and "no GPU" in entry.capture_note
    assert (entry.precision, entry.weights_dtype) == ("fp32", "float32")
    assert entry.captured_step is not None and entry.captured_step["attention"] == "sdpa"
    assert entry.phase_seconds is not None and entry.phase_seconds["capture"] > 0
    (stored,) = json.loads(json.dumps(record.document([entry]), allow_nan=False))["outcomes"]
    assert stored["captured_step"] == entry.captured_step and stored["capture_note"] == entry.capture_note


def test_a_seed_gives_the_same_run_twice_and_another_seed_another(trial, tmp_path):
    """With dropout, in the adapter and in the model."""
    assert trial.method.adapter.lora_dropout == 0.1
    losses = []
    for index, seed in enumerate((0, 0, 1)):
        _, meter, _ = trained(replace(trial, seed=seed), tmp_path / str(index))
        losses.append(meter.measurements().train_loss)
    assert losses[0] == losses[1]
    assert losses[0] != pytest.approx(losses[2], abs=1e-4)


def test_dropout_is_the_methods(trial, tmp_path):
    losses = []
    for index, method in enumerate((trial.method, without_dropout(trial.method))):
        # B starts at zero, so that A's dropout shows from the second step on
        _, meter, _ = trained(
            replace(trial, method=replace(method, training_arguments={"learning_rate": 1e-2})), tmp_path / str(index)
        )
        losses.append(meter.measurements().train_loss)
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)
    assert losses[0][1:] != pytest.approx(losses[1][1:], abs=1e-5)


@pytest.mark.parametrize("method", [LORA, QLORA], ids=["lora", "qlora"])
def test_what_a_captured_run_saves_peft_loads(trial, tmp_path, method):
    method = replace(method, step="captured", weights_dtype="half", training_arguments={"learning_rate": 1e-3})
    trial = replace(trial, method=method)
    trainer, _, _ = trained(trial, tmp_path / "run")
    trainer.save_model(str(tmp_path / "saved"))
    base = models.load(trial.model, torch.float32, CPU, trial.running_method.quantization)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # as worker.build does, for the same arithmetic
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "saved")
    ids = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        ours, theirs = (network.eval()(input_ids=ids).logits for network in (trainer.model, loaded))
        with loaded.disable_adapter():
            bare = loaded(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(theirs, bare, atol=1e-4)


@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (4, 2)])
def test_half_precision_weights_are_trained_by_fp32_masters_and_saved_in_fp32(trial, tmp_path, size, accumulation):
    """At a rate at which bf16 weights by themselves would stand still."""
    method = replace(
        without_dropout(BASELINE),
        step="captured",
        weights_dtype="bfloat16",
        training_arguments={
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "learning_rate": 1e-5,
            "lr_scheduler_type": "constant",
        },
    )
    trial = replace(trial, method=method, max_steps=4, max_length=64)
    before = {name: p.detach().clone() for name, p in worker.build(trial, CPU).named_parameters()}
    assert {p.dtype for p in before.values()} == {torch.bfloat16}
    trainer, meter, _ = trained(trial, tmp_path / "half")
    name = "model.decoder.layers.0.fc1.weight"
    after = dict(trainer.model.named_parameters())[name]
    assert after.dtype == torch.float32
    moved = (after - before[name].float()).abs()
    assert 1e-6 < moved.max() <= 4.4e-5  # four steps of at most the rate
    assert (moved > 0).float().mean() > 0.9
    whole = replace(method, weights_dtype="float32", step="captured")
    _, expected, _ = trained(replace(trial, method=whole), tmp_path / "whole")
    assert meter.measurements().train_loss == pytest.approx(expected.measurements().train_loss, rel=1e-2)


@pytest.mark.parametrize("steps", [2, 5])
def test_a_rehearsal_leaves_no_trace_in_what_is_trained(trial, tmp_path, steps):
    """Capturing runs whole steps first; on a GPU nobody would see what they did. Also in a job shorter than that."""
    method = replace(trial.method, training_arguments={"learning_rate": 1e-2})
    trial = replace(trial, max_steps=steps, method=method)
    losses = []
    for index, rehearses in enumerate((False, True)):
        trainer, rows, meter, _ = prepared(trial, tmp_path / str(index))
        job = loop.CapturedTraining(trial, trainer, rows, meter)
        job.prepare()
        if rehearses:
            with job.step.optimizer.rehearsing():
                for _ in range(4):
                    job._run(job.epochs.layouts[0][0])
        job.train()
        losses.append(meter.measurements().train_loss)
    assert losses[0] == losses[1]


def test_a_model_whose_logits_are_more_than_its_heads_keeps_its_own_loss(trial, tmp_path):
    trainer, rows, meter, _ = prepared(trial, tmp_path)
    forward = trainer.model.get_base_model().forward

    @functools.wraps(forward)  # the Trainer looks at its arguments' names
    def capped(*arguments, **options):
        output = forward(*arguments, **options)
        output.logits = 2.0 * torch.tanh(output.logits / 2.0)
        return output

    trainer.model.get_base_model().forward = capped
    job = loop.CapturedTraining(trial, trainer, rows, meter)
    job.prepare()
    assert job.step.parts.loss != "chunked"
    assert "loss given up: its head is not its last operation" in meter.facts["capture_note"]


def test_on_a_cpu_the_record_says_that_nothing_was_captured(trial, tmp_path):
    facts = job_of(trial, tmp_path).meter.facts
    assert (facts["captured"], facts["compiled"]) == (False, False)
    assert facts["capture_note"].endswith("no GPU: the same step without a graph")


def test_an_optimizer_that_only_the_trainer_runs_is_refused_in_one_line(trial, tmp_path):
    trainer, rows, meter, _ = prepared(trial, tmp_path)
    trainer.args.optim = "sgd"  # past the check of the trial's own arguments
    with pytest.raises(ValueError, match="runs torch's AdamW, and `optim` asks for SGD: leave it out") as raised:
        loop.CapturedTraining(trial, trainer, rows, meter)
    assert "\n" not in str(raised.value)


def test_adaloras_steps_are_run_by_the_trainer(trial, tmp_path):
    adapter = peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=9, target_modules=["q_proj"])
    captured = replace(trial, method=replace(trial.method, adapter=adapter), max_steps=2)
    trainer, rows, meter, _ = prepared(captured, tmp_path)
    assert loop.prepare(captured, trainer, rows, meter) is None
    assert meter.facts["capture_note"].endswith("the Trainer runs the steps, since " + loop.RANKS_MOVE)


@pytest.mark.parametrize("packing", [True, False])
def test_tokens_of_a_captured_step_are_its_dialogues_and_the_rows_that_it_runs(trial, tmp_path, packing):
    trial = replace(trial, method=replace(trial.method, step=CapturedStep(packing=packing)))
    theirs = replace(trial, method=replace(trial.method, step="trainer"))
    _, expected, _ = trained(theirs, tmp_path / "stock")
    _, meter, _ = trained(trial, tmp_path / "captured")
    ours, stocks = meter.measurements(), expected.measurements()
    assert ours.step_tokens == stocks.step_tokens
    assert len(ours.step_tokens) == trial.steps
    assert min(ours.step_tokens) > 0
    if packing:
        assert sum(ours.step_padded_tokens) < sum(stocks.step_padded_tokens)
    assert all(real <= padded for real, padded in zip(ours.step_tokens, ours.step_padded_tokens, strict=True))


def test_a_data_seed_orders_captured_steps_as_the_trainers(trial, tmp_path):
    arguments = {"per_device_train_batch_size": 8, "data_seed": 5, "learning_rate": 1e-3}
    method = replace(without_dropout(trial.method), training_arguments=arguments)
    losses = []
    for step in ("trainer", "captured"):
        _, meter, _ = trained(replace(trial, method=replace(method, step=step)), tmp_path / step)
        losses.append(meter.measurements().train_loss)
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)


def freeze_embeddings(network):
    network.get_input_embeddings().requires_grad_(False)
    return network


def adamw_with_a_hook(network, arguments):
    optimizer = torch.optim.AdamW(network.parameters(), lr=arguments.learning_rate)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def test_a_transform_is_captured_as_the_trainer_trains_it(trial, tmp_path):
    method = replace(without_dropout(trial.method), transform=freeze_embeddings)
    losses, counts = [], []
    for step in ("trainer", "captured"):
        trainer, meter, _ = trained(replace(trial, method=replace(method, step=step)), tmp_path / step)
        losses.append(meter.measurements().train_loss)
        counts.append(models.count_parameters(trainer.model, trainable=True))
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)
    assert counts[0] == counts[1] < models.count_parameters(trainer.model)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ((torch.optim.SGD, {}), "its optimizer is SGD: leave it out, or let the Trainer run the steps"),
        (adamw_with_a_hook, "its optimizer is AdamW with hooks around its steps"),
    ],
)
def test_an_optimizer_of_ones_own_that_is_not_what_the_step_runs_is_refused(trial, tmp_path, optimizer, expected):
    method = Method(name="own", step="captured", optimizer=optimizer)
    with pytest.raises(ValueError, match=f"method own: the captured step runs torch's AdamW, and {expected}"):
        job_of(replace(trial, method=method), tmp_path)


def test_the_schedule_does_not_move_on_a_skipped_step(trial, tmp_path):
    job = job_of(trial, tmp_path)
    optimizer = job.step.optimizer
    rates = optimizer_module.learning_rates(job.trainer, job.step._adamw, trial.steps)
    expected = [5e-5 * (1 - step / trial.steps) for step in range(trial.steps)]
    assert rates == [pytest.approx([rate, rate]) for rate in expected]  # weights with decay, and without
    for skipped, taken in ((0.0, 1), (1.0, 1), (0.0, 2)):
        optimizer._adamw.found_inf = torch.tensor([skipped])
        optimizer._count_step(optimizer._adamw)
        assert optimizer._taken.item() == taken


SETTINGS = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"lr_end": 2e-3, "power": 2.0},
    "warmup_stable_decay": {"num_decay_steps": 3},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_captured_steps_have_the_rates_of_the_trainers_optimizer(trial, tmp_path, schedule):
    """Of every schedule that is supported, also where it ends at a rate of its own."""
    arguments = {"learning_rate": 1e-2, "warmup_steps": 2, "lr_scheduler_type": schedule}
    arguments |= {"lr_scheduler_kwargs": SETTINGS.get(schedule, {})}
    job = job_of(replace(trial, method=replace(trial.method, training_arguments=arguments)), tmp_path)
    theirs = job.trainer.create_optimizer()
    scheduler = job.trainer.create_scheduler(num_training_steps=trial.steps, optimizer=theirs)
    for rates in job.step.optimizer.schedule:
        assert rates == pytest.approx([group["lr"] for group in theirs.param_groups if group["params"]])
        theirs.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("asked", "steps", "compiled"),
    [(None, 5_999, False), (None, 6_000, True), (True, 1, True), (False, 1_000_000, False)],
)
def test_a_job_is_compiled_where_it_is_long_enough_or_asked_for(asked, steps, compiled):
    assert loop.compiles(CapturedStep(compile=asked), steps) == compiled


def test_a_loss_scale_changes_no_step_and_skips_one_that_overflows(trial, tmp_path):
    """As fp16 has it on a GPU: fused AdamW takes the scale and whether something overflowed, all on the device."""
    trial = replace(trial, method=without_dropout(trial.method))
    plain, scaled = (job_of(trial, tmp_path / name) for name in ("plain", "scaled"))
    scaled.step.optimizer._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for layout in plain.epochs.layouts[0][:3]:
        plain._run(layout)
        scaled._run(layout)
    before = [weight.detach().clone() for weight in scaled.step.optimizer.weights]
    for found, expected in zip(before, plain.step.optimizer.weights, strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
    scaled.step.optimizer._scaler.update(float("inf"))
    scaled._run(plain.epochs.layouts[0][3])
    assert all(torch.equal(*pair) for pair in zip(before, scaled.step.optimizer.weights, strict=True))
    assert scaled.step.optimizer._taken.item() == 3


@pytest.fixture
def graphs(monkeypatch):
    """Everything of CUDA graphs but CUDA."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(loop, "on_a_side_stream", contextlib.nullcontext)
    monkeypatch.setattr(loop, "waiting_forbidden", contextlib.nullcontext)
    run = Step.run

    def watched(step, buffers):
        if StandInGraph.recording is not None:
            StandInGraph.recording.again = lambda: run(step, buffers)
        run(step, buffers)

    monkeypatch.setattr(Step, "run", watched)


def test_replays_train_as_the_steps_they_recorded_in_every_shape(trial, tmp_path, graphs, monkeypatch):
    monkeypatch.setattr(packing, "BUCKET_STEPS", 1)
    trial = replace(trial, epochs=2)
    _, expected, _ = trained(trial, tmp_path / "uncaptured")
    trainer, rows, meter, _ = prepared(trial, tmp_path / "captured")
    job = loop.CapturedTraining(trial, trainer, rows, meter)
    job.prepare()
    with job.step.optimizer.rehearsing():
        job.captured = job._capture()
    assert job.captured
    shapes = list(job._graphs.by_shape)
    assert len(shapes) > 1 and set(shapes) == set(job.epochs.shapes)
    assert shapes[0].rows == max(shape.rows for shape in shapes)  # memory is laid out by the largest
    assert [graph.in_pool for graph in job._graphs.by_shape.values()] == [None] + ["pool"] * (len(shapes) - 1)  # type: ignore[attr-defined]
    job.train()
    assert meter.measurements().train_loss == expected.measurements().train_loss


def test_out_of_memory_in_a_capture_is_that_and_any_other_failure_a_note(trial, tmp_path, graphs, monkeypatch):
    job = job_of(trial, tmp_path)

    @contextlib.contextmanager
    def failing(graph, pool=None, capture_error_mode="global"):
        yield
        raise error from None

    monkeypatch.setattr(torch.cuda, "graph", failing)
    with job.step.optimizer.rehearsing():
        error = RuntimeError("operation not permitted when stream is capturing\nand more")
        assert job._capture() is False
        assert job.notes[-1] == "uncaptured: OPTForCausalLM: operation not permitted when stream is capturing"
        error = RuntimeError("capture was invalidated")
        error.__context__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        with pytest.raises(torch.OutOfMemoryError, match=r"1\.00 GiB"):
            job._capture()
