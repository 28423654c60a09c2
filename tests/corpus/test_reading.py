"""Rows in the shapes of public data sets, and what becomes of them when something in them is not as it should be."""

import copy
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lightweight import corpus
from lightweight.corpus import Conversation, CorpusError, How, Message, Text, formats, messages
from lightweight.corpus.conversation import Origin

U, A, S = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system"))


def origin(loaded: corpus.Corpus) -> Origin:
    assert loaded.origin is not None
    return loaded.origin


def talk(*said: Message) -> Conversation:
    return Conversation(said)


# Keys as on the hub; what is said is ours.
PUBLIC: dict[str, tuple[str, dict, corpus.Example]] = {
    "HuggingFaceH4/ultrachat_200k": (
        "messages",
        {
            "prompt": "How do tides work?",
            "prompt_id": "f0e3",
            "messages": [
                {"content": "How do tides work?", "role": "user"},
                {"content": "The moon pulls the sea.", "role": "assistant"},
                {"content": "And the sun?", "role": "user"},
                {"content": "It pulls, too.", "role": "assistant"},
            ],
        },
        talk(U("How do tides work?"), A("The moon pulls the sea."), U("And the sun?"), A("It pulls, too.")),
    ),
    "HuggingFaceH4/no_robots": (
        "messages",
        {
            "prompt": "Hi",
            "prompt_id": "a1",
            "messages": [
                {"content": "Be brief.", "role": "system"},
                {"content": "Hi", "role": "user"},
                {"content": "Hello", "role": "assistant"},
            ],
            "category": "Chat",
        },
        talk(S("Be brief."), U("Hi"), A("Hello")),
    ),
    "Open-Orca/SlimOrca": (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": "Hi", "weight": 0},
                {"from": "gpt", "value": "Hello", "weight": 1},
            ]
        },
        talk(S("Be brief."), U("Hi"), A("Hello")),
    ),
    "trl-lib/kto-mix-14k": (
        "prompt-completion",
        {
            "prompt": [{"content": "Hi", "role": "user"}],
            "completion": [{"content": "Hello", "role": "assistant"}],
            "label": True,
        },
        talk(U("Hi"), A("Hello")),
    ),
    "OpenAI's fine-tuning": (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hi, "}, {"type": "text", "text": "you"}]},
                {"role": "assistant", "content": "Hello", "weight": 1, "tool_calls": None},
            ],
            "tools": [],
        },
        talk(S("Be brief."), U("Hi, you"), A("Hello")),
    ),
    "anon8231489123/ShareGPT_Vicuna_unfiltered": (
        "sharegpt",
        {
            "id": "QWJhYvA_0",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        },
        talk(U("Hi"), A("Hello")),
    ),
    "teknium/OpenHermes-2.5": (
        "sharegpt",
        {
            "custom_instruction": None,
            "system_prompt": None,
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": "Hi", "weight": None},
                {"from": "gpt", "value": "Hello", "weight": None},
            ],
            "source": "airoboros2.2",
        },
        talk(S("Be brief."), U("Hi"), A("Hello")),
    ),
    "lmsys/lmsys-chat-1m": (
        "sharegpt",
        {
            "conversation_id": "33f1",
            "model": "vicuna-13b",
            "conversation": [{"content": "Hi", "role": "user"}, {"content": "Hello", "role": "assistant"}],
            "turn": 1,
        },
        talk(U("Hi"), A("Hello")),
    ),
    "GAIR/lima": (
        "sharegpt",
        {"conversations": ["Hi", "Hello", "And?", "Yes"], "source": "multi_turn"},
        talk(U("Hi"), A("Hello"), U("And?"), A("Yes")),
    ),
    "LDJnr/Capybara": (
        "sharegpt",
        {
            "source": "Airoboros",
            "conversation": [{"input": "Hi", "output": "Hello"}, {"input": "And?", "output": "Yes"}],
        },
        talk(U("Hi"), A("Hello"), U("And?"), A("Yes")),
    ),
    "tatsu-lab/alpaca": (
        "alpaca",
        {"instruction": "Add these.", "input": "1 2", "output": "3", "text": "Below is an instruction"},
        talk(U("Add these.\n\n1 2"), A("3")),
    ),
    "databricks/databricks-dolly-15k": (
        "alpaca",
        {"instruction": "Who?", "context": "", "response": "Me", "category": "open_qa"},
        talk(U("Who?"), A("Me")),
    ),
    "LLaMA-Factory's alpaca": (
        "alpaca",
        {"instruction": "And?", "input": "", "output": "Yes", "system": "Be brief.", "history": [["Hi", "Hello"]]},
        talk(S("Be brief."), U("Hi"), A("Hello"), U("And?"), A("Yes")),
    ),
    "TRL's prompts": (
        "prompt-completion",
        {"prompt": "The sky is", "completion": " blue."},
        Text("The sky is", " blue."),
    ),
    "TRL's prompts of messages": (
        "prompt-completion",
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]},
        talk(U("Hi"), A("Hello")),
    ),
    "timdettmers/openassistant-guanaco": (
        "text",
        {"text": "### Human: Hi### Assistant: Hello"},
        Text("", "### Human: Hi### Assistant: Hello"),
    ),
    "Anthropic/hh-rlhf": (
        "preference",
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And?\n\nAssistant: Yes",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And?\n\nAssistant: No",
        },
        talk(U("Hi"), A("Hello"), U("And?"), A("Yes")),
    ),
    "Dahoas/full-hh-rlhf": (
        "preference",
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " Yo", "chosen": " Hello", "rejected": " Yo"},
        talk(U("Hi"), A(" Hello")),
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        "preference",
        {
            "prompt": "Hi",
            "prompt_id": "b2",
            "chosen": [{"content": "Hi", "role": "user"}, {"content": "Hello", "role": "assistant"}],
            "rejected": [{"content": "Hi", "role": "user"}, {"content": "No", "role": "assistant"}],
            "messages": [{"content": "Hi", "role": "user"}, {"content": "Hello", "role": "assistant"}],
            "score_chosen": 8.0,
            "score_rejected": 3.5,
        },
        talk(U("Hi"), A("Hello")),
    ),
    "Intel/orca_dpo_pairs": (
        "preference",
        {"system": "Be brief.", "question": "Hi", "chosen": "Hello", "rejected": "No"},
        talk(S("Be brief."), U("Hi"), A("Hello")),
    ),
    "Intel/orca_dpo_pairs without a system message": (
        "preference",
        {"system": "", "question": "Hi", "chosen": "Hello", "rejected": "No"},
        talk(U("Hi"), A("Hello")),
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        "preference",
        {"system": "Be brief.", "input": "Hi", "chosen": "Hello", "rejected": "No", "status": "tie"},
        talk(S("Be brief."), U("Hi"), A("Hello")),
    ),
    "openai/gsm8k": (
        "question-answer",
        {"question": "How many?", "answer": "6 and 6 are 12.\n#### 12"},
        talk(U("How many?"), A("6 and 6 are 12.\n#### 12")),
    ),
    "Open-Orca/OpenOrca": (
        "question-answer",
        {"id": "cot.1", "system_prompt": "Be brief.", "question": "Hi", "response": "Hello"},
        talk(S("Be brief."), U("Hi"), A("Hello")),
    ),
    "meta-math/MetaMathQA": (
        "question-answer",
        {"type": "MATH_AnsAug", "query": "Hi", "original_question": "Hey", "response": "Hello"},
        talk(U("Hi"), A("Hello")),
    ),
    "b-mc2/sql-create-context": (
        "question-answer",
        {"question": "How many?", "context": "CREATE TABLE head (age INTEGER)", "answer": "SELECT COUNT(*) FROM head"},
        talk(U("How many?\n\nCREATE TABLE head (age INTEGER)"), A("SELECT COUNT(*) FROM head")),
    ),
    "LLaMA-Factory's pairs": (
        "preference",
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "No"},
        },
        talk(U("Hi"), A("Hello")),
    ),
    "LLaMA-Factory's pairs of answers to an instruction": (
        "preference",
        {"instruction": "And", "input": "you?", "history": [["Hi", "Hello"]], "chosen": "Well.", "rejected": "No."},
        talk(U("Hi"), A("Hello"), U("And\n\nyou?"), A("Well.")),
    ),
    "openbmb/UltraInteract_pair": (
        "preference",
        {
            "dataset": "MATH",
            "trajectory": [
                {"from": "user", "value": "Hi"},
                {"from": "assistant", "value": "Hello"},
                {"from": "user", "value": "And?"},
            ],
            "chosen": "Yes",
            "rejected": "No",
        },
        talk(U("Hi"), A("Hello"), U("And?"), A("Yes")),
    ),
    "a system prompt beside the turns": (
        "sharegpt",
        {
            "system_prompt": "Be brief.",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        },
        talk(S("Be brief."), U("Hi"), A("Hello")),
    ),
    "TRL's prompts of messages with a system message": (
        "prompt-completion",
        {
            "system": "Be brief.",
            "prompt": [{"role": "user", "content": "Hi"}],
            "completion": [{"role": "assistant", "content": "Hello"}],
        },
        talk(S("Be brief."), U("Hi"), A("Hello")),
    ),
    "preferences without a prompt": ("preference", {"chosen": "Good.", "rejected": "Bad."}, Text("", "Good.")),
}
each = pytest.mark.parametrize("name", PUBLIC)


