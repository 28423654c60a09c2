from dataclasses import replace

import pytest
import torch
from test_stock import Unattended

from lightweight import captured, corpus, models, stock, targets, worker
from lightweight.corpus import Corpus
from lightweight.meter import Meter
from lightweight.methods import BASELINE, LORA, Method
from lightweight.models import GPT_NEO_TINY, OPT_TINY, Model
from lightweight.trial import MAX_LENGTH, Trial

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
    "gpt-neo-tiny": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "llama-tiny": {},
}


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """The tiny models without dropout, their random weights written."""
    found = {}
    for model in (OPT_TINY, GPT_NEO_TINY, LLAMA_TINY):
        still = replace(model, architecture=model.architecture | NO_DROPOUT[model.name])
        found[model.name] = models.write(models.find(still)[0], tmp_path_factory.mktemp(model.name), seed=0)
    return found


@pytest.fixture(scope="session")
def dialogues(small_corpus) -> Corpus:
    """36 dialogues of very different lengths to train on, so that packing has something to do."""
    pairs = [
        replace(pair, answer=" ".join([pair.answer] * (1 + index % 5)))
        for index, pair in enumerate(small_corpus.train + small_corpus.train[:16])
    ]
    return replace(small_corpus, train=tuple(pairs))


def prepared(trial, folder):
    tokenizer = models.load_tokenizer(trial.model)
    rows = [corpus.encode(pair, tokenizer, MAX_LENGTH) for pair in trial.corpus.train]
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
        job = captured.Job(trial, trainer, rows, meter)
        job.prepare()
        job.train(owner)
    return trainer, meter, owner


def without_dropout(method: Method) -> Method:
    if method.adapter is None:
        return method
    adapter = type(method.adapter)(**{**method.adapter.to_dict(), "lora_dropout": 0.0})
    return replace(method, adapter=adapter)


@pytest.mark.parametrize("model", ["opt-tiny", "gpt-neo-tiny", "llama-tiny"])
@pytest.mark.parametrize("method", [BASELINE, LORA], ids=["baseline", "lora"])
@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (2, 4)])
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
