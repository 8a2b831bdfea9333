"""What `test_target.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "keep one direction more than a rule asks for, as sd-scripts does",
        "compress/rules.py",
        "for k, have in enumerate(shares, 1)",
        "for k, have in enumerate(shares, 2)",
    ),
    Fault(
        "take the noise threshold at the median itself",
        "compress/rules.py",
        "return middle * (1 + math.sqrt(slot.rank / slot.in_features)) *",
        "return middle * (1 + 0 * math.sqrt(slot.rank / slot.in_features)) *",
    ),
    Fault(
        "forget what else a file holds",
        "compress/target.py",
        "amount=self.size - overhead)",
        "amount=self.size)",
    ),
    Fault(
        "stop covering one direction early",
        "plans/knapsack.py",
        "        if kept >= wanted:\n",
        "        if kept + options.gain(i, ranks[i], rank) > wanted:\n",
    ),
    Fault(
        "lose the way back through the knapsack",
        "plans/knapsack.py",
        "            at -= weight\n",
        "            pass\n",
    ),
]
