"""What `test_disk.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "disk: leave a file unsynced",
        "formats/io/atomic.py",
        "        _keep_owners(partial, out)\n        sync(partial)\n\n\ndef is_plain",
        "        _keep_owners(partial, out)\n\n\ndef is_plain",
    ),
    Fault(
        "disk: leave the files of a folder unsynced",
        "formats/io/atomic.py",
        "            sync(file)",
        "            pass",
    ),
    Fault(
        "disk: leave the folder that a name is in unsynced",
        "formats/io/atomic.py",
        "sync(out.parent)",
        "pass",
    ),
    Fault(
        "disk: leave a ledger unsynced",
        "training/ledger.py",
        "        sync_open(fd, path)\n",
        "",
    ),
    Fault(
        "disk: leave a new ledger's folder unsynced",
        "training/ledger.py",
        "sync(path.resolve().parent)",
        "pass",
    ),
    Fault(
        "disk: leave matrices unsynced",
        "training/ledger.py",
        "        sync(half)\n",
        "",
    ),
    Fault(
        "disk: leave the name of matrices unsynced",
        "training/ledger.py",
        "        sync(self.path.parent)\n",
        "",
    ),
    Fault(
        "disk: leave the folder above a new one unsynced",
        "formats/io/disk.py",
        "        sync(path.parent)\n",
        "        pass\n",
    ),
    Fault(
        "disk: sync files as Windows does not let them be",
        "formats/io/disk.py",
        "os.O_RDWR if writable else os.O_RDONLY",
        "os.O_RDONLY",
    ),
    Fault(
        "disk: take a disk that fails for one that cannot sync",
        "formats/io/disk.py",
        "    except OSError as e:\n        if e.errno not in NOT_TO_BE_HAD:\n",
        "    except OSError as e:\n        if False:\n",
    ),
    Fault(
        "disk: take away what may be of a living process, where there are no locks",
        "formats/io/atomic.py",
        "            if held:  # so",
        "            if True:  # so",
    ),
    Fault(
        "disk: replace what came meanwhile",
        "formats/io/atomic.py",
        "partial.replace(out) if there else _put_new(partial, out)",
        "partial.replace(out)",
    ),
    Fault(
        "disk: forget modes and owners",
        "formats/io/atomic.py",
        "        if there.is_symlink() or",
        "        if True or",
    ),
    Fault(
        "cut a file before looking whether it is a ledger",
        "training/ledger.py",
        "if mend and raw and not _begins_ledger(raw, events):",
        "if False:",
    ),
    Fault(
        "go through all events to add one",
        "training/ledger.py",
        "self.events = _followed(self.events, line)",
        "self.events = _effective([*self.events, line])",
    ),
]
