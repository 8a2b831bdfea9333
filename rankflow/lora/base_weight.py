"""The frozen weight beside an adapter, as plain numbers."""

from __future__ import annotations

from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

from rankflow.errors import AdapterError
from rankflow.lora.site import Site

_BITSANDBYTES = ("Params4bit", "Int8Params")


def check_base_weight(site: Site) -> None:
    """Raise AdapterError if the values of the base weight cannot be read."""
    base = site.layer.get_base_layer()
    weight = getattr(base, "weight", None)
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.device.type != "meta"
    if plain or type(weight).__name__ in _BITSANDBYTES or hasattr(base, "W_q"):
        return
    raise AdapterError(
        f"{site.name}: the values of its base weight ({type(base).__name__}) cannot be read: it is offloaded, or "
        "quantised in a way that PEFT cannot undo; load the base model otherwise, or use a policy that does not ask "
        "for signal 'weight_score', such as eva or increlora"
    )


def base_weight(site: Site) -> Tensor:
    """Return W0 in the layout of DeltaW, ``[out, in]``: a view, or what PEFT makes of a quantised weight.

    Modules may share it; each has its own DeltaW on top of it, and so its own gradient.

    Raises:
        AdapterError: its values cannot be had.
    """
    check_base_weight(site)
    base = site.layer.get_base_layer()
    if getattr(getattr(getattr(base, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
        base.state_dict()  # a forward in eval mode packs 4-bit weights, on some CPUs; only saving unpacks them
    weight = dequantize_module_weight(base).detach()
    turned = site.kind == "embedding" or getattr(site.layer, "fan_in_fan_out", False)
    return weight.T if turned else weight.flatten(1)
