"""Models of scvi-tools on cells that are split over ranks before the model is made; see docs/scvi.md.

Splitting batches needs nothing of this: every rank has all the cells, and `strategy="distopt"` does the rest. Where a
rank is to hold only its own cells, `split` gives them to it, `by_rows` is the strategy, and `sample_posterior` and
`export_posterior` bring results together.
"""

from distopt.scvi.cells import align_, cell_numbers, split
from distopt.scvi.posterior import export_posterior, gather_cells, sample_posterior
from distopt.scvi.row_strategy import by_rows, plate_of_cells
from distopt.scvi.same import DifferentModelError, check_same

__all__ = [
    "DifferentModelError",
    "align_",
    "by_rows",
    "cell_numbers",
    "check_same",
    "export_posterior",
    "gather_cells",
    "plate_of_cells",
    "sample_posterior",
    "split",
]
