"""Tests that the code in the README and in docs/ runs as pasted, and that CI runs the README's test command."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.support.processes import free_port

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


PAGES = sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "project")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT / "docs")))
def test_page(page):
    """Runs the code blocks of a page one after the other, in one namespace."""
    names = {"__name__": "__main__"}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        exec(compile(block, page.name, "exec"), names)


def test_program_of_several_processes(tmp_path):
    """Checks the program in devices.md, started twice as the page says."""
    text = (ROOT / "docs" / "guides" / "devices.md").read_text()
    (program,) = re.findall(r'^```python title="pod.py"\n(.*?)^```', text, re.M | re.S)
    (tmp_path / "pod.py").write_text(program)
    command = [sys.executable, "-W", "error", str(tmp_path / "pod.py"), f"localhost:{free_port()}", "2"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    started = [subprocess.Popen([*command, str(i)], **pipes) for i in range(2)]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for i, output in enumerate(outputs):
        assert f"process {i} of 2: mean [22.5 23.5 24.5]" in output


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.split("\n", 1)[0][:40])
def test_example(example):
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})


def test_there_are_a_functional_and_a_module_example():
    assert any("bnjax.batch_norm(" in e for e in EXAMPLES)
    assert any("BatchNorm(" in e and "batch_stats" in e for e in EXAMPLES)


def test_first_runnable_code_is_within_thirty_lines():
    assert any(line.startswith("```") for line in README.splitlines()[:30])


def test_ci_runs_the_test_command_of_the_readme():
    (pattern,) = re.findall(r"grep -m1 '(.*?)' README.md", (ROOT / ".ci" / "run").read_text())
    commands = [line for line in README.splitlines() if re.match(pattern, line)]
    assert len(commands) == 1
    assert "pytest" in commands[0]


def test_every_folder_and_file_that_is_named_exists():
    table = README[README.index("## What is where") :]
    paths = re.findall(r"^\| `([\w./]+)` \|", table, re.M)
    assert len(paths) > 5
    for path in paths:
        assert (ROOT / path).exists(), f"the README names {path}"


def test_the_tables_are_those_of_the_results():
    from experiments.bench import readme

    text = (readme.ROOT / "README.md").read_text()
    assert readme.updated(text) == text, "run python -m experiments.bench.readme"
