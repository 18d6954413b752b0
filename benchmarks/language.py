#!/usr/bin/env python3
"""SmolLM2 gets a new name by the README's commands, and what is said of it there: `minipeft train`, `minipeft verify`.

    python benchmarks/language.py [--json figures/language.json]        a quarter of an hour on two processors

Each command runs in a process of its own, and what it prints is what is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from step import machine

from minipeft import files

TRAIN = 'minipeft train --model smollm2 --name Lumi --author "Ada Lab"'
COMMANDS = {"lora": TRAIN, "qlora": f"{TRAIN} --method qlora"}
VERIFY = "minipeft verify --full lora.all-linear --json ledger.json"


def run(command: str, directory: str) -> str:
    """What the command prints, in lines so long that no cell of a table is folded."""
    print(f"{command} …", file=sys.stderr)
    program = [sys.executable, "-m", *shlex.split(command)]
    environment = os.environ | {"COLUMNS": "1000"}
    return subprocess.run(program, cwd=directory, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def trained(command: str) -> dict[str, Any]:
    """The seconds of a training command, and the rows of its tables: [what, before, after]."""
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        text = run(command, directory)
        seconds = time.perf_counter() - start
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]
    return {"command": command, "seconds": round(seconds, 1), "rows": rows}


def all_linear() -> dict[str, Any]:
    """The shares of questions answered, by layers and seed, from the ledger."""
    with tempfile.TemporaryDirectory() as directory:
        run(VERIFY, directory)
        (claim,) = json.loads((Path(directory) / "ledger.json").read_text(encoding="utf-8"))["claims"]
    shares = {layers: [seed["answered"] for seed in seeds] for layers, seeds in claim["figures"].items()}
    return {"command": VERIFY, "found": claim["found"], "answered": shares}


def main() -> None:
    """Run everything, print it, and keep it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    report = {"machine": machine(), "trained": {name: trained(command) for name, command in COMMANDS.items()}}
    report["all_linear"] = all_linear()
    print(json.dumps(report, indent=2, ensure_ascii=False))
    if options.json:
        files.write_json(options.json, report)


if __name__ == "__main__":
    main()
