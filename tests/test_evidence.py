"""The exact test, the e-process, the verdict and the planner.

The exact test is compared with brute force, and its level under the null hypothesis is checked.
"""

import itertools
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import CountermarkError
from countermark.evidence import EProcess, cell_differences, judge, sign_flip_test, trials_needed
from countermark.evidence.sign_flip import log10

cells = st.lists(st.tuples(st.integers(-5, 5), st.integers(1, 4)), max_size=10)


def brute_force(signed: list[int]) -> tuple[int, int]:
    magnitudes, statistic = [abs(value) for value in signed if value], sum(signed)
    sums = [
        sum(sign * value for sign, value in zip(signs, magnitudes, strict=True))
        for signs in itertools.product((1, -1), repeat=len(magnitudes))
    ]
    return sum(total >= statistic for total in sums), sum(total > statistic for total in sums)


@settings(max_examples=300, deadline=None)
@given(cells)
def test_counts_are_those_of_all_sign_patterns(drawn: list[tuple[int, int]]) -> None:
    test = sign_flip_test([value for value, _ in drawn], [weight for _, weight in drawn])
    signed = [value * weight for value, weight in drawn]
    assert (test.at_least, test.above) == brute_force(signed)
    assert test.statistic == sum(signed)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=9))
def test_level_is_exact_under_the_null(magnitudes: list[int]) -> None:
    """Over all coins, P(p <= p_0) = p_0 for each p_0 that can occur.

    The test is therefore neither anti-conservative nor wasteful.
    """
    values = [
        sign_flip_test([sign * value for sign, value in zip(signs, magnitudes, strict=True)]).p
        for signs in itertools.product((1, -1), repeat=len(magnitudes))
    ]
    for threshold in set(values):
        assert Fraction(sum(value <= threshold for value in values), len(values)) == threshold


def test_one_sided_binomial_in_closed_form() -> None:
    test = sign_flip_test([1] * 60 + [-1] * 40)
    assert test.p == Fraction(sum(math.comb(100, k) for k in range(60, 101)), 2**100)


