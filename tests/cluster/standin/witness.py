#!/usr/bin/env python3
"""Stands before the stand-in evaluator and leaves, beside the results, what reached it."""

import hashlib
import json
import os
import sys
from pathlib import Path

SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "NGC_API_KEY")
FILES = {"image": Path("/image-name"), "mount": Path("/mnt/it's(a)mount/file")}

seen = {
    "probes": {name: value for name, value in os.environ.items() if name.startswith("PROBE_")},
    "secrets": {
        name: hashlib.sha256(os.environ.get(name, "").encode()).hexdigest() for name in SECRETS
    },
    **{name: path.read_text() if path.exists() else None for name, path in FILES.items()},
}
out = Path(sys.argv[sys.argv.index("--output_dir") + 1])
(out / "seen.part").write_text(json.dumps(seen))
(out / "seen.part").replace(out / "seen.json")
os.execv(sys.executable, [sys.executable, f"{__file__}.py", *sys.argv[1:]])
