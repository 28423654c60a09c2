"""What does a card really do at each size? Seconds of kernels, measured once, and from them those of any other.

Between the measured sizes it is not seconds that are interpolated but the share of the card's limits that is reached:
arithmetic and bytes are known exactly, and how well a kernel uses the card changes slowly with its sizes. The same
shares make a forecast of a card that was not measured, from its data sheet.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightweight import schema, targets
from lightweight.forecast.work import COPIES, Kernel, Kernels
from lightweight.schema import AtLeast1, Count, Name, Positive
from lightweight.targets import Rates

SCHEMA = 1
"""Of the record; readers refuse larger numbers."""

STORED = Path(__file__).parent / "calibrations"
"""Records that come with the package."""

LEAST_SECONDS = 2e-6
"""What a kernel takes at the least, in a graph, whatever it does."""

REACH = 4
"""Over how many doublings of a size samples say something of each other."""

OWN = 0.005
"""What a sample differs by from those around it for reasons of its own, such as tiles that fit its sizes: its variance,
beside the variance of all. With these two, samples that are left out are predicted best (docs/lab.md)."""

INSTEAD = {
    "concatenation": "strided",
    "strided": "elementwise",
    "reduction of rows": "elementwise",
    "reduction of columns": "reduction of rows",
    "row by row": "elementwise",
    "dequantization": "elementwise",
    "our attention, causal": "cudnn attention, causal",
    "our attention backward of queries, causal": "cudnn attention backward, causal",
    "our attention backward of keys, causal": "cudnn attention backward, causal",
    "unpack": "dequantization",
}
"""What kind of kernel stands in for one that was not measured."""


class CalibrationError(ValueError):
    """A record of a calibration that cannot be used, or none where one is needed. One line, with the mend."""


@dataclass(frozen=True, kw_only=True)
class TimedKernel:
    """Kernels of one `kind`, number format and shape, as in `forecast.work.Kernel`, and the seconds of one of them
    among others of its kind in a CUDA graph."""

    kind: Name
    dtype: str
    shape: tuple[Count, ...]
    flop: Count
    bytes: AtLeast1
    seconds: Positive

    @property
    def kernel(self) -> Kernel:
        """What was measured."""
        return Kernel(self.kind, self.dtype, self.shape, self.flop, self.bytes)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was measured on a card.

    `device` is CUDA's name of it, `driver` NVIDIA's version, `torch` torch's. `operator_seconds` are what the host took
    from one operator of a stock step to the next, for each kind of step that was timed. `samples` are kernels.
    """

    schema: AtLeast1 = SCHEMA
    device: Name
    driver: str | None
    torch: str
    date: str
    host: str
    operator_seconds: Mapping[str, Positive]
    samples: tuple[TimedKernel, ...] = field(repr=False)

    @property
    def rates(self) -> Rates:
        """The card's limits. Raises CalibrationError for a card whose data sheet is not known."""
        found = targets.rates(self.device)
        if found is None:
            raise CalibrationError(f"{self.device}: its data sheet is not in lightweight/targets.py: add it to RATES")
        return found

    def seconds(self, kernels: Kernels, rates: Rates | None = None) -> float:
        """What kernels take one after the other in a CUDA graph: on this card, or on one of other `rates`. Copies to
        the host and back take no time of theirs."""
        own = ((kernel, count) for kernel, count in kernels.items() if kernel.kind not in COPIES)
        return math.fsum(count * self.kernel_seconds(kernel, rates) for kernel, count in own)

    def kernel_seconds(self, kernel: Kernel, rates: Rates | None = None) -> float:
        """What one kernel takes, and the gap until the next."""
        samples = self._samples_like(kernel)
        if len(kernel.shape) != samples.sizes:  # a pass stands in for what has other sizes
            kernel = kernel._replace(shape=(kernel.bytes,))
        return limit(kernel, rates or self.rates) * samples.excess(kernel.shape, kernel.dtype)

    def _samples_like(self, kernel: Kernel) -> _Samples:
        kind = kernel.kind
        plain = kind.removesuffix(", added").removesuffix(", masked").removesuffix(", causal")
        for name in (kind, INSTEAD.get(kind, kind), plain, kind.partition(" with ")[0], "elementwise"):
            of_kind = self._by_kind.get(name)
            if of_kind:
                return of_kind.get(_family(kernel.dtype)) or next(iter(of_kind.values()))
        raise CalibrationError(f"the calibration of {self.device} has no passes over memory: run lightweight calibrate")

    @cached_property
    def _by_kind(self) -> Mapping[str, Mapping[str, _Samples]]:
        grouped: dict[str, dict[str, list[TimedKernel]]] = defaultdict(lambda: defaultdict(list))
        for sample in self.samples:
            grouped[sample.kind][_family(sample.dtype)].append(sample)
        return {
            kind: {family: _Samples(samples, self.rates) for family, samples in of_kind.items()}
            for kind, of_kind in grouped.items()
        }


def limit(kernel: Kernel, rates: Rates) -> float:
    """The seconds that a card needs at the least: for the arithmetic, for the bytes, or to run a kernel at all."""
    arithmetic = kernel.flop / rates.of(kernel.dtype) if kernel.flop else 0.0
    return max(arithmetic, kernel.bytes / rates.bytes_per_second, LEAST_SECONDS)


