"""`attr-batch validate`: is the attribution right? Retrainings decide."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from attr_batch.estimators import Entry
from attr_batch.estimators.design import of_size
from attr_batch.job import Study
from attr_batch.spec import JobSpec

ORACLE = "oracle"


def oracle(spec: JobSpec, n: int) -> Study:
    """Return the retrainings that the linear datamodeling score needs: one size after the other."""
    entries = tuple(_subsets(spec, n))
    return Study(ORACLE, entries, spec.validation.oracle, streams=ORACLE)


def _subsets(spec: JobSpec, n: int) -> Iterator[Entry]:
    index = 0
    for subsets in spec.validation.subsets:
        size = int(subsets.alpha * n + 1e-9)
        chosen = list(islice(of_size(n, size, spec.seed), subsets.count))
        for replicate in range(subsets.seeds):
            for coalition in chosen:
                yield Entry("oracle", index, coalition, "holdout", None, 0, replicate, None)
                index += 1