@pytest.mark.parametrize("count", [400, 2000])
def test_small_p_values_do_not_underflow(count: int) -> None:
    test = sign_flip_test([1] * count)
    assert test.log10_p_value == pytest.approx(-count * math.log10(2))
    assert sign_flip_test([2, 3] * (count // 2)).log10_p_value == pytest.approx(
        -count * math.log10(2)
    )


def test_no_cells_prove_nothing() -> None:
    assert sign_flip_test([]).p == 1
    assert sign_flip_test([0, 0]).p == 1


def test_the_logarithm_of_a_p_value_is_exact_from_1_down() -> None:
    """The logarithm is also exact close to 1.

    It is compared with ln(1 - q) = -q - q^2/2 - ... It never falls where p rises, and it is 0
    exactly where p is 1.0 as a float.
    """
    values = {
        Fraction((1 << cells) - lost, 1 << cells)
        for cells in range(1, 80)
        for lost in range(min(12, 1 << cells))
    }
    values |= {
        Fraction(lost, 1 << cells) for cells in (2, 30, 60, 2000, 20000) for lost in (1, 2, 3)
    }
    found = [log10(p) for p in sorted(values)]
    assert found == sorted(found)
    assert math.copysign(1, found[-1]) == 1
    for p, logarithm in zip(sorted(values), found, strict=True):
        lost = 1 - p
        assert (logarithm == 0) == (float(p) == 1)
        assert logarithm <= 0
        if lost < Fraction(1, 1000) and logarithm:
            series = sum(lost**power / power for power in range(1, 8))
            assert logarithm == pytest.approx(-float(series) / math.log(10), rel=1e-15, abs=0)
        elif not lost:
            continue
        else:
            assert logarithm == pytest.approx(
                math.log10(p.numerator) - math.log10(p.denominator), rel=1e-13
            )
    assert log10(Fraction(1, 1 << 20000)) == pytest.approx(-20000 * math.log10(2), rel=1e-15)


def test_no_evidence_is_a_logarithm_of_0() -> None:
    process = EProcess()
    for outcome in (0, -1, -1):
        assert repr(process.log10_p_value) == "0.0"
        assert process.p_value == 1
        process.update(outcome)
    outcomes = [-1] * 80
    assert repr(judge(range(80), outcomes, batches=2).log10_p_value) == "0.0"
    assert judge(range(55), [1] + [-1] * 54).log10_p_value == 0  # 1 - 2^-55


def test_scale_of_the_weights_does_not_matter() -> None:
    values = [3, -1, 2, 5, -4, 1]
    assert sign_flip_test(values, [7] * 6).p == sign_flip_test(values).p


@pytest.mark.parametrize("weights", [[1], [0, 1], [-1, 1], [0.5, 1]])
def test_weights_are_positive_integers(weights: list[int]) -> None:
    with pytest.raises(CountermarkError):
        sign_flip_test([1, 1], weights)


def test_trials_of_a_cell_share_one_coin() -> None:
    differences = cell_differences([1, 1, 1, 2, 3], [1, 1, -1, -1, 0])
    assert differences == {1: 1, 2: -1, 3: 0}
    # Ten trials of one cell are one coin, not ten.
    assert judge([0] * 10, [1] * 10).p_value == 0.5


def test_counting_a_cells_trials_as_independent_would_convict_strangers() -> None:
    """Simulate strangers whose answers within a cell always agree with each other.

    This simulation would have caught the mistake of counting the trials of a cell as independent.
    """
    generator = random.Random(1)
    naive = exact = 0
    for _ in range(2000):
        outcomes = [
            sign for sign in (generator.choice((-1, 1)) for _ in range(20)) for _ in range(10)
        ]
        naive += sign_flip_test(outcomes).p <= 0.01
        exact += judge([i // 10 for i in range(200)], outcomes).p_value <= 0.01
    assert naive > 200
    assert exact <= 40  # Binomial(2000, 0.01): P(> 40) < 1e-4


def test_choosing_learned_trials_would_convict_strangers() -> None:
    """Simulate a breach of condition 2.

    Dropping the trials that the marked model did not learn looks at the coins through the model.
    """
    generator = random.Random(2)
    chosen = 0
    for _ in range(2000):
        bias = [
            generator.random() for _ in range(200)
        ]  # a stranger shares the marked model's inclinations
        coins = [generator.choice((-1, 1)) for _ in bias]
        inclined = [1 if generator.random() < value else -1 for value in bias]
        learned = [
            coin if generator.random() < 0.6 else (1 if value > 0.5 else -1)
            for coin, value in zip(coins, bias, strict=True)
        ]
        kept = [i for i in range(200) if learned[i] == coins[i]]
        chosen += sign_flip_test([1 if inclined[i] == coins[i] else -1 for i in kept]).p <= 0.01
    assert chosen > 200


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([1] * 40, "match"),
        ([1, -1] * 20, "no evidence"),
        ([1] * 19 + [0] * 381, "inconclusive"),
        ([0] * 400, "inconclusive"),
        ([], "inconclusive"),
    ],
)
def test_verdicts(outcomes: list[int], verdict: str) -> None:
    assert judge(range(len(outcomes)), outcomes).verdict == verdict


def test_verdict_counts_and_limits() -> None:
    result = judge(range(30), [1] * 20 + [-1] * 4 + [0] * 6, batches=4)
    assert (result.agreements, result.disagreements, result.neither, result.trials) == (
        20,
        4,
        6,
        30,
    )
    assert result.log10_smallest_p_value == pytest.approx(math.log10(4) - 30 * math.log10(2))
    assert result.p_value == pytest.approx(4 * float(sign_flip_test([1] * 20 + [-1] * 4).p))


def test_p_value_times_batches_stays_a_probability() -> None:
    assert judge(range(4), [-1] * 4, batches=4).p_value == 1.0


@pytest.mark.parametrize(
    ("cells_", "outcomes", "alpha"),
    [([1], [1, 1], 0.1), ([1], [2], 0.1), ([1], [1], 0.0), ([1], [1], 1.0)],
)
def test_bad_outcomes_are_refused(cells_: list[int], outcomes: list[int], alpha: float) -> None:
    with pytest.raises(CountermarkError):
        judge(cells_, outcomes, alpha=alpha)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10))
def test_expected_wealth_is_one_under_the_null(count: int) -> None:
    total = 0.0
    for outcomes in itertools.product((1, -1), repeat=count):
        process = EProcess()
        for outcome in outcomes:
            process.update(outcome)
        total += math.exp(process.log_e)
    assert total / 2**count == pytest.approx(1)


