"""What `test_optim.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "drop the moment map",
        "optim/moments.py",
        "first = {key: carry_first(m, N, M, self.factor) for key, m in self.first.items()}",
        "first = {key: m[..., : N.shape[-2], :] if self.factor == 'A' else m[..., : N.shape[-2]] "
        "for key, m in self.first.items()}",
        "tests/surgery/test_surgeon.py",
    ),
    Fault(
        "skip the ramp",
        "optim/warmup.py",
        "(old + step * note.scale).to(t.dtype)",
        "(old + step).to(t.dtype)",
        "tests/surgery/test_surgeon.py",
    ),
    Fault(
        "carry the lengths of steps as gradients instead of displacements",
        "optim/moments.py",
        "carry_squares(s, N, M, self.factor) for",
        "carry_second(s, None, N, M, self.factor) for",
        "-k entry_by_entry",
    ),
    Fault(
        "map sizes as if they were squares",
        "optim/handler.py",
        "        held |= {k: _squared(held[k]) for k in self.roots if k in held}\n",
        "        held |= {k: held[k].double() for k in self.roots if k in held}\n",
        "-k entry_by_entry",
    ),
    Fault(
        "let Rprop's new directions sleep where there are no others",
        "optim/handlers/rprop.py",
        "torch.where(s > 0, s, start)",
        "s",
        "-k as_far_as",
    ),
    Fault(
        "bring a module back into the first group",
        "optim/param_groups.py",
        "            if token in order:\n                return i\n",
        "            if token in order:\n                return 0\n",
        "-k lora_plus",
    ),
]