def write(folder: Path, rows: list, name: str = "rows.jsonl") -> Path:
    path = folder / name
    lines = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    content = (lines if ".jsonl" in name else json.dumps(rows)).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def said(loaded: corpus.Corpus) -> list[str]:
    return sorted(map(str, loaded.train + loaded.heldout))


@each
@pytest.mark.parametrize("file", ["rows.json", "rows.jsonl", "rows.jsonl.gz", "rows.json.gz"])
def test_a_public_data_set_goes_through(tmp_path, name, file):
    kind, row, expected = PUBLIC[name]
    other = formats.FORMATS[kind].read(spoken_otherwise(row))
    loaded = corpus.load(write(tmp_path, [row, spoken_otherwise(row)], file))
    assert origin(loaded).format == kind
    assert said(loaded) == sorted([str(expected), str(other)])


def spoken_otherwise(value: Any) -> Any:
    """`value` with every text another one, but for names of roles and kinds."""
    if isinstance(value, dict):
        kept = ("role", "from", "type")
        return {key: item if key in kept else spoken_otherwise(item) for key, item in value.items()}
    if isinstance(value, list):
        return [spoken_otherwise(item) for item in value]
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        return value.replace("Hi", "Hey")
    return f"{value}." if isinstance(value, str) and value else value


