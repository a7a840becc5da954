"""Names that an option of a verb takes and that are rows of a table as well.

They are here and not beside their tables, so that the help of a verb imports no PyTorch. A test
holds the two equal.
"""

from typing import Literal

Embedding = Literal["interleaved", "epoch"]
"""How watermarks get in: some join every batch, or in a pass after each epoch (Algorithm 1)."""
Precision = Literal["auto", "32-true", "bf16-mixed"]
"""Precision of the training; `auto` takes bf16 where the device computes in it."""
Protocol = Literal["clean", "as-published"]
"""How a study cuts its data: disjoint pools, or the published runs' habits."""
Recipe = Literal["fast", "strong", "pgd", "standard"]
"""The training objectives, each with its recipe."""
SchemeName = Literal["ood", "adversarial", "coin", "texture", "mixed", "composite"]
"""The watermark schemes, `SCHEMES`."""
Setting = Literal["white", "black", "grey", "natural", "robust", "best", "distil"]
"""What a thief has, `THEFTS`."""
Size = Literal["quick", "standard", "paper"]
"""How much a study does, `PROFILES`."""
