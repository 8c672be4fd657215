"""The part of wandb that its adapter uses; every call is recorded in `calls`."""

calls = []
served = {}
"""What a service holds: of a run's id the steps of its history."""


class Settings(dict):
    pass


class Run:
    def __init__(self, id, mode):
        self.history = served.setdefault(id, []) if mode == "online" else []
        self.step = self.history[-1] + 1 if self.history else 0

    def define_metric(self, name, step_metric=None):
        calls.append(("define", name, step_metric))

    def log(self, values, step=None):
        calls.append(("log", values, step))
        self.step = self.step if step is None else step
        self.history.append(self.step)
        self.step += 1

    def finish(self, exit_code=0):
        calls.append(("finish", exit_code))


def init(*, project, entity, name, group, id, resume, mode, dir, config, settings):
    calls.append(("init", {"name": name, "group": group, "id": id, "resume": resume, "mode": mode, "config": config}))
    return Run(id, mode)
