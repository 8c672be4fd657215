"""The part of mlflow that its adapter uses; every call is recorded in `calls`."""

from types import SimpleNamespace

calls = []


class MlflowClient:
    def __init__(self, tracking_uri):
        calls.append(("client", tracking_uri))

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return "7"

    def create_run(self, experiment_id, run_name, tags):
        calls.append(("create", experiment_id, run_name, tags))
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def update_run(self, run_id, status):
        calls.append(("update", run_id, status))

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(metrics) <= 1000 and len(params) <= 100  # what the real one refuses
        calls.append(("batch", run_id, list(metrics), list(params)))

    def set_terminated(self, run_id, status):
        calls.append(("end", run_id, status))
