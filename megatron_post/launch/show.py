"""Print a job's script, as a dry run does."""

from megatron_post.config.secrets import HIDDEN, is_secret_name, redact
from megatron_post.display import say
from megatron_post.launch import slurm
from megatron_post.launch.cluster import Cluster
from megatron_post.launch.script import Job, render


def show_script(job: Job, cluster: Cluster) -> None:
    """Print a job's script without secrets, because users paste this output into tickets."""
    shown = {name: HIDDEN if is_secret_name(name) else text for name, text in cluster.environment.items()}
    say(f"# {slurm.submission(job, cluster)} <<'SCRIPT'")
    say(redact(render(job, cluster.model_copy(update={"environment": shown}))))
