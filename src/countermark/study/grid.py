"""The grid of the paper and beyond it: the units of a study, and their places in its tables.

A cell is a unit and its place: the data set, the seed, the defence, how the model was stolen and
what was removed. The results of all cells are one flat list of measurements; every table, figure
and sentence is made from that list.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

from countermark.choices import Protocol, Size
from countermark.data import Known, known
from countermark.errors import CountermarkError, choose
from countermark.study.graph import Unit
from countermark.thieves import REMOVALS, THEFTS
from countermark.thieves.steal import surrogate_for
from countermark.threat import shown
from countermark.watermarks import CRAFTING_STEPS, SCHEMES, full_strength

MARKS = ("ood", "adversarial", "coin")
"""The schemes of the study."""
PRUNED = tuple(k / 10 for k in range(1, 10))
FINETUNED = (1, 2, 5, 10, 20, 30, 40)
DEFENCES = (
    "none",
    "ADVTR",
    *(f"{prefix}{scheme}" for prefix in ("WM ", "ADVTR+") for scheme in MARKS),
)
TRAINED_ON = "ADVTR, trained on"
"""The control for marks whose training starts from the unmarked model.

It is trained for the same number of further epochs without a mark.
"""
_STRANGERS = 1000  # seeds of strangers begin here, far from those of owners
_CHAIN = ("prune", "finetune")
_CHAIN_AMOUNTS = {"prune": 0.8}
_OWN = THEFTS["white"].title


@dataclass(frozen=True)
class Studied:
    """How a data set is studied.

    Attributes:
        title: its name in tables and figures.
        sweep: watermark budgets besides the default one, for the statement beta > epsilon + alpha;
            a profile of fewer takes the first, which the statement says does conflict.
        budgets: attacks of Table 5, as (budget, steps), with a step size of 0.01.
        pictured: the budget of the second watermark of Figure 6.
        network: the owner's, instead of the profile's.
        paper: whether the paper has this data set.
    """

    title: str
    sweep: tuple[float, ...]
    budgets: tuple[tuple[float, int], ...] = (
        (0.15, 15),
        (0.25, 25),
        (0.3, 40),
        (0.4, 40),
        (0.5, 40),
    )
    pictured: float = 0.5
    network: str | None = None
    paper: bool = False


STUDIED: Mapping[str, Studied] = {
    "mnist": Studied("MNIST", (0.25, 0.15, 0.3, 0.35, 0.5), paper=True),
    "fashion_mnist": Studied("FMNIST", (0.15, 0.1, 0.2, 0.25, 0.4), pictured=0.4, paper=True),
    "digits": Studied("digits", (0.1, 0.15, 0.4), pictured=0.35),
    "cifar10": Studied(
        "CIFAR-10",
        (8 / 255, 12 / 255, 24 / 255, 32 / 255),
        budgets=tuple((k / 255, 5 * k // 4) for k in (4, 8, 12, 16, 24)),
        pictured=32 / 255,
        network="narrow",
    ),
}
"""The data sets of the study; a new one is a row here, and one in `data.known`."""


@dataclass(frozen=True)
class Profile:
    """How much a study does of everything.

    Attributes:
        network: the owner's network.
        objective: objective of robust training.
        plain: recipe of the models without robustness; `pgd` is Table 6 without its attack.
        algorithm_1: whether the published schemes' marks get in by the paper's Algorithm 1 under
            both protocols; else only as published.
        seeds: number of owners.
        strangers: number of models of each kind that never see the mark.
        queries: number of queries of Algorithm 2.
        thief_objective: objective of the grey-box thief and of adversarial fine-tuning; `fast` is
            one step.
        haste: how a thief in a hurry trains: the share of the theft's own epochs, and the batch
            size and learning rate that replace its own. None stands for no hurry; `quick` copies
            about as well in a quarter of the time (docs/log.md).
        finetune_examples: images that the thief fine-tunes on; None for their whole pool.
        attack_copies: test images for the adversarial accuracy of copies, strangers and swept
            budgets; None for all of them.
        strict: test images for the strict accuracy of the owners' robust models.
        selection: test images under attack when the published protocol picks its epoch; None for
            all of them.
        attack_removals: the same after the paper's removals; 0 measures test and watermark accuracy
            only.
        test_removals: test images for the test accuracy after the paper's removals; None for all of
            them.
        budget_examples: test images of Table 5 and of the plane.
        sweep: how many watermark budgets besides the default one; None for all of `Studied`.
        epochs: epochs of training, by data set; those of the recipe where there is no entry.
        amounts: amounts of the removals beyond the paper, by name of the removal; the removal's own
            amount where there is no entry.
    """

    network: str
    objective: str
    plain: str
    algorithm_1: bool
    seeds: int
    strangers: int
    queries: int
    thief_objective: str
    haste: tuple[float, int, float] | None
    finetune_examples: int | None
    strict: int
    selection: int | None
    attack_copies: int | None
    attack_removals: int | None
    test_removals: int | None
    budget_examples: int
    sweep: int | None
    epochs: Mapping[str, int]
    amounts: Mapping[str, float]


_PAPER = Profile(
    network="paper",
    objective="pgd",
    plain="pgd",
    algorithm_1=True,
    seeds=3,
    strangers=3,
    queries=51_200,
    thief_objective="pgd",
    haste=None,
    finetune_examples=None,
    strict=1000,
    selection=None,
    attack_copies=None,
    attack_removals=None,
    test_removals=None,
    budget_examples=10_000,
    sweep=None,
    epochs=dict.fromkeys(STUDIED, 100),
    amounts={"finetune": 40, "adversarial": 40},
)
_STANDARD = replace(
    _PAPER,
    objective="fast",
    plain="standard",
    algorithm_1=False,
    thief_objective="fast",
    epochs={},
    amounts={"finetune": 10, "adversarial": 10},
)
_QUICK = replace(
    _STANDARD,
    network="small",
    seeds=1,
    strangers=2,
    queries=12_800,
    haste=(0.4, 128, 0.05),
    finetune_examples=2000,
    strict=500,
    selection=1000,
    attack_copies=1000,
    attack_removals=0,
    test_removals=2000,
    budget_examples=2000,
    sweep=1,
    epochs={"mnist": 5, "fashion_mnist": 5},
    amounts={"finetune": 5, "adversarial": 5},
)
PROFILES: Mapping[Size, Profile] = {"quick": _QUICK, "standard": _STANDARD, "paper": _PAPER}


@dataclass(frozen=True)
class Cell:
    """A unit and its place in the tables.

    Attributes:
        unit: the unit.
        place: what the measurement is of: section, data, seed, defence, theft, removal; its values
            are strings and numbers.
    """

    unit: Unit
    place: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What `--only` chooses by, such as `mnist/0/ADVTR+coin/white-box/pruned`."""
        place, section = self.place, self.place["section"]
        if "setting" in place:
            parts = [place["defence"], place["setting"], place.get("removal", section)]
        else:
            parts = [place.get(name) for name in ("scheme", "budget", "stranger")]
            parts.insert(0, section)
        words = (place["data"], place.get("seed"), *parts)
        return "/".join(str(word) for word in words if word is not None)


