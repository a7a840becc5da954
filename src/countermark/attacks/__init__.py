"""Attacks under an L-inf budget, as functions on tensors: pixels of [0, 1] in, adversarial examples out.

`pgd` and `fgsm` are what training and everyday evaluation use. `strict` is the worst case over an ensemble of attacks of different kinds,
each in a file of its own (`apgd`, `fab`, `square`) and a row of one table. `prepare` (folding.py) makes a network quicker to attack,
and `ask` (asking.py) is how all of them ask it.
"""

from countermark.attacks.asking import answers, ask, finite
from countermark.attacks.folding import Prepared, prepare, shortens
from countermark.attacks.pgd import Recording, capturable, fgsm, pgd
from countermark.attacks.strict import strict
from countermark.device import computes_bf16

__all__ = [
    "Prepared",
    "Recording",
    "answers",
    "ask",
    "capturable",
    "computes_bf16",
    "fgsm",
    "finite",
    "pgd",
    "prepare",
    "shortens",
    "strict",
]
