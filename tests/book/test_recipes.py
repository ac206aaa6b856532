"""Every recipe is a short whole program, and prints what the page shows."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

import companion
from tests.book.reading import ROOT
from tests.kit.processes import warm
from tools.programs import outputs, programs

PAGE = ROOT / "book" / "recipes.md"
RECIPES = programs(PAGE.read_text())


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    return {recipe.heading: output for recipe, output in zip(RECIPES, outputs(PAGE, warm()), strict=True)}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.heading)
def test_recipe_prints_what_the_page_shows(recipe: object, printed: dict[str, str]) -> None:
    assert printed[recipe.heading] == recipe.output  # type: ignore[attr-defined]


def test_recipes_are_many_and_short() -> None:
    text = PAGE.read_text()
    questions = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert len(questions) >= 16
    wrong = [each for each in questions if not re.fullmatch(r"How do I .+\?", each)]
    assert not wrong, "a heading must begin with `How do I` and end with a question mark"
    labels = re.findall(r"^\((recipe-[a-z-]+)\)=\n### ", text, re.MULTILINE)
    assert len(labels) == len(questions), "a line such as `(recipe-heun)=` must stand before each heading"
    in_table = set(re.findall(r"<(recipe-[a-z-]+)>`", text.split("\n\n**Before")[0]))
    assert in_table == set(labels), "the table at the top of the page must name every recipe"
    assert len(RECIPES) == len(questions) - 1  # the job of Slurm has a test of its own
    for recipe in RECIPES:
        marks = [recipe.code.count(mark) for mark in ("# the recipe", "# to here")]
        assert marks[0] == marks[1] > 0, f"{recipe.heading} needs the marks `# the recipe` and `# to here`"
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        lines = code.splitlines()
        assert len(lines) <= 25, lines[:6]
        assert max(map(len, lines)) <= 84


SRUN = """#!/bin/bash
# Stands in for Slurm: two processes of one job on this machine.
shift  # --kill-on-bad-exit=1
export SLURM_JOB_NODELIST=here SLURM_NTASKS_PER_NODE=2
SLURM_PROCID=0 SLURM_LOCALID=-1 "$@" & SLURM_PROCID=1 SLURM_LOCALID=-1 "$@" & wait -n && wait -n
"""


def run_job(folder: pathlib.Path, train: str) -> str:
    """What the page's job prints with a script of ours, and stand-ins for Slurm's commands."""
    text = PAGE.read_text()
    job = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", text, re.DOTALL)[0]
    (place,) = re.findall(r"```python\n(import json\n.*?)```", text, re.DOTALL)
    for name, content in {"job": job, "place.py": place, "train.py": train, "srun": SRUN}.items():
        (folder / name).write_text(content)
    (folder / "scontrol").write_text('#!/bin/bash\n[ "$1 $2 $3" = "show hostnames here" ] && echo 127.0.0.1\n')
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    number = next(n for n in range(os.getpid() % 20000, 20000) if is_free(20000 + n) and is_free(20000 + n + 1))
    here = {"PATH": path, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": str(number), "TF_CPP_MIN_LOG_LEVEL": "3"}
    assert subprocess.run(["bash", "-n", "job"], cwd=folder).returncode == 0
    done = subprocess.run(
        ["bash", "job"], cwd=folder, env=os.environ | here, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def is_free(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) != 0


def test_job_of_slurm_gives_each_process_its_place(tmp_path: pathlib.Path) -> None:
    program = "import os, sys; open(sys.argv[0] + os.environ['SLURM_PROCID'], 'w').write(os.environ['TF_CONFIG'])\n"
    run_job(tmp_path, program)
    places = [json.loads((tmp_path / f"train.py{rank}").read_text()) for rank in range(2)]
    assert [place["task"]["index"] for place in places] == [0, 1]
    assert places[0]["cluster"] == places[1]["cluster"]
    assert len(set(places[0]["cluster"]["worker"])) == 2


def test_a_process_on_the_second_machine_gets_its_address_and_its_gpu(tmp_path: pathlib.Path) -> None:
    (place,) = re.findall(r"```python\n(import json\n.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "place.py").write_text(place)
    (tmp_path / "train.py").write_text("import os; print(os.environ['TF_CONFIG'], os.environ['CUDA_VISIBLE_DEVICES'])")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/bash\n[ "$1 $2 $3" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    scontrol.chmod(0o755)
    job = {"JOB_NODELIST": "n[1-2]", "JOB_ID": "7", "NTASKS_PER_NODE": "4", "PROCID": "5", "LOCALID": "1"}
    here = {f"SLURM_{name}": value for name, value in job.items()}
    here["PATH"] = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    command = [sys.executable, "place.py", "train.py"]
    said = subprocess.run(command, cwd=tmp_path, env=os.environ | here, capture_output=True, text=True, check=True)
    config, gpu = said.stdout.rsplit(maxsplit=1)
    workers, task = json.loads(config)["cluster"]["worker"], json.loads(config)["task"]
    assert task == {"type": "worker", "index": 5}
    assert [address.split(":")[0] for address in workers] == ["n1"] * 4 + ["n2"] * 4
    assert len(set(workers)) == 8
    assert gpu == "1"


@pytest.mark.slow
def test_job_of_slurm_trains(tmp_path: pathlib.Path) -> None:
    (train,) = [recipe.code for recipe in RECIPES if recipe.command]
    assert "2 workers, 6 exchanges" in (shown := run_job(tmp_path, train))
    assert "loss below 0.01: True" in shown
    assert list(tmp_path.glob("backups/*/*"))


@pytest.mark.parametrize(("restarts", "requeued"), [("", True), ("2", True), ("3", False)])
def test_job_of_slurm_that_fails_comes_back_three_times(tmp_path: pathlib.Path, restarts: str, requeued: bool) -> None:
    (job,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", PAGE.read_text(), re.DOTALL)
    for name, content in {"srun": "exit 1", "scontrol": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{content}\n")
        (tmp_path / name).chmod(0o755)
    here = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts}
    done = subprocess.run(["bash", "-c", job], cwd=tmp_path, env=os.environ | here, capture_output=True, text=True)
    assert done.stdout == ("requeue 7\n" if requeued else "")
    assert (done.returncode == 0) == requeued


def test_result_on_the_first_page() -> None:
    shown = re.findall(r"\| (.+?) \| \**(\d\.\d)\** \|$", (ROOT / "book" / "index.md").read_text(), re.MULTILINE)
    x, y = np.ones((4, 1)), np.array([[0.0], [0.0], [0.0], [4.0]])
    found = []
    sgd = keras.optimizers.SGD
    weighed = companion.GradientAccumulation(sgd(0.5), 2, normalize="weight")
    for batch_size, optimizer in ((3, sgd(0.5, gradient_accumulation_steps=2)), (4, sgd(0.5)), (3, weighed)):
        model = keras.Sequential([keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
        model.compile(optimizer, "mse")
        if optimizer is weighed:
            companion.inject(model)
        model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)
        found.append(f"{float(model.get_weights()[0][0, 0]):.1f}")
    assert [number for _, number in shown] == found
