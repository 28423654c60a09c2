"""What is private in peft: read in 0.19 and 0.21.

Imported where it is asked for: `lightweight.preload` decides how peft is imported, and has done so before.
"""

from __future__ import annotations

from typing import Any


def chosen_layers(adapter: Any, network: Any) -> set[str]:
    """The places of the layers in `network` that `adapter`, a config, is put on; "all-linear" is made into their names
    first, in `adapter`. peft has this answer only once it has put the adapter on. peft/tuners/tuners_utils.py."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    adapter = _maybe_include_all_linear_layers(adapter, network)
    return {place for place, _ in network.named_modules() if check_target_module_exists(adapter, place)}
