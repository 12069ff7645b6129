"""All errors of a cluster file are reported together, and the shipped files have none."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_post.config.load import ConfigError
from megatron_post.launch.cluster import Cluster, load_cluster

CLUSTERS = sorted((Path(__file__).resolve().parents[3] / "configs" / "clusters").glob("*.yaml"))


def _write(directory: Path, text: str) -> Path:
    (directory / "cluster.yaml").write_text(text)
    return directory / "cluster.yaml"


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_shipped_files_are_valid(path: Path) -> None:
    cluster = load_cluster(path)
    assert cluster.environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    with pytest.raises(ValidationError):
        cluster.partition = "other"  # type: ignore[misc]


def test_all_errors_are_reported_together(tmp_path: Path) -> None:
    """The file has an unknown and a missing key, a newline, a wrong time, a bad variable and a bad mount."""
    path = _write(
        tmp_path,
        """
partiton: h100
account: "a\\n#SBATCH --wrap=evil"
time_limit: "one day"
environment: {"A B": "1"}
container: {image: x.sqsh, mounts: ["/data"]}
""",
    )
    with pytest.raises(ConfigError) as error:
        load_cluster(path)
    message = str(error.value)
    assert "6 error(s)" in message
    assert "partiton: unknown key (value 'h100')" in message
    assert "cpus_per_node: missing" in message
    assert "account: 'a\\n#SBATCH --wrap=evil' holds a newline" in message
    assert "time_limit: 'one day' is not written as [days-]hours:minutes:seconds" in message
    assert "environment: these cannot be names of environment variables: 'A B'" in message
    assert "mounts must read /host:/container[:flags]" in message


def test_values_that_yaml_1_1_reads_as_numbers(tmp_path: Path) -> None:
    """24:00:00 is 86400 in YAML 1.1, and `yes` is true: both are passed on as they are written. A number and
    a boolean are refused where a text is wanted."""
    path = _write(tmp_path, "cpus_per_node: 96\ntime_limit: 24:00:00\nenvironment: {VERBOSE: yes}\n")
    cluster = load_cluster(path)
    assert (cluster.seconds, cluster.environment) == (86400, {"VERBOSE": "yes"})
    path = _write(tmp_path, "cpus_per_node: 96\ntime_limit: 90\nenvironment: {THREADS: 8, LOUD: true}\n")
    with pytest.raises(ConfigError) as error:
        load_cluster(path)
    for key, value in {"time_limit": "90", "environment.THREADS": "8", "environment.LOUD": "True"}.items():
        assert f"{key}: Input should be text; put it in quotes (got {value})" in str(error.value)


@pytest.mark.parametrize(
    "name", ["RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_PROCID"]
)
def test_variables_that_identify_a_rank_are_refused(tmp_path: Path, name: str) -> None:
    """The script would clear the variable, and a site's setting must not be dropped in silence."""
    path = _write(tmp_path, f'cpus_per_node: 96\nenvironment: {{{name}: "1", SLURM_CPU_BIND: none}}\n')
    with pytest.raises(
        ConfigError, match=f"environment: {name} cannot be set here, because the job's script sets"
    ):
        load_cluster(path)


def test_numbers_must_add_up(tmp_path: Path) -> None:
    path = _write(tmp_path, 'ranks_per_node: 9\ncpus_per_node: 4\ntime_limit: "5:00"\nwarning_seconds: 301\n')
    with pytest.raises(ConfigError) as error:
        load_cluster(path)
    message = str(error.value)
    assert "ranks_per_node=9 is more than gpus_per_node=8" in message
    assert "cpus_per_node=4 is less than one for each of 9 ranks" in message
    assert "warning_seconds=301 is not within time_limit=5:00" in message


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30:00", 1800), ("2:00:00", 7200), ("1-06:00:30", 108030)],
)
def test_time_limit(tmp_path: Path, text: str, seconds: int) -> None:
    assert load_cluster(_write(tmp_path, f'cpus_per_node: 8\ntime_limit: "{text}"\n')).seconds == seconds


def test_base_file_is_inherited(tmp_path: Path) -> None:
    path = _write(tmp_path, f"base: {CLUSTERS[0]}\npartition: mine\n")
    assert load_cluster(path) == load_cluster(CLUSTERS[0]).model_copy(update={"partition": "mine"})


def test_numa_binding_needs_gpus() -> None:
    assert Cluster(cpus_per_node=96, numa_binding="node").numa_binding == "node"
    with pytest.raises(ValidationError, match="numa_binding=node needs GPUs on the nodes"):
        Cluster(cpus_per_node=8, gpus_per_node=0, ranks_per_node=2, numa_binding="node")
    with pytest.raises(ValidationError, match="MEGATRON_POST_NUMA_BINDING cannot be set here"):
        Cluster(cpus_per_node=96, environment={"MEGATRON_POST_NUMA_BINDING": "node"})
