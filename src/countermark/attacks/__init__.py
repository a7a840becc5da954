"""Attacks under an L-inf budget: functions from pixels in [0, 1] to adversarial examples.

`pgd` and `fgsm` serve training and everyday evaluation. `strict` takes the worst case over an
ensemble of attacks of different kinds; each has its own file (`apgd`, `fab`, `square`) and its own
row in one table. They attack a network as it is or, faster, a prepared copy (`fast.prepare`), and
all of them query it through `ask` (asking.py).
"""

from countermark.attacks.asking import answers, ask, finite
from countermark.attacks.pgd import Recording, fgsm, pgd
from countermark.attacks.strict import strict
from countermark.device import computes_bf16

__all__ = [
    "Recording",
    "answers",
    "ask",
    "computes_bf16",
    "fgsm",
    "finite",
    "pgd",
    "strict",
]
