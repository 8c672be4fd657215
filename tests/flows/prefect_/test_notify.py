"""Hooks that are notification blocks of Prefect: on a real server, with a webhook that a small HTTP server receives."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import in_process
import pytest
import scripted_run
from places import TINY

from flows.experiment import load_experiment
from flows.hooks import Hooks
from flows.prefect_.notify import message
from flows.prefect_.server import StoreServer
from flows.prefect_.session import prefect_session
from flows.run.hooks import after_failure, after_round
from flows.run.runner import run_experiment
from storage.errors import ConfigError
from storage.runs import RoundState, Run, RunState

METRICS = {"accuracy_greedy": 0.83, "accuracy_greedy_se": 0.027, "reverse_kl": 0.0584, "reverse_kl_se": 0.008}
STATE = RunState(name="demo", status="running", rounds=[RoundState(round=3, metrics=METRICS, student_sha256="a")])
KEY = "sk-abcdefghijklmnopqrstuvwxyz0123456789"


@pytest.fixture(scope="module")
def received() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a webhook, and what it has got."""
    found: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.append(json.loads(body))
            self.send_response(500 if "broken" in self.path else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", found
        server.shutdown()


@pytest.fixture(scope="module")
def root(shared_server: StoreServer, received: tuple[str, list[dict[str, Any]]]) -> Path:
    """A store whose server has a webhook that answers, one that does not, and a block that is none."""
    root = shared_server.home.parent
    with prefect_session(root, required=True):
        from prefect.blocks.notifications import CustomWebhookNotificationBlock
        from prefect.blocks.system import Secret

        for name, path in (("lab", ""), ("broken", f"/broken?key={KEY}")):
            text = {"subject": "{{subject}}", "body": "{{body}}"}
            block = CustomWebhookNotificationBlock(name=name, url=received[0] + path, json_data=text)
            block.save(name, overwrite=True)
        Secret(value="x").save("password", overwrite=True)
    return root


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path, "demo", {}, {})


def of(name: str) -> Hooks:
    hook = {"block": f"custom-webhook/{name}"}
    return Hooks.model_validate({"on_round": hook, "on_failure": hook})


@pytest.mark.usefixtures("no_prefect_of_the_users")
def test_a_block_gets_the_rounds_line_and_the_error(run: Run, root: Path, received) -> None:
    assert after_round(of("lab"), run, STATE, 3, root) is None, run.log_path("hooks").read_text()
    assert received[1][-1] == {
        "subject": "demo: round 3 is done",
        "body": "round 3:  accuracy 83.0% ± 2.7%  reverse KL 0.0584 ± 0.0080",
    }
    failed = STATE.model_copy(update={"status": "failed", "error": "the disk is full"})
    assert after_failure(of("lab"), run, failed, root) is None, run.log_path("hooks").read_text()
    assert received[1][-1] == {"subject": "demo failed in round 3", "body": "the disk is full"}


@pytest.mark.usefixtures("no_prefect_of_the_users")
def test_a_block_that_fails_is_a_warning_without_the_key_in_its_address(run: Run, root: Path) -> None:
    warning = after_round(of("broken"), run, STATE, 3, root)
    assert warning is not None and "hooks.on_round" in warning and "exit code 1" in warning
    log = run.log_path("hooks").read_text()
    assert "custom-webhook/broken" in log and "Traceback" not in log and KEY not in log, log


@pytest.mark.usefixtures("no_prefect_of_the_users")
@pytest.mark.parametrize(
    ("block", "why"),
    [
        ("custom-webhook/nobody", "the Prefect server has no block 'custom-webhook/nobody'"),
        ("no-such-type/lab", "the Prefect server has no block 'no-such-type/lab'"),
        ("secret/password", "a block of another kind"),
    ],
)
def test_a_block_that_is_not_there_is_refused_before_the_first_stage(
    root: Path, shared_server: StoreServer, tmp_path: Path, monkeypatch, block: str, why: str
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", shared_server.api_url)
    store = scripted_run.prepare_root(tmp_path / "store")
    e = scripted_run.experiment()
    e = e.model_copy(update={"hooks": Hooks.model_validate({"on_failure": {"block": block}})})
    with pytest.raises(ConfigError, match=r"hooks\.on_failure\.block: ") as raised:
        run_experiment(e, name="one", root=store, workers=in_process.InProcess())
    assert why in str(raised.value)
    assert not any(state.stages for state in Run.open(store, "one").state.rounds)


def test_a_block_in_a_config(tmp_path: Path) -> None:
    assert load_experiment(TINY, ["hooks.on_round.block=slack-webhook/lab"]).hooks.on_round
    with pytest.raises(ConfigError, match=r"hooks\.on_round"):
        load_experiment(TINY, ["hooks.on_round.block=lab"])


def test_a_round_that_was_not_evaluated_has_a_line_too() -> None:
    assert message({"OPD_RUN": "demo", "OPD_ROUND": "2"}, {}) == ("demo: round 2 is done", "round 2:")
