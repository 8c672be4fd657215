"""The images, the Slurm script and the Kubernetes files: what they name exists, and agrees with the command line."""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from places import CHECKOUT

from flows.cli.app import make_app

FOLDER = CHECKOUT / "configs" / "deploy"
COMMANDS = typer.main.get_command(make_app()).commands  # type: ignore[attr-defined]


def options_are_known(words: list[str]) -> bool:
    """Whether each option of `opd COMMAND ...` is one of that command's."""
    known = {option for parameter in COMMANDS[words[0]].params for option in parameter.opts}
    return all(word in known for word in words if word.startswith("--"))


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_an_image_installs_the_pinned_list_and_runs_as_a_user(kind: str) -> None:
    text = (FOLDER / f"Dockerfile.{kind}").read_text().replace("\\\n", " ")
    steps = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    ignored = (FOLDER / f"Dockerfile.{kind}.dockerignore").read_text().splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = [source for step, words in steps if step == "COPY" for source in words.split()[:-1]]
    assert f"requirements/{kind}.txt" in copied
    for source in copied:
        assert (CHECKOUT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) or source.startswith(f"{pattern}/") for pattern in sent), source
    assert {"flows", "tasks", "storage", "opdflow", "configs"} <= set(copied)  # configs: opdflow has a link to it
    users = [words for step, words in steps if step == "USER"]
    assert users == ["1000"] and [step for step, _ in steps].index("USER") > max(
        number for number, (step, _) in enumerate(steps) if step in ("RUN", "COPY")
    )
    assert not re.search(r"(token|password|secret)\s*=", text, re.IGNORECASE)


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


@pytest.mark.parametrize("name", ["kubernetes-job.yaml", "kubernetes-worker.yaml"])
def test_a_pod_mounts_what_is_declared_and_calls_what_exists(name: str) -> None:
    claims = {d["metadata"]["name"] for d in documents("kubernetes-job.yaml") if d["kind"] == "PersistentVolumeClaim"}
    for document in documents(name):
        assert {"apiVersion", "kind", "metadata", "spec"} <= document.keys()
        if document["kind"] == "PersistentVolumeClaim":
            continue
        pod = document["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
        assert volumes["store"]["persistentVolumeClaim"]["claimName"] in claims
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        program, *words = container["args"]
        assert program in ("opd", "prefect")
        if program == "opd":
            assert options_are_known(words)
        if document["kind"] == "Job":  # only these may have a policy for failures
            assert pod["restartPolicy"] == "Never"
            (refused, _) = document["spec"]["podFailurePolicy"]["rules"]
            assert refused["onExitCodes"]["containerName"] == container["name"]
        else:
            labels = document["spec"]["template"]["metadata"]["labels"]
            assert document["spec"]["selector"]["matchLabels"] == labels


def test_the_slurm_script_calls_opd_run_once_and_passes_its_exit_code_on(tmp_path: Path) -> None:
    script = FOLDER / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""
    (call,) = [line for line in script.read_text().splitlines() if '"$opd"' in line]
    assert options_are_known(call.partition('"$opd" ')[2].split())
    for name, body in (("srun", 'echo "srun $*"; exit "$CODE"'), ("scontrol", 'echo "scontrol $*"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    for code in ("0", "2", "130"):
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": code, "SLURM_JOB_ID": "7"}
        done = subprocess.run(
            ["bash", str(script), "e.yaml", "demo"], env=environment, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == int(code)
        assert done.stdout == "srun --nodes=1 --ntasks=1 opd run e.yaml --name demo --no-prefect\n"
    wrong = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert wrong.returncode != 0 and "usage" in wrong.stderr


def test_the_slurm_script_starts_a_ray_node_on_each_machine_and_one_run(tmp_path: Path) -> None:
    script = FOLDER / "slurm-ray.sh"
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""
    programs = {
        # Ray's nodes stay until the script ends them; the run ends with a code
        "srun": 'echo "srun $*"; case "$*" in *"opd run"*) sleep 0.3; exit "$CODE";; *) exec sleep 60;; esac',
        "scontrol": 'if [ "$1" = show ]; then echo one; echo two; echo three; else echo "scontrol $*"; fi',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "x", "RAY_WAIT": "0.2"}
    for code in ("0", "2", "130"):
        environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": code}
        done = subprocess.run(
            ["bash", str(script), "e.yaml", "demo"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            timeout=30,
        )
        assert done.returncode == int(code)
        head, others, run = done.stdout.splitlines()
        assert head.startswith("srun --nodes=1 --ntasks=1 --nodelist=one --overlap ray start --head --port=6379 ")
        assert others.startswith("srun --nodes=2 --ntasks=2 --exclude=one --overlap ray start --address=one:6379 ")
        assert run == "srun --nodes=1 --ntasks=1 --nodelist=one --overlap opd run e.yaml --name demo --no-prefect"
        assert options_are_known(run.partition("opd ")[2].split())


def test_the_line_for_ray_job_submit_calls_opd_with_absolute_paths(tmp_path: Path) -> None:
    script = FOLDER / "ray-submit.sh"
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""
    (tmp_path / "ray").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "ray").chmod(0o755)
    environment = os.environ | {"RAY": str(tmp_path / "ray"), "OPD_ROOT": "/shared/store"}
    command = ["bash", str(script), "http://head:8265", "e.yaml", "demo"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    words = done.stdout.splitlines()
    assert words[:4] == ["job", "submit", "--address", "http://head:8265"]
    called = words[words.index("--") + 1 :]
    assert called[:3] == ["opd", "run", str(tmp_path / "e.yaml")] and options_are_known(called[1:])
    assert called[called.index("--root") + 1] == "/shared/store" and "runtime.cluster=ray" in called


def test_the_files_for_ray_on_kubernetes_call_what_exists() -> None:
    claims = {d["metadata"]["name"] for d in documents("kubernetes-job.yaml") if d["kind"] == "PersistentVolumeClaim"}
    pinned = re.search(r"^ray==(\S+)$", (CHECKOUT / "requirements" / "ray.txt").read_text(), re.MULTILINE)
    [job] = documents("kuberay-job.yaml")
    assert job["kind"] == "RayJob" and pinned is not None
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == pinned[1]
    program, *words = job["spec"]["entrypoint"].split()
    assert program == "opd" and options_are_known(words)
    [deployment] = documents("prefect-ray.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"], deployment["spec"]]
    for pod in (group["template"]["spec"] for group in groups):
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
        assert volumes["store"]["persistentVolumeClaim"]["claimName"] in claims
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        for line in container.get("args", ()):
            assert subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("name", ["deploy.md", "cluster.md"])
def test_every_command_of_the_page_is_one_of_the_programs(name: str) -> None:
    page = (CHECKOUT / "docs" / name).read_text()
    called = re.findall(r"^(?:\S+=\S+ )*(?:kubectl exec \S+ -- )?opd (.+?)(?:  +#.*)?$", page, re.MULTILINE)
    assert called
    for words in called:
        assert options_are_known(words.split()), words
    for path in re.findall(r"configs/deploy/[\w.-]+", page):
        assert (CHECKOUT / path).exists(), path
