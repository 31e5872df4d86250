"""A checkpoint as a set of modules: show what they do, prune, insert and merge them.

The checkpoints that are read stay as they are; what is written appears whole or not at all.
"""

import argparse

from megamf.cli import run
from megamf.tools import _modules_insert, _modules_merge, _modules_prune, _modules_show

ACTIONS = {
    "show": (_modules_show.options, _modules_show.show, "use of every module on data, heat maps, duplicates"),
    "prune": (_modules_prune.options, _modules_prune.prune_job, "a checkpoint without the modules that are used least"),
    "insert": (_modules_insert.options, _modules_insert.run_insert, "a checkpoint with new modules in every layer"),
    "merge": (_modules_merge.options, _modules_merge.run_merge, "average checkpoints, or make duplicate modules one"),
}


def main(argv: list[str] | None = None) -> int:
    """Do what was asked for."""
    parser = argparse.ArgumentParser(prog="megamf modules", description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    for name, (options, _, what) in ACTIONS.items():
        options(actions.add_parser(name, help=what, description=what))
    args = parser.parse_args(argv)
    return ACTIONS[args.action][1](args)


if __name__ == "__main__":
    raise SystemExit(run(main))
