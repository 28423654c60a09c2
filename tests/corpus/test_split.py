import json
import random
from collections import Counter

import pytest

from lightweight import corpus
from lightweight.corpus import CorpusError, How, Text


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


@pytest.mark.parametrize("seed", range(5))
def test_what_says_the_same_is_on_one_side(tmp_path, seed):
    texts = [f"{(number * 7 + seed) % 20}" for number in range(60)]
    loaded = corpus.load(write(tmp_path / "a.jsonl", texts))
    assert not set(loaded.train) & set(loaded.heldout)
    assert Counter(loaded.train + loaded.heldout) == Counter(Text("", text) for text in texts)
    assert len(set(loaded.heldout)) == 3  # a sixth of the distinct ones
    assert loaded.origin is not None and loaded.origin.duplicates == 40


def test_without_duplicates_the_split_and_the_digest_are_the_originals(tmp_path):
    loaded = corpus.load(write(tmp_path / "a.jsonl", map(str, range(60))))
    drawn = random.Random(350).sample(range(60), 10)
    assert loaded.heldout == tuple(Text("", str(number)) for number in sorted(drawn))
    shared = corpus.load(write(tmp_path / "a.jsonl", map(str, range(60))), How(held_out=str(1 / 6)))
    assert shared.heldout == loaded.heldout and shared.digest != loaded.digest


def test_a_corpus_that_says_one_thing_alone_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="its 3 examples are all the same: add a different one"):
        corpus.load(write(tmp_path / "a.jsonl", ["a"] * 3))


@pytest.mark.parametrize(("share", "count"), [("0.1", 6), ("10%", 6), ("0.999", 59), ("0.0001", 1), ("5e-1", 30)])
def test_a_share_is_held_out_and_something_is_left_on_either_side(tmp_path, share, count):
    loaded = corpus.load(write(tmp_path / "a.jsonl", map(str, range(60))), How(held_out=share))
    assert len(loaded.heldout) == count and len(loaded.train) == 60 - count


@pytest.mark.parametrize("share", ["0", "1", "1.5", "-0.1", "nan", "100%", "inf"])
def test_a_share_of_nothing_or_all_is_refused(tmp_path, share):
    with pytest.raises(CorpusError, match=f"--held-out {share}: give a share between 0 and 1"):
        corpus.load(write(tmp_path / "a.jsonl", map(str, range(60))), How(held_out=share))


def test_a_held_out_file_without_a_name_is_told_of_the_option(tmp_path):
    with pytest.raises(CorpusError, match=r"^--held-out: is empty: give a share between 0 and 1"):
        corpus.load(write(tmp_path / "a.jsonl", map(str, range(60))), How(held_out=" "))


def test_a_file_is_held_out_and_nothing_of_it_is_trained_on(tmp_path):
    path = write(tmp_path / "a.jsonl", ["a", "b", "c", "b"])
    loaded = corpus.load(path, How(held_out=str(write(tmp_path / "h.jsonl", ["b", "d"]))))
    assert loaded.train == (Text("", "a"), Text("", "c")) and loaded.heldout == (Text("", "b"), Text("", "d"))
    assert "held out and so left out of training: 2" in str(loaded.origin)
    others = [corpus.load(path, How(held_out=str(write(tmp_path / "h.jsonl", texts)))) for texts in (["b"], ["d"])]
    assert len({one.digest for one in (loaded, *others)}) == 3
    with pytest.raises(CorpusError, match="each of its examples is also held out"):
        corpus.load(path, How(held_out=str(path)))
    with pytest.raises(CorpusError, match=r"nowhere\.jsonl: does not exist"):
        corpus.load(path, How(held_out=str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(CorpusError, match=r"h.jsonl: has nothing to hold out"):
        corpus.load(path, How(held_out=str(write(tmp_path / "h.jsonl", []))))


def test_one_example_suffices_where_a_file_is_held_out(tmp_path):
    loaded = corpus.load(write(tmp_path / "a.jsonl", ["a"]), How(held_out=str(write(tmp_path / "h.jsonl", ["b"]))))
    assert (len(loaded.train), len(loaded.heldout)) == (1, 1)