def paths(value: object, *before: object):
    """Where in `value` a text stands that is trained on or asked, as keys and indices."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from paths(item, *before, key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from paths(item, *before, index)
    elif isinstance(value, str):
        yield before


NEEDED = {
    "messages": ("messages",),
    "sharegpt": ("conversations", "conversation"),
    "alpaca": ("instruction", "output", "response"),
    "prompt-completion": ("completion",),
    "text": ("text",),
    "preference": ("chosen",),
    "question-answer": ("question", "query", "answer", "response"),
}
MUTANTS = {
    "missing": None,
    "null": lambda text: None,
    "number": lambda text: 3,
    "boolean": lambda text: True,
    "empty": lambda text: "",
    "blank": lambda text: " \n",
    "half": lambda text: text + "\ud83d",
    "nested": lambda text: {"a": {"b": [text]}},
    "listed": lambda text: [[text]],
}


def mutants(kind: str, row: dict):
    """What `row` becomes with one thing wrong in it, and that thing's key."""
    for path in paths(row):
        if path[0] not in NEEDED[kind] or path[-1] == "type":
            continue
        for words, change in MUTANTS.items():
            mutant = copy.deepcopy(row)
            place = mutant
            for step in path[:-1]:
                place = place[step]
            is_part = kind == "messages" and "text" in place
            of_system = isinstance(place, dict) and {"system", "developer"} & {str(value) for value in place.values()}
            may_be_empty = of_system or is_part
            if may_be_empty and path[-1] in ("content", "value", "text") and words in ("null", "empty", "blank"):
                continue  # no system message, or one part of several
            if change is not None:
                place[path[-1]] = change(place[path[-1]])
            elif isinstance(place, dict):
                del place[path[-1]]
            else:
                continue
            yield f"{'.'.join(map(str, path))} {words}", mutant, "content" if is_part else str(path[-1])
        if path[-1] in ("role", "from"):
            for role in ("narrator", "tool", "function_call", "user" if path[-2] else "assistant"):
                mutant = copy.deepcopy(row)
                place = mutant
                for step in path[:-1]:
                    place = place[step]
                if messages.ROLES[place[path[-1]]] != role:
                    place[path[-1]] = role
                    yield f"{'.'.join(map(str, path))} {role}", mutant, ""


EVERY_MUTANT = [
    pytest.param(kind, row, mutant, key, id=f"{name}: {words}")
    for name, (kind, row, _) in PUBLIC.items()
    for words, mutant, key in mutants(kind, row)
]


