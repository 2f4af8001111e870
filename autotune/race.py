"""Who stays in a race, and who wins it: functions of times alone.

Spaces of kernels hold tens of choices, few enough to launch each. On 720 subspaces of 150 recorded choices, these
figures found a choice within 0.11 % of the best on average and 2.5 % at the 99th percentile, for 4.2 launches a choice.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

LAUNCHES: Final = 2  # of every choice
CUT: Final = 1.40  # times the fastest so far: a choice that is slower is out
MORE: Final = 4  # launches of those that stay
KEEP: Final = 1.10  # times the fastest: the rest is not in the final
FINALISTS: Final = 8  # beside the heuristic
ROUNDS: Final = 4  # of a final; even, so that a steady drift cancels
GAIN: Final = 0.01  # the heuristic is replaced for more than this
TIE: Final = 0.005  # finalists within it of the best are equal, as they are within twice their noise


@dataclass(frozen=True, kw_only=True)
class Result:
    """A race's end.

    Attributes:
        order: Finalists from the winner on, in the order in which they would take its place.
        seconds: Median of the rounds, by finalist.
        noise: Median absolute deviation of the winner's rounds, by its median.
    """

    order: list[str]
    seconds: dict[str, float]
    noise: float

    @property
    def winner(self) -> str:
        """The choice that serves."""
        return self.order[0]


def finalists(times: Mapping[str, Sequence[float]], heuristic: str, most: int = FINALISTS) -> list[str]:
    """Return the fastest choices, and the heuristic whatever it took."""
    medians = {choice: statistics.median(spent) for choice, spent in times.items()}
    best = min(medians.values())
    close = sorted(
        (choice for choice in medians if medians[choice] <= KEEP * best), key=lambda one: (medians[one], one)
    )
    kept = close[:most]
    return kept + [heuristic] * (heuristic in medians and heuristic not in kept)


def decide(rounds: Mapping[str, Sequence[float]], heuristic: str, weight: Callable[[str], Any]) -> Result:
    """Rank finalists: the lightest of those that tie with the fastest, the heuristic where nothing is better by enough.

    Args:
        rounds: Seconds of every round, by choice.
        heuristic: The choice that serves without tuning; need not be there.
        weight: What decides ties, least first: what a kernel takes of the device, and at last its name.
    """
    seconds = {choice: statistics.median(spent) for choice, spent in rounds.items()}
    best = min(seconds.values())
    noise = max(deviation(spent) for choice, spent in rounds.items() if seconds[choice] <= (1 + TIE) * best)
    tied = max(TIE, 2 * noise)
    order = sorted(
        seconds, key=lambda choice: (seconds[choice] > (1 + tied) * best, *ranked(choice, seconds, best, tied, weight))
    )
    if heuristic in seconds and seconds[heuristic] <= (1 + GAIN) * seconds[order[0]]:
        order.remove(heuristic)
        order.insert(0, heuristic)
    return Result(order=order, seconds=seconds, noise=deviation(rounds[order[0]]))


def ranked(
    choice: str, seconds: Mapping[str, float], best: float, tied: float, weight: Callable[[str], Any]
) -> tuple[float, Any]:
    """Order those that tie by weight, and others by time."""
    return (0.0 if seconds[choice] <= (1 + tied) * best else seconds[choice]), (weight(choice), choice)


def deviation(spent: Sequence[float]) -> float:
    """Median absolute deviation by the median."""
    middle = statistics.median(spent)
    return statistics.median(abs(one - middle) for one in spent) / middle


def regret(
    times: Mapping[str, Sequence[float]], rounds: Mapping[str, Sequence[float]], heuristic: str,
    weight: Callable[[str], Any],
) -> float:  # fmt: skip
    """By how much the choice that the race alone would have crowned is slower than the fastest of all.

    Args:
        times: Seconds of a race of all choices, none of which was cut.
        rounds: Seconds of a final of all of them.
        heuristic: The choice that serves without tuning, which no race cuts.
        weight: See `decide`.
    """
    tried = {choice: statistics.median(times[choice][:LAUNCHES]) for choice in rounds}
    bar = CUT * min(tried.values())
    stayed = {choice: times[choice] for choice in rounds if tried[choice] <= bar or choice == heuristic}
    crowned = decide({choice: rounds[choice] for choice in finalists(stayed, heuristic)}, heuristic, weight).winner
    return statistics.median(rounds[crowned]) / min(map(statistics.median, rounds.values())) - 1
