"""The supervisor's promises: answers in order, crashes contained, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from places import PLUGINS

from storage.errors import ConfigError, InputError, OpdError
from tasks.workers import jobs
from tasks.workers.pool import WorkerDied, WorkerFailed, WorkerPool
from tasks.workers.runtime import RuntimeConfig, ScorerRuntime

sys.path.insert(0, str(PLUGINS))
from scripted_jobs import ScriptedItem, ScriptedJob


def pool(tmp_path: Path, **runtime) -> WorkerPool:
    config = RuntimeConfig(device="cpu", threads=1, **runtime)
    return WorkerPool(config, tmp_path / "logs", ("scripted_worker",), str(PLUGINS))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_one_warm_worker_serves_a_stream_of_jobs(tmp_path):
    seen = []
    with pool(tmp_path) as workers:
        first = [
            workers.run("scorer", ScriptedJob(do="echo", value=i), lambda done, total: seen.append((done, total)))
            for i in range(5)
        ]
        second = workers.run("scorer", ScriptedJob(do="echo"))
        workers.stage_done()
    assert [r.value for r in first] == [0, 1, 2, 3, 4]
    assert second.served == 6 and second.pid == first[0].pid
    assert seen == [(1, 1)] * 5
    assert not alive(first[0].pid)


def test_warm_workers_rest_once_before_a_training(tmp_path):
    """And go on after one that failed. The trainer itself, and a worker that is at a job, do not."""
    with pool(tmp_path) as workers:
        first = workers.run("scorer", ScriptedJob(do="rests"))
        for _ in range(2):
            assert workers.run("trainer", ScriptedJob(do="rests")).value == 0
        second = workers.run("scorer", ScriptedJob(do="rests"))
        workers.run("trainer", ScriptedJob(do="rests"))
        third = workers.run("scorer", ScriptedJob(do="rests"))
        items = [ScriptedItem(shard) for shard in range(4)]
        share = threading.Thread(
            target=workers.share, args=("scorer", ScriptedJob(do="shards", path=str(tmp_path), pause=0.5), items)
        )
        share.start()
        while not (tmp_path / "there-0").exists():
            time.sleep(0.01)
        workers.run("trainer", ScriptedJob(do="rests"))
        assert share.is_alive()
        share.join()
        last = workers.run("scorer", ScriptedJob(do="rests"))
    assert [found.value for found in (first, second, third, last)] == [0, 1, 2, 2]
    assert first.pid == last.pid and last.served == 5


@pytest.mark.parametrize(("length", "there"), [(20, True), (60, False), (200, False)])
def test_a_long_folder_for_temporary_files_leaves_room_for_sockets(tmp_path, monkeypatch, length, there):
    """A socket's path has at most 107 characters. Nothing stays in either place, also of a run that was killed."""
    with tempfile.TemporaryDirectory(prefix="opd-", dir="/tmp") as short:
        folder = Path(short, "x" * (length - len(short) - 1))
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        left = [place / ended_process_name() for place in (folder, Path("/tmp"))]
        for path in left:
            path.mkdir()
        with pool(tmp_path) as workers:
            own = Path(workers.run("scorer", ScriptedJob(do="socket")).folder)
            assert own.is_dir() and own.parent == (folder if there else Path("/tmp"))
        assert not any(path.exists() for path in (own, *left))


def ended_process_name() -> str:
    code = "import storage.disk.files; print(storage.disk.files.temporary_name())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_metrics_of_a_job_reach_whoever_listens(tmp_path):
    """The first and the last always; in between not more often than five times a second."""
    metrics = [{"loss": 3.0 - step, "entropy": None} for step in range(3)]
    seen = []
    with pool(tmp_path) as workers:
        listen = lambda done, total, metrics=None: seen.append((done, metrics))  # noqa: E731
        workers.run("scorer", ScriptedJob(do="train", metrics=metrics, pause=0.3), listen)
        assert seen == [(1, metrics[0]), (2, metrics[1]), (3, metrics[2])]
        seen.clear()
        workers.run("scorer", ScriptedJob(do="train", metrics=metrics * 20, pause=0.001), listen)
        assert seen[0] == (1, metrics[0]) and seen[-1] == (60, metrics[2]) and len(seen) < 10
        seen.clear()
        workers.run("scorer", ScriptedJob(do="echo", value=1), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)]


def test_workers_share_a_queue_and_results_keep_the_order_of_the_items(tmp_path):
    seen = []
    with pool(tmp_path, scorer=ScorerRuntime(workers=2)) as workers:
        items = [ScriptedItem(shard) for shard in range(5, 25)]
        job = ScriptedJob(do="shards", path=str(tmp_path), pause=0.5)
        results, answers = workers.share("scorer", job, items, seen.append)
    assert [result.shard for result in results] == list(range(5, 25))
    assert sum(answer.value for answer in answers) == 20 and len(answers) == 2
    assert {result.pid for result in results} == {answer.pid for answer in answers if answer.value}
    assert seen == sorted(seen) and seen[-1] == 20


