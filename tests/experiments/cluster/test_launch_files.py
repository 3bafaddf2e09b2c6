"""Tests the launch files of docs/guides/clusters.md: each starts processes that JAX recognises, with valid options."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tyro
import yaml
from jax._src.clusters.k8s_cluster import K8sCluster

from experiments.train.cluster.detect import Member, member
from experiments.train.config import Config, Hardware
from experiments.train.recipes import defaults
from tests.experiments.cluster.launchers import VARIABLES
from tests.support.programs import LIMIT, ROOT, compilation_cache, learning, write_images

TEXT = (ROOT / "docs" / "guides" / "clusters.md").read_text()
FILES = dict(re.findall(r'^```\w+ title="([\w.]+)"\n(.*?)^```', TEXT, re.M | re.S))
FLAGS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
# Stands for srun on a machine of two tasks: starts the command twice, with what srun sets.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
export SLURM_JOB_ID=4711 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 SLURM_NTASKS=2
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & SLURM_PROCID=0 SLURM_LOCALID=0 "$@" && wait $!
"""
TINY = """
[training]
data = "fashion-mnist"
batch-size = 16
epochs = 1
width = 2
[hardware]
devices = 1
"""


def options(argv: list[str]) -> Config:
    """Returns the options that a command line of experiments.train gives; fails if it is not valid."""
    return tyro.cli(Config, args=argv, default=defaults(argv), config=FLAGS)


def command(text: str) -> list[str]:
    """Returns the options in a command line, variables of the shell replaced by their names."""
    words = shlex.split(re.sub(r"\$(\w+)", r"\1", text))
    assert words[words.index("-m") + 1] == "experiments.train"
    return words[words.index("-m") + 2 :]


@pytest.mark.parametrize("name", ["train.sbatch", "pod.sh"])
def test_scripts_are_valid(name: str) -> None:
    subprocess.run(["bash", "-n"], input=FILES[name], text=True, check=True)


def test_the_pod_runs_one_valid_command_on_every_host() -> None:
    words = shlex.split(FILES["pod.sh"].replace("\\\n", " "))
    assert "--worker=all" in words
    found = options(command(words[words.index("--command") + 1]))
    assert found.training.model == "resnet50" and found.files.resume


@pytest.mark.slow
def test_the_script_for_slurm_trains(tmp_path: Path) -> None:
    """Runs the script under a stand-in for srun, with a recipe that takes seconds under the name of its own."""
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "tiny.toml").write_text(TINY)
    script = FILES["train.sbatch"].replace("--recipe resnet50", f"--recipe {tmp_path / 'tiny.toml'}")
    script = script.replace("python -m", f"{sys.executable} -m")
    data, out = write_images(tmp_path / "data", train=32, test=16), tmp_path / "out"
    environment = {**os.environ, **compilation_cache(tmp_path / "compiled"), "JAX_PLATFORMS": "cpu"}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA": str(data), "RUN": str(out)}
    pipes = dict(text=True, capture_output=True, cwd=ROOT, env=environment)
    done = subprocess.run(["bash"], input=script, timeout=LIMIT, **pipes)
    assert done.returncode == 0, done.stderr
    assert "process 1 is done" in done.stdout and len(learning(out)) == 3


@pytest.fixture
def jobset() -> dict:
    """Returns the JobSet of the page."""
    (found,) = [part for part in yaml.safe_load_all(FILES["jobset.yaml"]) if part["kind"] == "JobSet"]
    return found


def test_the_jobset_runs_a_valid_command(jobset: dict) -> None:
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "experiments.train"]
    found = options(container["args"])
    (mount,) = container["volumeMounts"]
    assert all(path.is_relative_to(mount["mountPath"]) for path in (found.files.data_dir, found.files.out))
    assert job["parallelism"] == job["completions"] and found.files.resume


def test_jax_finds_the_processes_of_the_jobset(jobset: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers JAX's questions to Kubernetes from the file, as the JobSet controller names jobs and pods."""
    job, name = jobset["spec"]["replicatedJobs"][0], jobset["metadata"]["name"]
    labels = {"jobset.sigs.k8s.io/jobset-name": name}
    spec = job["template"]["spec"]
    answer = SimpleNamespace(
        metadata=SimpleNamespace(name=f"{name}-{job['name']}-0", labels=labels),
        spec=SimpleNamespace(parallelism=spec["parallelism"]),
    )
    for launcher in VARIABLES:
        monkeypatch.delenv(launcher, raising=False)
    assert spec["completionMode"] == "Indexed"
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    monkeypatch.setattr(K8sCluster, "is_env_present", lambda: True)
    monkeypatch.setattr(K8sCluster, "_controller", lambda: SimpleNamespace(kind="Job"))
    monkeypatch.setattr(K8sCluster, "_job", lambda: answer)
    monkeypatch.setattr(K8sCluster, "_pod", lambda: None)
    monkeypatch.setattr("socket.gethostbyname", lambda host: "10.0.0.7")
    assert member(Hardware()) == Member("resnet50-workers-0-0.resnet50:55527", 4, 2)
