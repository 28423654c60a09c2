"""What does a trial run on? A card's usable bytes, its number formats and its rates. To add a card: a `Target` and its
`RATES`, here.

A smaller card is emulated on a larger one by a cap on the process's CUDA allocator. So the OutOfMemoryError of a trial
comes from a real allocation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lightweight import names

MiB = 2**20
GiB = 2**30


def size(count: float) -> str:
    """Bytes as text: GiB from one on, else MiB."""
    return f"{count / GiB:.2f} GiB" if count >= GiB else f"{count / MiB:.0f} MiB"


Capability = tuple[int, int]
"""CUDA's compute capability, major and minor: which kernels a card can run."""

AMPERE: Capability = (8, 0)
HOPPER: Capability = (9, 0)


def has_bf16(capability: Capability) -> bool:
    """Whether a card has bfloat16 arithmetic: from Ampere on. torch also says yes for older cards, which emulate it."""
    return capability >= AMPERE


def is_card(card: str, device_name: str) -> bool:
    """Whether `device_name` is CUDA's name for `card`: the whole name or its last words. An A100 is not an A10, a part
    of an A100 is not an A100, and a laptop's card is not the desktop's of that name."""
    return device_name == card or device_name.endswith(f" {card}")


CONTEXT_BYTES = 430 * MiB
"""What the CUDA context takes off a card before torch allocates a byte: 290 to 430 MiB, the upper end taken. It grows
with the card's multiprocessors and the kernels that are loaded; on an H200, with 3.3 times a T4's, 630 to 740 MiB were
seen."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A card, or a card's worth of memory.

    Attributes:
        name: What it is called on a command line.
        capability: CUDA's compute capability. It decides which kernels a forecast assumes, and whether there is
            bfloat16 arithmetic. An amount of memory has a Hopper's until it is `on` a device.
        total_bytes: What torch reports as `total_memory`. None is all of the device at hand, uncapped.
        card: How CUDA's name of the device ends. On a device of that name, the target needs no cap.
    """

    name: str
    capability: Capability
    total_bytes: int | None = None
    card: str | None = None

    @property
    def bf16(self) -> bool:
        """Whether the hardware has bfloat16 arithmetic."""
        return has_bf16(self.capability)

    @property
    def budget_bytes(self) -> int | None:
        """Bytes the allocator may reserve: the card's memory less its CUDA context; `None` where there is no cap."""
        return None if self.total_bytes is None else self.total_bytes - CONTEXT_BYTES

    def on(self, device: Device) -> Target:
        """This target as `device` stands for it: one that is no card has that device's capability."""
        if self.card is not None or device.capability is None:
            return self
        return replace(self, capability=device.capability)

    def emulated_on(self, device_name: str) -> bool:
        """Whether a device called `device_name` must be capped to stand for this target."""
        return self.total_bytes is not None and (self.card is None or not is_card(self.card, device_name))


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The highest rates of a card, by its data sheet.

    Attributes:
        flop_per_second: Dense multiplications and additions per second by number format, on matrix units if they
            support it, summed in fp32.
        bytes_per_second: Bytes per second to and from the card's memory.
        host_bytes_per_second: Bytes per second between the card's and the host's memory, each way, by 16 lanes of PCIe.
    """

    flop_per_second: Mapping[str, float]
    bytes_per_second: float
    host_bytes_per_second: float

    def of(self, dtype: str) -> float:
        """The rate of a number format; that of fp32 if the card has no units for it."""
        return self.flop_per_second.get(dtype, self.flop_per_second["float32"])


PCIE_GIGA_BYTES = {3: 15.75, 4: 31.5, 5: 63.0}
"""A second each way, by generation."""


def _rates(tera: Mapping[str, float], giga_bytes: float, pcie: int) -> Rates:
    return Rates(
        flop_per_second={name: rate * 1e12 for name, rate in tera.items()},
        bytes_per_second=giga_bytes * 1e9,
        host_bytes_per_second=PCIE_GIGA_BYTES[pcie] * 1e9,
    )


HOPPER_TERA = {"bfloat16": 989.4, "float16": 989.4, "float32": 66.9}
RATES = {
    "Tesla T4": _rates({"float16": 65, "float32": 8.1}, 320, pcie=3),
    "NVIDIA L4": _rates({"bfloat16": 121, "float16": 121, "float32": 30.3}, 300, pcie=4),
    "NVIDIA A10": _rates({"bfloat16": 125, "float16": 125, "float32": 31.2}, 600, pcie=4),
    "RTX 4090": _rates({"bfloat16": 165.2, "float16": 165.2, "float32": 82.6}, 1008, pcie=4),
    "A100-SXM4-40GB": _rates({"bfloat16": 312, "float16": 312, "float32": 19.5}, 1555, pcie=4),
    "A100-SXM4-80GB": _rates({"bfloat16": 312, "float16": 312, "float32": 19.5}, 2039, pcie=4),
    "H100 80GB HBM3": _rates(HOPPER_TERA, 3350, pcie=5),
    "H200": _rates(HOPPER_TERA, 4800, pcie=5),
}
"""By the last words of CUDA's name of the card: NVIDIA's data sheets, and for GeForce the Ada whitepaper's."""