def test_there_are_mutants_of_every_format():
    assert {param.values[0] for param in EVERY_MUTANT} == set(formats.FORMATS)
    assert len(EVERY_MUTANT) > 300


@pytest.mark.parametrize(("kind", "row", "mutant", "key"), EVERY_MUTANT)
def test_a_mutant_is_one_line_with_file_place_field_and_mend_or_is_skipped(tmp_path, kind, row, mutant, key):
    rows = [row, mutant, spoken_otherwise(row)]
    path = write(tmp_path, rows)
    with pytest.raises(CorpusError) as raised:
        corpus.load(path)
    message = str(raised.value)
    assert message.startswith(f"corpus {path}: line 2: ")
    assert "\n" not in message and len(message) < len(str(path)) + 400
    problem = message.removeprefix(f"corpus {path}: line 2: ")
    assert ": " in problem  # the mend
    assert key in problem if not key.isdigit() else True
    skipped = corpus.load(path, How(skip_bad=True))
    assert origin(skipped).skipped == 1
    assert said(skipped) == said(corpus.load(write(tmp_path, [row, spoken_otherwise(row)], "sound.jsonl")))
    assert "rows skipped: 1" in str(skipped.origin)


ASKED, ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "search"}}]}
PICTURE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
REFUSED = {
    "a tool's call": ({"messages": [ASKED, CALL]}, "messages[1].tool_calls: is of a tool, and only text"),
    "tools": ({"messages": [ASKED, ANSWERED], "tools": [{"name": "search"}]}, "tools: is of a tool"),
    "an image's message": ({"messages": [PICTURE, ANSWERED]}, "messages[0].content[0].type: is 'image_url'"),
    "an image's row": (
        {"image": "1.jpg", "conversations": [{"from": "human", "value": "<image>"}]},
        "image: is an image, audio or a video",
    ),
    "no turns": ({"messages": [{"role": "system", "content": "Be brief."}]}, "messages: has no turns"),
    "an empty list": ({"messages": []}, "messages: is empty"),
    "a late system message": (
        {"messages": [ASKED, ANSWERED, {"role": "system", "content": "a"}]},
        "messages[2]: a system message after others",
    ),
    "no last answer": ({"messages": [ASKED, ANSWERED, ASKED]}, "messages[2]: the last user turn has no answer"),
    "two in a row": ({"messages": [ASKED, ASKED, ANSWERED]}, "messages[1]: two user turns in a row"),
    "the assistant first": ({"messages": [ANSWERED, ASKED]}, "messages[0]: the first turn is the assistant's"),
    "a weight of 0": ({"messages": [ASKED, ANSWERED | {"weight": 0}]}, "messages[1].weight: is 0"),
    "ms-swift's answer without a loss": (
        {"messages": [ASKED, ANSWERED | {"loss": False}]},
        "messages[1].loss: is false",
    ),
    "axolotl's answer without a loss": ({"messages": [ASKED, ANSWERED | {"train": 0}]}, "messages[1].train: is 0"),
    "a system message beside a text": (
        {"system": "Be brief.", "prompt": "Hi", "completion": "Hello"},
        "system: stands beside a text",
    ),
    "a system message beside a chosen text": (
        {"system_prompt": "Be brief.", "chosen": "Hello", "rejected": "No"},
        "system_prompt: stands beside a text",
    ),
    "an answer that is not wanted": (
        {"prompt": "a", "completion": "b", "label": False},
        "label: is false, which marks an answer",
    ),
    "a conversation that is not wanted": (
        {"messages": [ASKED, ANSWERED], "label": False},
        "label: is false, which marks an answer",
    ),
    "an instruction's answer that is not wanted": (
        {"instruction": "a", "output": "b", "kto_tag": False},
        "kto_tag: is false, which marks an answer",
    ),
    "an answer that a table does not want": (
        {"prompt": "a", "completion": "b", "label": "False"},
        "label: is false, which marks an answer",
    ),
    "tools as a text": ({"messages": [ASKED, ANSWERED], "tools": '[{"name": "search"}]'}, "tools: is of a tool"),
    "thoughts beside an answer": (
        {"messages": [ASKED, ANSWERED | {"reasoning_content": "They greet."}]},
        "messages[1].reasoning_content: holds thoughts, which would be left out",
    ),
    "a message's text under another key": (
        {"messages": [{"role": "prompter", "text": "Hi"}, ANSWERED]},
        "messages[0]: has no 'content', but 'text': write the text as 'content'",
    ),
    "a message of a role alone": (
        {"messages": [{"role": "user"}, ANSWERED]},
        "messages[0]: has no 'content', but nothing",
    ),
    "Open Assistant's trees": (
        {"message_tree_id": "a1", "prompt": {"text": "Hi", "role": "prompter", "replies": []}},
        "message_tree_id: belongs to a tree of answers: write each path through it as 'messages'",
    ),
    "hh-rlhf without the last answer": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant:", "rejected": ""},
        "chosen[0]: the last user turn has no answer",
    ),
    "a history that is no pair": (
        {"instruction": "a", "output": "b", "history": [["c"]]},
        "history[0]: is not a pair",
    ),
    "a text and messages": ({"prompt": "a", "completion": [ANSWERED]}, "completion: is a JSON list, and 'prompt' a"),
    "messages without what was asked": ({"chosen": [ANSWERED], "rejected": []}, "has no 'prompt': write what was"),
    "Open Assistant's rows": ({"text": "Hi", "role": "prompter", "parent_id": None}, "role: belongs to one message"),
    "keys of no format": ({"source": "a", "target": "b"}, "has the keys 'source', 'target', which no format has"),
    "a question whose answers are left out": (
        {"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answer": "A"},
        "choices: would be left out of the question: write them into it",
    ),
    "turns by other names": (
        {"conversation": [{"asked": "a", "answered": "b"}]},
        "conversation[0]: has no 'role', but 'asked', 'answered': use 'system', 'user' or 'assistant'",
    ),
    "LIMA's questions for a test": (
        {"conversations": ["Hi"], "source": "pushshift_r_askhistorians"},
        "conversations[0]: the last user turn has no answer",
    ),
    "SQuAD's answers": (
        {"id": "5", "context": "a", "question": "b", "answers": {"text": ["c"], "answer_start": [0]}},
        "has the keys 'id', 'context', 'question', 'answers', which no format has: "
        "rename them (question-answer: 'question' and 'answer')",
    ),
    "no keys": ({}, "has the keys of nothing"),
}