def test_an_idle_worker_is_not_started(tmp_path):
    with pool(tmp_path, scorer=ScorerRuntime(workers=3)) as workers:
        _, answers = workers.share("scorer", ScriptedJob(do="shards", path=str(tmp_path)), [ScriptedItem(0)])
        assert len(answers) == 1
        assert workers.share("scorer", ScriptedJob(do="shards"), []) == ([], [])


def test_unfinished_items_of_a_dead_worker_are_done_by_another(tmp_path):
    (tmp_path / "die-3").touch()
    seen = []
    with pool(tmp_path) as workers:
        items = [ScriptedItem(shard, size=10) for shard in range(6)]
        results, answers = workers.share("scorer", ScriptedJob(do="shards", path=str(tmp_path)), items, seen.append)
    assert [result.shard for result in results] == list(range(6))
    assert len({result.pid for result in results}) == 2 and answers[0].value == 4  # 2 and 3 were under way
    assert seen[-1] == 60


def test_an_item_that_kills_its_worker_ends_the_stage_and_is_named(tmp_path):
    (tmp_path / "kill-3").touch()
    with pool(tmp_path) as workers, pytest.raises(WorkerDied) as error:
        items = [ScriptedItem(shard, size=10) for shard in range(6)]
        workers.share("scorer", ScriptedJob(do="shards", path=str(tmp_path)), items)
    first = str(error.value).splitlines()[0]
    assert "shards 2, 3 (20 samples) not finished" in first and "the last of 2 tries" in first


NOW = jobs.PROTOCOL
SENT = f'"protocol":{NOW}'.encode()


def test_a_message_that_does_not_fit_names_the_field_and_both_protocols(tmp_path):
    wrong = jobs.raw(ScriptedItem(0))
    with pytest.raises(jobs.JobMismatch, match=rf"`int`, got `str` - at `\$\.shard`.*protocol 7.*protocol {NOW}"):
        jobs.decode(type(wrong)(bytes(wrong).replace(b'"shard":0', b'"shard":"a"')), 7)
    with pytest.raises(jobs.JobMismatch, match=rf"protocol 7.*protocol {NOW}"):
        jobs.decode(wrong, 7)
    with pytest.raises(jobs.JobMismatch, match=r"missing required field `size`|unknown field"):
        jobs.decode(type(wrong)(b'{"type":"ShardDone","shard":1,"bytes":3}'))
    with pool(tmp_path) as workers, pytest.raises(OpdError, match=r"unknown field `valeu`"):
        job = ScriptedJob(do="echo")
        worker = workers._worker("scorer", 0)
        worker._jobs += 1
        sent = type(wrong)(bytes(jobs.raw(job)).replace(b'"value"', b'"valeu"'))
        worker._send(jobs.Do(worker._jobs, jobs.PROTOCOL, str(tmp_path / "log"), sent))
        while True:
            for _, message in worker._receive():
                if isinstance(message, jobs.Error):
                    raise worker._error(message.error)


def there(tmp_path: Path):
    return lambda shard: (tmp_path / f"there-{shard}").exists()


def test_a_death_after_the_last_shard_is_written_loses_nothing(tmp_path):
    (tmp_path / "die-written-2").touch()
    job, items = ScriptedJob(do="shards", path=str(tmp_path)), [ScriptedItem(shard, size=10) for shard in range(3)]
    with pool(tmp_path, retries=0) as workers:
        results, answers = workers.share("scorer", job, items, written=there(tmp_path))
        assert [result.shard for result in results] == [0, 1] and answers == []
        assert workers.each("scorer", [(job, items)], written=lambda _, shard: there(tmp_path)(shard)) == []
    assert "nothing is lost" in (tmp_path / "logs" / "scorer.log").read_text()


def test_a_death_between_shards_names_those_that_are_not_begun(tmp_path):
    """The worker dies with two written shards in hand; without a retry the others stay."""
    (tmp_path / "there-1").touch()
    (tmp_path / "die-written-0").touch()
    job, items = ScriptedJob(do="shards", path=str(tmp_path)), [ScriptedItem(shard, size=10) for shard in range(5)]
    with pool(tmp_path, retries=0) as workers, pytest.raises(WorkerDied) as error:
        workers.share("scorer", job, items, written=there(tmp_path))
    assert "shards 2, 3, 4 (30 samples) not begun" in str(error.value).splitlines()[0]


