"""README is short, README.ko.md says the same, and what they and docs/ tell people to type is understood and runs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import turns
from lightweight import __main__, corpus, methods, record
from lightweight.methods import Method
from lightweight.targets import size

ROOT = Path(__file__).parents[1]
README, KOREAN = ROOT / "README.md", ROOT / "README.ko.md"
PAGES = [README, KOREAN, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
each_readme = pytest.mark.parametrize("readme", [README, KOREAN], ids=lambda path: path.name)


def commands(page: Path, program: str) -> list[list[str]]:
    """The arguments of every command line of `program` in `page`, without redirections."""
    # a command may stand in an item of a list, eight spaces deep
    lines = re.findall(rf"^ {{4,8}}(?:.* && |.*python -m )?{program} (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return [shlex.split(line.partition(" >")[0], comments=True) for line in lines]


def blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))


def test_the_readme_is_read_in_five_minutes():
    lines = README.read_text("utf-8").splitlines()
    assert len(lines) <= 160
    assert max(map(len, lines)) <= 120


def test_ci_finds_two_commands_in_the_readme():
    assert len(re.findall(r"^    pip install .* && pytest.*$", README.read_text("utf-8"), re.MULTILINE)) == 2


def test_the_korean_readme_says_what_the_english_one_says():
    """The same sections, commands, code, tables, links and figures, in the same order."""
    english, korean = README.read_text("utf-8"), KOREAN.read_text("utf-8")

    def shape(text: str) -> list[str]:
        """Headings by their depth; commands, code and rows of tables as they stand."""
        return re.findall(r"^(?:#+(?= )|    .*|\|.*|```\w*|<!-- .*|- `\w+`)", text, re.MULTILINE)

    assert shape(korean) == shape(english)
    assert blocks(KOREAN) == blocks(README)
    there = [link for link in links(README) if link != "README.ko.md"]
    assert sorted(link for link in links(KOREAN) if link != "README.md") == sorted(there)


@each_readme
def test_a_ratio_in_the_readmes_prose_is_one_of_its_table(readme):
    text = readme.read_text("utf-8")
    ratios = re.findall(r"(\d+\.\d+)(?: times| ?배)", text)
    assert ratios and [ratio for ratio in ratios if f" {ratio}x |" not in text] == []


def test_the_memory_and_the_sizes_in_the_readmes_question_are_those_of_its_record():
    entries = record.load(ROOT / "experiments" / "records" / "h100-t4.json").entries
    (budget,) = {entry.budget_bytes for entry in entries if entry.budget_bytes}  # the control has none
    baselines = {entry.model: entry.parameters or 0 for entry in entries if entry.method == "baseline"}
    small, large = baselines["opt-350m"], baselines["gpt-neo-1.3b"]
    english, korean = (" ".join(page.read_text("utf-8").split()) for page in (README, KOREAN))
    assert f"has {size(budget)} for" in english and size(budget) in korean
    assert f"of {small / 1e6:.0f} million parameters, and one of {large / 1e9:.1f} billion?" in english
    hundreds, rest = divmod(round(small / 1e6), 100)
    assert f"파라미터 {hundreds}억 {rest * 100:,}만 개와 {large / 1e8:.0f}억 개의" in korean


@each_page
def test_every_link_to_a_file_has_one(page):
    for link in links(page):
        target = link.partition("#")[0]
        assert "://" in link or not target or (page.parent / target).exists(), f"{page.name}: {link}"


CHANGES = re.findall(r"^\| (?!to add|-)(.*) \|$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("row", CHANGES, ids=lambda row: row.partition(" |")[0].strip())
def test_what_a_common_change_touches_is_there(row):
    """Every file, from the package or the repository on, and every name in one of the row's files."""
    quoted = re.findall(r"`([^`]+)`", row)
    paths = [word for word in quoted if "/" in word or word.endswith(".py")]
    found = {path: sorted(found_from(ROOT / "lightweight", path) or found_from(ROOT, path)) for path in paths}
    assert paths and [path for path, files in found.items() if not files] == []
    text = "".join(file.read_text("utf-8") for files in found.values() for file in files if file.is_file())
    assert [name for name in quoted if name.isidentifier() and not re.search(rf"\b{name}\b", text)] == []


def found_from(folder: Path, path: str) -> list[Path]:
    """The files of `path`, in which `*` and `<command>` are any."""
    return list(folder.glob(re.sub(r"<\w+>", "*", path)))


@each_page
def test_every_command_of_ours_is_one(page):
    for line in commands(page, "lightweight"):
        if "..." not in line:
            __main__.parser().parse_args(line)  # exits where it does not understand


@each_page
def test_every_option_of_pytest_is_one(page, request):
    for line in commands(page, "pytest"):
        _, unknown = request.config._parser.parse_known_and_unknown_args(line)
        assert not unknown, f"pytest {shlex.join(line)}"
        for path in (word for word in line if word.startswith(("experiments", "tests"))):
            assert (ROOT / path).exists(), f"pytest {shlex.join(line)}"


