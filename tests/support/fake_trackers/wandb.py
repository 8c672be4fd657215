"""The part of wandb that its adapter uses; every call is recorded in `calls`."""

calls = []


class Settings(dict):
    pass


class Run:
    def define_metric(self, name, step_metric=None):
        calls.append(("define", name, step_metric))

    def log(self, values, step=None):
        calls.append(("log", values, step))

    def finish(self, exit_code=0):
        calls.append(("finish", exit_code))


def init(*, project, entity, name, group, id, resume, mode, dir, config, settings):
    calls.append(("init", {"name": name, "group": group, "id": id, "resume": resume, "mode": mode, "config": config}))
    return Run()
