"""The section `tracking`: where metrics are shown besides `metrics.jsonl` and TensorBoard."""

from typing import Literal

from pydantic import Field

from megatron_post.config.section import Name, Section


class WandB(Section):
    """A run of Weights & Biases. One run id stays over all restarts."""

    project: Name = Field(description="project of the run")
    entity: Name | None = Field(None, description="team or user. null: that of the login")
    name: Name | None = Field(None, description="null: the name of `run_dir`")
    tags: tuple[Name, ...] = Field((), description="tags of the run")
    mode: Literal["online", "offline"] = Field(
        "online", description="offline: write below `run_dir`, for `wandb sync` where there is internet"
    )


class MLflow(Section):
    """A run of MLflow. One run id stays over all restarts."""

    uri: Name = Field(description="tracking server, or sqlite:///FILE")
    experiment: Name = Field(description="experiment that the run belongs to. It is created if it is missing")
    name: Name | None = Field(None, description="null: the name of `run_dir`")


class Tracking(Section):
    """Where metrics are shown besides `metrics.jsonl` and TensorBoard."""

    wandb: WandB | None = Field(None, description="null: not Weights & Biases")
    mlflow: MLflow | None = Field(None, description="null: not MLflow")
