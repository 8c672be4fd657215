"""A teacher behind a server: the values are those of the local teacher, and whatever goes wrong is an error, never a value."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scoring import model_folder, tokens
from teacher_server import TeacherServer

from storage.errors import ConfigError, CorruptArtifact, InputError
from tasks.engines.listed import ROUNDING
from tasks.engines.local import LocalModel
from tasks.engines.server import RECORDS, OtherTeacher, ServerModel, TeacherServerError
from tasks.engines.teacher import Host, Passage, ServerTeacher, Vocabulary
from tasks.signals import Ask

ROWS = 264
ASK = Ask(logprobs=True, entropy=True, top=frozenset([6, ROWS]))
SMALL = Ask(logprobs=True, top=frozenset([6]))


def passages(count: int = 7) -> list[Passage]:
    return [
        Passage(tokens("prompt", i, length=2 + i % 3), tokens("completion", i, length=3 + 2 * i)) for i in range(count)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"teacher": model_folder(root, "teacher", 2), "other": model_folder(root, "other", 3)}


@pytest.fixture(scope="module")
def local(folders: dict[str, Path]) -> LocalModel:
    return LocalModel(folders["teacher"], "float32", Host("cpu", 64))


@pytest.fixture
def server(folders: dict[str, Path]) -> Iterator[TeacherServer]:
    made = TeacherServer(folders["teacher"])
    yield made
    made.kill()


def opened(server: TeacherServer, folder: Path, store: Path, *others: TeacherServer, **settings) -> ServerModel:
    backend = ServerTeacher(model=server.name, entropy_k=settings.pop("entropy_k", 20))
    urls = [server.url, *(other.url for other in others)]
    access = {"urls": urls, "retries": 3, "backoff": 0.01, "timeout": 20, "sequences": 2, "concurrency": 3} | settings
    weights = settings.pop("weights", "weights of the teacher")
    access.pop("weights", None)
    return ServerModel(
        folder, "float32", Host("cpu", 64, settings={"server": access}, weights=weights, store=store), backend
    )


def score(model: ServerModel, asked: list[Passage], ask: Ask = SMALL, vocabulary: Vocabulary | None = None):
    model.check(asked, [f"teacher, sample {i}" for i in range(len(asked))])
    return model.score(asked, ask, vocabulary or Vocabulary(ROWS, ROWS), {})


def assert_equal(found, expected) -> None:
    """Equal values; a tail is compared as mass, which a list gives to rounding only."""
    assert found.keys() == expected.keys()
    for name in found:
        for one, other in zip(found[name], expected[name], strict=True):
            if name.endswith("tail"):
                np.testing.assert_allclose(np.exp(one), np.exp(other), atol=4 * ROUNDING, err_msg=name)
            elif name.endswith("ids"):  # equal log-probabilities may change places
                assert (one == other).mean() > 0.99, name
            elif name != "entropy":
                np.testing.assert_allclose(one, other, atol=2e-5, err_msg=name)


# --- values ----------------------------------------------------------------------------------------------------------


def test_values_are_those_of_the_local_teacher(server, folders, local, tmp_path):
    asked = passages()
    expected = local.score(asked, ASK, Vocabulary(ROWS, ROWS), {})
    model = opened(server, folders["teacher"], tmp_path, entropy_k=ROWS)
    found = score(model, asked, ASK)
    assert_equal(found, expected)
    np.testing.assert_allclose(np.concatenate(found["entropy"]), np.concatenate(expected["entropy"]), atol=1e-4)
    assert all(np.isneginf(tail).all() for tail in found[f"top{ROWS}_tail"])
    short = np.concatenate(score(opened(server, folders["teacher"], tmp_path), asked, Ask(entropy=True))["entropy"])
    assert (short < np.concatenate(expected["entropy"]) + 1e-5).all() and short.mean() > 0
    assert max(len(sequences) for sequences in server.asked) == 2


def test_only_sampled_tokens_ask_for_no_candidates(server, folders, local, tmp_path):
    asked = passages(3)
    found = score(opened(server, folders["teacher"], tmp_path), asked, Ask(logprobs=True))
    assert_equal(found, local.score(asked, Ask(logprobs=True), Vocabulary(ROWS, ROWS), {}))


def test_nothing_after_a_token_that_the_teacher_lacks_has_a_value(server, folders, local, tmp_path):
    asked = passages(4)
    asked[2].completion[3] = ROWS + 5
    found = score(opened(server, folders["teacher"], tmp_path), asked)
    expected = local.score(asked, SMALL, Vocabulary(ROWS, ROWS), {})
    own = found["logprobs"][2]
    assert np.isfinite(own[:3]).all() and np.isneginf(own[3]) and np.isnan(own[4:]).all()
    assert found["top6_valid"][2].tolist() == expected["top6_valid"][2].tolist() == [6] * 4 + [0] * 3
    np.testing.assert_allclose(found["top6_logprobs"][2], expected["top6_logprobs"][2], atol=2e-5)
    assert all(token < ROWS for request in server.asked for ids in request for token in ids)


def test_rows_that_the_student_lacks_are_no_candidates(server, folders, tmp_path):
    shared = 100
    found = score(opened(server, folders["teacher"], tmp_path), passages(3), vocabulary=Vocabulary(shared, shared))
    for ids, logprobs, valid, tail in zip(
        *(found[f"top6_{part}"] for part in ("ids", "logprobs", "valid", "tail")), strict=True
    ):
        assert (ids < shared).all() and (valid < 6).any()
        assert (np.isfinite(logprobs).sum(axis=1) == valid).all()
        np.testing.assert_allclose(np.exp(logprobs).sum(axis=1) + np.exp(tail), 1, atol=1e-6)


def test_several_servers_share_the_requests(server, folders, local, tmp_path):
    second, another = TeacherServer(folders["teacher"]), TeacherServer(folders["other"], name="something else")
    try:
        found = score(opened(server, folders["teacher"], tmp_path, second, another), passages())
        assert_equal(found, local.score(passages(), SMALL, Vocabulary(ROWS, ROWS), {}))
        assert len(server.asked) > 3 and len(second.asked) > 3 and not another.asked
    finally:
        second.kill()
        another.kill()


# --- faults ----------------------------------------------------------------------------------------------------------


def sequence(passage: Passage) -> list[int]:
    return [*passage.prompt, *passage.completion]


def probes_of(server: TeacherServer) -> int:
    """Requests that a start makes, before the first of a batch."""
    return len(server.asked)


@pytest.mark.promise(19, "teacher's server: HTTP 500, 503, 429, too late, or a broken connection, twice")
@pytest.mark.parametrize("fault", ["500", "503", "429", "slow", "drop"])
def test_a_fault_that_passes_changes_nothing(server, folders, local, tmp_path, fault):
    model = opened(server, folders["teacher"], tmp_path, timeout=0.75)
    first = probes_of(server)
    server.script = lambda number, sequences: fault if number in (first, first + 2) else None
    found = score(model, passages())
    assert_equal(found, local.score(passages(), SMALL, Vocabulary(ROWS, ROWS), {}))
    assert len(server.asked) > first + 5


@pytest.mark.promise(19, "teacher's server: HTTP 500 to one sample at every try")
def test_a_request_that_fails_is_halved_down_to_the_sequence_that_fails(server, folders, local, tmp_path):
    asked = passages(8)
    bad = sequence(asked[5])
    model = opened(server, folders["teacher"], tmp_path, sequences=8, retries=2)
    server.script = lambda number, sequences: "500" if bad in sequences else None
    with pytest.raises(TeacherServerError, match=r"sample 5: no answer at 3 tries .*HTTP 500: scripted.*opd resume"):
        score(model, asked)
    alone = [request for request in server.asked if request == [bad]]
    assert len(alone) == 3
    assert [len(request) for request in server.asked if bad in request] == [8, 4, 2, 1, 1, 1]
    server.script = lambda number, sequences: "500" if len(sequences) > 2 else None  # too much at once
    assert_equal(score(model, asked), local.score(asked, SMALL, Vocabulary(ROWS, ROWS), {}))


@pytest.mark.promise(19, "teacher's server: fewer candidates or sequences, or logits")
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("fewer", "has 5 candidates, asked for 6"),
        ("shorter", "has 0 sequences, asked for 1"),
        ("logits", "no log-probabilities; start the server with --logprobs-mode raw_logprobs"),
    ],
)
def test_less_than_was_asked_is_an_error_that_names_the_sample(server, folders, tmp_path, fault, why):
    asked = passages(4)
    bad = sequence(asked[1])
    model = opened(server, folders["teacher"], tmp_path)
    server.script = lambda number, sequences: fault if bad in sequences else None
    with pytest.raises(TeacherServerError, match=f"sample 1: the server's answer cannot be used: .*{why}"):
        score(model, asked)


@pytest.mark.promise(19, "teacher's server: gone for a moment, waited for")
def test_a_server_that_is_gone_is_waited_for(server, folders, local, tmp_path):
    model = opened(server, folders["teacher"], tmp_path, retries=8, backoff=0.05)
    first = probes_of(server)

    def die(number, sequences):
        if number != first + 1:
            return None
        threading.Timer(0.3, server.start, [server.port]).start()
        return "die"

    server.script = die
    assert_equal(score(model, passages()), local.score(passages(), SMALL, Vocabulary(ROWS, ROWS), {}))


@pytest.mark.promise(19, "teacher's server: gone for good")
def test_a_server_that_stays_gone_ends_it(server, folders, tmp_path):
    model = opened(server, folders["teacher"], tmp_path)
    first = probes_of(server)
    server.script = lambda number, sequences: "die" if number == first + 1 else None
    with pytest.raises(TeacherServerError, match=r"no answer at 4 tries .*Connect"):
        score(model, passages())


# --- which model -----------------------------------------------------------------------------------------------------


@pytest.mark.promise(19, "teacher's server: another model than before")
def test_another_model_than_the_checkpoint_is_refused_at_the_first_start(folders, tmp_path):
    wrong = TeacherServer(folders["other"])
    try:
        with pytest.raises(OtherTeacher, match="is not the model that was asked before"):
            opened(wrong, folders["teacher"], tmp_path)
    finally:
        wrong.kill()


def weightless(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.promise(19, "teacher's server: another model than before")
def test_without_weights_the_first_answers_are_the_ones_to_compare_with(server, folders, tmp_path):
    folder = weightless(folders["teacher"], tmp_path / "described")
    score(opened(server, folder, tmp_path), passages(2))
    (record,) = (tmp_path / RECORDS).iterdir()
    before = record.read_bytes()
    opened(server, folder, tmp_path)
    assert record.read_bytes() == before
    server.load(folders["other"])
    with pytest.raises(OtherTeacher, match=r"differ by .* nats on average"):
        opened(server, folder, tmp_path)
    opened(server, folder, tmp_path, weights="of another revision")  # another name for the weights, another record
    record.write_bytes(before.replace(b'"logprobs"', b'"logprobz"'))
    with pytest.raises(CorruptArtifact, match="remove it"):
        opened(server, folder, tmp_path)


@pytest.mark.promise(19, "teacher's server: another model than before")
def test_a_model_that_took_its_place_meanwhile_is_noticed_before_its_values_are_used(server, folders, tmp_path):
    model = opened(server, folders["teacher"], tmp_path)
    first = probes_of(server)
    server.script = lambda number, sequences: server.load(folders["other"]) if number == first + 1 else None
    with pytest.raises(OtherTeacher):
        score(model, passages())


# --- what a server can give ------------------------------------------------------------------------------------------


def test_a_list_longer_than_the_server_gives_is_refused_with_its_flag(folders, tmp_path):
    server = TeacherServer(folders["teacher"], longest=4)
    try:
        model = opened(server, folders["teacher"], tmp_path)
        with pytest.raises(ConfigError, match=r"6 candidates are needed .* gives 4; start it with --max-logprobs 6"):
            score(model, passages(1))
    finally:
        server.kill()


def test_a_name_that_no_server_has_and_another_vocabulary_are_refused(server, folders, tmp_path):
    server.name = "another"
    with pytest.raises(ConfigError, match=r"supervise\.teacher\.model: .* serve 'another', not 'teacher'"):
        model = TeacherServer.__new__(TeacherServer)  # the config's side of it: an address and a name
        model.name, model.url = "teacher", server.url
        opened(model, folders["teacher"], tmp_path)
    wider = TeacherServer(model_folder(tmp_path, "wider", 4, vocab_size=272))
    try:
        with pytest.raises(ConfigError, match="with 272 ids, but the model of `teacher:` has 264"):
            opened(wider, folders["teacher"], tmp_path)
    finally:
        wider.kill()


def test_passages_that_leave_no_room_are_refused_by_sample(folders, tmp_path):
    server = TeacherServer(folders["teacher"], length=40)
    try:
        model = opened(server, folders["teacher"], tmp_path)
        with pytest.raises(InputError, match=r"sample 1: 40 tokens of prompt and completion .* reads 40"):
            model.check([Passage([1] * 9, [2] * 30), Passage([1] * 10, [2] * 30)], ["sample 0", "sample 1"])
    finally:
        server.kill()


def test_the_key_comes_from_the_environment_alone(folders, tmp_path, monkeypatch):
    server = TeacherServer(folders["teacher"], key="a-key-of-the-tests")
    try:
        monkeypatch.delenv("OPD_TEACHER_API_KEY", raising=False)
        with pytest.raises(TeacherServerError, match=r"HTTP 401: Unauthorized .*OPD_TEACHER_API_KEY, which is not set"):
            opened(server, folders["teacher"], tmp_path)
        monkeypatch.setenv("MY_KEY", "a-key-of-the-tests")
        score(opened(server, folders["teacher"], tmp_path, key_variable="MY_KEY"), passages(1))
    finally:
        server.kill()


def test_no_address_and_no_server_say_what_to_do(folders, tmp_path):
    gone = TeacherServer(folders["teacher"])
    gone.kill()
    with pytest.raises(
        TeacherServerError, match=r"no answer from the teacher's server .*runtime\.scorer\.server\.urls"
    ):
        opened(gone, folders["teacher"], tmp_path, retries=0)
    with pytest.raises(ConfigError, match=r"runtime\.scorer\.server\.urls: empty"):
        opened(gone, folders["teacher"], tmp_path, urls=[])