@pytest.mark.parametrize(("row", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_on_is_refused_by_its_line(tmp_path, row, expected):
    path = write(tmp_path, [row])
    with pytest.raises(CorpusError) as raised:
        corpus.load(path)
    assert str(raised.value).startswith(f"corpus {path}: line 1: {expected}")
    rows = [row, *({"messages": [ASKED | {"content": str(n)}, ANSWERED]} for n in range(2))]
    if "messages" in row:
        assert origin(corpus.load(write(tmp_path, rows), How(skip_bad=True))).skipped == 1


@pytest.mark.parametrize("nothing", ["[]", " null\n", "", [], None])
def test_a_row_without_tools_or_pictures_says_so_in_any_way(tmp_path, nothing):
    rows = [
        {"messages": [ASKED | {"content": f"Hi {n}"}, ANSWERED], "tools": nothing, "images": nothing} for n in (0, 1)
    ]
    assert origin(corpus.load(write(tmp_path, rows))).conversations == 2


def test_a_class_of_a_text_is_no_wish(tmp_path):
    rows = [{"text": f"Tides {n}.", "label": False} for n in (0, 1)]
    assert origin(corpus.load(write(tmp_path, rows))).texts == 2


@pytest.mark.parametrize("row", [{"question": "a"}, {"messages": []}, "a"])
def test_where_all_is_skipped_it_is_not_told_to_add_rows(tmp_path, row):
    path = write(tmp_path, [row, row])
    with pytest.raises(
        CorpusError, match=r"has 0 example\(s\) left, and 2 row\(s\) skipped: leave out --skip-bad to see"
    ):
        corpus.load(path, How(skip_bad=True))


def test_what_is_skipped_of_the_held_out_file_is_counted_too(tmp_path):
    path = write(tmp_path, [*alpaca(3), {"instruction": "a", "output": ""}])
    held_out = write(
        tmp_path, [{"instruction": "Say nine.", "output": "9"}, {"instruction": "a", "output": 1}], "h.jsonl"
    )
    loaded = corpus.load(path, How(skip_bad=True, held_out=str(held_out)))
    assert (len(loaded.train), len(loaded.heldout), origin(loaded).skipped) == (3, 1, 2)
    bad = write(tmp_path, [{"instruction": "a", "output": ""}], "bad.jsonl")
    with pytest.raises(CorpusError, match=r"bad.jsonl: has 0 example\(s\) left, and 1 row\(s\) skipped"):
        corpus.load(path, How(skip_bad=True, held_out=str(bad)))


def alpaca(count: int) -> list[dict]:
    return [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(count)]


def test_a_row_of_another_format_is_refused_with_its_line_whatever_is_skipped(tmp_path):
    for name, place in (("rows.jsonl", "line 3"), ("rows.json", "row 2")):
        path = write(tmp_path, [*alpaca(2), {"text": "Tides."}], name)
        for how in (How(), How(skip_bad=True)):
            with pytest.raises(CorpusError) as raised:
                corpus.load(path, how)
            assert f"{place}: has the keys of the format text, and rows before it those of alpaca" in str(raised.value)


@pytest.mark.parametrize("how", [How(), How(skip_bad=True)])
def test_a_first_row_that_lacks_a_key_does_not_make_the_others_another_format(tmp_path, how):
    rows = [row | {"text": f"Tides {number}."} for number, row in enumerate(alpaca(6))]
    del rows[0]["output"]
    with pytest.raises(
        CorpusError, match="line 2: has the keys of the format alpaca, and rows before it those of text"
    ):
        corpus.load(write(tmp_path, rows), how)


def test_a_format_that_is_said_goes_before_what_the_keys_tell(tmp_path):
    rows = [row | {"text": f"Tides {number}."} for number, row in enumerate(alpaca(6))]
    path = write(tmp_path, rows)
    assert origin(corpus.load(path)).format == "alpaca"
    forced = corpus.load(path, How(format="text"))
    assert origin(forced).format == "text"
    assert set(forced.train + forced.heldout) == {Text("", f"Tides {number}.") for number in range(6)}
    with pytest.raises(CorpusError, match=r"line 1: has no 'messages': write an object with 'messages'"):
        corpus.load(path, How(format="messages"))


def test_what_was_read_is_told_in_one_line(tmp_path):
    rows = [{"messages": [ASKED | {"content": str(n)}, ANSWERED] * (1 + n % 2)} for n in range(1204)]
    told = str(corpus.load(write(tmp_path, [*rows, rows[0], "{"]), How(skip_bad=True)).origin)
    assert told == (
        "messages: 1,205 conversations, 3.0 turns each; exact duplicates, each on the side of its first: 1; "
        "rows skipped: 1"
    )
    pairs = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(3)]
    told = str(corpus.load(write(tmp_path, pairs)).origin)
    assert (
        told
        == "preference: 3 conversations, 2.0 turns each; trained on is the chosen answer, the rejected one is not read"
    )


def spoken(number: int) -> list[dict]:
    return [{"role": "user", "content": f"{number}?"}, {"role": "therapist", "content": f"{number}."}]


def test_turns_one_a_line_are_what_they_are_in_a_list(tmp_path):
    turns = [turn for number in range(12) for turn in spoken(number)]
    listed, lined = (corpus.load(write(tmp_path, turns, name)) for name in ("t.json", "t.jsonl"))
    assert listed == lined


def test_a_bad_turn_takes_its_pair_along_and_no_other(tmp_path):
    good = [spoken(number) for number in range(5)]
    wrong: list[list] = [
        [{"role": "user", "content": ""}, {"role": "therapist", "content": "a"}],
        [{"role": "user", "content": "a"}, {"role": "therapist", "content": 1}],
        [{"role": "user", "content": "a"}],
        [{"role": "therapist", "content": "a"}],
        ["a"],
    ]
    turns = [turn for pair, bad in zip(good, wrong, strict=True) for turn in (*pair, *bad)]
    loaded = corpus.load(write(tmp_path, turns, "t.json"), How(skip_bad=True))
    sound = corpus.load(write(tmp_path, [turn for pair in good for turn in pair], "s.json"))
    assert said(loaded) == said(sound)
    assert origin(loaded).skipped == len(turns) - 10
    with pytest.raises(CorpusError, match="turn 2: 'content' is empty"):
        corpus.load(write(tmp_path, turns, "t.json"))


def test_a_corpus_is_not_held_twice(tmp_path):
    """Of ten times the file, the peak beside the examples grows by no part of it."""
    beside = []
    for count in (300, 3000):
        path = write(tmp_path, [{"text": f"{n} " + "x" * 3000} for n in range(count)])
        tracemalloc.start()
        loaded = corpus.load(path)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(loaded.train + loaded.heldout) == count
        beside.append(peak - kept)
    assert beside[1] - beside[0] < 3000 * 3000 / 4
