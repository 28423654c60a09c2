"""Which parts does the captured step have that the Trainer's has not, and in which order are they switched off?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Loss = Literal["chunked", "logits", "model"]
"""How the captured step computes its loss: from the body's output, chunk by chunk; from the whole logits; or by the
model itself, which knows its own labels, caps and further losses."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What of the captured step is not the model's own. Packing needs the captured attention's mask."""

    packing: bool
    attention: bool
    loss: Loss
    lean: bool

    @property
    def needs_trainers_passes(self) -> bool:
        """Whether a step must have the Trainer's own passes, since the model computes its loss over one of them."""
        return self.loss == "model" and not self.packing

    def given_up(self, rest: Parts) -> list[str]:
        """The parts of this that `rest` does not have; packing that goes because attention does is no part of its
        own."""
        names = ["attention" if self.attention > rest.attention else "packing" if self.packing > rest.packing else None]
        names += ["loss" if self.loss != rest.loss else None, "lean" if self.lean > rest.lean else None]
        return [name for name in names if name is not None]

    def fewer(self, losses: Sequence[Loss]) -> list[Parts]:
        """This, and what is left of it where parts are given up, fewest first. `losses` are to be tried in this order,
        its own first."""
        rows = [(self.packing, self.attention), (False, self.attention), (False, False)]
        candidates = [
            replace(self, packing=packing, attention=attention, loss=loss, lean=lean)
            for loss in losses
            for lean in dict.fromkeys((self.lean, False))
            for packing, attention in dict.fromkeys(rows)
        ]
        return sorted(candidates, key=lambda rest: len(self.given_up(rest)))


class PartError(NotImplementedError):
    """A part that this network cannot have. The message says why, in words that a note can take."""
