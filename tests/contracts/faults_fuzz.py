"""What `test_fuzz.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "bad files: take NaN in factors",
        "formats/io/tensors.py",
        "return all(map(math.isfinite, torch.aminmax(t)))",
        "return True",
        "::test_residuals_that_lie_about_shapes",
    ),
    Fault(
        "bad files: tensors larger than their file",
        "formats/io/tensors.py",
        "if sum(t.nbytes for t in tensors.values()) > 4 * path.stat().st_size:",
        "if False:",
        "::test_torch_files",
    ),
    Fault(
        "bad files: let a pickle import what it likes",
        "formats/io/tensors.py",
        "if foreign := _foreign(path, archive):",
        "if False and (foreign := _foreign(path, archive)):",
        "::test_torch_files",
    ),
    Fault(
        "bad files: expressions may take for ever",
        "plans/peft_patterns.py",
        "expression.fullmatch(name, timeout=_SECONDS)",
        "expression.fullmatch(name[:24])",
        "::test_an_expression_that_backtracks_for_ever",
    ),
    Fault(
        "bad files: aliases of aliases",
        "config/yaml.py",
        "if size > _LARGEST:",
        "if False:",
        "::test_yaml",
    ),
    Fault(
        "bad files: ranks far above what shapes can hold",
        "formats/base.py",
        "if slot.rank > max(WIDE, slot.in_features + slot.out_features):",
        "if False:",
        "::test_tensors",
    ),
    Fault(
        "bad files: multiply matrices of several precisions",
        "formats/as_lora/randlora.py",
        "columns.flatten(1).to(dtype) @ rows.flatten(0, 1).to(dtype)",
        "columns.flatten(1) @ rows.flatten(0, 1)",
        "::test_randlora_of_several_precisions",
    ),
    Fault(
        "bad files: sum inputs into more rows than the shape can hold",
        "formats/as_lora/miss.py",
        "if r < min(out, inside):",
        "if r <= inside:",
        "::test_miss_and_vera_of_ranks_that_would_fill_the_memory",
    ),
    Fault(
        "bad files: draw matrices of whatever rank a file asks for",
        "formats/as_lora/vera.py",
        "if rank > max(WIDE, *map(min, shapes.values())):",
        "if False:",
        "::test_miss_and_vera_of_ranks_that_would_fill_the_memory",
    ),
    Fault(
        "bad files: a base model of no inputs",
        "formats/as_lora/vera.py",
        "weight.ndim != 2 or not weight.numel():",
        "weight.ndim != 2:",
        "::test_a_base_model_of_no_inputs_and_one_too_large_to_count_in",
    ),
    Fault(
        "bad files: look for intruders among infinities",
        "analysis/base_comparison.py",
        "return not max(sizes[0], sizes[1] * sizes[2], *sizes) <",
        "return not min(sizes[0], sizes[1] * sizes[2], *sizes) <",
        "::test_a_base_model_of_no_inputs_and_one_too_large_to_count_in",
    ),
    Fault(
        "bad files: hold all factors that are made",
        "formats/peft/modules.py",
        '*(tensors[key].to("meta") for key in keys)',
        "*(tensors[key] for key in keys)",
        "::test_factors_that_are_made_are_not_held_all_at_once",
    ),
    Fault(
        "bad files: believe a residual about shapes",
        "compress/residual.py",
        "if len(pairs) < len(files) or fitting[0] != fitting[1] or sum(ranks) != entry.slot.rank:",
        "if len(pairs) < len(files):",
        "::test_residuals_that_lie_about_shapes",
    ),
]
