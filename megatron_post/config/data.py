"""The sections that say which data is used, and how it is read: `tokenizer` and `data`."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_post.config.section import Count, Line, Name, Positive, Section, Whole

Rating = Literal["significantly_better", "better", "slightly_better", "marginally_better"]
TrainOn = Literal["all_turns", "last_turn"]
Reasoning = Literal["refuse", "drop", "render"]


class Tokenizer(Section):
    """The tokenizer of the model."""

    path: Name = Field(
        description="Meta's tokenizer.model, a tokenizer.json, or a directory that holds one of them"
    )
    content_tokens: tuple[Line, ...] = Field(
        (),
        description="special tokens of the user's own, such as <think>, that texts may spell; what spells "
        "another special token is encoded as text",
    )


class Source(Section):
    """One dataset: a local file or directory, or a hub name, read through `datasets`."""

    name: Name = Field(description="what statistics and messages call it")
    path: Name = Field(description="file, directory, or name of a dataset on the hub")
    split: Name = Field(
        "train", description="split of a dataset on the hub, or of a directory that has several"
    )
    subset: Name | None = Field(
        None, description="configuration of a dataset that has several; null: its default"
    )
    format: Literal["auto", "messages", "preference", "columns", "transcript"] = Field(
        "auto", description="what the rows hold; auto: decided by the keys of each row"
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="role -> column, for rows that hold one column a role; or {messages: column}",
    )
    epochs: Positive | None = Field(None, description="how often each row is used; exclusive with weight")
    weight: Positive | None = Field(
        None, description="share of the mixture's rows, relative to other weights"
    )
    max_rows: Count | None = Field(None, description="use only so many rows, the first ones; null: all")
    train_on: TrainOn | None = Field(None, description="null: as data.train_on")
    templated: Literal["refuse", "keep"] = Field(
        "refuse", description="texts that hold the marks of a chat template or a transcript"
    )
    ignore: tuple[str, ...] = Field(
        (), description="keys of rows and messages that are passed over: neither used, refused nor listed"
    )
    batch: Whole = Field(0, description="number of the preference batch; a higher one is newer")

    @model_validator(mode="after")
    def _one_of_epochs_and_weight(self) -> "Source":
        if self.epochs is not None and self.weight is not None:
            raise ValueError(f"source {self.name!r}: give epochs or weight, not both")
        return self


class Preferences(Section):
    """Which comparisons are used, as in section 4.2 of the report. Rows without a rating pass
    `min_rating`."""

    min_rating: Rating | None = Field("better", description="drop comparisons rated lower; null: keep all")
    max_similarity: float = Field(
        0.95, gt=0, le=1, description="drop pairs whose responses share a larger part of their token trigrams"
    )
    newest_batch_only: bool = Field(False, description="use only the sources of the highest `batch`")


class Data(Section):
    """What is trained on, and how it is packed."""

    store: Name = Field(description="directory of the packed zarr store")
    sources: tuple[Source, ...] = Field((), description="datasets to train on")
    eval_sources: tuple[Source, ...] = Field((), description="held-out datasets, for evaluation")
    pack_length: Count = Field(8192, description="tokens in a pack; every microbatch is one pack")
    overlong: Literal["error", "drop", "truncate"] = Field(
        "error", description="what becomes of an example that is longer than a pack"
    )
    max_bad_rows: Whole = Field(
        0, description="rows that may be refused, and are left out, before packing ends"
    )
    train_on: TrainOn = Field(
        "all_turns",
        description="turns of the assistant that rows of `messages` train. A mark on a message (`weight`, "
        "`train`) comes first. Rows of prompt and completion train the completion.",
    )
    reasoning: Reasoning = Field(
        "refuse",
        description="what an assistant's `reasoning_content` or `thinking` becomes. refuse: its row is bad; "
        "drop: it is left out; render: it stands between <think> and </think> before the answer",
    )
    preferences: Preferences = Field(Preferences(), description="which comparisons are used")
    backend: Literal["torch", "dali"] = Field("torch", description="what brings packs to the device")
    prefetch: int = Field(4, gt=0, le=4096, description="microbatches prepared ahead in the background")
