from samples import LADDER, entry, paired, run

from lightweight.report import tables, words, write


def test_marks_are_explained_only_where_they_occur():
    plain = tables.results([entry(emulated=False)]).text("terminal")
    assert "[" not in plain
    marked = tables.results([entry(weights="random", peak_allocated_bytes=None)]).text("terminal")
    for mark in (words.EMULATED, words.RANDOM, words.HOST):
        assert marked.count(mark) == 2  # in the row and in the note
    assert "Measured on NVIDIA H200; torch 2.11.0, transformers 5.17.0, peft 0.21.0, bitsandbytes 0.50.2." in marked


def test_the_card_that_was_timed_stands_wherever_a_time_does():
    pairs = {"speedup": paired(1.7, 1.6, 1.8)}
    cells_ = [entry(), entry(method="lora", **pairs), entry(target="native", emulated=False), *LADDER]
    for table in tables.tables([run(*cells_)]):
        if table.key in ("results", "loss", "speedup", "others"):
            assert "card" in table.columns
            assert {row[table.columns.index("card")] for row in table.rows} <= {"NVIDIA H200 as t4 [e]", "NVIDIA H200"}
        elif table.key.startswith("ladder"):
            assert "on NVIDIA H200 as t4" in table.title
    assert words.timed_on(entry(emulated=False, device="Tesla T4")) == "Tesla T4"
    assert words.timed_on(entry(world_size=2)) == "2 x NVIDIA H200 as t4"


def test_an_interval_without_an_upper_end_is_told():
    assert words.speedup(entry(method="lora", speedup=paired(1.7, 0.0, None)), entry()) == "1.70x [0.00, inf]"


def test_a_tree_that_was_not_clean_is_told():
    clean, dirty = (run(entry(), commit="abcdef123456", is_dirty=is_dirty) for is_dirty in (False, True))
    line = "Measured with uncommitted changes to the code: run.json (after commit abcdef1)."
    assert line in write.text([dirty], "terminal") and line not in write.text([clean], "terminal")


def test_what_trained_on_other_rows_or_on_another_loss_is_told():
    own = {"compute_loss": {"import_path": "mine:focal", "source_sha256": "0" * 64}}
    told = words.notes(
        [entry(), entry(method="focal", own_code=own, data_note="it ended after 3 of 6 optimizer steps")]
    )
    assert "Not trained like the others: opt-350m x focal: it ended after 3 of 6 optimizer steps." in told
    assert "Training losses on a scale of their own, unlike held-out ones: focal." in told
    smoothed = words.notes([entry(method="smoothed", training_arguments={"label_smoothing_factor": 0.1})])
    assert "Training losses on a scale of their own, unlike held-out ones: smoothed." in smoothed
    plain = words.notes([entry(own_code={"optimizer": {"import_path": "mine:muon"}})])
    assert not any("scale" in line or "Not trained" in line for line in plain)


def test_methods_of_one_name_are_told_apart_by_their_rates_where_these_differ():
    swept = [
        entry(method="lora", method_digest=digest, learning_rates=(rate,)) for digest, rate in (("a", 1.0), ("b", 2.0))
    ]
    assert [words.method_among(each, swept) for each in swept] == ["lora (rate 1)", "lora (rate 2)"]
    assert words.method_among(swept[0], swept[:1]) == "lora"
