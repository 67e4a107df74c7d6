"""Audit of differential privacy by one training run: a lower bound on epsilon from right guesses of membership."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from nabla_tau.arguments import numbers_checked, whole
from nabla_tau.membership.privacy import EpsilonBound, Rule, bound_of, check_levels, largest_epsilon
from nabla_tau.membership.scores import as_labels, as_scores, refuse_nan


@numbers_checked
def eps_one_run(
    scores: object,
    labels: object,
    *,
    guesses: int | Sequence[int] | None = None,
    delta: float = 0.0,
    confidence: float = 0.95,
    random_state: int = 0,
) -> EpsilonBound:
    """Audit by one training run (Steinke, Nasr and Jagielski, NeurIPS 2023, arXiv 2305.08846): the largest epsilon that
    `one_run_p_value` rejects.

    scores [N] of one model for N samples that were put into training each by a fair coin of its own, labels [N] (True:
    put in); they need not be independent given the coins. The auditor guesses "in" for the upper half of `guesses` and
    "out" for the lower half, and abstains on the rest: the highest ceil(r / 2) and the lowest floor(r / 2) scores.
    guesses must not depend on the labels; of several numbers the best is taken, each at its share of the error, and by
    default these are eight from about N / 100 to N. Ties are broken at random by random_state, since breaking them by
    position would give away samples that stand in order of membership. In the result true_positives count right "in"
    guesses, and false_positives wrong ones. ValueError for labels that no fair coins would give.
    """
    values = refuse_nan(as_scores(scores, "scores"), "scores")
    member = as_labels(labels, values.size)
    check_levels(delta, confidence)
    n, inside = values.size, int(member.sum())
    if abs(inside - n / 2) > 2.5 * math.sqrt(n) + 0.5:
        raise ValueError(f"labels must be fair coin flips, but {inside} of {n} samples are members")
    numbers = _guess_numbers(guesses, n)
    order = np.lexsort((np.random.default_rng(random_state).random(n), values))
    level = (1 - confidence) / len(numbers)
    # [k]: members among the k lowest scores.
    members_below = np.append(0, np.cumsum(member[order]))

    def right_guesses(r: int) -> tuple[int, int]:
        """How many of r guesses are right: of "in", of "out"."""
        return inside - int(members_below[n - (r + 1) // 2]), r // 2 - int(members_below[r // 2])

    epsilon, r = max((_one_run_bound(sum(right_guesses(r)), r, n, delta, level), r) for r in numbers)
    right_in, right_out = right_guesses(r)
    called_in, called_out = (r + 1) // 2, r // 2
    rule = Rule(
        threshold=float(values[order[n - called_in]]),
        true_positives=right_in,
        n_members=right_in + called_out - right_out,
        false_positives=called_in - right_in,
        n_nonmembers=called_in - right_in + right_out,
    )
    ceiling = max(_one_run_bound(r, r, n, delta, level) for r in numbers)
    return bound_of(rule, epsilon, None, ceiling, delta, confidence, "one run", len(numbers), random_state)


def one_run_p_value(right: int, guesses: int, n: int, epsilon: float, delta: float = 0.0) -> float:
    """Bound on the chance of `right` or more right guesses of membership, of `guesses` made, if (epsilon, delta) holds.

    With f(v) = P[Binomial(guesses, e^epsilon / (1 + e^epsilon)) >= v] it is f(right) + 2 n delta max over i of
    (f(right - i) - f(right)) / i, i from 1 to n (Steinke, Nasr and Jagielski 2023), for n samples, each
    put into training by a fair coin.
    """
    if not 0 <= right <= guesses <= n:
        raise ValueError(f"right <= guesses <= n is needed, got {right}, {guesses} and {n}")
    return _p_value(right, guesses, n, delta)(epsilon)


def _p_value(right: int, guesses: int, n: int, delta: float) -> Callable[[float], float]:
    """`one_run_p_value` as a function of epsilon; what does not depend on that is done once."""
    from scipy.special import betainc, gammaln

    if right == 0:
        return lambda epsilon: 1.0
    # From right - 1 down to 0: f(right - i) - f(right) is the sum of the first i probabilities of exactly k right ones.
    k = np.arange(right - 1, -1, -1)
    log_orders = gammaln(guesses + 1) - gammaln(k + 1) - gammaln(guesses - k + 1)

    def p_value(epsilon: float) -> float:
        p = float(betainc(right, guesses - right + 1, 1 / (1 + math.exp(-epsilon))))
        if delta > 0:
            log_wrong = -np.logaddexp(0, epsilon)
            exactly = np.exp(log_orders + k * epsilon + guesses * log_wrong)
            # For i beyond `right` only the divisor grows.
            p += 2 * n * delta * float((np.cumsum(exactly) / np.arange(1, right + 1)).max())
        return min(p, 1.0)

    return p_value


def _one_run_bound(right: int, guesses: int, n: int, delta: float, level: float) -> float:
    p_value = _p_value(right, guesses, n, delta)
    return largest_epsilon(lambda epsilon: p_value(epsilon) < level)


def _guess_numbers(guesses: int | Sequence[int] | None, n: int) -> list[int]:
    if guesses is None:
        numbers = sorted({round(g) for g in np.geomspace(min(n, max(10, n / 100)), n, 8).tolist()})
    else:
        numbers = [whole(g, "guesses", least=None) for g in np.atleast_1d(guesses)]
    if not numbers or min(numbers) < 1 or max(numbers) > n:
        raise ValueError(f"guesses must be from 1 to {n}, got {numbers}")
    return numbers
