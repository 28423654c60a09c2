from pathlib import Path

import pytest
from samples import cells, entry, run

from lightweight.report import tables, write

BEGIN, END = write.marks("results")


def test_text_that_would_break_a_markdown_table_does_not():
    row = cells([entry(model="a|b\nc")])
    assert len(row) == 1
    assert row[0]["model"] == r"a\|b c"


def test_into_replaces_what_stands_between_the_marks_of_every_table(tmp_path):
    readme = tmp_path / "README.md"
    (begin, end), (memory_begin, memory_end) = write.marks("results"), write.marks("memory")
    readme.write_text(f"before\n{begin}\nold\n{end}\nbetween\n{memory_begin}{memory_end}\nafter\n")
    for method in ("baseline", "lora"):
        write.into(readme, [run(entry(method=method))])
    made = {table.key: table.text("markdown") for table in tables.tables([run(entry(method="lora"))])}
    results, memory = made["results"], made["memory"]
    assert "lora" in results and "weights" in memory
    assert readme.read_text() == (
        f"before\n{begin}\n\n{results}\n\n{end}\nbetween\n{memory_begin}\n\n{memory}\n\n{memory_end}\nafter\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("content", [None, "", BEGIN, f"{END} {BEGIN}", f"{BEGIN} " * 2])
def test_a_file_without_the_marks_is_told(tmp_path, content):
    readme = tmp_path / "README.md"
    if content is not None:
        readme.write_text(content)
    with pytest.raises(write.ReportError, match=r"README\.md") as raised:
        write.into(readme, [run(entry())])
    assert "\n" not in str(raised.value)
    assert content is None or readme.read_text() == content


def test_a_file_that_cannot_be_written_is_told_and_left_alone(tmp_path):
    with pytest.raises(write.ReportError, match=r"nowhere/report\.html: cannot be written"):
        write.write(tmp_path / "nowhere" / "report.html", "new")


def test_text_from_a_record_is_text_in_markdown():
    hostile = "<img src=x> ](http://evil) `code` \\| a\u202eb"
    line = next(line for line in write.text([run(entry(method=hostile))], "markdown").splitlines() if "evil" in line)
    assert "<img" not in line and "](http" not in line


@pytest.mark.parametrize("name", [".", "/", "folder", "folder/.", "/dev/null", "x" * 300 + ".html"])
def test_what_no_report_can_be_written_to_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(write.ReportError, match=r"^report ") as raised:
        write.write(Path(name), "new")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and not any((tmp_path / "folder").iterdir())


def test_a_link_that_somebody_planted_is_not_followed(tmp_path):
    """Neither under the name that a temporary file had once, nor under any that can be foreseen, nor the report's."""
    precious, report_ = tmp_path / "precious", tmp_path / "r.html"
    precious.write_text("precious")
    for name in (".r.html.writing", "r.html"):
        (tmp_path / name).symlink_to(precious)
    write.write(report_, "new")
    assert (precious.read_text(), report_.read_text(), report_.is_symlink()) == ("precious", "new", False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".r.html.writing", "precious", "r.html"]


def test_a_report_can_be_read_by_whom_other_files_can_be(tmp_path):
    other = tmp_path / "other"
    other.write_text("")
    write.write(tmp_path / "new.md", "new")
    assert (tmp_path / "new.md").stat().st_mode == other.stat().st_mode
    other.chmod(0o640)
    write.write(other, "new")
    assert other.stat().st_mode & 0o777 == 0o640
