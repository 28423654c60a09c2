import csv
import gzip
import json
import subprocess
import sys

import pytest

from lightweight import corpus
from lightweight.corpus import CorpusError, How

ALPACA = [{"instruction": f"Say {n},\nplease", "input": "", "output": f"{n}"} for n in range(8)]
MESSAGES = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}]} for n in range(8)
]


def lined(folder, rows):
    path = folder / "same.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return corpus.load(path)


def separated(path, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("a.CSV", ","), ("a.csv.gz", ",")])
def test_separated_values_are_what_the_same_lines_are(tmp_path, name, delimiter):
    """Numbers are texts, cells have line breaks, and no package is needed."""
    path = separated(tmp_path / name, ALPACA, delimiter)
    if name.endswith("gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert corpus.load(path) == lined(tmp_path, ALPACA)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'instruction,output\n"a\nb",c\nd,\n', r"line 4: output: is empty"),
        (b"instruction,output\na,b,c\n", r"line 2: has 3 cells, and the first line 2: quote"),
        (b"instruction,output\na\n", r"line 2: has 1 cells"),
        (b'instruction,output\na,"b" c\n', r"line 2: is not CSV"),
        (b"instruction,output\na,\xff\n", r"is not UTF-8 at byte 2 of line 2"),
        (
            b"instruction,output\na,b\0\n",
            r"holds a zero byte, which text never has, at byte 3 of line 2: save it as UTF-8",
        ),
        ("instruction,output\na,b\n".encode("utf-16-le"), r"holds a zero byte, .* at byte 1 of line 1"),
        (b"a,b\nc,d\n", r"line 2: has the keys 'a', 'b', which no format has"),
        (b"", r"has 0 pair\(s\)"),
    ],
)
def test_a_bad_cell_is_one_line(tmp_path, content, expected):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=expected) as raised:
        corpus.load(path)
    assert "\n" not in str(raised.value)


def test_an_empty_line_is_no_row_but_an_empty_cell_is_told(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,output\na,b\n  \nc,d\n\n \n")
    assert len(corpus.load(path).train) == 1
    path.write_text('text\na\nb\n" "\n')
    with pytest.raises(CorpusError, match="line 4: text: is empty"):
        corpus.load(path)


def test_a_cell_may_be_long_and_a_bad_row_is_skipped(tmp_path):
    rows = [*ALPACA, {"instruction": "a", "input": "", "output": " "}]
    rows[0] = rows[0] | {"output": "x" * 200_000}
    loaded = corpus.load(separated(tmp_path / "a.csv", rows), How(skip_bad=True))
    assert loaded.origin is not None and loaded.origin.skipped == 1 and len(loaded.train + loaded.heldout) == 8


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("rows", [ALPACA, MESSAGES], ids=["alpaca", "messages"])
def test_a_file_of_datasets_is_what_the_same_lines_are(tmp_path, name, rows):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(rows)
    if name == "a.parquet":
        table.to_parquet(tmp_path / name)
    else:
        table.save_to_disk(tmp_path / "saved")
        (file,) = (tmp_path / "saved").glob("*.arrow")
        file.rename(tmp_path / name)
    assert corpus.load(tmp_path / name) == lined(tmp_path, rows)


def test_both_kinds_of_arrow_files_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(MESSAGES)
    for name, new in (("stream.arrow", pyarrow.ipc.new_stream), ("file.arrow", pyarrow.ipc.new_file)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        assert corpus.load(tmp_path / name) == lined(tmp_path, MESSAGES)


DAMAGED = """
import sys
from pathlib import Path

from lightweight import corpus

path = Path(sys.argv[1])
sound = path.read_bytes()
refused = 0
for place in range(0, len(sound), 5):
    path.write_bytes(sound[:place] + bytes([sound[place] ^ 0xFF]) + sound[place + 1 :])
    try:
        corpus.load(path)
    except corpus.CorpusError as error:
        assert "\\n" not in str(error)
        refused += 1
print(refused)
"""


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_damaged_table_is_one_line_and_ends_no_process(tmp_path, name):
    """Whichever of its bytes is wrong: pyarrow follows an offset that leads anywhere."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(MESSAGES)
    if name == "a.parquet":
        parquet.write_table(table, tmp_path / name)
    else:
        with pyarrow.ipc.new_stream(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    found = subprocess.run(
        [sys.executable, "-c", DAMAGED, tmp_path / name], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 50


LOADED = r"""
import re, sys
from pathlib import Path

from lightweight import corpus
from lightweight.corpus import tables

if not tables.SEPARATED.search(sys.argv[1]):
    import pyarrow.parquet
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
told = []
loaded = corpus.load(Path(sys.argv[1]), progress=told.append)
print(peak() - before, len([text for text in told if " %" in text]))
"""


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv"])
def test_a_large_table_is_read_with_progress_and_not_held_twice(tmp_path, name):
    """64 MiB of texts: what is in memory beside them is some rows, and what pyarrow allocates once."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"{number:05}" + chr(97 + number % 26) * 4091 for number in range(16384)]
    table = pyarrow.table({"prompt": texts, "completion": ["."] * len(texts)})
    if name == "a.parquet":
        parquet.write_table(table, tmp_path / name, use_dictionary=False, compression="none")
    elif name == "a.arrow":
        with pyarrow.ipc.new_stream(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    else:
        separated(tmp_path / name, table.to_pylist())
    found = subprocess.run([sys.executable, "-c", LOADED, tmp_path / name], capture_output=True, text=True, check=True)
    kilobytes, told = map(int, found.stdout.split())
    assert 64 << 10 <= kilobytes < 160 << 10  # whole tables took five times the texts
    assert told >= 5


def test_a_data_set_of_the_hub_is_loaded_by_its_name_and_split(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(MESSAGES)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert corpus.load("hub:owner/talks:test_sft") == corpus.load("hub:owner/talks") == lined(tmp_path, MESSAGES)
    assert asked == [("owner/talks", "test_sft"), ("owner/talks", "train")]


def test_what_datasets_cannot_read_is_one_line(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.parquet").write_bytes(b"no parquet" * 9)
    with pytest.raises(CorpusError, match=r"a\.parquet: pyarrow cannot read it \(.*\): write it again") as raised:
        corpus.load(tmp_path / "a.parquet")
    assert "\n" not in str(raised.value)
    with pytest.raises(CorpusError, match="does not exist"):
        corpus.load(tmp_path / "b.parquet")

    def refuse(name, split):
        raise ValueError("Unknown split \"tran\". Should be one of ['train'].")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(CorpusError, match=r'hub:a/b:tran: datasets cannot read it .*Unknown split "tran"'):
        corpus.load("hub:a/b:tran")


def test_without_datasets_the_command_that_installs_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for path in (tmp_path / "a.parquet", "hub:a/b"):
        with pytest.raises(CorpusError, match=r"needs the package datasets.*: pip install 'lightweight-llm\[data\]'"):
            corpus.load(path)