def test_half_the_confidence_is_half_the_stake() -> None:
    process = EProcess()
    process.update(1, confidence=0.5)
    process.update(0, confidence=0.5)
    stakes = [k / 20 for k in range(1, 21)]
    assert math.exp(process.log_e) == pytest.approx(sum(1 + stake / 2 for stake in stakes) / 20)
    process.update(-1)
    assert math.exp(process.log_e) == pytest.approx(
        sum((1 + stake / 2) * (1 - stake) for stake in stakes) / 20
    )


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 15), st.floats(0, 1)), min_size=1, max_size=8)
)
def test_expected_wealth_is_one_for_coins_of_any_bias(
    trials: list[tuple[bool, int, float]],
) -> None:
    """Sum over all patterns of biased coins, weighted by their probabilities.

    The suspect never saw the coins.
    """
    total = 0.0
    for coins in itertools.product((True, False), repeat=len(trials)):
        process, probability = EProcess(), 1.0
        for coin, (answer, sixteenths, confidence) in zip(coins, trials, strict=True):
            heads = sixteenths / 16
            probability *= heads if coin else 1 - heads
            process.update(1 if coin == answer else -1, heads if answer else 1 - heads, confidence)
        total += probability * math.exp(process.log_e)
    assert total == pytest.approx(1)


def test_agreement_is_convicted_without_underflow() -> None:
    process = EProcess()
    for _ in range(2000):
        process.update(1)
    assert process.log10_p_value < -590
    assert process.p_value == 0.0 or process.log10_p_value > -308


@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_the_anytime_p_value_keeps_its_level_under_optional_stopping(alpha: float) -> None:
    """A stranger who stops when it looks worst; the same peeking ruins the fixed-sample test."""
    generator = random.Random(3)
    anytime = fixed = 0
    runs = 1000
    for _ in range(runs):
        process, outcomes, peeked = EProcess(), [], False
        for number in range(150):
            outcome = generator.choice((-1, 1))
            process.update(outcome)
            outcomes.append(outcome)
            peeked = peeked or (number % 10 == 9 and sign_flip_test(outcomes).p <= alpha)
        anytime += process.p_value <= alpha
        fixed += peeked
    assert anytime <= runs * alpha + 4 * math.sqrt(runs * alpha)
    assert fixed > 1.5 * runs * alpha


@pytest.mark.parametrize(
    ("outcome", "chance", "confidence"),
    [(2, 0.5, 1), (1, 0, 1), (1, 1, 1), (1, 0.5, -0.1), (-1, 0.5, 1.1)],
)
def test_impossible_bets_are_refused(outcome: int, chance: float, confidence: float) -> None:
    with pytest.raises(CountermarkError):
        EProcess().update(outcome, chance, confidence)


@pytest.mark.parametrize("p", [1e-2, 1e-6, 1e-9])
@pytest.mark.parametrize("agreement", [0.75, 0.9, 1.0])
@pytest.mark.parametrize("power", [0.5, 0.9])
def test_the_plan_is_the_fewest_trials(p: float, agreement: float, power: float) -> None:
    def reaches(trials: int) -> bool:
        tail, forgiven = 0, -1
        while forgiven < trials and Fraction(
            tail + math.comb(trials, forgiven + 1), 2**trials
        ) <= Fraction(p):
            forgiven += 1
            tail += math.comb(trials, forgiven)
        chance = sum(
            math.comb(trials, k) * (1 - agreement) ** k * agreement ** (trials - k)
            for k in range(forgiven + 1)
        )
        return chance >= power

    planned = trials_needed(p, agreement, power)
    assert next(trials for trials in range(1, 1000) if reaches(trials)) == planned


@pytest.mark.parametrize(
    ("p", "agreement", "power"),
    [(0, 0.9, 0.9), (0.1, 0.5, 0.9), (0.1, 1.1, 0.9), (0.1, 0.9, 0.3), (1e-9, 0.5001, 0.9)],
)
def test_impossible_plans_are_refused(p: float, agreement: float, power: float) -> None:
    with pytest.raises(CountermarkError):
        trials_needed(p, agreement, power)
