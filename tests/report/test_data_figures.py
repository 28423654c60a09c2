from samples import entry, run

from lightweight.record import Entry
from lightweight.report import figures, page, tables


def told(**changes) -> Entry:
    return entry(
        **{
            "example_tokens": {"128": 7, "256": 56, "512": 40, "1024": 2},
            "corpus_format": "messages",
            "corpus_skipped": 3,
            "max_length": 256,
            "truncated_sequences": 42,
        }
        | changes
    )


def test_each_corpus_is_drawn_once_a_model_and_length_of_rows():
    entries = [told(), told(method="lora"), told(max_length=512), told(corpus_digest="e"), entry(model="gpt-neo-1.3b")]
    drawn = [picture for picture in figures.pictures([run(*entries)]) if picture.kind == "data"]
    assert [(one.entries[0].max_length, one.entries[0].corpus_digest) for one in drawn] == [
        (256, "d"),
        (512, "d"),
        (256, "e"),
    ]
    assert "105 examples, 42 of them in bars that reach beyond a row" in drawn[0].summary
    assert "105 examples, 2 of them" in drawn[1].summary


def test_bars_beyond_a_row_are_hollow_and_every_bar_leads_to_its_record():
    def bars(one: Entry) -> list[str]:
        (drawn,) = (picture for picture in figures.pictures([run(one)]) if picture.kind == "data")
        return [part.partition("</a>")[0] for part in drawn.svg.split('<a class="mark"')[1:]]

    assert ["fill: none" in bar for bar in bars(told())] == [False, False, True, True]
    assert ["fill: none" in bar for bar in bars(told(max_length=1024))] == [False] * 4


def test_the_table_says_what_the_picture_shows():
    (table,) = (one for one in tables.tables([run(told())]) if one.key == "data")
    assert table.rows == [["opt-350m", "messages d", "105", "3", "256", "1,024", "256", "42"]]
    document = page.html([run(told())])
    assert 'id="data-0"' in document and "What was trained on" in document


def test_a_record_without_lengths_or_with_others_has_no_picture():
    for one in (entry(), told(example_tokens={}), told(example_tokens={"many": 3})):
        assert not [picture for picture in figures.pictures([run(one)]) if picture.kind == "data"]
    assert len([p for p in figures.pictures([run(told(max_length=None))]) if p.kind == "data"]) == 1
