import pytest

from lightweight import targets
from lightweight.targets import CONTEXT_BYTES, T4, GiB, MiB


def test_budget_is_the_card_less_its_cuda_context():
    assert T4.total_bytes == 15_655_829_504
    assert T4.budget_bytes == 15_655_829_504 - 430 * MiB
    assert targets.NATIVE.budget_bytes is None


def test_a_card_is_emulated_unless_it_is_the_card():
    assert T4.emulated_on("NVIDIA H200")
    assert targets.named("a10").emulated_on("NVIDIA A100-SXM4-40GB"), "which is another card"
    assert not T4.emulated_on("Tesla T4")
    assert targets.named("16GiB").emulated_on("Tesla T4")
    assert not targets.NATIVE.emulated_on("NVIDIA H200")


def test_every_named_target_can_be_named():
    assert set(targets.TARGETS) == {"t4", "l4", "a10", "rtx4090", "a100-40", "h100", "native"}
    assert all(targets.named(name) is target for name, target in targets.TARGETS.items())


def test_an_amount_of_memory_is_a_target():
    assert targets.named("16GiB").total_bytes == 16 * GiB
    assert targets.named("7.5GiB").budget_bytes == int(7.5 * GiB) - CONTEXT_BYTES


@pytest.mark.parametrize("text", ["T4", "16GB", "0GiB", "0.1GiB", "-1GiB", "", "cpu"])
def test_unknown_target_is_told_with_what_exists(text):
    with pytest.raises(ValueError, match="target"):
        targets.named(text)


def test_bf16_begins_with_ampere():
    cards = [
        targets.Target(name="card", capability=capability) for capability in ((7, 0), (7, 5), (8, 0), (8, 9), (9, 0))
    ]
    assert [card.bf16 for card in cards] == [False, False, True, True, True]


def test_t4_has_no_bf16():
    assert [name for name, target in targets.TARGETS.items() if not target.bf16] == ["t4"]


def test_a_target_that_is_no_card_computes_as_the_device_does():
    volta = targets.Device(name="Tesla V100", capability=(7, 0))
    assert not targets.NATIVE.on(volta).bf16
    assert not targets.named("8GiB").on(volta).bf16
    assert targets.named("l4").on(volta) is targets.named("l4")
    assert targets.NATIVE.on(targets.Device(name="cpu")) is targets.NATIVE


@pytest.mark.parametrize(
    ("device_name", "of"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA A10", "NVIDIA A10"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB HBM3"),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_a_card_has_its_own_data_sheet_or_none(device_name, of):
    assert targets.rates(device_name) is (targets.RATES[of] if of else None)


def test_every_target_that_is_a_card_has_a_data_sheet():
    cards = [target.card for target in targets.TARGETS.values() if target.card is not None]
    assert len(cards) == 6 and all(map(targets.rates, cards))