def test_jobs_of_one_worker_each_go_to_different_workers(tmp_path):
    """A worker that dies in the middle does its whole job again, and no other's."""
    (tmp_path / "die-5").touch()
    counted = [0, 0, 0]

    def count(number: int, done: int) -> None:
        counted[number] = done

    work = [
        (ScriptedJob(do="shards", path=str(tmp_path), pause=0.5), [ScriptedItem(n) for n in range(start, start + 3)])
        for start in (0, 3, 6)
    ]
    with pool(tmp_path, scorer=ScorerRuntime(workers=2)) as workers:
        answers = workers.each("scorer", work, count)
    assert [answer.value for answer in answers] == [3, 3, 3] and counted == [3, 3, 3]
    assert len({answer.pid for answer in answers}) > 1


def test_an_error_of_one_such_job_ends_the_others(tmp_path):
    (tmp_path / "kill-0").touch()
    work = [(ScriptedJob(do="shards", path=str(tmp_path), pause=0.1), [ScriptedItem(n)]) for n in range(60)]
    with pool(tmp_path, retries=0, scorer=ScorerRuntime(workers=2)) as workers, pytest.raises(WorkerDied):
        workers.each("scorer", work)
    assert not (tmp_path / "there-59").exists()


def test_a_late_message_of_another_job_is_not_taken_for_the_answer(tmp_path):
    seen = []
    with pool(tmp_path) as workers:
        listen = lambda done, total: seen.append(done)  # noqa: E731
        assert workers.run("scorer", ScriptedJob(do="late", value=3), listen).value == 3
    assert 99 not in seen


def test_a_worker_does_not_outlive_an_error_of_the_supervisor_in_the_middle_of_a_job(tmp_path):
    def refuse(done: int) -> None:
        raise InputError("the run's log cannot be written")

    job, items = ScriptedJob(do="shards", path=str(tmp_path)), [ScriptedItem(shard) for shard in range(4)]
    with pool(tmp_path) as workers:
        with pytest.raises(InputError, match="the run's log"):
            workers.share("scorer", job, items, refuse)
        after = workers.run("scorer", ScriptedJob(do="echo", value=7))
    assert (after.value, after.served) == (7, 1)


@pytest.mark.parametrize("spoilt", [(b'"log"', b'"logfile"'), (SENT, b'"protocol":"one"')])
def test_a_job_that_the_worker_cannot_read_names_the_field(tmp_path, monkeypatch, spoilt):
    old, new = spoilt
    whole = jobs.line
    with pool(tmp_path) as workers:
        pid = workers.run("scorer", ScriptedJob(do="echo")).pid
        monkeypatch.setattr(jobs, "line", lambda message: whole(message).replace(old, new))
        with pytest.raises(jobs.JobMismatch, match=rf"(`logfile`|at `\$\.protocol`).*read with protocol {NOW}"):
            workers.run("scorer", ScriptedJob(do="echo"))
        monkeypatch.undo()
        assert workers.run("scorer", ScriptedJob(do="echo", value=5)).value == 5
    assert not alive(pid)


def test_a_job_of_another_protocol_names_both(tmp_path, monkeypatch):
    whole = jobs.line
    newer = lambda m: whole(m).replace(SENT, b'"protocol":7,"priority":2')  # noqa: E731
    with pool(tmp_path) as workers:
        workers.run("scorer", ScriptedJob(do="echo"))
        monkeypatch.setattr(jobs, "line", newer)
        with pytest.raises(jobs.JobMismatch, match=rf"`priority` \(sent with protocol 7, read with protocol {NOW}\)"):
            workers.run("scorer", ScriptedJob(do="echo"))
        monkeypatch.undo()


def test_an_answer_that_cannot_be_sent_is_an_error_of_the_job(tmp_path):
    with pool(tmp_path) as workers, pytest.raises(WorkerFailed, match="TypeError") as error:
        workers.run("scorer", ScriptedJob(do="unsendable"))
    assert not isinstance(error.value, WorkerDied)


def test_an_interruption_comes_before_a_workers_death(tmp_path):
    """Ctrl-C in a batch system goes to all processes: a worker may be seen to die first."""
    (tmp_path / "die-2").touch()

    def interrupt() -> None:
        while (tmp_path / "die-2").exists():
            time.sleep(0.05)
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGINT)

    job, items = ScriptedJob(do="shards", path=str(tmp_path), pause=6), [ScriptedItem(shard) for shard in range(3)]
    with pytest.raises(KeyboardInterrupt), pool(tmp_path, retries=0, scorer=ScorerRuntime(workers=2)) as workers:
        threading.Thread(target=interrupt, daemon=True).start()
        workers.share("scorer", job, items)


