"""Secrets never persist (row 17): a canary in the environment, in a URL or in the config is in no file of the store, of Prefect's
home and of the temporary folder, and nowhere in what the commands print."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import sqlite3
import string
import subprocess
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_trials import Trials, both_forms
from opd_cli import OPD
from places import CHECKOUT, PLUGINS
from scripted_run import EXPERIMENT, MARK, NAME, WITHOUT_PANDAS, Trial
from secrets_search import places

ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Kind:
    """`text` is how it stands in a message or a config, {} for the canary; `variable` holds it in the environment."""

    prefix: str = ""
    length: int = 32
    text: str = "{}"
    variable: str | None = None

    def canary(self, name: str) -> str:
        draw = random.Random(f"canary {name}")
        return self.prefix + "".join(draw.choice(ALPHABET) for _ in range(self.length))


KINDS = {
    "HF_TOKEN": Kind("hf_", 34, variable="HF_TOKEN"),
    "OPENAI_API_KEY": Kind("sk-proj-", 40, variable="OPENAI_API_KEY"),
    "PREFECT_API_KEY": Kind("pnu_", 36, variable="PREFECT_API_KEY"),
    "opaque": Kind(text="failed for {}.", variable="MY_SERVICE_PASSWORD"),
    "quoted": Kind("a'b\"c\\d é/", 20, variable="AWS_SECRET_ACCESS_KEY"),
    "user-in-url": Kind(text="GET https://robot:{}@example.invalid/a/b failed"),
    "query-in-url": Kind(text="https://example.invalid/data?rev=1&token={}&v=2"),
    "header": Kind(text="Authorization: Bearer {}"),
    "field": Kind(text="api_key={}, retries=2"),
    "unset": Kind("hf_", 34, text="401 for {}"),
}
LEAKS = {
    "environment": 0, "prints": 0, "logs": 0, "warns": 0, "raises": 1, "raises-ours": 2, "chains": 1, "dies": 1, "supervisor": 1,
}  # fmt: skip
"""What a worker (the supervisor, for the last) does with the canary, and the run's exit code."""
CONFIGS = ("value", "name", "override", "plugin")
AFTER = (
    ("status", NAME),
    ("status", NAME, "--json"),
    ("ls", "--json"),
    ("logs", NAME),
    ("query", NAME, "SELECT * FROM rollouts"),
    ("verify", NAME),
)


class SecretRun(Trial):
    """A run by the installed command line in an environment of its own; all that it writes lies below `folder`."""

    def opd(self, *arguments: str, **environment: str) -> int:
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        paths = os.pathsep.join(map(str, (CHECKOUT, WITHOUT_PANDAS, PLUGINS)))
        kept |= {"HOME": str(home), "TMPDIR": str(self.temporary), "PYTHONPATH": paths, MARK: str(self.folder)}
        command = [str(OPD), *arguments, "--root", str(self.root)]
        with (self.folder / "output").open("ab") as output:
            return subprocess.run(command, env=kept | environment, stdout=output, stderr=output, timeout=300).returncode

    def begin(self, *more: str, config: dict | None = None, prefect: bool = True, **environment: str) -> int:
        written = self.temporary / "config.yaml"
        written.write_text(
            json.dumps(EXPERIMENT | {"plugins": ["scripted_leaks"], "policy": {"rounds": 1}} | (config or {}))
        )
        try:
            more = more if prefect else (*more, "--no-prefect")
            return self.opd("run", str(written), "--name", NAME, *more, **environment)
        finally:
            written.unlink()

    def holds_none(self, canaries: list[str]) -> None:
        assert self.orphans() == []
        assert places(canaries, self.folder) == [] and places(canaries, self.temporary) == []


def leak(run: SecretRun, how: str, kinds: list[str], name: str, prefect: bool) -> None:
    """A run that lets canaries slip, then every command that shows something of it."""
    canaries = [KINDS[kind].canary(name) for kind in kinds]
    text = " | ".join(KINDS[kind].text.format(canary) for kind, canary in zip(kinds, canaries, strict=True))
    variables = ((KINDS[kind].variable, canary) for kind, canary in zip(kinds, canaries, strict=True))
    environment = {variable: canary for variable, canary in variables if variable is not None}
    told = {"OPD_TEST_LEAK": text, "OPD_TEST_LEAK_HOW": how}
    more = ("--set", "runtime.retries=0")
    assert run.begin(*more, prefect=prefect, **environment, **told) == LEAKS[how], run.output
    if how not in ("environment", "supervisor"):  # it was said, and hidden
        written = run.output + "".join(path.read_text() for path in run.root.glob(f"runs/{NAME}/logs/*.log"))
        assert "***" in written
    for command in AFTER if LEAKS[how] == 0 else AFTER[:4]:
        assert run.opd(*command, **environment) == 0, run.output
    run.holds_none(canaries)
    run.remove()


