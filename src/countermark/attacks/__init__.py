"""Attacks under an L-inf budget, as functions on tensors: pixels of [0, 1] in, adversarial examples out.

`pgd` and `fgsm` are what training and everyday evaluation use. `strict` is the worst case over four attacks of different kinds, each in a
file of its own: `apgd`, `fab`, `square`. `prepare` (folding.py) makes a network quicker to attack.
"""

from countermark.attacks.folding import Prepared, computes_bf16, prepare, shortens
from countermark.attacks.pgd import fgsm, pgd
from countermark.attacks.strict import strict

__all__ = ["Prepared", "computes_bf16", "fgsm", "pgd", "prepare", "shortens", "strict"]
