"""Data sets for visual questions and captions, with a split for tuning and a split for reported figures."""

from untrigger.data.catalog import Part, Split, SplitName, Task, load, names, parts_of, rows_of_part, save, task_of
from untrigger.data.own import METRICS, USUAL_METRIC, check_no_shared_image, own_data, own_rows

__all__ = [
    "METRICS",
    "USUAL_METRIC",
    "Part",
    "Split",
    "SplitName",
    "Task",
    "check_no_shared_image",
    "load",
    "names",
    "own_data",
    "own_rows",
    "parts_of",
    "rows_of_part",
    "save",
    "task_of",
]
