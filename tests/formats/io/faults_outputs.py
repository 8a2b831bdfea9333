"""What `test_outputs.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "outputs: know a file by its name alone",
        "formats/io/outputs.py",
        "    if not target.exists():\n        return None\n",
        "    return None\n",
        "::test_the_hubs_cache_is_an_input_as_a_whole",
    ),
    Fault(
        "outputs: replace what is there unasked",
        "formats/io/outputs.py",
        "if os.path.lexists(target) and not force:",
        "if False:",
        "::test_nothing_that_is_there_is_replaced_without_force",
    ),
    Fault(
        "outputs: let a new file become part of an input",
        "formats/io/outputs.py",
        "            if _becomes_part(target, source):",
        "            if False:",
        "::test_a_new_file_does_not_become_part_of_an_input",
    ),
    Fault(
        "outputs: forget the base on the hub",
        "formats/io/outputs.py",
        "        path = _cached(str(given))",
        "        return",
        "::test_a_base_by_its_name_on_the_hub_is_an_input_too",
    ),
    Fault(
        "outputs: let two go to one place",
        "formats/io/outputs.py",
        "            if _same(target, place):",
        "            if False:",
        "::test_two_outputs_are_in_two_places",
    ),
    Fault(
        "outputs: write reports in a dry run",
        "cli/squeeze.py",
        "if not dry_run or is_plain(path)]",
        "]",
        "::test_a_dry_run_writes_nothing_and_says_so",
    ),
    Fault(
        "outputs: forget a plan and a budget among inputs",
        "cli/options.py",
        "{**source, **{what: given.get(option) for option, what in _READ.items()}}",
        "dict(source)",
        "::test_no_output_replaces_a_file_of_an_input_by_whatever_name",
    ),
    Fault(
        "outputs: replace under --force what came meanwhile",
        "cli/adapters.py",
        "force=html in there",
        "force=force",
        "::test_what_came_while_work_went_on_stays",
    ),
    Fault(
        "let SIGTERM and SIGHUP end a command as they stand",
        "cli/app.py",
        "_warnings_shown(), _ending():",
        "_warnings_shown():",
        "::test_a_signal_ends_a_command_as_an_exception_does",
    ),
    Fault(
        "call candidates as a stranger called the adapter",
        "compress/each.py",
        'candidate = Path(folder) / f"r{rank}',
        'candidate = Path(folder) / f"{adapter.path.stem}-r{rank}',
        "::test_candidates_have_names_of_our_own",
    ),
    Fault(
        "let a gate read what is on stdin",
        "compress/accept.py",
        "stdin=subprocess.DEVNULL",
        "stdin=None",
        "::test_the_gate_reads_nothing_from_stdin",
    ),
]
