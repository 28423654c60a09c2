import gzip
import json
import random
import re
from pathlib import Path

import pytest

from lightweight.corpus import CorpusError, files, load


def read(path: Path, content: bytes, progress=lambda text: None) -> list[files.Item]:
    path.write_bytes(content)
    return list(files.items(path, progress))


def damage(text: str) -> list | str:
    """What the json module reads, or a pattern of what it says of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        said = [error]
        if (
            error.msg == "Illegal trailing comma before end of array"
        ):  # Python 3.13; of the whole list we say as before it
            said.append(json.JSONDecodeError("Expecting value", text, text.index("]", error.pos)))
        return "|".join(re.escape(f"line {one.lineno}, column {one.colno} ({one.msg})") for one in said)


VALUES: tuple = ({"a": 'é한😀\n"\\' * 3}, [1.5e-3, -12, True, None], "x" * 40, 12345, -1e10, {}, [])


@pytest.mark.parametrize("seed", range(8))
def test_a_list_is_read_as_json_reads_it_whatever_fits_into_the_buffer(tmp_path, monkeypatch, seed):
    """Also where it is damaged: the same line, column and words."""
    rng = random.Random(seed)
    for _ in range(60):
        monkeypatch.setattr(files, "CHUNK_BYTES", rng.choice([1, 2, 3, 7, 17, 1000]))
        values = rng.choices(VALUES, k=rng.randrange(6))
        text = json.dumps(values, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
        assert [item.value for item in read(tmp_path / "a.json", text.encode())] == values
        cut = rng.randrange(len(text))
        text = text[:cut] + rng.choice(["", "}", "\x01", ",", "q"]) + text[cut + rng.randrange(3) :]
        found = damage(text)
        if isinstance(found, str):
            with pytest.raises(CorpusError, match=found):
                read(tmp_path / "a.json", text.encode())
        else:
            assert [item.value for item in read(tmp_path / "a.json", text.encode())] == found


def test_only_some_items_are_held_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    longest = 0

    class Watched(files._Listed):
        def _append(self, chunk: bytes) -> None:
            nonlocal longest
            super()._append(chunk)
            longest = max(longest, len(self._text))

    monkeypatch.setattr(files, "_Listed", Watched)
    content = json.dumps([{"text": "x" * 90}] * 2000).encode()
    assert len(read(tmp_path / "a.json", content)) == 2000
    assert longest < 3000 < len(content)


LINES = b'{"a": 1}\n\n  \n{"a": 2}\n'


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.JSONL"])
@pytest.mark.parametrize("compressed", [False, True])
def test_lines_have_their_numbers_plain_or_compressed(tmp_path, name, compressed):
    content = gzip.compress(LINES) if compressed else LINES
    read_items = read(tmp_path / (name + ".gz" * compressed), content)
    assert read_items == [files.Item(("line", 1), {"a": 1}), files.Item(("line", 4), {"a": 2})]


def test_a_byte_order_mark_begins_lines_too(tmp_path):
    assert [item.value for item in read(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + LINES)] == [{"a": 1}, {"a": 2}]
    assert [item.value for item in read(tmp_path / "a.json", b"\xef\xbb\xbf" + LINES)] == [{"a": 1}, {"a": 2}]


def test_a_line_that_is_damaged_leaves_the_others_readable(tmp_path):
    lines = [b'{"a": 1}', b'{"a": ', b"[" * 100_000, b"9" * 5000, b'{"a": "\xff"}', b'{"a": 6}']
    found = read(tmp_path / "a.jsonl", b"\n".join(lines))
    assert [item.place for item in found] == [("line", number) for number in range(1, 7)]
    said = [str(item.value) for item in found[1:5]]
    expected = ["is not JSON at column", "nested too deeply", "digits", "UTF-8 at byte 7"]
    assert all(words in line for words, line in zip(expected, said, strict=True))
    assert found[5].value == {"a": 6}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_a_compressed_file_that_was_cut_off_is_one_line(tmp_path, name):
    whole = gzip.compress(b'[{"a": 1}]\n' * 500)
    for content in (whole[:-9], whole[:30] + b"xxxx" + whole[34:]):
        with pytest.raises(CorpusError, match="is damaged or cut off"):
            read(tmp_path / name, content)


def test_progress_is_told_once_a_hundredth_and_of_long_files_alone(tmp_path):
    told: list[str] = []
    read(tmp_path / "a.jsonl", b'{"a": 1}\n' * 1000, told.append)
    assert told == []
    for name in ("b.jsonl", "b.json"):
        line = json.dumps({"a": "x" * 10_000})
        content = "\n".join([line] * 300) if name == "b.jsonl" else f"[{','.join([line] * 300)}]"
        read(tmp_path / name, content.encode(), told.append)
        assert told[-1] == f"reading {name}: 100 %"
        assert 2 <= len(told) <= 100 and len(set(told)) == len(told)
        told.clear()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.jsonl.gz", "a.parquet"])
def test_a_pointer_of_git_lfs_is_told_as_one(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(CorpusError, match=rf"{name}: is a Git LFS pointer, not the data: fetch them with git lfs pull"):
        load(tmp_path / name)
