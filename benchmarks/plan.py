"""What slices of TPUs would do with BERT: `--plan` for the paper's models, as the table in README.

    pip install '.[tpu]'
    python benchmarks/plan.py [--configs pretrain_base …] [--topologies v5e:2x4 …] [--rows 64] [--output plans]

Each plan is one run of `train.py --plan`, in a process of its own, with `--rows` rows of 128 tokens a chip (a quarter
of them at 512). Plans that are in `--output` already are read, not made again.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = ("pretrain_base", "pretrain_base_512", "pretrain_large", "pretrain_large_512")
TOPOLOGIES = ("v5e:2x4", "v5e:16x16", "v4:8x8x8", "v5p:4x4x4", "v6e:4x4")
HEAD = "| config | slice | rows a chip | GB a chip | step, ms | MFU | tokens a second | compiled in |"


def plan(name: str, topology: str, rows: int, accumulate: int, output: Path) -> dict:
    """One plan, from its file or made now."""
    folder = output / f"{name}-{topology.replace(':', '-')}-{rows}x{accumulate}"
    if not (folder / "plan.json").exists():
        chips = math.prod(int(size) for size in topology.split(":")[1].split("x"))
        words = [sys.executable, "-m", "bert_jax.train", "--config", CONFIGS / f"{name}.py", "--plan", topology]
        words += ["--workdir", folder, "--train.global-batch-size", rows * accumulate * chips]
        subprocess.run([*map(str, words), "--optimizer.accumulate", str(accumulate)], check=True)
    return json.loads((folder / "plan.json").read_text())


def main() -> None:
    """Makes the plans one after the other, since each compiles on all cores, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="+", default=NAMES)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--rows", type=int, default=64, help="of 128 tokens, a chip and micro-batch (default: 64)")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("plans"), help="folder of the plans (default: plans)")
    args = parser.parse_args()
    lines = [HEAD, "|" + "---|" * HEAD.count(" | ") + "---|"]
    for name in args.configs:
        rows = args.rows // 4 if name.endswith("_512") else args.rows
        for topology in args.topologies:
            found = plan(name, topology, rows, args.accumulate, args.output)
            low, high = (1000 * value for value in found["seconds"]["step"])
            slow, fast = found["tokens_per_second"]
            lines.append(
                f"| `{name}` | {topology} | {args.accumulate} x {rows} | {found['bytes_per_chip']['peak'] / 1e9:.2f} | "
                f"{low:.1f} to {high:.1f} | {found['mfu'][0]:.2f} to {found['mfu'][1]:.2f} | "
                f"{slow / 1e6:.2f} to {fast / 1e6:.2f} M | {found['compile_seconds']:.0f} s |"
            )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