def rates(device_name: str) -> Rates | None:
    """The highest rates of the card of that name; None if its data sheet is not here."""
    return next((rates for name, rates in RATES.items() if is_card(name, device_name)), None)


@dataclass(frozen=True, kw_only=True)
class Device:
    """The device at hand: its name, and for a GPU its memory as torch reports it and its compute capability."""

    name: str
    total_bytes: int | None = None
    capability: Capability | None = None
    driver: str | None = None


NATIVE = Target(name="native", capability=HOPPER)
"""The card as it is, uncapped."""
CPU = Target(name="cpu", capability=HOPPER)
"""No card: host memory, uncapped."""

# Total memory as torch reported it on real cards: `total_memory`, or 'a total capacity of' in its OutOfMemoryError.
# Driver and ECC settings move it by about one per cent; where reports differ this is one of the lower ones.
T4 = Target(name="t4", card="Tesla T4", capability=(7, 5), total_bytes=15_655_829_504)  # Colab
L4 = Target(name="l4", card="NVIDIA L4", capability=(8, 9), total_bytes=int(22.03 * GiB))
A10 = Target(name="a10", card="NVIDIA A10", capability=(8, 6), total_bytes=22_587 * MiB)  # an A10G on AWS
RTX_4090 = Target(name="rtx4090", card="RTX 4090", capability=(8, 9), total_bytes=25_250_627_584)
A100_40 = Target(name="a100-40", card="A100-SXM4-40GB", capability=(8, 0), total_bytes=int(39.39 * GiB))
H100 = Target(name="h100", card="H100 80GB HBM3", capability=HOPPER, total_bytes=81_082 * MiB)

TARGETS = {target.name: target for target in (T4, L4, A10, RTX_4090, A100_40, H100, NATIVE)}
"""What `--target` knows by name, beside amounts such as `16GiB`."""


def named(text: str) -> Target:
    """The target called `text`: a card's name, `native`, or an amount such as `16GiB`.

    Raises ValueError with the names that exist.
    """
    if text in TARGETS:
        return TARGETS[text]
    if amount := re.fullmatch(r"(\d+(?:\.\d+)?)GiB", text, re.ASCII):
        total_bytes = int(float(amount[1]) * GiB)
        if total_bytes <= CONTEXT_BYTES:
            raise ValueError(f"target {text!r} is smaller than a CUDA context ({CONTEXT_BYTES // MiB} MiB)")
        return Target(name=text, capability=HOPPER, total_bytes=total_bytes)
    amount = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:G|GB|GiB)?", text, re.ASCII | re.IGNORECASE)
    if amount and not names.nearest(text, TARGETS):
        raise ValueError(f"target {text!r}: an amount of memory is written {amount[1]}GiB")
    raise ValueError(names.unknown("target", text, TARGETS, "give an amount such as 16GiB"))