def test_workers_that_start_when_the_run_is_interrupted_end_too(tmp_path):
    before = set(psutil.Process().children())
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), pool(tmp_path, scorer=ScorerRuntime(workers=2)) as workers:
        workers.share("scorer", ScriptedJob(do="shards", path=str(tmp_path)), [ScriptedItem(0), ScriptedItem(1)])
    deadline = time.monotonic() + 20
    while (left := set(psutil.Process().children()) - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def test_cold_workers_end_with_their_stage(tmp_path):
    with pool(tmp_path, keep_warm=False) as workers:
        result = workers.run("scorer", ScriptedJob(do="echo", value=1))
        workers.stage_done()
        assert not alive(result.pid)


def test_a_worker_that_dies_is_replaced_and_its_job_tried_again(tmp_path):
    with pool(tmp_path) as workers:
        result = workers.run("scorer", ScriptedJob(do="die_once", path=str(tmp_path / "died")))
    assert result.value == 2


def test_retries_are_bounded_and_the_error_names_the_log(tmp_path):
    with pool(tmp_path) as workers, pytest.raises(WorkerDied, match=r"killed by signal 9[\s\S]*scorer\.log"):
        workers.run("scorer", ScriptedJob(do="die"))


def test_a_users_error_keeps_its_type_and_text_and_the_worker(tmp_path):
    with pool(tmp_path) as workers:
        with pytest.raises(InputError, match=r"prompts\.jsonl:3"):
            workers.run("scorer", ScriptedJob(do="refuse"))
        assert workers.run("scorer", ScriptedJob(do="echo", value=7)).value == 7


def test_a_bug_is_reported_with_its_traceback(tmp_path):
    with pool(tmp_path) as workers, pytest.raises(WorkerFailed, match="ZeroDivisionError: a bug"):
        workers.run("scorer", ScriptedJob(do="crash"))


def test_workers_that_runs_share_stay_warm_and_log_to_each_runs_own_place(tmp_path):
    plugins = ("scripted_worker",)
    with pool(tmp_path) as workers:
        with workers.serving(workers.runtime, tmp_path / "one", plugins):
            first = workers.run("scorer", ScriptedJob(do="echo", value=1))
        (tmp_path / "two").mkdir()
        with workers.serving(workers.runtime, tmp_path / "two", plugins):
            second = workers.run("scorer", ScriptedJob(do="echo", value=2))
            with pytest.raises(WorkerFailed, match=r"two/scorer\.log"):
                workers.run("scorer", ScriptedJob(do="crash"))
    assert second.pid == first.pid
    assert "ZeroDivisionError" in (tmp_path / "two" / "scorer.log").read_text()
    assert "ZeroDivisionError" not in (tmp_path / "one" / "scorer.log").read_text()


def test_a_run_that_ends_in_an_error_leaves_the_next_one_fresh_workers(tmp_path):
    with pool(tmp_path) as workers:
        with pytest.raises(KeyError), workers.serving(workers.runtime, tmp_path / "one", workers.plugins):
            before = workers.run("scorer", ScriptedJob(do="echo", value=1))
            raise KeyError
        assert not alive(before.pid)
        with workers.serving(workers.runtime, tmp_path / "two", workers.plugins):
            assert workers.run("scorer", ScriptedJob(do="echo", value=2)).served == 1


def test_workers_are_not_shared_with_a_run_that_asks_for_others(tmp_path):
    with pool(tmp_path) as workers:
        other = RuntimeConfig(device="cpu", threads=2)
        with pytest.raises(ConfigError, match="runtime, plugins"), workers.serving(other, tmp_path, workers.plugins):
            pass


def test_a_job_past_its_time_limit_is_stopped_with_its_children(tmp_path):
    pids = tmp_path / "pids"
    with pool(tmp_path, stage_timeout=5, retries=0) as workers, pytest.raises(WorkerDied, match="stage_timeout"):
        workers.run("scorer", ScriptedJob(do="grandchild", path=str(pids)))
    assert not any(alive(int(pid)) for pid in pids.read_text().split())


def test_a_killed_supervisor_leaves_nothing_behind(tmp_path):
    pids = tmp_path / "pids"
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3])\n"
        "from tasks.workers.runtime import RuntimeConfig; from tasks.workers.pool import WorkerPool\n"
        "pool = WorkerPool(RuntimeConfig(device='cpu', threads=1), Path(sys.argv[1]), ('scripted_worker',), sys.argv[3])\n"
        "from scripted_jobs import ScriptedJob\n"
        "pool.run('scorer', ScriptedJob(do='grandchild', path=sys.argv[2]))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "logs"), str(pids), str(PLUGINS)])
    deadline = time.monotonic() + 60
    while not (pids.exists() and len(pids.read_text().split()) == 2):
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    family = [int(pid) for pid in pids.read_text().split()]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in family) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in family)


def test_a_worker_finds_a_plugin_in_the_folders_of_the_runtime(tmp_path):
    runtime = RuntimeConfig(device="cpu", threads=1, modules=(PLUGINS,))
    with WorkerPool(runtime, tmp_path / "logs", ("scripted_worker",)) as workers:
        assert workers.run("scorer", ScriptedJob(do="echo", value=3)).value == 3
