"""Attacks under an L-inf budget, as functions on tensors: pixels of [0, 1] in, adversarial examples out.

`pgd` and `fgsm` are what training and everyday evaluation use. `strict` is the worst case over an ensemble of attacks of different kinds,
each in a file of its own (`apgd`, `fab`, `square`) and a row of one table. They attack
a network as it is or, sooner, a prepared copy (`fast.prepare`), and `ask` (asking.py) is how all of them ask it.
"""

from countermark.attacks.asking import answers, ask, finite
from countermark.attacks.pgd import Recording, capturable, fgsm, pgd
from countermark.attacks.strict import strict
from countermark.device import computes_bf16

__all__ = [
    "Recording",
    "answers",
    "ask",
    "capturable",
    "computes_bf16",
    "fgsm",
    "finite",
    "pgd",
    "strict",
]
