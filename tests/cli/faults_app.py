"""What `test_app.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "read a PEFT folder as PEFT where another format was given",
        "formats/open.py",
        "if kind is not None and not inside and",
        "if False and not inside and",
        "-k peft_folder",
    ),
    Fault(
        "replace any picture by a report's own",
        "cli/runs.py",
        "picture_of(out) == source_of(read)",
        "True",
        "-k report_replaces",
    ),
    Fault(
        "import no plugin",
        "cli/app.py",
        "        import_plugin(module)",
        "        pass",
        "-k plugin",
    ),
    Fault(
        "let headings make columns wide",
        "render/table.py",
        '"\\n".join(wrap(name, _HEADING, break_long_words=False))',
        "name",
        "-k heading",
    ),
    Fault(
        "take an option by its old and its new name, and go by the last",
        "cli/app.py",
        'any(word.partition("=")[0] == names[old] for word in words)',
        "False",
        "-k old_and_its_new",
    ),
]