@dataclass(frozen=True)
class Computing:
    """Where and in what the numbers of a study are computed; it is in the name of every unit.

    Attributes:
        device: kind of device: `cpu`, `cuda` or `mps`.
        precision: of training and of the search of PGD: `32-true` or `bf16-mixed`.
    """

    device: str = "cpu"
    precision: str = "32-true"


def grid(
    data_sets: tuple[str, ...],
    profile: Profile,
    protocol: str,
    seeds: int | None = None,
    computing: Computing | None = None,
) -> list[Cell]:
    """All cells of a study.

    Args:
        data_sets: names of the data sets.
        profile: how much is done.
        protocol: `clean` or `as-published`.
        seeds: number of owners, instead of the profile's.
        computing: where and in what the numbers are computed; by default a processor's float32.

    Raises:
        CountermarkError: unknown data set or protocol.
    """
    choose("protocol", protocol, get_args(Protocol))
    cells = []
    for data in data_sets:
        study = _Study(data, profile, protocol, computing or Computing())
        bank = _Bank(study)
        for seed in range(seeds or profile.seeds):
            cells += _Owner(study, seed, bank).cells()
        cells += bank.cells()
    return sorted(cells, key=_rank)


def _rank(cell: Cell) -> int:
    """What is measured first: the owners' models, their copies, the strangers, then the rest."""
    section, setting = cell.place["section"], cell.place.get("setting")
    if section == "model":
        return 0 if setting == _OWN else 1
    return {"strangers": 2, "strict": 3}.get(section, 4)


