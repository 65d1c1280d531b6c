"""Bundled data sets for both tasks, in a split to tune on and a split to report on."""

from untrigger.data.catalog import Split, SplitName, Task, load, names, save, task_of

__all__ = ["Split", "SplitName", "Task", "load", "names", "save", "task_of"]
