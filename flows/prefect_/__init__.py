"""Prefect around a run: flow and tasks, its server, schedules."""
