"""Evidently's report of embeddings: our two-sample test as a metric of its own.

Evidently's own embedding metrics draw a t-SNE at every run and alarm at levels that nobody set.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from monitoring.windows import PERMUTATIONS, compare_windows


@cache
def name_metric() -> Any:
    """The metric's class: p of the test of `monitoring.windows`, and a test that p is above a level.

    It takes `columns` (of the embedding), `level` (p at or below is drift) and `permutations`. The class is
    made when it is asked for, since it is a subclass of Evidently's, whose import takes seconds.
    """
    from evidently.core.metric_types import BoundTest, SingleValue, SingleValueCalculation, SingleValueMetric
    from evidently.core.report import Context
    from evidently.legacy.renderers.html_widgets import CounterData, counter
    from evidently.tests import gt

    class EmbeddingWindow(SingleValueMetric):
        columns: list
        level: float
        permutations: int = PERMUTATIONS

        def _default_tests_with_reference(self, context: Context) -> list[BoundTest]:
            return [gt(self.level).bind_single(self.get_fingerprint())]

    class Calculation(SingleValueCalculation[EmbeddingWindow]):  # Evidently finds it by the metric's class
        def calculate(self, context: Context, current_data: Any, reference_data: Any) -> SingleValue:
            asked = self.metric
            both = (data.as_dataframe()[asked.columns].to_numpy() for data in (reference_data, current_data))
            old, new = both
            _, p = compare_windows(old, new, asked.permutations, 0)
            told, about = self.result(p), f"{len(new)} subjects against {len(old)}; level {asked.level:.2g}"
            told.widget = [counter(counters=[CounterData(about, f"p {p:.2g}")], title=self.display_name())]
            return told

        def display_name(self) -> str:
            return f"Embeddings: two-sample test of {len(self.metric.columns)} principal axes"

    return EmbeddingWindow
