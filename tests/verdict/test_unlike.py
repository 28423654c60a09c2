from lightweight.verdict import unlike


def test_every_condition_that_differs_is_said_with_both_values():
    assert unlike.said({"seed": (0, 1), "target": ("t4", "l4")}) == (
        "seed is 0 there and 1 here, target is t4 there and l4 here"
    )
    assert unlike.said({"corpus_digest": ("a" * 64, "b")}) == "corpus_digest is aaaaaaaaaaaa... there and b here"


def test_the_placement_that_one_gpu_does_not_have_is_not_said():
    ranks = {"world_size": (1, 2), "placement": (None, "sharded")}
    assert unlike.said(ranks) == "world_size is 1 there and 2 here"
    assert unlike.said({"placement": ("sharded", "replicated")}) == "placement is sharded there and replicated here"


def test_of_an_authors_code_what_differs_is_said():
    one = {"import_path": "mine:loss", "source_sha256": "a" * 64}
    other = {"import_path": "mine:loss", "source_sha256": "b" * 64}
    assert unlike.said({"compute_loss": (one, other)}) == (
        "digest of the code of compute_loss is aaaaaaaaaaaa... there and bbbbbbbbbbbb... here"
    )
    assert unlike.said({"compute_loss": (one, {**one, "import_path": "mine:focal"})}) == (
        "import path of compute_loss is mine:loss there and mine:focal here"
    )
    assert unlike.said({"optimizer": ([one, {"lr": 0.02}], [one, {"lr": 0.01}])}) == (
        "lr of optimizer 2 is 0.02 there and 0.01 here"
    )
    assert unlike.said({"compute_loss": (None, other)}) == "compute_loss is None there and mine:loss here"
