"""What `test_linalg.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "carry first moments as displacements instead of gradients",
        "optim/moments.py",
        "return f64(M).mT.to(moment64.device) @ moment64",
        "return f64(N).to(moment64.device) @ moment64",
    ),
    Fault(
        "forget the bound on second moments",
        "optim/moments.py",
        "carried = torch.maximum(carried, bias_second * (f64(m) / bias_first).square())",
        "pass",
    ),
    Fault(
        "transpose N",
        "linalg/decompose.py",
        "return N.detach().to(A) @ A",
        "N = N.mT if N.shape[-1] == N.shape[-2] else N; return N.detach().to(A) @ A",
        "tests/surgery/test_surgeon.py",
    ),
    Fault(
        "take what Cholesky left of a singular matrix for its root",
        "linalg/decompose.py",
        "if not bool(failed.any()):",
        "if failed is not None:",
    ),
    Fault(
        "trust short sums of columns that nearly depend on each other",
        "linalg/decompose.py",
        ">= _APART * size",
        ">= 0 * size",
    ),
    Fault(
        "square bfloat16 out of float32's range",
        "linalg/decompose.py",
        "& (size > 1e-20) & (size < 1e30) ",
        "",
    ),
    Fault(
        "scale singular values twice",
        "linalg/decompose.py",
        "R_B = scaling * root_B if S_B is None else root(f64(S_B))",
        "R_B = scaling * scaling * root_B if S_B is None else root(f64(S_B))",
    ),
    Fault(
        "go on from the first old directions, not from those that are kept most",
        "linalg/spectrum.py",
        "old.append(int(diagonal.argmax()))",
        "old.append(len(old))",
    ),
    Fault(
        "choose old directions without regard to those already chosen",
        "linalg/spectrum.py",
        "    rest = rest - torch.outer",
        "    torch.outer",
    ),
    Fault(
        "rely on old directions that do not stand for what is kept",
        "linalg/spectrum.py",
        "if S[0] > _CONDITION * S[-1]:",
        "if S[0] < 0:",
    ),
    Fault(
        "give all that is lost to one factor",
        "linalg/spectrum.py",
        "new_N = Vh.mT @ ((U / root).mT @ projector[old])",
        "new_N = Vh.mT @ ((U / S).mT @ projector[old]); root = torch.ones_like(S)",
    ),
    Fault(
        "scale all modules factorised at once by the first's scaling",
        "linalg/decompose.py",
        "apart = torch.tensor(scalings, dtype=",
        "apart = torch.tensor(scalings[:1] * len(scalings), dtype=",
        "::test_modules_factorised_at_once_are_each_as_if_alone",
    ),
]
