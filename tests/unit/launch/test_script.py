"""sbatch and bash receive the values of the files, character for character."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_post.launch.cluster import Cluster
from megatron_post.launch.script import Job, render, sbatch_options

EVIL = "$(touch WITNESS) `touch WITNESS`; touch WITNESS; 'a' \"b\" \\ $HOME *"
TEMPLATE = Path(__file__).resolve().parents[3] / "launchers" / "slurm" / "train.sbatch"


def _cluster(**values: Any) -> Cluster:
    return Cluster(**{"cpus_per_node": 96, **values})


def _job(tmp_path: Path, **values: Any) -> Job:
    base = {"name": "run", "command": ("train", "c.yaml"), "run_dir": "runs/x", "directory": tmp_path}
    return Job(**{**base, **values})


def test_values_are_quoted(tmp_path: Path) -> None:
    """bash reads the settings back unchanged and executes none of them."""
    cluster = _cluster(
        python=EVIL,
        environment={"VARIABLE": EVIL},
        container={"image": EVIL, "mounts": ["/a b:/c$d"]},
    )
    job = _job(tmp_path, name=EVIL, command=("train", EVIL, "model.init_from=" + EVIL), run_dir=EVIL)
    script = render(job, cluster)
    settings = script.split("# >>> settings\n")[1].split("# <<< settings\n")[0]
    show = 'printf "%s\\0" "$PYTHON" "$RUN_DIR" "$VARIABLE" "${CONTAINER[0]}" "${command[@]}"'
    done = subprocess.run(["bash", "-c", settings + show], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.split("\0")[:-1] == [
        EVIL, EVIL, EVIL, f"--container-image={EVIL}", "train", EVIL, f"model.init_from={EVIL}",
    ]  # fmt: skip
    assert not list(tmp_path.rglob("WITNESS"))
    assert f"--job-name={EVIL}" in sbatch_options(job, cluster)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_interpreter_of_the_ranks(tmp_path: Path) -> None:
    """The ranks run the interpreter that launched them, and `python3` in a container."""
    assert f"PYTHON={shlex.quote(sys.executable)}\n" in render(_job(tmp_path), _cluster())
    assert "PYTHON=python3\n" in render(_job(tmp_path), _cluster(container={"image": "x.sqsh"}))


@pytest.mark.parametrize("field", ["name", "run_dir"])
def test_a_newline_is_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(ValueError, match="holds a newline"):
        _job(tmp_path, **{field: "a\n#SBATCH --nodes=2048"})


def test_options(tmp_path: Path) -> None:
    """8 ranks share 96 CPUs, GPUs have a type, and only a % in the log's directory is doubled for sbatch."""
    cluster = _cluster(
        partition="p",
        account="a",
        qos="q",
        exclude=("n1", "n7"),
        gpu_type="h100",
        memory="0",
        time_limit="30:00",
    )
    job = _job(tmp_path, name="50% off", run_dir="runs/50%", nodes=4)
    assert sbatch_options(job, cluster) == [
        "--job-name=50% off", "--nodes=4", "--ntasks-per-node=8", "--cpus-per-task=12",
        "--gpus-per-node=h100:8", "--time=30:00", "--signal=B:USR1@300", "--open-mode=append",
        f"--output={tmp_path}/runs/50%%/slurm/50--off-%j.log", f"--chdir={tmp_path}", "--partition=p",
        "--account=a", "--qos=q", "--exclude=n1,n7", "--mem=0", "--requeue", "--exclusive",
    ]  # fmt: skip
    plain = sbatch_options(job, _cluster(gpus_per_node=0, ranks_per_node=2, exclusive=False))
    assert not [option for option in plain if option.startswith(("--gpus", "--exclusive", "--mem"))]


def test_setup_lines_run_and_the_rest_is_the_template(tmp_path: Path) -> None:
    """Except for `#SBATCH` lines and settings, the script equals the file that users submit by hand."""
    script = render(_job(tmp_path), _cluster(setup=["module load cuda", "ulimit -n 65536"]))
    assert "setup() {\n    module load cuda\n    ulimit -n 65536\n}\n" in script
    template = TEMPLATE.read_text()
    assert script.split("# <<< settings\n")[1] == template.split("# <<< settings\n")[1]
    assert "#SBATCH" in template and "#SBATCH" not in script


