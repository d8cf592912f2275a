"""Evaluation tasks: published datasets and tasks over files, by name in `registry.TASKS`."""