def _family(dtype: str) -> str:
    """Number formats that run on the same units: what is known of one says something of the other."""
    return "half" if dtype in ("bfloat16", "float16") else dtype


class _Samples:
    """Samples of one kind, and by how much more than its limit a kernel of another shape takes: by ordinary kriging,
    also called Gaussian process regression, with a Matern covariance of 3/2, over logarithms to the base 2."""

    def __init__(self, samples: Sequence[TimedKernel], rates: Rates) -> None:
        self.sizes = len(samples[0].shape)
        self._places = np.concatenate(
            [_place(sample.shape, sample.dtype) for sample in samples]
        )  # [samples, sizes + 1]
        self._excesses = np.array([math.log(sample.seconds / limit(sample.kernel, rates)) for sample in samples])
        covariance = _covariance(self._places, self._places) + OWN * np.eye(len(samples))
        ones = np.ones(len(samples))
        of_excesses, of_ones = np.linalg.solve(covariance, np.stack([self._excesses, ones], 1)).T
        self._mean = float(of_excesses.sum() / of_ones.sum())
        self._shares = of_excesses - self._mean * of_ones

    def excess(self, shape: tuple[int, ...], dtype: str) -> float:
        """How many times its limit a kernel of this shape takes: its own where it was measured; beyond the samples, as
        at their border."""
        place = _place(shape, dtype)
        same = np.abs(self._places - place).max(1) < 1e-9
        if same.any():
            return math.exp(float(self._excesses[same].mean()))
        within = np.clip(place, self._places.min(0), self._places.max(0))
        return math.exp(self._mean + float(_covariance(within, self._places)[0] @ self._shares))


def _place(shape: tuple[int, ...], dtype: str) -> NDArray[np.float64]:
    """Where a kernel lies among others of its kind: float16 as far from bfloat16 as twice of a size from the size."""
    place: NDArray[np.float64] = np.log2(
        np.maximum(1, np.array([[*shape, 2 if dtype == "float16" else 1]], np.float64))
    )
    return place


def _covariance(these: NDArray[np.float64], those: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of what excesses differ by from their mean, relative to their variance: [these, those]."""
    distances = np.sqrt(((these[:, None] - those) ** 2).sum(-1)) * math.sqrt(3) / REACH
    covariance: NDArray[np.float64] = (1 + distances) * np.exp(-distances)
    return covariance


# Records


def load(path: Path) -> Calibration:
    """The calibration stored at `path`. Raises CalibrationError."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CalibrationError(f"calibration {path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"calibration {path}: is not JSON ({error}): run lightweight calibrate again") from error
    required = tuple(each.name for each in fields(Calibration))
    fault = schema.fault(content, Calibration, required)
    if fault is None and content["schema"] > SCHEMA:
        raise CalibrationError(
            f"calibration {path}: has schema {content['schema']}, and this version of lightweight reads up to "
            f"{SCHEMA}: update it"
        )
    for index, sample in enumerate(content["samples"] if fault is None else ()):
        if wrong := schema.fault(sample, TimedKernel, tuple(each.name for each in fields(TimedKernel))):
            fault = f"has sample {index}, which {wrong}"
            break
    if fault is None:
        fault = _fault_between(content)
    if fault is None and targets.rates(content["device"]) is None:
        raise CalibrationError(f"calibration {path}: {content['device']} is a card whose data sheet is not known")
    if fault is not None:
        raise CalibrationError(f"calibration {path}: {fault}: run lightweight calibrate again")
    samples = tuple(TimedKernel(**sample | {"shape": tuple(sample["shape"])}) for sample in content["samples"])
    known = {name: content[name] for name in required}
    return Calibration(**known | {"samples": samples})


def _fault_between(content: Mapping[str, Any]) -> str | None:
    """What is wrong between the samples of a calibration, each of which is of its kind, None where nothing is."""
    if not content["samples"]:
        return "has no samples"
    if not content["operator_seconds"]:
        return "has no pace of the host in 'operator_seconds'"
    sizes: dict[tuple[str, str], int] = {}
    for index, sample in enumerate(content["samples"]):
        if sizes.setdefault((sample["kind"], sample["dtype"]), len(sample["shape"])) != len(sample["shape"]):
            return f"has sample {index}, which has another number of sizes than others of its kind"
    return None


def written(calibration: Calibration) -> str:
    """The JSON of a calibration, a sample a line."""
    head = json.dumps(asdict(replace(calibration, samples=())), indent=1).removesuffix("[]\n}")
    samples = ",\n  ".join(json.dumps(asdict(sample)) for sample in calibration.samples)
    return f"{head}[\n  {samples}\n ]\n}}\n"


def stored() -> list[Calibration]:
    """Those that come with the package."""
    return [load(path) for path in sorted(STORED.glob("*.json"))]


def of_card(name: str, known: Sequence[Calibration]) -> tuple[Calibration, bool] | None:
    """The calibration to forecast a card with, `name` being what CUDA calls it or the last words of that, and whether
    it is of such a card; None where there is none at all. The first one stands in for cards that were not measured."""
    of_it = next((one for one in known if targets.is_card(name, one.device)), None)
    if of_it is not None:
        return of_it, True
    return (known[0], False) if known else None