def _progress(run_dir: Path, command: str = "train") -> str:
    functions = TEMPLATE.read_text().split("newest_checkpoint() {")[1].split("# Only a running job")[0]
    script = f"RUN_DIR={shlex.quote(str(run_dir))} command=({command} x)\nnewest_checkpoint() {{{functions}"
    script += 'kept "$(progress)"'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def test_progress_is_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    """Steps with leading zeros are decimal. A partial checkpoint or one without manifest is not progress."""
    run_dir = tmp_path / "a run"
    assert _progress(run_dir) == "checkpoint 0"
    for name in ("step-00000008", "step-00000090", "step-00000100"):
        (run_dir / "checkpoints" / name).mkdir(parents=True)
    (run_dir / "checkpoints" / ".partial-step-00000200").mkdir()
    assert _progress(run_dir) == "checkpoint 0"
    (run_dir / "checkpoints" / "step-00000008" / "manifest.json").touch()
    assert _progress(run_dir) == "checkpoint 8"
    (run_dir / "checkpoints" / "step-00000090" / "manifest.json").touch()
    assert _progress(run_dir) == "checkpoint 90"


def test_progress_of_other_commands_is_the_size_of_their_files(tmp_path: Path) -> None:
    """A generation that is requeued at every time limit is not a crash loop, because its rows grow.

    Logs do not count.
    """
    run_dir = tmp_path / "-a 'run'"
    (run_dir / "slurm").mkdir(parents=True)
    empty = _progress(run_dir, "generate")
    (run_dir / "slurm" / "generate-1.log").write_text("restart 1\n" * 100)
    assert _progress(run_dir, "generate") == empty
    (run_dir / "samples.jsonl").write_text("{}\n" * 5)
    before, after = int(empty.split()[0]), int(_progress(run_dir, "generate").split()[0])
    assert after == before + 15
    assert empty.endswith(f" bytes in {run_dir}")


def test_variables_that_identify_a_rank_are_not_inherited() -> None:
    """A batch script in a container with enroot's PyTorch hook has RANK=0 and WORLD_SIZE=1, and a shell under
    torchrun or mpirun has theirs. srun would hand all of it on to every rank."""
    inherited = {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1", "ROLE_RANK": "0", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "OMPI_COMM_WORLD_SIZE": "1",
        "OMPI_COMM_WORLD_RANK": "0", "PMI_RANK": "0", "PMI_SIZE": "1",
    }  # fmt: skip
    kept = {"PATH": os.environ["PATH"], "OMPI_MCA_btl": "tcp", "NCCL_DEBUG": "INFO"}
    (clearing,) = re.findall(r"^unset RANK (?:.*\\\n)+.*$", TEMPLATE.read_text(), re.MULTILINE)
    done = subprocess.run(
        ["bash", "-c", f"set -e\n{clearing}\nexec env -0"],
        env={**inherited, **kept},
        capture_output=True,
        text=True,
    )
    found = dict(entry.split("=", 1) for entry in done.stdout.split("\0")[:-1])
    assert found.items() >= kept.items() and not found.keys() & inherited.keys(), done.stderr


def test_executable_by_hand(tmp_path: Path) -> None:
    """bash accepts the template, which depends on Python only for its settings."""
    assert TEMPLATE.read_text().startswith("#!/bin/bash\n")
    subprocess.run(["bash", "-n", str(TEMPLATE)], check=True, env={"PATH": os.environ["PATH"]})


def test_ranks_bind_themselves_to_cpus(tmp_path: Path) -> None:
    """Slurm must not bind the ranks, because it could leave a rank only CPUs of another NUMA node."""
    for binding, flags in ((None, ""), ("node", "--cpu-bind=none ")):
        script = render(_job(tmp_path), _cluster(numa_binding=binding))
        run = 'srun() { echo "$MEGATRON_POST_NUMA_BINDING" "$@"; }\n'
        settings = script.split("# >>> settings\n")[1].split("# A rank exits with 0")[0]
        (step,) = re.findall(r"^    srun .*$", script, re.MULTILINE)
        done = subprocess.run(
            ["bash", "-c", settings + run + step.rstrip("\\")], capture_output=True, text=True, cwd=tmp_path
        )
        assert (
            done.stdout.strip()
            == (f"{binding or ''} --kill-on-bad-exit=1 --wait=0 --distribution=block:block {flags}").strip()
        )
