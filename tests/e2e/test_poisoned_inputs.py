"""No byte of a model, a tokenizer or a store is ever run. Checkpoints are in test_poison.py."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from megatron_post.config.load import validate
from megatron_post.config.sections import Model
from megatron_post.convert.mapping import META_NAMES
from megatron_post.data.build import build_store
from megatron_post.data.tokenizer import load_tokenizer
from tests.e2e.poison import Call, Case, check, poisons, run_on_poison, saved
from tests.e2e.runs import small_run
from tests.ranks import run_ranks
from tests.unit.convert.models import weights_of, write_hf

Change = Callable[[Path], object]
FORMS = ("a plain pickle", "an object of the list", "an old archive")
# The commands that read each kind of input.
READERS = {
    "hf": ("inspect", "verify", "hf-to-megatron", "merge", "train", "generate", "reference"),
    "reward": ("score",),
    "meta": ("inspect", "verify", "hf-to-megatron"),
    "store": ("train", "stats", "show", "data verify"),
    "pairs": ("reference", "data verify"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, a reward model, a Meta model, a store of dialogs and a store of preferences."""
    directory = tmp_path_factory.mktemp("inputs")
    config = small_run(directory, model={"num_layers": 1, "rope_scaling": None}, train={"steps": 1})
    model, tokenizer = config.model, load_tokenizer(directory / "tokenizer")
    for name, is_reward in (("hf", False), ("reward", True)):
        weights = weights_of(model, scalar_head=is_reward)
        write_hf(directory / name, model, weights, scalar_head=is_reward)
        tokenizer.save(directory / name)
        (directory / name / "generation_config.json").write_text("{}")
    _write_meta(directory / "meta", model)
    rows = directory / "pairs.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 8)
    values = config.model_dump() | {"stage": "dpo"}
    values["data"] |= {"store": str(directory / "pairs"), "sources": [{"name": "pairs", "path": str(rows)}]}
    build_store(validate(values, origin="pairs"), console=Console(quiet=True))
    (directory / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    return directory


def _write_meta(directory: Path, model: Model) -> None:
    directory.mkdir()
    tensors = {}
    for name, tensor in weights_of(model).items():
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        in_layer = name.startswith("model.layers.")
        tensors[f"layers.{layer}.{META_NAMES[rest]}" if in_layer else META_NAMES[name]] = tensor
    torch.save(tensors, directory / "consolidated.00.pth")
    params = {"dim": model.hidden_size, "n_layers": model.num_layers, "n_heads": model.num_attention_heads}
    params |= {"n_kv_heads": model.num_key_value_heads, "norm_eps": model.rms_norm_eps}
    (directory / "params.json").write_text(json.dumps(params))


def _commands(base: Path, changed: Path, work: Path) -> dict[str, tuple[object, ...]]:
    """Every command that reads the changed input. work: the directory in which it may write."""
    (work / "merge.yaml").write_text(yaml.safe_dump({"models": [{"model": str(changed)}] * 2}))
    sampling = {"samples": 1, "max_tokens": 2}
    drawing = {"model": str(changed), "prompts": str(base / "prompts.jsonl"), "sampling": sampling}
    (work / "generate.yaml").write_text(yaml.safe_dump(drawing))
    train = ["train", base / "config.yaml", f"run_dir={work / 'run'}"]
    if changed.name == "store":
        train += [f"data.store={changed}"]
    else:
        train += [f"model.init_from={changed}", f"tokenizer.path={changed}"]
    pairs = changed if changed.name == "pairs" else Path(shutil.copytree(base / "pairs", work / "own-pairs"))
    return {
        "inspect": ("convert", "inspect", changed),
        "verify": ("convert", "verify", changed, changed),
        "hf-to-megatron": ("convert", "hf-to-megatron", changed, work / "checkpoints"),
        "merge": ("merge", "linear", "--config", work / "merge.yaml", "--output", work / "merged"),
        "train": tuple(train),
        "generate": ("generate", work / "generate.yaml", "--output", work / "responses.jsonl"),
        "reference": ("reference", pairs, "--model", base / "hf" if changed.name == "pairs" else changed),
        "score": ("score", changed, base / "pairs.jsonl", "--output", work / "scores.jsonl"),
        "stats": ("data", "stats", changed),
        "show": ("data", "show", changed),
        "data verify": ("data", "verify", changed),
    }


def _walk(base: Path, directory: Path, kind: str, changes: Mapping[str, Change]) -> list[Case]:
    """Run each reader on a fresh copy with each change of an input."""
    found = []
    for what, change in changes.items():
        for reader in READERS[kind]:
            work = directory / "work"
            shutil.rmtree(work, ignore_errors=True)
            changed = Path(shutil.copytree(base / kind, work / kind))
            change(changed)
            arguments = _commands(base, changed, work)[reader]
            found.append(run_on_poison(what, reader, arguments, directory / "witness"))
    return found


def _files(base: Path, tmp_path: Path, kind: str, forms: Sequence[str]) -> dict[str, Change]:
    """Each file of an input, replaced by each form of poison."""
    contents, root = poisons(tmp_path / "witness"), base / kind
    names = [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()]
    return {
        f"{name} {form}": partial(_write, name=name, content=contents[form])
        for name in names
        for form in forms
    }


def _write(directory: Path, *, name: str, content: bytes) -> None:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize("kind", READERS)
def test_unchanged_every_command_reads_it(base: Path, tmp_path: Path, kind: str) -> None:
    (cases,) = run_ranks(_walk, 1, base, tmp_path, kind, {"nothing": Path.exists})
    assert [case.status for case in cases] == [0] * len(READERS[kind]), cases


@pytest.mark.parametrize("kind", ["hf", "reward", "meta"])
def test_every_file_of_a_model(base: Path, tmp_path: Path, kind: str) -> None:
    """All commands read weights and configs.

    The tokenizer is read only by those that use it, and copied by others.
    """
    (cases,) = run_ranks(_walk, 1, base, tmp_path, kind, _files(base, tmp_path, kind, FORMS))
    for case in cases:
        name, uses_text = case.what.split()[0], case.reader in ("train", "generate", "score")
        if name in ("generation_config.json", "tokenizer_config.json"):
            check(case, named=None)
        else:
            check(case, named=name if name != "tokenizer.json" or uses_text else None)


def _config(directory: Path, *, name: str = "config.json", **values: object) -> None:
    """Add keys to a JSON file."""
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _code(directory: Path, *, witness: Path) -> None:
    """Write code beside the weights, to which the config and the tokenizer refer."""
    classes = {
        "AutoConfig": "evil.A",
        "AutoModelForCausalLM": "evil.A",
        "AutoTokenizer": ["evil.A", "evil.A"],
    }
    for name in ("config.json", "tokenizer_config.json"):
        _config(directory, name=name, auto_map=classes)
    for name in ("evil.py", "custom_generate/generate.py"):
        _write(
            directory, name=name, content=f"import pathlib\npathlib.Path({str(witness)!r}).touch()\n".encode()
        )


def _other_weights(directory: Path, *, content: bytes) -> None:
    """Write pickled weights beside the safetensors, under names that `transformers` looks for."""
    for name in ("pytorch_model.bin", "adapter_model.bin", "other.bin"):
        _write(directory, name=name, content=content)
    _write(
        directory,
        name="adapter_config.json",
        content=b'{"peft_type": "LORA", "base_model_name_or_path": "."}',
    )
    _config(directory, transformers_weights="other.bin")


def _template(directory: Path, *, witness: Path) -> None:
    """Write a chat template that calls a Python function."""
    text = f"{{{{ cycler.__init__.__globals__.os.system('touch {witness}') }}}}"
    _write(directory, name="chat_template.jinja", content=text.encode())
    _config(directory, name="tokenizer_config.json", chat_template=text)


@pytest.mark.parametrize("kind", ["hf", "reward"])
def test_other_files_of_a_model_directory(base: Path, tmp_path: Path, kind: str) -> None:
    """`transformers` might load these files. This project does not use them."""
    witness = tmp_path / "witness"
    changes: dict[str, Change] = {
        "code": partial(_code, witness=witness),
        "a template": partial(_template, witness=witness),
        "a kernel": partial(_config, attn_implementation="evil/kernel", _attn_implementation="evil/kernel"),
    }
    for form in FORMS:
        changes[f"weights {form}"] = partial(_other_weights, content=poisons(witness)[form])
    (cases,) = run_ranks(_walk, 1, base, tmp_path, kind, changes)
    for case in cases:
        check(case, named=None)


def test_an_object_among_metas_tensors(base: Path, tmp_path: Path) -> None:
    bomb = Call(Path.touch, tmp_path / "witness")
    change = partial(_write, name="consolidated.00.pth", content=saved({"norm.weight": bomb}))
    (cases,) = run_ranks(_walk, 1, base, tmp_path, "meta", {"an object": change})
    for case in cases:
        check(case, named="consolidated.00.pth: not a file of plain tensors; nothing in it was run")


def _sign_store(store: Path) -> None:
    """Write checksums that fit the present files, as any attacker can."""
    content = json.loads((store / "checksums.json").read_text())
    content.pop("sha256")
    for name in content["files"]:
        if (store / name).is_file():
            content["files"][name] = hashlib.sha256((store / name).read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (store / "checksums.json").write_text(json.dumps({"sha256": digest, **content}))


def _write_and_sign(store: Path, *, name: str, content: bytes) -> None:
    _write(store, name=name, content=content)
    if name != "checksums.json":
        _sign_store(store)


def _pickling_codec(store: Path, *, codec: str, content: bytes) -> None:
    """Write an array whose codec would unpickle."""
    array = store / "train" / "segment_offsets"
    _config(array, name="zarr.json", codecs=[{"name": codec, "configuration": {"protocol": 5}}])
    _write(array, name="c/0", content=content)
    _sign_store(store)


def _older_array(store: Path, *, dtype: str, filters: list[str], content: bytes) -> None:
    """Write such an array in zarr's older format, in which arrays of objects are pickled."""
    shutil.rmtree(store / "train" / "segment_offsets")
    for group in (store, store / "train"):
        attributes = json.loads((group / "zarr.json").read_text())["attributes"]
        _write(group, name=".zgroup", content=b'{"zarr_format": 2}')
        _write(group, name=".zattrs", content=json.dumps(attributes).encode())
    (store / "train" / "zarr.json").unlink()
    meta = {
        "zarr_format": 2, "shape": [1], "chunks": [1], "dtype": dtype, "compressor": None, "fill_value": 0,
        "order": "C", "filters": [{"id": name} for name in filters],
    }  # fmt: skip
    _write(store / "train" / "segment_offsets", name=".zarray", content=json.dumps(meta).encode())
    _write(store / "train" / "segment_offsets", name="0", content=content)
    _sign_store(store)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["store", "pairs"])
def test_every_file_of_a_store(base: Path, tmp_path: Path, kind: str) -> None:
    """Each file is replaced by a pickle, and arrays get codecs that would unpickle.

    Every command reads all metadata, and only the arrays that it needs. `data verify` reads all arrays.
    """
    content = pickle.dumps(Call(Path.touch, tmp_path / "witness"))
    names = [path.relative_to(base / kind) for path in sorted((base / kind).rglob("*")) if path.is_file()]
    changes: dict[str, Change] = {
        str(name): partial(_write_and_sign, name=str(name), content=content) for name in names
    }
    for codec in ("pickle", "numcodecs.pickle"):
        changes[f"{codec}.json"] = partial(_pickling_codec, codec=codec, content=content)
    for dtype, filters in (("|O", ["pickle"]), ("|O", ["vlen-utf8", "pickle"]), ("<i8", ["pickle"])):
        changes[f"{dtype} {filters}.json"] = partial(
            _older_array, dtype=dtype, filters=filters, content=content
        )
    (cases,) = run_ranks(_walk, 1, base, tmp_path, kind, changes)
    for case in cases:
        if case.reader == "data verify":  # it lists all damaged packs
            assert case.status == 2 and not case.ran and "Traceback" not in case.output, case
        else:
            check(case, named=f"/{kind}" if case.what.endswith(".json") or case.status else None)
