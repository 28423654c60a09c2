"""The parts that may be given up, and in which order."""

import dataclasses

from lightweight.captured.parts import Parts


def test_parts_are_given_up_one_by_one_before_two_by_two():
    full = Parts(packing=True, attention=True, loss="chunked", lean=True)
    candidates = full.fewer(["chunked", "logits", "model"])
    lost = [len(full.given_up(rest)) for rest in candidates]
    assert candidates[0] == full and lost == sorted(lost)
    assert len(set(candidates)) == len(candidates) == 18
    assert all(rest.attention or not rest.packing for rest in candidates)
    assert full.given_up(dataclasses.replace(full, packing=False, attention=False)) == ["attention"]
    plain = Parts(packing=False, attention=False, loss="model", lean=False)
    assert plain.fewer(["model"]) == [plain]
