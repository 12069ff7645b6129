from pathlib import Path

from setuptools import find_packages, setup

# what tests and benchmarks compare with
PEERS = ["transformers>=4.56", "trl>=1.16", "peft>=0.21", "datatrove>=0.9"]
MATH = "math-verify>=0.8"  # compares mathematical answers
ROUGE = "rapidfuzz>=3.0"  # tells instructions that are close to others
LANGUAGE = "py3langid>=0.4"  # identifies languages
CURATION = [LANGUAGE, "ftfy>=6.3"]  # ftfy repairs texts that were decoded in a wrong encoding
# signatures, k-means and encoders of the steps that find duplicates
DUPLICATES = ["rensa>=0.5", "faiss-cpu>=1.9", "sentence-transformers>=5.1"]
BROWSER = "playwright>=1.50"  # drives the Chromium of the machine in a test
# What programs of the recipes for tools import. They run in the sandbox, where users install these.
TOOLS = ["sympy", "jsonschema", "docstring-parser", "pypdf", "python-docx", "openpyxl"]
TRITON = "triton; sys_platform == 'linux'"  # CUDA builds of torch bring it, torch for CPU does not

# Directories outside megatron_post/ that belong into a wheel. `config copy` copies the configs and launchers.
OUTSIDE = {
    "megatron_post.configs": "configs",
    "megatron_post.launchers": "launchers",
    "megatron_post_kernels": "kernels/megatron_post_kernels",
}
# Where metrics may be shown. Each is an extra of its own: a user needs at most one of them.
TRACKERS = {"wandb": ["wandb>=0.19"], "mlflow": ["mlflow-skinny>=3.0"]}
# Loose here, pinned for the tests in constraints.txt. CUDA-only packages are extras and imported lazily.
# `apex` on PyPI is not NVIDIA's and must never be named here; `megatron-post doctor` recognises it.
setup(
    name="megatron-post",
    version="0.1.0",
    description="Post-training for Llama 3 on megatron-core: SFT, reward model, DPO",
    license="Apache-2.0",
    python_requires=">=3.11",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    classifiers=[
        "Operating System :: MacOS",  # for what needs no GPU
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
    ],
    packages=[*find_packages(include=["megatron_post*"]), *OUTSIDE],
    package_dir=OUTSIDE,
    package_data={
        "megatron_post": ["py.typed", "**/*.j2", "**/*.jinja", "**/*.sbatch"],
        "megatron_post.configs": ["**/*"],
        "megatron_post.launchers": ["**/*"],
        "megatron_post_kernels": ["py.typed"],
    },
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.17",
        "numpy",
        "psutil",  # megatron-core's checkpoint writer hangs without it
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "typer>=0.12",
        "rich",
        "httpx2>=2.0",  # asks servers; transformers requires it too
        "tenacity>=9.0",
        "regex",  # stops where Python's own would search for ever
        "zarr>=3.0",
        "blake3",  # checksums of checkpoints
        "isal",  # CRC-32 of weights and packs, faster than zlib's
        "tokenizers>=0.20",
        "safetensors>=0.4",
        "huggingface_hub",  # models by their name on the hub
        "jinja2>=3.1",
        "matplotlib>=3.9",  # charts of pages
        "datasets>=2.20",
        "tensorboard",
        "xxhash",  # hashes of words; datasets requires it too
    ],
    extras_require={
        **TRACKERS,
        "cuda": ["transformer-engine[pytorch]>=2.9,<2.12"],  # megatron-core's range
        "dali": ["nvidia-dali-cuda120>=1.53"],
        "generate": ["transformers>=4.56", "vllm>=0.32,<0.33; sys_platform == 'linux'"],
        "curate": [*CURATION, *DUPLICATES],
        "synthesize": ["ruff", MATH, ROUGE, LANGUAGE],
        "eval": ["lm_eval>=0.4.9", "transformers>=4.56", "accelerate"],
        "bench": PEERS,
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "tiktoken",
            TRITON,
            MATH,
            ROUGE,
            *CURATION,
            BROWSER,
            *TOOLS,
            *PEERS,
            *DUPLICATES,
            *TRACKERS["wandb"],
            *TRACKERS["mlflow"],
        ],
    },
    entry_points={"console_scripts": ["megatron-post=megatron_post.cli:main"]},
)
