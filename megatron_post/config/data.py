"""The sections `tokenizer` and `data`, which say what data is used and how it is read."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_post.config.section import Count, Distinct, Line, Name, Positive, Section, Whole

Rating = Literal["significantly_better", "better", "slightly_better", "marginally_better"]
TrainOn = Literal["all_turns", "last_turn"]
Reasoning = Literal["refuse", "drop", "render"]
Neutral = Literal["right", "wrong", "unlabelled"]


class Tokenizer(Section):
    """The tokenizer of the model."""

    path: Name = Field(
        description="Meta's tokenizer.model, a tokenizer.json, a directory that holds one of them, or a "
        "model of the hub"
    )
    content_tokens: tuple[Line, ...] = Field(
        (),
        description="added special tokens, such as <think>, that texts may spell. Other special tokens in "
        "texts are encoded as text",
    )


class Dataset(Section):
    """The rows of a local file or directory, or of a dataset on the hub, read through `datasets`."""

    name: Name = Field(description="its name in statistics and messages")
    path: Name = Field(description="file, directory, or name of a dataset on the hub")
    split: Name = Field(
        "train", description="split of a dataset on the hub, or of a directory that has several"
    )
    subset: Name | None = Field(
        None, description="configuration of a dataset that has several; null: its default"
    )
    format: Literal["auto", "messages", "preference", "columns", "transcript", "steps"] = Field(
        "auto", description="the form of the rows. auto: the keys of each row decide"
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="the column of each role, for rows with one column per role, or {messages: column}, or "
        "{text: column} for documents. Documents are in the column `text` by default",
    )
    max_rows: Count | None = Field(None, description="use only this number of first rows. null: all rows")
    templated: Literal["refuse", "keep"] = Field(
        "refuse", description="what happens to texts with the markers of a chat template or a transcript"
    )
    ignore: tuple[str, ...] = Field(
        (), description="keys of rows and messages that are skipped, so neither used, refused nor listed"
    )


class Source(Dataset):
    """A dataset with its share of the training data."""

    epochs: Positive | None = Field(None, description="how often each row is used. Excludes `weight`")
    weight: Positive | None = Field(
        None,
        description="share of the mixture's rows, or with stage=pretrain of its tokens, relative to other "
        "weights",
    )
    train_on: TrainOn | None = Field(None, description="as data.train_on, for this source. null: the same")
    batch: Whole = Field(0, description="number of the preference batch. A higher number is newer")

    @model_validator(mode="after")
    def _one_of_epochs_and_weight(self) -> "Source":
        if self.epochs is not None and self.weight is not None:
            raise ValueError(f"source {self.name!r}: give epochs or weight, not both")
        return self


class Preferences(Section):
    """The choice of comparisons, as in section 4.2 of the report. Rows without a rating pass `min_rating`."""

    min_rating: Rating | None = Field("better", description="drop comparisons rated lower. null: keep all")
    max_similarity: float = Field(
        0.95, gt=0, le=1, description="drop pairs whose responses share a larger part of their token trigrams"
    )
    newest_batch_only: bool = Field(False, description="use only the sources of the highest `batch`")


class Steps(Section):
    """How the steps of a solution are read and rendered, for a reward model of steps."""

    separator: str = Field(
        "\n\n",
        min_length=1,
        max_length=64,
        description="the text that is written between two steps, and at which `score` splits responses that "
        "have no steps numbered as `Step 1:`",
    )
    neutral: Neutral = Field(
        "right",
        description="the label of a step that PRM800K rates 0. unlabelled: the step is only context",
    )


class PromptedSource(Section):
    """A source whose rows are rendered with prompt templates. Each template gives a source of its own."""

    source: Name = Field(description="name of an entry of data.sources or data.eval_sources")
    templates: Name = Field(description="file of templates in promptsource's YAML format")
    names: Annotated[tuple[Line, ...], Distinct] = Field(
        (), description="names of the templates that are used. Empty: all templates of the file"
    )
    task: Name = Field(description="the task of the dataset, such as sentiment or paraphrase")


class Prompted(Section):
    """Multitask prompting as in T0: several prompt templates for each dataset, and held-out tasks."""

    sources: tuple[PromptedSource, ...] = Field((), description="the sources that templates are applied to")
    max_examples: Count = Field(
        500_000,
        description="most examples of a dataset. Each of its n templates is applied to at most "
        "max_examples / n rows, which the seed draws",
    )
    held_out_tasks: Annotated[tuple[Name, ...], Distinct] = Field(
        (), description="tasks whose datasets in data.sources are not trained on"
    )


class Data(Section):
    """The data of a run, and how it is packed."""

    store: Name = Field(description="directory of the packed zarr store")
    sources: tuple[Source, ...] = Field((), description="datasets to train on")
    eval_sources: tuple[Source, ...] = Field((), description="held-out datasets, for evaluation")
    pack_length: Count = Field(8192, description="tokens in a pack. Every microbatch is one pack")
    overlong: Literal["error", "drop", "truncate"] = Field(
        "error", description="what happens to an example that is longer than a pack"
    )
    max_bad_rows: Whole = Field(0, description="bad rows that are left out. With more of them packing fails")
    train_on: TrainOn = Field(
        "all_turns",
        description="the assistant's turns that are trained in rows of `messages`. A mark on a message "
        "(`weight`, `train`) has priority. Rows of prompt and completion train the completion.",
    )
    reasoning: Reasoning = Field(
        "refuse",
        description="what happens to an assistant's `reasoning_content` or `thinking`. refuse: the row is "
        "bad. drop: it is left out. render: it is written between <think> and </think> before the answer",
    )
    preferences: Preferences = Field(Preferences(), description="which comparisons are used")
    steps: Steps = Field(Steps(), description="the labelled steps of stage=step_reward")
    prompted: Prompted = Field(Prompted(), description="prompt templates that are applied to sources")
    backend: Literal["torch", "dali"] = Field("torch", description="what copies packs to the device")
    prefetch: int = Field(4, gt=0, le=4096, description="microbatches prepared ahead in the background")
