"""A file of questions: what is read, and what is refused in a line that names the place."""

import json
from dataclasses import replace

import pytest

from lightweight import corpus
from lightweight.corpus import Conversation, Message, Text

DIALOGUE = [{"role": role, "content": role} for role in ("user", "assistant", "user")]


def written(tmp_path, *rows, name="task.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
    return path


def test_questions_are_put_as_the_examples_that_are_trained_on(small_corpus, tmp_path):
    path = written(tmp_path, {"prompt": "How are you?", "answer": " well "}, "", {"prompt": "And now?", "answer": "so"})
    of_pairs = corpus.load_task(path, small_corpus)
    assert [one.answer for one in of_pairs.questions] == ["well", "so"]
    assert of_pairs.questions[0].begun == Conversation((Message("user", "How are you?"),), corpus.THERAPIST)
    texts = replace(small_corpus, train=(Text("a", "b"),))
    assert corpus.load_task(path, texts).questions[0].begun == Text("How are you?", "")
    talk = Conversation((Message("user", "a"), Message("assistant", "b")))
    talks = replace(small_corpus, train=(talk,))
    assert corpus.load_task(path, talks).questions[0].begun == Conversation((Message("user", "How are you?"),))
    dialogue = written(tmp_path, {"messages": [{"role": "user", "content": "a"}], "answer": "well"}, name="talk.jsonl")
    assert corpus.load_task(dialogue, talks).questions[0].begun == Conversation((Message("user", "a"),))
    assert corpus.load_task(path, texts).digest == of_pairs.digest != corpus.load_task(dialogue, talks).digest


def test_a_line_ends_where_json_lines_end_and_not_within_what_is_asked(small_corpus, tmp_path):
    asked = "one\u2028two\x85three"
    row = json.dumps({"prompt": asked, "answer": "well"}, ensure_ascii=False)
    (question,) = corpus.load_task(written(tmp_path, row), small_corpus).questions
    assert question.begun == Conversation((Message("user", asked),), corpus.THERAPIST)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "line 1: "),
        ({"prompt": "a"}, "line 1: no prompt or messages with an answer: write "),
        ({"prompt": "a", "answer": " "}, "line 1: no prompt or messages with an answer"),
        ({"messages": [{"role": "assistant", "content": "a"}], "answer": "b"}, "ending with the user's"),
        ({"messages": [{"role": "robot", "content": "a"}], "answer": "b"}, "a message without a role"),
        ("", "has no question"),
        (
            {"messages": [{"role": r, "content": r} for r in ("user", "assistant", "user")], "answer": "b"},
            "ask one turn",
        ),
    ],
)
def test_what_is_no_question_is_refused_in_one_line(row, problem, small_corpus, tmp_path):
    with pytest.raises(corpus.CorpusError, match=problem) as raised:
        corpus.load_task(written(tmp_path, row), small_corpus)
    assert "task.jsonl" in str(raised.value) and "\n" not in str(raised.value)


def test_a_question_that_is_trained_on_is_refused(small_corpus, tmp_path):
    prompt, answer = corpus.conversation.contents(small_corpus.train[0])
    held_out, its = corpus.conversation.contents(small_corpus.heldout[0])
    assert len(corpus.load_task(written(tmp_path, {"prompt": held_out, "answer": its}), small_corpus).questions) == 1
    with pytest.raises(corpus.CorpusError, match="question 1 is in the training data"):
        corpus.load_task(written(tmp_path, {"prompt": prompt, "answer": answer}), small_corpus)
    with pytest.raises(corpus.CorpusError, match="cannot be read"):
        corpus.load_task(tmp_path / "nowhere.jsonl", small_corpus)
