"""`opd export --push`: to a hub on the loopback interface, by the library that talks to the real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest
from hub_server import TOKEN, Hub, served
from opd_cli import Result, in_this_process, opd


@pytest.fixture
def hub() -> Iterator[Hub]:
    with served() as found:
        yield found


@pytest.fixture
def push(monkeypatch, capsys, example_store, tmp_path, hub):
    """Calls the command in this process, as a user with this token of this hub."""
    monkeypatch.setattr(hub_constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)  # an engine in this process sets it
    monkeypatch.delenv("HF_TOKEN", raising=False)

    opd = in_this_process(monkeypatch, capsys, example_store)

    def call(*args: object, token: str | None = TOKEN) -> Result:
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        return opd("export", "demo", *args)

    return call


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_student_is_committed_to_the_hub_that_the_environment_names(
    hub, example_store, tmp_path, monkeypatch
) -> None:
    target = tmp_path / "student"
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # an engine in this process sets it for what it starts
    command = ["export", "demo", target, "--push", "acme/pupil", "--private"]
    said = json.loads(opd(*command, "--json", root=example_store).stdout)
    assert said["hub"] == f"{hub.url}/acme/pupil" and hub.private == {"acme/pupil": True}
    assert hub.repos["acme/pupil"] == content(target) and "model.safetensors" in hub.repos["acme/pupil"]
    assert set(hub.cards) == {(target / "README.md").read_text()}  # the hub checks its front matter
    assert hub.messages == [f"student of 'demo' round 2, weights sha256 {said['student_sha256'][:16]}"]


@pytest.mark.parametrize(
    ("args", "token", "message"),
    [
        (["--push", "acme/pupil"], None, "no token of the Hub; set HF_TOKEN"),
        (["--push", "acme/pupil"], "hf_other", "does not take the token"),
        (["--push", "pupil"], TOKEN, "write OWNER/NAME"),
        (["--push", "acme/a/b"], TOKEN, "write OWNER/NAME"),
        (["--private"], TOKEN, "goes with --push"),
    ],
)
def test_what_the_hub_would_not_take_is_refused_before_anything_is_exported(
    args, token, message, push, hub, tmp_path
) -> None:
    code, out, err = push(tmp_path / "student", *args, token=token)
    assert code == 2 and message in err and out == "" and "hf_other" not in err
    assert not (tmp_path / "student").exists() and not hub.repos


def test_a_public_repository_is_not_taken_for_a_private_one(push, hub, tmp_path) -> None:
    hub.create("acme/pupil", private=False)
    code, out, err = push(tmp_path / "student", "--push", "acme/pupil", "--private")
    assert code == 2 and "acme/pupil exists and is public" in err and out == ""
    assert not (tmp_path / "student").exists() and hub.repos == {"acme/pupil": {}}
    assert push(tmp_path / "student", "--push", "acme/pupil").code == 0
    assert hub.repos["acme/pupil"] and hub.private == {"acme/pupil": False}


def test_a_private_repository_that_exists_gets_a_commit_and_stays_private(push, hub, tmp_path) -> None:
    hub.create("acme/pupil", private=True)
    for folder, more in (("one", ["--private"]), ("two", [])):
        assert push(tmp_path / folder, "--push", "acme/pupil", *more).code == 0
        assert hub.repos["acme/pupil"] == content(tmp_path / folder) and hub.private == {"acme/pupil": True}


def test_a_folder_that_is_not_free_is_refused_before_the_hub_is_asked(push, hub, tmp_path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "mine").write_text("keep")
    code, _, err = push(tmp_path / "student", "--push", "acme/pupil")
    assert code == 2 and "not empty" in err and not hub.asked


def test_an_upload_that_fails_leaves_the_folder_and_says_how_to_repeat_it(push, hub, tmp_path) -> None:
    hub.refused.add("/api/models/acme/pupil/preupload/main")
    code, out, err = push(tmp_path / "student", "--push", "acme/pupil")
    assert code == 1 and f"hf upload acme/pupil {tmp_path / 'student'}" in err and TOKEN not in err
    assert "model.safetensors" in content(tmp_path / "student") and "is in" in out
