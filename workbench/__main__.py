"""The `workbench` command."""

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The command line: run, runs, import-config, import-zoo, doctor."""
    top = argparse.ArgumentParser(
        prog="workbench", description="A notebook-first workbench for latent-variable models."
    )
    commands = top.add_subparsers(dest="command", required=True)
    told = "execute the notebooks of parameter folders, or go on with them"
    run = commands.add_parser("run", help=told, allow_abbrev=False)  # a driver's job has the same words but --detach
    run.add_argument("folders", type=Path, nargs="+", metavar="folder", help="such as params/demo")
    run.add_argument("-p", metavar="key=value", dest="overrides", action="append", default=[], help="set a parameter")
    run.add_argument("--seeds", type=int, metavar="N", help="run everything with N seeds; of a sweep, each setting")
    run.add_argument(
        "--grid",
        metavar="key=a,b,c",
        action="append",
        default=[],
        help="run everything with each of these values of a parameter; several give all combinations",
    )
    run.add_argument("--site", type=Path, metavar="FILE", help="run on a cluster, such as cluster/slurm.py says")
    run.add_argument("--detach", action="store_true", help="with --site: submit what waits for the runs as a job too")
    run.add_argument(
        "--jobs", type=int, metavar="N", help="of a sweep: runs at one time (one for each CUDA device, else 1)"
    )
    run.add_argument(
        "--accept-failures", action="store_true", help="begin from the verdict of a sweep some of whose runs failed"
    )
    run.add_argument("--accept-undecided", action="store_true", help="begin from the verdict of a sweep on one seed")
    runs = commands.add_parser("runs", help="list the runs of an outputs folder")
    runs.add_argument("folder", type=Path, nargs="?", help="the project's outputs/ when left out")
    runs.add_argument("--watch", action="store_true", help="show what they are doing until interrupted")
    settings = commands.add_parser("import-config", help="turn settings of SimulGen-VAE into a parameter folder")
    settings.add_argument("condition", type=Path, help="its condition.txt")
    settings.add_argument("preset", type=Path, nargs="?", help="its preset.txt")
    settings.add_argument("--out", type=Path, required=True, help="a new folder, such as params/mine")
    zoo = commands.add_parser("import-zoo", help="turn a zoo of pickled modules into one of state dicts")
    zoo.add_argument("source", type=Path, help="folder of .pt files, or the one that holds it as weights/")
    zoo.add_argument("--out", type=Path, required=True, help="a new folder")
    zoo.add_argument(
        "--classes",
        nargs="+",
        required=True,
        metavar="package.module.Name",
        help="modules whose code may be run; a class that files call otherwise as __main__.Net=package.module.Net",
    )
    commands.add_parser("doctor", help="check what is installed, and say what to do about what is missing")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; errors of the user's making end in one message and exit code 1 or 2, Ctrl-C in 130."""
    args = parser().parse_args(arguments)
    try:
        return _command(args, sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        return 130


def _command(args: argparse.Namespace, arguments: list[str]) -> int:
    from workbench.paths import outputs_root

    if args.command == "doctor":
        from workbench.doctor import report

        return report(outputs_root())
    from workbench.config import ConfigError
    from workbench.datasets.frames import DataError
    from workbench.listing import table_of_runs
    from workbench.runs import RunError

    try:
        if args.command == "import-config":
            from workbench.importing import import_config

            lines = import_config(args.condition, args.preset, args.out)
            print("\n".join([*lines, f"parameter files of notebooks 01 to 04 are in {args.out}"]))
            return 0
        if args.command == "import-zoo":
            from workbench.datasets.zoo_importing import import_zoo

            print("\n".join([*import_zoo(args.source, args.out, args.classes), f"the zoo is in {args.out}"]))
            return 0
        if args.command == "runs" and args.watch:
            from workbench.live import watch

            watch(args.folder or outputs_root())
            return 0
        if args.command == "runs":
            table = table_of_runs(args.folder or outputs_root())
            print(table.to_string(index=False) if len(table) else "no runs yet")
            return 0
        return _run(args, arguments)
    except (ConfigError, RunError, DataError) as error:
        print(error, file=sys.stderr)
        return 1


def _run(args: argparse.Namespace, arguments: list[str]) -> int:
    from workbench.config import ConfigError

    accepted = {"failures": args.accept_failures, "undecided": args.accept_undecided}
    accept, overrides = [name for name, given in accepted.items() if given], _pairs(args.overrides)
    if args.site is None:
        from workbench.batch import run_folders

        if args.detach:
            raise ConfigError([("--detach", "needs --site FILE, a cluster to which it can be submitted")])
        return run_folders(args.folders, overrides, args.seeds, args.jobs, accept, args.grid)
    from workbench.cluster import detach, run_on_site

    if args.jobs is not None:
        raise ConfigError([(f"--jobs {args.jobs}", f"{args.site} says how many runs go on at one time: leave it out")])
    again = [word for word in arguments if word != "--detach"]
    begin = detach if args.detach else run_on_site
    return begin(args.folders, overrides, args.site, args.seeds, accept, args.grid, again)


def _pairs(overrides: list[str]) -> dict[str, str]:
    from workbench.config import ConfigError

    wrong = [(f"-p {text}", "must read key=value") for text in overrides if "=" not in text]
    if wrong:
        raise ConfigError(wrong)
    return dict(text.split("=", 1) for text in overrides)


if __name__ == "__main__":
    sys.exit(main())
