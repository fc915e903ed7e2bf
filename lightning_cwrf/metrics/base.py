"""The base class of the membership metrics, and their registry. Imports no metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_cwrf.checks import check_integer
from lightning_cwrf.metrics.functional.intervals import Interval
from lightning_cwrf.metrics.functional.roc import check_scores, count_scores
from lightning_cwrf.registry import Registry

M = TypeVar("M", bound="type[MembershipMetric]")


class AuditContext(NamedTuple):
    """What the metrics of an audit depend on: the model's test accuracy, on how many examples, and the settings.

    ``sync_on_compute`` is off: in a distributed training, every process audits all examples.
    """

    accuracy: float
    accuracy_examples: int | None = None
    confidence: float = 0.95
    seed: int = 0
    sync_on_compute: bool = False

    @property
    def common(self) -> dict[str, Any]:
        """The arguments of every metric."""
        return {"seed": self.seed, "sync_on_compute": self.sync_on_compute}


class MembershipMetric(Metric):
    """Base of the metrics over scores ``(n,)`` and ``is_member`` ``(n,)`` bool, higher score = more likely a member.

    ``compute()`` returns a scalar tensor, :meth:`interval` a confidence interval and :meth:`p_value` a test against
    chance, each over all processes. A metric is a class with these functions of ``(scores, is_member)``, registered by
    :func:`register_metric`; from then on audits report it.

    Attributes:
        value_function: the statistic, a scalar tensor.
        interval_function: its bounds; takes ``confidence=`` too.
        p_value_function: a one-sided test against chance. None: the metric has none.
        settings: names of attributes that all three functions take as keyword arguments.
        has_shadow_interval: whether an audit can estimate its spread over other shadow models.
        uses_accuracy: whether :meth:`for_audit` uses the accuracy of the audited model. An audit of many models makes
            a metric once where it does not.

    Args:
        seed: of the split of :class:`EpsilonLowerBound`; the other metrics are deterministic.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    >>> import torch
    >>> with METRICS.temporary():
    ...     @register_metric("mean_gap")
    ...     class MeanGap(MembershipMetric):
    ...         value_function = staticmethod(lambda scores, is_member: scores[is_member].mean())
    ...         interval_function = staticmethod(lambda scores, is_member, confidence: (0.0, 1.0))
    ...     metric = MeanGap()
    ...     metric.update(torch.tensor([0.5, 0.0]), torch.tensor([True, False]))
    ...     metric.compute(), metric.interval(), metric.p_value()
    (tensor(0.5000), Interval(low=0.0, high=1.0), None)
    """

    value_function: ClassVar[Callable[..., Tensor]]
    interval_function: ClassVar[Callable[..., tuple[Tensor | float, Tensor | float]]]
    p_value_function: ClassVar[Callable[..., float] | None] = None
    settings: ClassVar[tuple[str, ...]] = ()
    has_shadow_interval: ClassVar[bool] = True
    uses_accuracy: ClassVar[bool] = True
    name: ClassVar[str]

    is_differentiable = False
    full_state_update = False
    higher_is_better = False
    scores: list[Tensor]
    is_member: list[Tensor]

    def __init__(self, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("seed", seed)
        self.seed = seed
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("is_member", default=[], dist_reduce_fx="cat")

    @classmethod
    def for_audit(cls, context: AuditContext) -> dict[str, MembershipMetric]:
        """The metrics of this class that an audit measures each attack with, by the name of their estimate."""
        return {cls.name: cls(**context.common)}

    def update(self, scores: Tensor, is_member: Tensor) -> None:
        """Add examples.

        Raises:
            TypeError: scores or ``is_member`` that are not tensors.
            ValueError: wrong shapes, an ``is_member`` that is not bool, or NaN scores (which).
        """
        check_scores(scores, is_member)
        self.scores.append(scores.detach())
        self.is_member.append(is_member)

    def compute(self) -> Tensor:
        """The metric as a scalar float64 tensor.

        Raises:
            ValueError: there are no members, or no non-members.
        """
        return self._value(*self._data())

    def value_of(self, scores: Tensor, is_member: Tensor) -> Tensor:
        """The metric of these examples alone: as ``reset``, ``update`` and ``compute``, and faster.

        Raises:
            TypeError, ValueError: as :meth:`update` and :meth:`compute`.
        """
        cls = type(self)
        if cls.update is MembershipMetric.update and cls.compute is MembershipMetric.compute:
            check_scores(scores, is_member)
            return self._value(scores, is_member)
        self.reset()
        self.update(scores, is_member)
        found: Tensor = self.compute()
        return found

    def interval(self, confidence: float = 0.95) -> Interval:
        """A two-sided confidence interval of what :meth:`compute` estimates, over other examples like these.

        ``docs/numbers.md`` describes each construction, its coverage in simulation, and what it does not cover.
        """
        with self._synced():
            return self._interval(*self._data(), confidence)

    def p_value(self) -> float | None:
        """One-sided test against chance: the probability of so high a value if members and non-members do not differ.

        None where the metric has no such test.
        """
        if self.p_value_function is None:
            return None
        with self._synced():
            return self.p_value_function(*self._data(), **self._settings())

    def chance(self, nonmembers: int) -> float | None:
        """The mean value of an attack without any signal, at this number of non-members; None: it is not known."""
        return None

    @property
    def note(self) -> str | None:
        """What the number of examples cannot show, in a sentence, or None."""
        return None

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several, by default that of :meth:`compute`; as for every torchmetrics metric.

        Args:
            val: one or several results of ``compute`` or ``forward``.
            ax: matplotlib axes to plot into.

        Returns:
            The figure and its axes.
        """
        return self._plot(val, ax)

    def _value(self, scores: Tensor, is_member: Tensor) -> Tensor:
        return self.value_function(scores, is_member, **self._settings())

    def _interval(self, scores: Tensor, is_member: Tensor, confidence: float) -> Interval:
        low, high = self.interval_function(scores, is_member, confidence=confidence, **self._settings())
        return Interval(float(low), float(high))

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.settings}

    def _data(self) -> tuple[Tensor, Tensor]:
        if isinstance(self.scores, list) and not self.scores:
            raise ValueError(f"{type(self).__name__} has no examples: call update(scores, is_member) first.")
        return dim_zero_cat(self.scores), dim_zero_cat(self.is_member)

    @contextmanager
    def _synced(self) -> Iterator[None]:
        # torchmetrics synchronises compute() only; other readers of the states have to do it.
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            yield


def of_counts(interval: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    """An ``interval_function`` from an interval of :class:`~lightning_cwrf.metrics.functional.roc.ScoreCounts`."""

    def of_scores(scores: Tensor, is_member: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        return interval(count_scores(scores, is_member), **settings)

    return staticmethod(of_scores)


METRICS: Registry[type[MembershipMetric]] = Registry("metric")
"""Every registered metric."""


def register_metric(name: str) -> Callable[[M], M]:
    """A decorator that registers a subclass of :class:`MembershipMetric`, which every audit then reports.

    Raises:
        TypeError: a name that is not a string.
        ValueError: another metric has the name.
    """
    METRICS.check_name(name)

    def register(metric: M) -> M:
        METRICS.add(name, metric)
        metric.name = name
        return metric

    return register


def available_metrics() -> list[str]:
    """The names of the registered metrics."""
    return METRICS.names()
