import re
import signal
import time
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from chat_templates import (
    ALPACA,
    CHATML,
    CHATML_MARKED,
    MISTRAL,
    TALK,
    TEMPLATES,
    THINKING,
    THOUGHTS,
    UNSTABLE,
    WITHOUT_SYSTEM,
    tokenizer,
)
from published_templates import LAST_ALONE, NEVER, PUBLISHED, WIDER
from transformers import AddedToken, ByT5Tokenizer

from lightweight import corpus
from lightweight.corpus import IGNORED, THERAPIST, Conversation, LossOn, Message, pair, template
from lightweight.models import ModelError


def said(conversation):
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


def learned(row, found):
    """What the loss is on, as text."""
    return found.decode(row["labels"][row["labels"] != IGNORED])


def by_hand(written, found):
    """Ids and labels of what a template writes, the loss on what is between « and »."""
    pieces = re.split("[«»]", written)
    ids = [found.encode(piece, add_special_tokens=False) for piece in pieces]
    labels = [[IGNORED] * len(of) if index % 2 == 0 else of for index, of in enumerate(ids)]
    return list(chain(*ids)), list(chain(*labels))


EVERY = TEMPLATES | PUBLISHED


@pytest.mark.parametrize("loss_on", ["all", "last"])
@pytest.mark.parametrize("name", EVERY | WIDER)
def test_the_loss_is_on_what_was_marked_by_hand(name, loss_on):
    of = (EVERY | WIDER)[name]
    found = tokenizer(of.template, bos=of.bos, eos=of.eos)
    row = corpus.encode_whole(of.talk, found, loss_on)
    written = of.written
    if loss_on == "last":
        first, _, last = written.rpartition("«")
        written = re.sub("[«»]", "", first) + "«" + last
    ids, labels = by_hand(written, found)
    if not of.is_ended:
        ids, labels = [*ids, found.eos_token_id], [*labels, found.eos_token_id]
    assert row["input_ids"].tolist() == ids
    assert row["labels"].tolist() == labels
    theirs = found.apply_chat_template(said(of.talk), tokenize=True, return_dict=True)["input_ids"]
    assert row["input_ids"].tolist() == [*theirs, *([] if of.is_ended else [found.eos_token_id])]


