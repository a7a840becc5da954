"""What thieves do: steal a model, and try to get rid of the mark in the copy.

`THEFTS` and `REMOVALS` are tables of frozen records with functions. The verbs `steal` and `remove`,
the study and the tests read the tables. A new theft or removal takes one row, and the words of the
row among the options of its verb, whose help must not import PyTorch; a test compares the two. An
input cleaner is a removal too; its row is in `countermark.networks.cleaners`, because a folder that
has one in front must be loaded without a thief.
"""

from countermark.thieves.means import Means
from countermark.thieves.remove import REMOVALS, Removal, objective_of, removed
from countermark.thieves.steal import THEFTS, Theft, stolen

__all__ = ["REMOVALS", "THEFTS", "Means", "Removal", "Theft", "objective_of", "removed", "stolen"]
