#!/usr/bin/env python3
"""How fast a job's Ray comes up, what the script adds to it, and how fast the job ends.

    python bench/bringup/run.py > table.md

Needs root on Debian, as the tests' Slurm cluster does, and an environment with Ray and the
evaluator (--prefix; the one that runs this unless given). Prints tables in Markdown; progress goes
to standard error.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ending import ending
from overhead import overhead
from ratio import ratio

PARTS = ("ratio", "overhead", "ending")


def note(text: str) -> None:
    """Say what is going on."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    add("--prefix", type=Path, default=Path(sys.prefix), help="environment of the jobs")
    add("--pairs", type=int, default=5, help="pairs of jobs for the ratio (5)")
    add("--nodes", default="1,8,64,256", help="job sizes for the overhead (1,8,64,256)")
    add("--repeats", type=int, default=3, help="jobs of each size and of the ending (3)")
    add("--demo", type=Path, help="the demo's directory (made anew unless given)")
    arguments = parser.parse_args()
    parts = arguments.parts or PARTS
    if os.geteuid() != 0:
        parser.error("needs root: the cluster makes namespaces")
    if set(parts) - set(PARTS):
        parser.error(f"the parts are {', '.join(PARTS)}")
    if "ratio" in parts:
        print(
            "## Bring-up\n", *ratio(arguments.prefix, arguments.pairs, note), sep="\n", flush=True
        )
    if "overhead" in parts:
        sizes = [int(size) for size in arguments.nodes.split(",")]
        print("\n## Overhead\n", *overhead(sizes, arguments.repeats, note), sep="\n", flush=True)
    if "ending" in parts:
        lines = ending(arguments.prefix, arguments.demo, arguments.repeats, note)
        print("\n## Ending\n", *lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()
