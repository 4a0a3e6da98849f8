"""The HuggingFace backend on one real GPU, under load; docs/serving.md says how to run it.

``SLURMEVAL_GPU_MODEL`` names a checkpoint, a path or a hub name; without it the demo's is served.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from serving import Deployment, LocalRay

BENCH = Path(__file__).resolve().parents[2] / "bench" / "serving"
pytestmark = [pytest.mark.serving, pytest.mark.timeout(3600)]


def no_gpu() -> str:
    """Return why there is no GPU for these tests, or an empty text."""
    try:
        import torch
    except ImportError as error:
        return f"the GPU test needs torch: {error}"
    return "" if torch.cuda.is_available() else "the GPU test needs a GPU that torch can use"


@pytest.mark.skipif(bool(no_gpu()), reason=no_gpu() or "there is a GPU")
def test_load_on_one_gpu(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    sys.path.insert(0, str(BENCH))
    from serving_load import KINDS, measure

    model = os.environ.get("SLURMEVAL_GPU_MODEL")
    checkpoint = model or request.getfixturevalue("demo_dir") / "model"
    folder = Path(tempfile.mkdtemp(prefix="gpu-", dir="/tmp"))
    ray = LocalRay(folder, cpus=4, gpus=1)
    config = tmp_path / "config.yaml"
    config.write_text("eval: {parallelism: 128}\n")
    flags = ("--backend=hf", "--num_gpus=1", "--torch_dtype=bfloat16", f"--config={config}")
    deployment = Deployment(ray, tmp_path / "run", checkpoint, *flags)
    try:
        url = deployment.endpoint()["completions"]
        for kind in KINDS:
            measure(url, kind, 4, 16)  # warms up
        loads = [measure(url, kind, count, 200) for kind in KINDS for count in (1, 8, 32, 128)]
        for load in loads:
            print(
                f"{load.kind:14} {load.clients:4} clients {load.rate:8.1f} requests/s "
                f"{load.tokens:9.1f} tokens/s, median {load.latency:.3f} s"
            )
        assert [load.failed for load in loads] == [0] * len(loads)
        assert deployment.stop() == 0
    finally:
        deployment.kill(signal.SIGTERM)
        ray.stop()
        shutil.rmtree(folder)
