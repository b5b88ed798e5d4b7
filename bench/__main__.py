"`python -m bench [--only NAME] [--quick] [--output FILE]`"

import argparse
import sys

from bench import FOLDER, run


def main(words=None):
    "Measure; the exit code is 1 where a benchmark could not be run, a missed goal is no failure."
    p = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure our ways beside others; processor time decides, wall time stands beside it.",
    )
    p.add_argument(
        "--only",
        default="",
        metavar="NAME",
        help="a topic, a name such as toolkit.snapshot, or a pattern; other rows of the file stay",
    )
    p.add_argument(
        "--quick",
        action="store_true",
        help="small sizes and two repetitions, to see that it works; written only with --output",
    )
    p.add_argument("--output", metavar="FILE", help="default bench/results.json")
    a = p.parse_args(words)
    rows, failed = run(a.only, a.quick, a.output or (None if a.quick else FOLDER / "results.json"))
    if not rows and not failed:
        print(f"no benchmark is called {a.only}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
