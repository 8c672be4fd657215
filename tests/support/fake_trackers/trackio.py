"""The part of trackio that its adapter uses; every call is recorded in `calls`. It prints, as the real one does."""

calls = []


class Run:
    def log(self, metrics, step):
        calls.append(("log", metrics, step))

    def finish(self):
        print("* Run finished")
        calls.append(("finish",))


def init(*, project, name, group, space_id, config, resume, embed, auto_log_gpu, auto_log_cpu):
    print("* Trackio project initialized")
    calls.append(("init", {"name": name, "group": group, "config": config, "resume": resume}))
    return Run()
