"""What `test_crash.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "full disk: write in place",
        "formats/io/atomic.py",
        'return out.with_name(f".{stem}.{uuid.uuid4().hex[:8]}.part{suffix}")',
        "return out.with_name(f'{stem}.{uuid.uuid4().hex[:8]}{suffix}') if not suffix else out",
        "::test_a_full_disk_leaves_what_was_there[plan-replacing]",
    ),
    Fault(
        "full disk: leave what failed",
        "formats/io/atomic.py",
        "self._held.callback(_remove, partial)",
        "pass",
        "::test_a_full_disk_leaves_what_was_there[squeeze-replacing]",
    ),
    Fault(
        "full disk: keep a residual whose adapter found no place",
        "formats/io/atomic.py",
        "undo.callback(_take_place(partial, out, there, self._held))",
        "_take_place(partial, out, there, self._held)",
        "::test_a_residual_gives_its_place_back_where_its_adapter_gets_none",
    ),
    Fault(
        "full disk: a residual before its adapter is whole",
        "compress/residual.py",
        "with atomic_file(path, group) as partial:",
        "with atomic_file(path) as partial:",
        "-m slow -k keep-residual",
    ),
    Fault(
        "full disk: write integers in place",
        "compress/quantized.py",
        "partial.write_bytes(save(tensors,",
        "path.write_bytes(save(tensors,",
        "::test_integers_beside_an_adapter_on_a_full_disk",
    ),
    Fault(
        "full disk: write GGUF in place",
        "formats/gguf/writer.py",
        "writer = _Writer(partial, ",
        "writer = _Writer(out, ",
        "::test_a_full_disk_leaves_what_was_there",
    ),
    Fault(
        "full disk: leave GGUF's file open",
        "formats/gguf/writer.py",
        "with closing(writer):",
        "if True:",
        "::test_a_full_disk_leaves_what_was_there",
    ),
    Fault(
        "full disk: write statistics in place",
        "calibration/statistics.py",
        "partial.write_bytes(save(tensors,",
        "path.write_bytes(save(tensors,",
        "::test_a_full_disk_leaves_what_was_there[calibrate-replacing]",
    ),
    Fault(
        "replace anything by a residual",
        "compress/residual.py",
        "if path.exists() and not _is_residual(path):",
        "if False:",
        "::test_a_residual_replaces_nothing_but_a_tail",
    ),
    Fault(
        "full disk: leave half a line in the ledger",
        "training/ledger.py",
        "os.ftruncate(fd, size)",
        "pass",
        "::test_a_ledger_on_a_disk_that_takes_half_a_line",
    ),
    Fault(
        "full disk: take away what a living process writes",
        "formats/io/disk.py",
        "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "::test_leftovers_are_taken_away_but_not_those_of_a_living_process",
    ),
]
