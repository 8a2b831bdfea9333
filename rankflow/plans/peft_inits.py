"""What each way in which PEFT starts an adapter (`init_lora_weights`) means for changing its rank."""

from __future__ import annotations

from typing import Any

from rankflow.errors import AdapterError

# What the factors start with is taken out of the base weights, when an adapter is made and whenever it is loaded
# (peft/tuners/lora/layer.py, update_layer). Known by how they begin, `pissa_niter_16`, and some of them in any case.
_CHANGING_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def changes_base(init: Any) -> bool:
    """Whether PEFT changes the base weights when it starts or loads an adapter of this `init_lora_weights`."""
    return isinstance(init, str) and init.lower().startswith(_CHANGING_BASE)


def refuse_init(init: Any, where: object) -> None:
    """
    Raises:
        AdapterError: an adapter of this `init_lora_weights` is tied to the rank that it was started with.
    """
    if changes_base(init):
        plain = "make plain LoRA of it, with save_pretrained(..., path_initial_model_for_weight_conversion=...), or "
        raise AdapterError(
            f"{where}: init_lora_weights is {init!r}, with which PEFT changes the base weights by an amount that "
            "depends on the rank; at other ranks the adapter would be loaded onto another base. To change them, "
            f"{'' if init.lower().startswith('loftq') else plain}start one with init_lora_weights=True"
        )
    if isinstance(init, str) and init.lower().startswith("mica"):
        raise AdapterError(
            f"{where}: init_lora_weights is {init!r} (MiCA), which keeps B at singular vectors of the base weights and "
            "trains A alone; start one with init_lora_weights=True to change ranks"
        )


def loadable_init(init: Any) -> Any:
    """Return the `init_lora_weights` to write beside other ranks. PEFT refuses to load odd ranks that start as
    `orthogonal`, and all weights come from the file anyway."""
    return True if init == "orthogonal" else init
