"""What PEFT does with an adapter: what it writes, all of which it heeds.

- Factors are looked for after `base_model.model.` alone; an adapter's name in theirs may be `default` (run with
  0.21.2).
- Of LoRA-XS and NLoRA it loads A and B without the matrix between them [code].
"""

from __future__ import annotations

from rankflow.serving.engine import Engine, Fate
from rankflow.serving.features import MIDDLE, NO_PREFIX, OTHER_ADAPTER, WRAPPED

ENGINE = Engine("peft", "peft", fates=dict.fromkeys((MIDDLE, WRAPPED, NO_PREFIX, OTHER_ADAPTER), Fate.SILENT))
