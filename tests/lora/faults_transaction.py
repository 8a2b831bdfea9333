"""What `test_transaction.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "lost: undo nothing after what cannot be undone",
        "lora/transaction.py",
        "            except BaseException as e:\n                failures.append(e)\n",
        "            except KeyError as e:\n                failures.append(e)\n",
    ),
    Fault(
        "lost: forget an inner transaction",
        "lora/transaction.py",
        "[] if outer is None else outer._undo",
        "[]",
    ),
    Fault(
        "lost: leave half undone what was interrupted",
        "lora/transaction.py",
        "                    failures.append(e)\n                    undo()\n",
        "                    failures.append(e)\n",
    ),
    Fault(
        "let an interrupt into the middle of a change",
        "lora/interrupts.py",
        "            self._waiting.add(number)\n            return\n",
        "            self._waiting.add(number)\n",
    ),
    Fault(
        "swallow an interrupt that has waited",
        "lora/interrupts.py",
        "                signal.signal(number, handler)\n        self.deliver()",
        "                signal.signal(number, handler)",
    ),
    Fault(
        "leave lines in a ledger that were undone",
        "training/ledger.py",
        "        os.truncate(path, size)",
        "        pass",
    ),
]
