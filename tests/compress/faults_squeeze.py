"""What `test_squeeze.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "take a saved attention for a linear layer",
        "formats/peft/modules.py",
        'kind = "attention" if attention else kind',
        "kind = kind",
        "::test_a_saved_attention_is_one_module_of_two_parts",
    ),
    Fault(
        "let the parts of a saved attention have ranks of their own",
        "formats/peft/modules.py",
        "tie=owner if attention else None",
        "tie=None",
        "::test_a_saved_attention_is_one_module_of_two_parts",
    ),
    Fault(
        "name one adapter of several in a folder",
        "formats/peft/files.py",
        "holds {', '.join(inside)}; name one",
        "holds {inside[0]}; name one",
        "::test_a_folder_of_adapters_asks_which",
    ),
    Fault(
        "hand the spectra of modules factorised at once out in another order",
        "linalg/parallel.py",
        "zip(group, future.result(), strict=True)}",
        "zip(group, future.result()[::-1], strict=True)}",
        "::test_modules_of_one_shape_are_factorised_at_once_to_the_same_end",
    ),
]