@pytest.mark.parametrize("name", ["ChatML, marked", "thoughts, marked"])
def test_marks_are_read_as_transformers_reads_them(name):
    of = EVERY[name]
    found = tokenizer(of.template, eos=of.eos)
    theirs = found.apply_chat_template(
        said(of.talk), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    row = corpus.encode_whole(of.talk, found)
    assert (row["labels"] != IGNORED).tolist() == [bool(mark) for mark in theirs["assistant_masks"]]


@pytest.mark.parametrize("name", EVERY)
def test_a_prompt_is_how_the_row_of_its_answer_begins(name):
    of = EVERY[name]
    found = tokenizer(of.template, bos=of.bos, eos=of.eos)
    row = corpus.encode_whole(of.talk, found, "last")
    begun = corpus.encode_prompt(replace(of.talk, messages=of.talk.messages[:-1]), found)
    first = int((row["labels"] != IGNORED).argmax())
    assert row["input_ids"][:first].tolist() == begun


@pytest.mark.parametrize("name", EVERY)
def test_an_answer_is_ended_by_the_token_that_was_learned_last(name):
    of = EVERY[name]
    found = tokenizer(of.template, bos=of.bos, eos=of.eos)
    row = corpus.encode_whole(of.talk, found)
    last = row["labels"][row["labels"] != IGNORED][-1]
    assert set(corpus.ends_of_answers(found)) == {found.eos_token_id, last}


@pytest.mark.parametrize("name", EVERY)
def test_a_slow_tokenizer_gives_the_same_rows(name):
    """ByT5's, which does not say where in the text its tokens are."""
    of = EVERY[name]
    found = ByT5Tokenizer(bos_token=of.bos, eos_token=AddedToken(of.eos))  # its own takes spaces around it along
    special = re.findall(r"<\|?[a-z_]+\|?>|</s>|\[/?INST\]", of.written)
    found.add_special_tokens({"additional_special_tokens": sorted({t for t in special if "think" not in t} - {of.eos})})
    found.chat_template = of.template
    ids, labels = by_hand(of.written, found)
    row = corpus.encode_whole(of.talk, found)
    end = [] if of.is_ended else [found.eos_token_id]
    assert row["input_ids"].tolist() == [*ids, *end]
    assert row["labels"].tolist() == [*labels, *end]


class Joining(ByT5Tokenizer):
    """A slow tokenizer with one token for a line's end and what comes after it."""

    def _tokenize(self, text, **options):
        return re.findall("\n.|.", text, re.DOTALL)

    def _convert_token_to_id(self, token):
        return 3 + sum(token.encode()) % 300


def test_a_slow_tokenizer_that_joins_turns_is_refused():
    found = Joining()
    found.chat_template = CHATML
    with pytest.raises(ModelError, match=r"joins the end of one turn.*: give its tokenizer\.json") as raised:
        corpus.encode_whole(TALK, found)
    assert "\n" not in str(raised.value)


def test_a_token_across_the_border_of_a_turn_is_learned_as_transformers_does():
    """Of '\\n' + '\\nHello', '\\n\\n' is one token, which an answer that begins with a line's end begins within."""
    found = tokenizer(CHATML_MARKED)
    talk = Conversation((Message("user", "Hi."), Message("assistant", "\nHello.")))
    theirs = found.apply_chat_template(said(talk), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    for written in (CHATML, CHATML_MARKED):
        found.chat_template = written
        row = corpus.encode_whole(talk, found)
        assert learned(row, found) == "\n\nHello.<|im_end|>"
        assert (row["labels"] != IGNORED).tolist() == [bool(mark) for mark in theirs["assistant_masks"]]


def test_thoughts_that_a_template_takes_out_of_earlier_turns_leave_the_last_turn():
    found = tokenizer(THINKING)
    mend = r"it writes message 2 of 4 differently once another follows: take --loss-on last, or a chat template with"
    with pytest.raises(ModelError, match=mend) as raised:
        corpus.encode_whole(THOUGHTS, found)
    assert "\n" not in str(raised.value)
    row = corpus.encode_whole(THOUGHTS, found, "last")
    assert learned(row, found) == "<think>\nLate.\n</think>\n\nSleep.<|im_end|>"
    assert "A guest" not in found.decode(row["input_ids"])
    one = corpus.encode_whole(Conversation(THOUGHTS.messages[:2]), found)
    assert learned(one, found) == "<think>\nA guest.\n</think>\n\nHello.<|im_end|>"


@pytest.mark.parametrize("name", LAST_ALONE)
def test_a_turn_that_is_written_otherwise_once_another_follows_is_not_learned(name):
    of = LAST_ALONE[name]
    found = tokenizer(of.template, bos=of.bos, eos=of.eos)
    with pytest.raises(ModelError, match="differently once another follows: take --loss-on last") as raised:
        corpus.encode_whole(of.talk, found)
    assert "\n" not in str(raised.value)
    row = corpus.encode_whole(of.talk, found, "last")
    assert (row["input_ids"].tolist(), row["labels"].tolist()) == by_hand(of.written, found)


@pytest.mark.parametrize("name", NEVER)
@pytest.mark.parametrize("loss_on", ["all", "last"])
def test_a_published_template_that_cannot_be_used_is_one_line(name, loss_on):
    of, expected = NEVER[name]
    with pytest.raises(ModelError, match=expected) as raised:
        corpus.encode_whole(of.talk, tokenizer(of.template, bos=of.bos, eos=of.eos), loss_on)
    assert "\n" not in str(raised.value)


def test_a_template_that_never_says_where_a_turn_lies_is_refused():
    found = tokenizer(UNSTABLE)
    expected = (
        "model .*: its chat template does not show which tokens the loss is taken over: "
        "it writes the last turn differently .*: take a"
    )
    modes: list[LossOn] = ["all", "last"]
    for loss_on in modes:
        with pytest.raises(ModelError, match=expected):
            corpus.encode_whole(TALK, found, loss_on)


def test_marks_that_are_not_one_a_turn_do_not_say_which_is_the_last():
    twice = CHATML_MARKED.replace(
        "{{ m.content + '<|im_end|>' }}", "{{ m.content }}{% endgeneration %}{% generation %}!"
    )
    found = tokenizer(twice)
    assert learned(corpus.encode_whole(TALK, found), found).endswith("Sleep.!</s>")
    with pytest.raises(ModelError, match="it does not mark each turn once"):
        corpus.encode_whole(TALK, found, "last")


def test_marks_around_nothing_are_refused():
    with pytest.raises(ModelError, match="it marks no turn as generated"):
        corpus.encode_whole(TALK, tokenizer(CHATML + "{% generation %}{% endgeneration %}"))


def test_a_conversation_that_begins_with_the_assistant_has_nothing_to_answer():
    talk = Conversation((Message("assistant", "Welcome."), *WITHOUT_SYSTEM.messages))
    with pytest.raises(ModelError, match="a conversation begins with the assistant: let another role begin"):
        corpus.encode_whole(talk, tokenizer(CHATML))
    row = corpus.encode_whole(talk, found := tokenizer(CHATML_MARKED))
    assert learned(row, found).startswith("Welcome.<|im_end|>")


def test_what_is_said_after_the_last_answer_is_left_out():
    longer = Conversation((*TALK.messages, Message("user", "Thanks.")))
    for found in (tokenizer(CHATML), tokenizer(None)):
        rows = [corpus.encode_whole(talk, found) for talk in (longer, TALK)]
        assert all(np.array_equal(rows[0][name], rows[1][name]) for name in ("input_ids", "labels"))


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (ENDLESS, "not done after 1 seconds"),
        ("{{ 9 ** (9 ** 9) }}", "not done after 1 seconds"),
        ("{{ 'x' * 10 ** 10 }}", "it takes over 1 GiB of memory"),
        ("{{ '%9999999999d' % 1 }}", "it takes over 1 GiB of memory"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ nobody.name.first }}", "is undefined"),
        ("{% for %}", "Expected an expression"),
        ("<user><assistant>", "it leaves out what the user says"),
        ({"tools": "x"}, "no default"),
        ("{{ messages[0].content }}{{ 'x' * 2_000_000 }}", "it writes 2,000,002 characters for 1 message"),
        ("{{ messages[0].content }}\ud800", "surrogates not allowed"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_one_line(monkeypatch, written, expected):
    if expected.startswith("not done"):
        monkeypatch.setattr(template, "RENDER_SECONDS", 1.0)
    found = ByT5Tokenizer()
    found.chat_template = written
    with pytest.raises(ModelError, match=expected) as raised:
        corpus.encode_prompt(Conversation((Message("user", "Hi"),)), found)
    assert "its chat template cannot be used" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_template_that_leaves_out_what_one_role_says_is_refused(role):
    silent = CHATML.replace("m.content", f"('' if m.role == '{role}' else m.content)")
    with pytest.raises(ModelError, match=f"it leaves out what the {role} says"):
        corpus.encode_whole(TALK, tokenizer(silent))


def test_a_template_that_refuses_a_system_message_is_told():
    with pytest.raises(ModelError, match="Only user and assistant roles are supported!"):
        corpus.encode_whole(TALK, tokenizer(MISTRAL, bos="<s>"))


def test_a_row_ends_where_no_special_token_ends_a_turn():
    found = tokenizer(ALPACA)
    row = corpus.encode_whole(pair("Hi", "Hello"), found)
    assert found.decode(row["input_ids"]) == "### Instruction:\nHi\n\n### Response:\nHello\n\n</s>"
    assert learned(row, found) == "Hello\n\n</s>"


def test_a_time_limit_leaves_anothers_alarm_running():
    """pytest-timeout's, say, which must still come."""
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with template._limits(5, 2**30):
            pass
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.3
        time.sleep(0.4)
        assert rang
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Without a template


def test_plain_names_of_the_roles_have_a_history():
    found = tokenizer(None)
    row = corpus.encode_whole(TALK, found)
    assert found.decode(row["input_ids"]) == (
        "System: Be kind.\nUser: Hi.\nAssistant: Hello 그래.</s>User: And now?\nAssistant: Sleep.</s>"
    )
    assert learned(row, found) == "Hello 그래.</s>Sleep.</s>"
    assert learned(corpus.encode_whole(TALK, found, "last"), found) == "Sleep.</s>"
    begun = corpus.encode_prompt(Conversation(TALK.messages[:-1]), found)
    assert row["input_ids"][: len(begun)].tolist() == begun
    assert len(begun) == len(row["input_ids"]) - len("Sleep.") - 1


def test_of_a_pair_they_are_the_originals():
    found = tokenizer(None, bos="<s>")
    row = corpus.encode_whole(pair("Hi", "hello"), found)
    prompt = [found.bos_token_id, *found.encode("User: Hi\nTherapist: ", add_special_tokens=False)]
    answer = [*found.encode("hello", add_special_tokens=False), found.eos_token_id]
    assert row["input_ids"].tolist() == prompt + answer
    assert row["labels"].tolist() == [IGNORED] * len(prompt) + answer
    assert corpus.encode_prompt(Conversation((Message("user", "Hi"),), THERAPIST), found) == prompt
