"""Supervised subprocesses that serve a stream of jobs."""