def test_the_search_finds_what_is_packed(tmp_path: Path) -> None:
    secret = KINDS["quoted"].canary("search")
    pq.write_table(pa.table({"a": ["x" * 1000, f"in {secret}"]}), tmp_path / "a.parquet", compression="zstd")
    with closing(sqlite3.connect(tmp_path / "b.db")) as connection, connection:
        connection.execute("CREATE TABLE t (a TEXT)")
        connection.execute("INSERT INTO t VALUES (?)", (f"in {secret}",))
    (tmp_path / "c.json").write_text(json.dumps({"a": secret}))
    for shift in range(3):
        (tmp_path / f"d{shift}").write_bytes(base64.b64encode(b"x" * shift + secret.encode() + b"tail"))
    names = {"a.parquet", "b.db", "c.json", "d0", "d1", "d2"}
    assert names <= set(places([secret], tmp_path))
    assert places([KINDS["quoted"].canary("another")], tmp_path) == []


@both_forms(short=1, full=len(LEAKS) * len(KINDS))
def test_a_canary_that_slips_is_nowhere(
    template: Path, migrated: Path, trials: Trials, tmp_path: Path, count: int
) -> None:
    """With Prefect, all kinds at once in `make test`; each in each way in full."""

    def attempt(name: str) -> None:
        how, _, kind = name.partition(" ")
        run = SecretRun.of(template, tmp_path / name.replace(" ", "-"))
        shutil.copytree(migrated, run.root / "prefect")
        leak(run, how, [kind] if kind else list(KINDS), name, prefect=True)

    names = [f"{how} {kind}" for how in LEAKS for kind in KINDS] if count > 1 else ["chains"]
    trials(17, "a canary of each kind slips in each way; store, Prefect's home, output searched", names, attempt)


@both_forms(short=1, full=len(CONFIGS) * len(KINDS))
def test_a_config_with_a_canary_is_refused(template: Path, trials: Trials, tmp_path: Path, count: int) -> None:
    def attempt(name: str) -> None:
        where, kind = name.split()
        secret = KINDS[kind]
        canary = secret.canary(name)
        text = secret.text.format(canary)
        run = SecretRun.of(template, tmp_path / name.replace(" ", "-"))
        environment = {secret.variable: canary} if secret.variable else {}
        config = {
            "value": {"prompts": EXPERIMENT["prompts"] | {"train": {"kind": "file", "path": f"/data/{text}"}}},
            "name": {text: 1},
            "override": {},
            "plugin": {"plugins": [text]},
        }[where]
        more = ("--set", f"teacher.source.repo={json.dumps(text)}") if where == "override" else ()
        assert run.begin(*more, config=config, **environment) == 2, run.output
        assert "secret" in run.output and "environment" in run.output
        assert not list(run.root.glob("runs/*"))
        run.holds_none([canary])
        run.remove()

    names = [f"{where} {kind}" for where in CONFIGS for kind in KINDS]
    trials(17, "a canary of each kind in the config", names if count > 1 else ["value user-in-url"], attempt)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_a_canary_in_prefects_address_is_nowhere(template: Path, trials: Trials, tmp_path: Path) -> None:
    """The address is what Prefect itself shows and keeps."""

    def attempt(name: str) -> None:
        canary = KINDS["opaque"].canary(name)
        url = {
            "user": f"http://robot:{canary}@127.0.0.1:9/api",
            "query": f"http://127.0.0.1:9/api?token={canary}",
            "auth": "http://127.0.0.1:9/api",
        }[name]
        run = SecretRun.of(template, tmp_path / name)
        environment = {"PREFECT_API_URL": url} | ({"PREFECT_API_AUTH_STRING": canary} if name == "auth" else {})
        assert run.begin(**environment) == 0, run.output
        assert "PREFECT_API_URL=http://" in run.output
        for command in AFTER:
            assert run.opd(*command, **environment) == 0, run.output
        run.holds_none([canary])
        run.remove()

    trials(17, "a canary in PREFECT_API_URL and PREFECT_API_AUTH_STRING", ("user", "query", "auth"), attempt)
