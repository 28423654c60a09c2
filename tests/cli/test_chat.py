"""What is asked of a trained model is put to it as it was trained; the model is a real one, its answers are its own."""

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
import time

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from lightweight import corpus, record
from lightweight.__main__ import main
from lightweight.cli import chat
from lightweight.corpus import THERAPIST, Conversation, Message, Text

pytestmark = pytest.mark.usefixtures("without_gpu")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<extra_id_0>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A function of rows of JSON: the folder of a model trained a step on them."""
    root = tmp_path_factory.mktemp("chat")
    made = {}

    def train(name, rows):
        if name not in made:
            (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
            given = f"train --model {base} --method baseline --corpus {root / name}.jsonl --output {root / name}"
            assert main([*given.split(), "--max-steps", "1", "--max-length", "96"]) == 0
            made[name] = root / name
        return made[name]

    return train


TALKS = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Hello {number}"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "Sleep" + "." * number},
        ]
    }
    for number in range(6)
]


@pytest.fixture
def conversations(trained):
    return trained("talks", TALKS)


@pytest.fixture
def asked(monkeypatch):
    """The ids that networks are asked to go on from, one list a question."""
    found = []
    own = chat.load

    def load(*given, **options):
        loaded = own(*given, **options)
        generate = loaded.network.generate

        def recorded(**arguments):
            found.append(arguments["input_ids"][0].tolist())
            return generate(**arguments)

        monkeypatch.setattr(loaded.network, "generate", recorded)
        return loaded

    monkeypatch.setattr(chat, "load", load)
    return found


def talked(monkeypatch, folder, lines, *more):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    return main(["chat", str(folder), "--max-tokens", "4", *more])


def test_what_a_model_was_trained_on_is_in_its_record(conversations, trained):
    (entry,) = record.load(conversations / "record.json").entries
    assert (entry.trained_on, entry.loss_on, entry.long, entry.padding) == ("conversations", "all", "cut", "longest")
    assert entry.training_rows == 5
    assert entry.step_tokens is not None and entry.step_padded_tokens is not None
    assert sum(entry.step_tokens) < sum(entry.step_padded_tokens) <= 8 * 96
    (entry,) = record.load(trained("texts", [{"text": f"Once {n}"} for n in range(4)]) / "record.json").entries
    assert entry.trained_on == "texts"


def test_a_dialogue_is_kept_taken_back_and_begun_anew(monkeypatch, conversations, asked, capsys):
    lines = ["Hello", "", "And now?", "/undo", "And then?", "/new", "/undo", "/ubdo", "Bye"]
    assert talked(monkeypatch, conversations, lines, "--system", "Be brief.") == 0
    told = capsys.readouterr().err
    assert "nothing was said yet" in told
    assert "/ubdo: is not a command: /new begins a dialogue, /undo takes a turn back" in told
    assert len(asked) == 4
    tokenizer = chat.load(conversations).tokenizer
    prompts = [str(tokenizer.decode(ids)) for ids in asked]
    begun = "System: Be brief.\nUser: Hello\nAssistant: "
    assert prompts[0] == begun
    assert all(prompt.startswith(begun) for prompt in prompts[:3])
    assert prompts[1].endswith("</s>User: And now?\nAssistant: ")
    assert prompts[2] == prompts[1].replace("now", "then")
    assert prompts[3] == "System: Be brief.\nUser: Bye\nAssistant: "


def test_it_is_put_as_in_training(conversations, asked):
    loaded = chat.load(conversations)
    dialogue = chat.Dialogue(loaded, "Be brief.")
    first = dialogue.say("Hello", max_tokens=3)
    dialogue.say("And now?", max_tokens=3)
    said = (
        *(Message("system", "Be brief."), Message("user", "Hello"), Message("assistant", first.strip())),
        *(Message("user", "And now?"), Message("assistant", "x")),
    )
    row = corpus.encode_whole(Conversation(said), loaded.tokenizer)
    assert asked[1] == row["input_ids"].tolist()[:-2]


def test_a_chat_template_marks_the_dialogue_up_and_ends_it(conversations, asked):
    loaded = chat.load(conversations)
    loaded.tokenizer.chat_template = CHATML
    end = loaded.tokenizer.convert_tokens_to_ids("<extra_id_0>")
    assert corpus.ends_of_answers(loaded.tokenizer) == [loaded.tokenizer.eos_token_id, end]
    chat.Dialogue(loaded, "Be brief.").say("Hello", max_tokens=2)
    expected = "<|im_start|>system\nBe brief.<extra_id_0>\n<|im_start|>user\nHello<extra_id_0>\n<|im_start|>assistant\n"
    assert asked[-1] == loaded.tokenizer.encode(expected, add_special_tokens=False)


def test_of_a_dialogue_without_room_the_first_turns_go(conversations, asked):
    loaded = chat.load(conversations)
    dialogue = chat.Dialogue(loaded, "Be brief.")
    for number in range(12):  # of 256 positions
        dialogue.say(f"Question number {number}", max_tokens=2)
    last = str(loaded.tokenizer.decode(asked[-1]))
    assert last.startswith("System: Be brief.\nUser: Question number ")
    assert last.endswith("User: Question number 11\nAssistant: ")
    assert "number 0" not in last
    assert len(asked[-1]) <= 254


def test_a_prompt_without_room_keeps_its_end_half_of_the_positions_at_least_and_that_is_told(
    conversations, asked, capsys
):
    dialogue = chat.Dialogue(chat.load(conversations))
    capsys.readouterr()
    dialogue.say("Hello", max_tokens=256)  # as many as the model has positions
    assert capsys.readouterr().err == ""
    dialogue.new()
    dialogue.say("Well " * 100, max_tokens=256)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("the prompt has 518 tokens: only the last 128 fit beside an answer")
    tokenizer = dialogue.chat.tokenizer
    assert tokenizer.decode(asked[0]) == "User: Hello\nAssistant: "
    assert len(asked[1]) == 128
    assert str(tokenizer.decode(asked[1])).endswith("Well \nAssistant: ")


def test_a_model_of_pairs_answers_each_prompt_by_itself(monkeypatch, trained, asked, capsys):
    pairs = [{"role": role, "content": f"{role} {n}"} for n in range(4) for role in ("user", "therapist")]
    folder = trained("pairs", pairs)
    assert talked(monkeypatch, folder, ["Hello", "/new"]) == 0
    loaded = chat.load(folder)
    expected = [Conversation((Message("user", text),), THERAPIST) for text in ("Hello", "/new")]
    assert asked == [corpus.encode_prompt(each, loaded.tokenizer) for each in expected]
    capsys.readouterr()
    assert talked(monkeypatch, folder, ["Hello"], "--system", "Be brief.") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--system" in line and "was trained on pairs, which have no system message: leave it out" in line


def test_a_model_of_texts_goes_on_from_a_prompt(trained, asked):
    loaded = chat.load(trained("texts", [{"text": f"Once {n}"} for n in range(4)]))
    chat.Dialogue(loaded).say("Once", max_tokens=2)
    assert asked == [corpus.encode_prompt(Text("Once", ""), loaded.tokenizer)]


def test_a_file_of_prompts_gives_json_lines(conversations, asked, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    dialogue = [*TALKS[0]["messages"][:3], {"role": "user", "content": "그래"}]
    rows = ["Hello", {"prompt": "Bye\u2028now"}, {"messages": dialogue}]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert main(["chat", str(conversations), "--prompt", str(file), "--max-tokens", "4", "--system", "Be kind."]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.strip().split("\n")]
    assert [set(each) for each in told] == [{"prompt", "answer"}, {"prompt", "answer"}, {"messages"}]
    assert told[2]["messages"][:-1] == dialogue
    assert told[2]["messages"][-1]["role"] == "assistant"
    tokenizer = chat.load(conversations).tokenizer
    assert [tokenizer.decode(ids) for ids in asked] == [
        "System: Be kind.\nUser: Hello\nAssistant: ",
        "System: Be kind.\nUser: Bye\u2028now\nAssistant: ",
        "System: Be brief.\nUser: Hello 0\nAssistant: Yes?</s>User: 그래\nAssistant: ",
    ]
    plain = tmp_path / "prompts.txt"
    plain.write_text('Hello\n\n{"prompt": 1}\n', "utf-8")
    assert main(["chat", str(conversations), "--prompt", str(plain), "--max-tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["Hello", '{"prompt": 1}']


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no prompt: write one per line"),
        (b"\xff", "cannot be read"),
        (b'"a"\n{', "line 2: "),
        (b"[" * 100_000, "line 1: "),
        (b"3", "line 1: no prompt and no messages"),
        (b'{"prompt": " "}', "line 1: no prompt and no messages"),
        (b'{"messages": []}', "line 1: messages that are not turns"),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]}', "are not turns of"),
        (b'{"messages": [{"role": "tool", "content": "a"}]}', "a message without a role"),
        (b'{"messages": ["a"]}', "a message without a role"),
        (b'"\\ud800"', "line 1: half of a surrogate pair"),
        (b'{"messages": [{"role": "user", "content": "\\udfff"}]}', "line 1: half of a surrogate pair"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_one_line(conversations, tmp_path, capsys, content, words):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    assert main(["chat", str(conversations), "--prompt", str(file)]) == 2
    found = capsys.readouterr()
    (line,) = found.err.strip().splitlines()
    assert words in line and str(file) in line and not found.out


@pytest.mark.parametrize("option", ["--prompt", "--system", None])
def test_what_is_no_text_is_one_line(conversations, monkeypatch, capsys, option):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello \xff\n"), "utf-8"))
    assert main(["chat", str(conversations), *([option, "Hello \udcff"] if option else [])]) == 2
    found = capsys.readouterr()
    (line,) = found.err.strip().splitlines()
    assert "UTF-8" in line and not found.out


def test_a_shells_pipe_of_prompts_is_a_file_of_them(trained, tmp_path, capsys):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    folder = trained("pairs", [{"prompt": f"Hello {number}", "completion": "Yes?"} for number in range(6)])
    with subprocess.Popen(["sh", "-c", f"echo Hello > {pipe}"]):
        assert main(["chat", str(folder), "--prompt", str(pipe), "--max-tokens", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "Hello"


def test_a_file_of_prompts_that_is_not_there_is_no_prompt(conversations, capsys, tmp_path):
    assert main(["chat", str(conversations), "--prompt", str(tmp_path / "prompts.jsonl")]) == 2
    found = capsys.readouterr()
    (line,) = found.err.strip().splitlines()
    assert "prompts.jsonl: cannot be read" in line and not found.out


def test_a_dialogue_for_a_model_of_pairs_is_one_line(trained, tmp_path, capsys):
    pairs = [{"role": role, "content": f"{role} {n}"} for n in range(4) for role in ("user", "therapist")]
    folder = trained("pairs", pairs)
    file = tmp_path / "prompts.jsonl"
    for said in (TALKS[0]["messages"][1:4], TALKS[0]["messages"][:2]):
        file.write_text("\n".join(json.dumps(each) for each in ("Hello", {"messages": said})), "utf-8")
        capsys.readouterr()
        assert main(["chat", str(folder), "--prompt", str(file)]) == 2
        found = capsys.readouterr()
        (line,) = found.err.strip().splitlines()
        assert f"{file}: has a dialogue, but" in line and "was trained on pairs: ask one turn" in line
        assert not found.out


# As it grows


@pytest.fixture
def speaks_words(tmp_path):
    """A folder of a small model whose tokens are words, and that never ends an answer."""
    words = ["<unk>", "</s>", "sea", *(f"word{number}" for number in range(30))]
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": len(words), "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
    network = LlamaForCausalLM(LlamaConfig(**sizes, **ids, tie_word_embeddings=False))
    with torch.no_grad():
        network.lm_head.weight[:2] = 0  # some word always has a logit above it
    for saved in (network, tokenizer):
        saved.save_pretrained(tmp_path / "words")
    return tmp_path / "words"


def test_an_answer_is_shown_as_it_grows(speaks_words):
    """On a terminal, in pieces that come one after the other."""
    ours, theirs = pty.openpty()
    given = ["chat", str(speaks_words), "--prompt", "word1 word2", "--max-tokens", "400"]
    with subprocess.Popen([sys.executable, "-m", "lightweight", *given], stdout=theirs) as child:
        os.close(theirs)
        pieces = []
        with contextlib.suppress(OSError):  # which says that nobody writes any more
            while piece := os.read(ours, 4096):
                pieces.append((time.monotonic(), piece.decode()))
        os.close(ours)
        assert child.wait() == 0
    assert len("".join(piece for _, piece in pieces).split()) == 400
    assert len(pieces) > 1 and pieces[0][0] < pieces[-1][0]
    assert len(pieces[0][1].split()) < 200
