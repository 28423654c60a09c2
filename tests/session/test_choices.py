import json

import pytest

from lightweight.session.choices import Choices


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"instruction": "a", "output": ""}]), "utf-8")
    return path


def test_a_corpus_is_read_as_the_command_line_says(pytester, rows, tmp_path):
    held_out = tmp_path / "held.jsonl"
    held_out.write_text('{"instruction": "Say 3.", "output": "3"}\n', "utf-8")
    with pytest.raises(pytest.UsageError, match=r"rows\.jsonl: line 13: output: is empty"):
        _ = Choices(pytester.parseconfig("-p", "lightweight.plugin", "--corpus", rows)).corpus
    read = Choices(
        pytester.parseconfig("-p", "lightweight.plugin", "--corpus", rows, "--skip-bad", "--held-out", held_out)
    ).corpus
    assert read.origin is not None
    assert (read.origin.format, read.origin.skipped, len(read.train), len(read.heldout)) == ("alpaca", 1, 11, 1)
    shared = Choices(
        pytester.parseconfig(
            "-p", "lightweight.plugin", "--corpus", rows, "--skip-bad", "--lightweight-held-out", "25%"
        )
    ).corpus
    assert (len(shared.train), len(shared.heldout)) == (9, 3)
    with pytest.raises(pytest.UsageError, match="line 1: has no 'text'"):
        _ = Choices(
            pytester.parseconfig("-p", "lightweight.plugin", "--corpus", rows, "--corpus-format", "text")
        ).corpus