def test_the_pages_tell_people_to_type_all_there_is():
    """A page without commands would pass the tests above."""
    ours = {line[0] for page in PAGES for line in commands(page, "lightweight")}
    assert ours == {"data", "plan", "train", "chat", "report", "gate", "sweep", "calibrate"}
    for readme in (README, KOREAN):
        assert {line[0] for line in commands(readme, "lightweight")} == {"plan", "train", "chat", "report"}
        assert len(commands(readme, "pytest")) >= 6


def test_no_python_of_a_page_goes_untested():
    """Methods, tests and conftests are run below; every other block stands by itself and is run here."""
    for page in PAGES:
        for code in blocks(page):
            if "MINE" not in code and "def test_" not in code and "pytest_plugins" not in code:
                subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


OF_METHODS = [(page, code) for page in PAGES for code in blocks(page) if "MINE" in code and page != KOREAN]


@pytest.mark.parametrize(("page", "code"), OF_METHODS, ids=[page.name for page, _ in OF_METHODS])
def test_every_method_of_a_page_can_be_named_and_forecast(page, code, tmp_path, monkeypatch, capsys, without_gpu):
    others = "\nfor number, other in enumerate(globals().get('OTHERS', ())):\n    globals()[f'OTHER{number}'] = other\n"
    (tmp_path / "mine.py").write_text(code + others, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert isinstance(methods.named("mine:MINE"), Method)
    own = [f"mine:{name}" for name in vars(sys.modules["mine"]) if re.fullmatch(r"MINE|OTHER\d+", name)]
    assert len(own) == 1 + code.count("\n    Method(")
    assert __main__.main(["plan", "llama-tiny", "--target", "t4", *(f"--method={name}" for name in own)]) == 0
    told = capsys.readouterr().out
    assert "cannot be forecast" not in told and told.count(" fits") == len(own)


def test_the_experiment_of_ones_own_runs(pytester, without_gpu):
    (code,) = (block for block in blocks(ROOT / "docs" / "experiments.md") if "def test_" in block)
    (conftest,) = blocks(ROOT / "docs" / "gate.md")
    pytester.makeconftest(conftest)
    # a twin learns by all its parameters alone, and in seconds
    pytester.makepyfile(code.replace('"smollm2-135m", "lora"', '"opt-tiny", "baseline"'))
    (pytester.path / "corpus.json").write_text(json.dumps(turns(24)), "utf-8")
    pytester.runpytest("-p", "no:cacheprovider").assert_outcomes(passed=1)


def test_the_corpus_that_the_docs_show_is_one(tmp_path):
    (shown,) = blocks(ROOT / "docs" / "data.md", "json")
    (tmp_path / "talks.json").write_text(shown, "utf-8")
    loaded = corpus.load(tmp_path / "talks.json")
    assert len(loaded.train) == len(loaded.heldout) == 1


def test_every_generated_table_is_that_of_the_committed_records():
    """`docs/regenerate --check` reads the records and compares each table of README and docs."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # its `python` is this one
    checked = subprocess.run(
        [ROOT / "docs" / "regenerate", "--check"], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("sequences", [2, 8])
def test_the_tokens_of_joined_conversations_are_those_of_the_committed_record(sequences):
    document = json.loads((ROOT / "experiments/records/h100-conversations.json").read_text("utf-8"))
    of = {outcome["method"]: outcome for outcome in document["outcomes"]}
    pair = [of[f"lora-{by}-{sequences}x1"] for by in ("padded", "joined")]
    rates = [sum(one["step_tokens"][4:]) / sum(one["step_seconds"][4:]) for one in pair]
    peaks = [f"{one['peak_allocated_bytes'] / 2**30:.1f} GiB" for one in pair]
    row = [f"{sequences}", *(f"{rate:,.0f}" for rate in rates), f"{rates[1] / rates[0]:.1f}", *peaks]
    assert f"\n| {' | '.join(row)} |\n" in (ROOT / "docs" / "large.md").read_text("utf-8")


def test_no_table_of_a_page_is_left_out_by_regenerate():
    script = (ROOT / "docs" / "regenerate").read_text("utf-8")
    for page in PAGES:
        if re.search(r"<!-- (?!faults)[\w-]+: begin -->", page.read_text("utf-8")):  # a record has none of faults
            assert f"tables {page.relative_to(ROOT)} " in script


def test_every_page_has_a_place_in_the_site():
    site = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs')}\n" in site


def test_the_site_builds_without_a_dead_link(tmp_path):
    pytest.importorskip("mkdocs", reason="not run: needs the extra docs (see CONTRIBUTING.md)")
    # not with --quiet, which also keeps --strict from counting warnings
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
