"""Bundled data sets for visual questions and captions, with a split for tuning and a split for reported figures."""

from untrigger.data.catalog import Part, Split, SplitName, Task, load, names, parts_of, rows_of_part, save, task_of

__all__ = ["Part", "Split", "SplitName", "Task", "load", "names", "parts_of", "rows_of_part", "save", "task_of"]
