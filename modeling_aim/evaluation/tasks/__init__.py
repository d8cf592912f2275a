"""Evaluation tasks: published data sets and tasks over files, by name in `registry.TASKS`."""
