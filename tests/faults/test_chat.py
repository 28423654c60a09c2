"""What `lightweight train` wrote can be talked to; where it was damaged, that is one line or an answer."""

import json
import random
import resource
import shutil

import pytest

from faults import mutants
from faults.harness import outcome_of, steers
from lightweight.__main__ import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return {}


@pytest.fixture
def model(given, trained, tmp_path, tmp_path_factory, request):
    """A copy of what a job has left: of every weight, or of an adapter."""
    method = request.param
    if method not in trained:
        trained[method] = tmp_path_factory.mktemp("trained") / "model"
        assert main(given(trained[method], method=method)) == 0
    return trained[method]


@pytest.mark.parametrize("model", ["constant:CAPTURED"], indirect=True)
def test_a_rank_that_no_memory_has_room_for_is_one_line(model, tmp_path, capfd):
    folder = shutil.copytree(model, tmp_path / "copy")
    settings = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"r": 10**13}), "utf-8")
    found = outcome_of(["chat", str(folder), "--prompt", "how are you?"], capfd)
    assert found.is_a_line and "(rank 10000000000000, where no tensor has over" in found.err, found


def test_base_weights_that_have_no_room_are_a_line_about_the_disk_and_not_about_the_model(given, tmp_path, capfd):
    assert main(given(tmp_path / "a", "--weights", "random", method="constant:CAPTURED")) == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, before[1]))
    try:
        found = outcome_of(["chat", str(tmp_path / "a"), "--prompt", "how are you?"], capfd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.is_a_line and "its base weights cannot be written: a file in the scratch folder" in found.err, found
    assert "by the limit of ulimit -f: raise it" in found.err


@pytest.mark.parametrize("model", ["constant:STOCK", "constant:CAPTURED"], indirect=True)
def test_a_damaged_model_is_one_line_or_answers(model, tmp_path, seeds, tried, capfd):
    def talk(folder):
        return outcome_of(["chat", str(folder), "--prompt", "how are you?", "--max-tokens", "2"], capfd)

    right, lost = talk(model), []
    assert (right.status, right.err.strip()) == (0, "")
    for seed in seeds(40_000, 150):
        folder = shutil.copytree(model, tmp_path / "copy")
        done = mutants.folder_of_a_model(folder, random.Random(seed))
        found = talk(folder)
        survived = found.is_a_line or (found.status == 0 and not found.err.strip() and not steers(found.out))
        tried("damaged models, talked to", survived=survived)
        if not survived:
            lost.append((seed, done, found))
        shutil.rmtree(folder)
    assert not lost, "\n".join(map(str, lost))