def chosen(cells: Mapping[str, Sequence[Cell]], patterns: Sequence[str]) -> dict[str, list[Cell]]:
    """The cells of each protocol whose names match one of some shell patterns.

    Raises:
        CountermarkError: a pattern matches no cell.
    """
    names = list(dict.fromkeys(cell.name for part in cells.values() for cell in part))
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise CountermarkError(
                f"--only {pattern!r} matches nothing of this study; a name is like {names[0]!r}, "
                "* stands for anything, and --plan --json lists all names"
            )
    kept = {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
    return {
        protocol: [cell for cell in part if cell.name in kept] for protocol, part in cells.items()
    }


@dataclass(frozen=True)
class _Study:
    """What every unit of one data set has in common.

    Attributes:
        data: name of the data set.
        profile: how much is done.
        protocol: how the data are cut.
        computing: where and in what.
    """

    data: str
    profile: Profile
    protocol: str
    computing: Computing


class _Maker:
    """What every unit of one data set and one pool seed has in common."""

    def __init__(self, study: _Study, pool_seed: int) -> None:
        self.study, self.pool_seed = study, pool_seed
        self.data, self.profile, self.protocol = study.data, study.profile, study.protocol
        self.spec: Known = known(study.data)
        self.studied = STUDIED[study.data]
        self.network = self.studied.network or study.profile.network

    def unit(
        self, kind: str, title: str, inputs: Mapping[str, Unit | None], **options: Any
    ) -> Unit:
        common = {
            "data": self.data,
            "pool_seed": self.pool_seed,
            "protocol": self.protocol,
            **asdict(self.study.computing),
        }
        given = {role: unit for role, unit in inputs.items() if unit is not None}
        return Unit(kind, {**common, **options}, given, f"{self.data} {self.pool_seed}: {title}")

    def model(
        self,
        title: str,
        seed: int,
        *,
        robust: bool,
        network: str | None = None,
        attacked: int | None = None,
        **inputs: Unit | None,
    ) -> Unit:
        profile = self.profile
        options = {
            "objective": profile.objective if robust else profile.plain,
            "robust": robust,
            "seed": seed,
            "epochs": profile.epochs.get(self.data),
            "network": network or self.network,
            "selection": profile.selection if self.protocol == "as-published" else None,
        }
        return self.unit("model", title, inputs, **options, attacked=attacked)

    def theft(
        self, title: str, victim: Unit, name: str, watermarks: Unit | None, seed: int
    ) -> Unit:
        """Make the unit of a theft, by its name in `THEFTS`.

        If the thief has the victim itself, that is the copy.
        """
        profile, theft = self.profile, THEFTS[name]
        if theft.sees is None:
            return victim
        means = {**theft.options, "queries": profile.queries}
        if profile.haste is not None:
            share, batch_size, rate = profile.haste
            epochs = max(1, round(share * means["epochs"]))
            means |= {"epochs": epochs, "batch_size": batch_size, "learning_rate": rate}
        # The published grey-box thief took MNIST's budget for Fashion-MNIST too.
        published = self.protocol == "as-published" and self.data == "fashion_mnist"
        budget = known("mnist").threat.epsilon if published else self.spec.threat.epsilon
        options = {
            "theft": name,
            "network": theft.network(self.network, self.spec.shape),
            "means": means,
            "thief_objective": profile.thief_objective,
            "epsilon": budget,
            "attacked": profile.attack_copies,
            "seed": seed,
        }
        return self.unit(
            "theft",
            f"{title}, {theft.title}",
            {"victim": victim, "watermarks": watermarks},
            **options,
        )


class _Bank(_Maker):
    """The strangers: models made with no knowledge of any owner's coins."""

    def __init__(self, study: _Study) -> None:
        super().__init__(study, _STRANGERS)
        self.models: dict[str, Unit] = {}
        profile = study.profile
        for number in range(profile.strangers):
            seed, few = _STRANGERS + number, profile.attack_copies
            maker = _Maker(study, seed)
            standard = maker.model("standard stranger", seed, robust=False, attacked=few)
            robust = maker.model("robust stranger", seed, robust=True, attacked=few)
            surrogate = surrogate_for(self.spec.shape)
            other = surrogate if self.network != surrogate else "small"
            self.models |= {
                f"standard {number}": standard,
                f"robust {number}": robust,
                f"another architecture {number}": maker.model(
                    "stranger of another architecture",
                    seed,
                    robust=False,
                    network=other,
                    attacked=few,
                ),
                f"black-box theft of standard {number}": maker.theft(
                    "standard stranger", standard, "black", None, seed
                ),
                f"black-box theft of robust {number}": maker.theft(
                    "robust stranger", robust, "black", None, seed
                ),
                f"grey-box theft of robust {number}": maker.theft(
                    "robust stranger", robust, "grey", None, seed
                ),
            }

    def cells(self) -> list[Cell]:
        return [
            Cell(unit, {"section": "bank", "data": self.data, "stranger": name})
            for name, unit in self.models.items()
        ]


class _Owner(_Maker):
    """One owner: one data set, one seed, all defences, thefts and removals."""

    def __init__(self, study: _Study, seed: int, bank: _Bank) -> None:
        super().__init__(study, seed)
        self.seed, self.bank = seed, bank
        self.plain = self.model("none", seed, robust=False)
        self.robust = self.model("ADVTR", seed, robust=True)
        self.scratch = self.protocol == "as-published" or self.profile.algorithm_1
        self.sets = {scheme: self.watermarks(scheme) for scheme in MARKS}

    def watermarks(self, scheme: str, epsilon: float | None = None) -> Unit:
        """A watermark set, crafted in the steps of its paper, or at full strength."""
        budget = epsilon or self.spec.threat.watermark_epsilon
        step = SCHEMES[scheme].published_step or full_strength(budget).step_size
        options = {
            "scheme": scheme,
            "epsilon": budget,
            "steps": CRAFTING_STEPS,
            "step_size": step,
            "seed": self.seed,
        }
        title = f"{scheme} watermarks" + (f" at {shown(epsilon)}" if epsilon is not None else "")
        return self.unit(
            "watermarks",
            title,
            {"source": self.robust if SCHEMES[scheme].crafted else None},
            **options,
        )

    def victims(self) -> dict[str, tuple[Unit, str | None]]:
        """Every defence's model and the scheme of its watermarks."""
        found: dict[str, tuple[Unit, str | None]] = {
            "none": (self.plain, None),
            "ADVTR": (self.robust, None),
        }
        for prefix, unmarked in (("WM ", self.plain), ("ADVTR+", self.robust)):
            robust = unmarked is self.robust
            for scheme, watermarks in self.sets.items():
                title, start = f"{prefix}{scheme}", self.start(scheme, unmarked)
                found[title] = (
                    self.model(title, self.seed, robust=robust, start=start, watermarks=watermarks),
                    scheme,
                )
        return {defence: found[defence] for defence in DEFENCES}

    def start(self, scheme: str, unmarked: Unit) -> Unit | None:
        """The model that a scheme's mark is trained into; none for Algorithm 1, from scratch."""
        return None if self.scratch and not SCHEMES[scheme].coins else unmarked

    def cells(self) -> list[Cell]:
        cells = []
        unmarked_thefts: dict[str, Unit] = {}
        for defence, (victim, scheme) in self.victims().items():
            watermarks = self.sets[scheme] if scheme is not None else None
            for name, theft in THEFTS.items():
                if theft.paper:
                    copy = self.theft(defence, victim, name, watermarks, self.seed)
                    cells += self.removals(defence, theft.title, copy, watermarks, scheme)
                    if scheme is None and copy is not victim:
                        unmarked_thefts[f"{theft.title} theft of this owner's {defence}"] = copy
            if victim.options["robust"]:
                cells.append(self.strict(defence, victim, scheme))
                if scheme is not None:
                    cells += self.beyond(defence, victim, watermarks, scheme)
        if self.protocol == "clean":
            control = self.model(TRAINED_ON, self.seed, robust=True, start=self.robust)
            place = self.place(
                "model", defence=TRAINED_ON, setting=_OWN, scheme=None, removal="none"
            )
            cells += [Cell(control, place), self.strict(TRAINED_ON, control, None)]
        strangers = {
            **self.bank.models,
            **unmarked_thefts,
            "this owner's unmarked ADVTR": self.robust,
            "this owner's unmarked none": self.plain,
        }
        cells += self.strangers(strangers)
        cells += self.sweep(strangers)
        return cells + self.figures()

    def place(self, section: str, **more: Any) -> dict[str, Any]:
        return {"section": section, "data": self.data, "seed": self.seed, **more}

    def removals(
        self, defence: str, setting: str, copy: Unit, watermarks: Unit | None, scheme: str | None
    ) -> list[Cell]:
        """A stolen model, and the two removals of the paper."""
        place = {"defence": defence, "setting": setting, "scheme": scheme}
        inputs, profile = {"model": copy, "watermarks": watermarks}, self.profile
        title = f"{defence}, {setting}"
        common: dict[str, Any] = {
            "attacked": profile.attack_removals,
            "tested": profile.test_removals,
        }
        pruned = self.unit("pruning", f"{title}, pruned", inputs, rates=list(PRUNED), **common)
        tuned = self.unit(
            "fine-tuning",
            f"{title}, fine-tuned",
            inputs,
            epochs=list(FINETUNED),
            examples=profile.finetune_examples,
            seed=self.seed,
            **common,
        )
        return [
            Cell(copy, self.place("model", removal="none", **place)),
            Cell(pruned, self.place("removal", removal="pruned", **place)),
            Cell(tuned, self.place("removal", removal="fine-tuned", **place)),
        ]

    def strict(self, defence: str, model: Unit, scheme: str | None) -> Cell:
        """What the strict attacks leave of an owner's model, beside the paper's PGD."""
        unit = self.unit(
            "strict",
            f"{defence}, strict accuracy",
            {"model": model},
            examples=self.profile.strict,
            seed=self.seed,
        )
        place = {"defence": defence, "setting": _OWN, "scheme": scheme}
        return Cell(unit, self.place("strict", **place))

    def beyond(
        self, defence: str, victim: Unit, watermarks: Unit | None, scheme: str
    ) -> list[Cell]:
        """Thieves and removals that the paper does not try."""
        cells = []

        def place(setting: str, removal: str) -> dict[str, Any]:
            return self.place(
                "beyond", defence=defence, setting=setting, scheme=scheme, removal=removal
            )

        for name, theft in THEFTS.items():
            if not theft.paper:
                unit = self.theft(defence, victim, name, watermarks, self.seed)
                cells.append(Cell(unit, place(theft.title, "none")))
        chains: list[tuple[str, ...]] = [
            (name,) for name, removal in REMOVALS.items() if not removal.paper
        ]
        for chain in [*chains, _CHAIN]:
            title = ", then ".join(REMOVALS[name].title for name in chain)
            unit = self.removal(f"{defence}, {title}", victim, watermarks, chain)
            cells.append(Cell(unit, place(_OWN, title)))
        return cells

    def removal(
        self, title: str, model: Unit, watermarks: Unit | None, chain: tuple[str, ...]
    ) -> Unit:
        """Removals by their names in `REMOVALS`, one after the other."""
        profile = self.profile
        amounts = {**_CHAIN_AMOUNTS, **profile.amounts} if len(chain) > 1 else profile.amounts
        return self.unit(
            "removal",
            title,
            {"model": model, "watermarks": watermarks},
            removals=[[name, amounts.get(name, REMOVALS[name].amount.default)] for name in chain],
            examples=profile.finetune_examples,
            attacked=profile.attack_copies,
            seed=self.seed,
            objective=profile.objective,
            thief_objective=profile.thief_objective,
        )

    def strangers(self, asked: Mapping[str, Unit]) -> list[Cell]:
        """Ask the same strangers for the watermarks of each scheme."""
        return [
            Cell(
                self.unit(
                    "strangers",
                    f"strangers asked for {scheme} watermarks",
                    {"watermarks": watermarks, **asked},
                ),
                self.place("strangers", scheme=scheme),
            )
            for scheme, watermarks in self.sets.items()
        ]

    def sweep(self, strangers: Mapping[str, Unit]) -> list[Cell]:
        """Measure adversarial watermarks at other budgets.

        The cells show what these cost the model, and how the strangers that are asked at the
        default budget answer them.
        """
        cells = []
        for budget in self.studied.sweep[: self.profile.sweep]:
            watermarks = self.watermarks("adversarial", budget)
            title, few = f"ADVTR+adversarial at {shown(budget)}", self.profile.attack_copies
            marked = self.model(
                title,
                self.seed,
                robust=True,
                attacked=few,
                start=self.start("adversarial", self.robust),
                watermarks=watermarks,
            )
            asked = self.unit(
                "strangers",
                f"strangers asked at {shown(budget)}",
                {"watermarks": watermarks, **strangers},
            )
            cells.append(
                Cell(
                    marked,
                    self.place(
                        "sweep", defence="ADVTR+adversarial", scheme="adversarial", budget=budget
                    ),
                )
            )
            cells.append(
                Cell(asked, self.place("sweep strangers", scheme="adversarial", budget=budget))
            )
        return cells

    def figures(self) -> list[Cell]:
        profile, catalogued = self.profile, self.spec
        budgets = self.unit(
            "budgets",
            "ADVTR at other budgets",
            {"model": self.robust},
            examples=profile.budget_examples,
            budgets=[list(budget) for budget in self.studied.budgets],
        )
        cells = [Cell(budgets, self.place("budgets", defence="ADVTR"))]
        if self.seed == 0:
            above, further = catalogued.threat.watermark_epsilon, self.studied.pictured
            crafted = [
                [
                    f"adversarial example at {shown(catalogued.threat.epsilon)}",
                    catalogued.threat.epsilon,
                    catalogued.threat.steps,
                ],
                [f"watermark at {shown(above)}", above, CRAFTING_STEPS],
                [f"watermark at {shown(further)}", further, CRAFTING_STEPS],
            ]
            pictures = self.unit(
                "pictures", "Figure 6", {"model": self.robust}, crafted=crafted, seed=self.seed
            )
            plane = self.unit(
                "plane",
                "Figures 1 and 5",
                {"model": self.robust, **self.sets},
                examples=profile.budget_examples,
                seed=self.seed,
            )
            cells += [Cell(pictures, self.place("pictures")), Cell(plane, self.place("plane"))]
        return cells
