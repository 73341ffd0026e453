"""The command ``labkit``. What a command needs is imported inside it, so that ``labkit --help`` stays quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    name="labkit",
    help="Research papers as notebooks: list them, run them, judge their claims.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
_Size = Annotated[str, typer.Option("--size", "-s", help="smoke, laptop, gpu or paper.")]
_Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the results [build/runs].")]


def main() -> None:
    """Entry point. Exit code 0: done; 1: a run or a check failed; 2: the command was wrong; 130: interrupted.

    A claim that is not reproduced is a result, not a failure.
    """
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("labkit: interrupted; finished runs are kept", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own usage errors
            _stop(_usage(error))
        if isinstance(error, ValueError | TypeError | FileNotFoundError | FileExistsError):
            _stop(str(error))
        if isinstance(error, ImportError):
            _stop(f"{error}. Mend it with: pip install 'labkit[notebooks]'")
        if isinstance(error, OSError):
            _stop(str(error), code=1)
        raise


def _usage(error: Any) -> str:
    """Click's message, with the nearest command where a command is unknown."""
    from labkit.papers import nearest

    message: str = error.format_message()
    if message.startswith("No such command"):
        known = [name for command in app.registered_commands if (name := _command_name(command))]
        asked = message.split("'")[1] if "'" in message else ""
        return f"there is no command {asked!r}; {nearest(asked, known)}"
    return message


def _command_name(command: Any) -> str:
    return command.name or command.callback.__name__.replace("_", "-")


def _stop(message: str, code: int = 2) -> NoReturn:
    print(f"labkit: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _show(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def _given(pairs: list[str], option: str = "-p") -> dict[str, str]:
    """``name=value`` strings as a mapping."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise ValueError(f"{option} {pair!r} is not of the form name=value")
        if name in found:
            raise ValueError(f"{option} {name} is given twice")
        found[name] = value
    return found


@app.command("list")
def list_papers(as_json: _Json = False) -> None:
    """List the papers of the collection and what the committed notebooks measured."""
    from labkit.lab import listing

    rows = listing.rows()
    if as_json:
        _show(rows)
    else:
        listing.show(rows)


@app.command()
def run(
    slugs: Annotated[list[str] | None, typer.Argument(help="Papers or notebooks; all if none.")] = None,
    size: _Size = "laptop",
    seed: Annotated[int | None, typer.Option("--seed", help="First seed.")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="Another parameter, name=value.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Kernels at a time.")] = 1,
    out: _Out = None,
    fresh: Annotated[bool, typer.Option("--fresh", "--force", help="Run again what is there.")] = False,
    timeout: Annotated[float | None, typer.Option("--timeout", min=1, help="Seconds per run.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Write the HTML report when done.")] = False,
    as_json: _Json = False,
) -> None:
    """Run notebooks; what is unchanged since its last run is not run again."""
    from labkit import papers
    from labkit.lab import project, runner
    from labkit.lab.report import show, write

    given = _given(parameter or [])
    for name, value in (("size", size), ("seed", seed)):
        if name in given and value not in (None, "laptop"):
            raise ValueError(f"{name} is given both as --{name} and as -p {name}=")
    size = given.pop("size", size)
    names = list(slugs) if slugs else _all_with_notebook()
    values: dict[str, Any] = {} if seed is None else {"seed": seed}
    if given:
        # Text takes its type from each paper's own registry entry; all papers of one call must agree.
        for name in names:
            paper, path = project.resolve(name)
            if paper is None:
                raise ValueError(f"-p needs a registered paper, and {path.name} is none")
            typed = runner.parse_parameters(paper, given)
            if values and any(values.get(key, value) != value for key, value in typed.items()):
                raise ValueError(f"-p means different things to {', '.join(names)}; run them one by one")
            values |= typed
    if size not in papers.SIZES:
        raise ValueError(f"size {size!r} is unknown; {papers.nearest(size, papers.SIZES)}")
    folder = out or project.default_out()
    results = runner.run_many(
        names,
        size,
        jobs=jobs,
        out=folder,
        parameters=values,
        fresh=fresh,
        timeout=timeout,
        table=False if as_json else None,
    )
    page = write(folder) if report else None
    if as_json:
        _show([{**item.record(), "verdicts": item.verdicts, "reused": item.reused} for item in results])
    else:
        show(results)
        if page:
            print(f"Report: {page}")
    if not all(item.ok for item in results):
        raise typer.Exit(1)


def _all_with_notebook() -> list[str]:
    from labkit.lab.refresh import all_slugs

    found = all_slugs()
    if not found:
        raise ValueError("no registered paper has a notebook yet; `labkit new SLUG` makes one")
    return found


@app.command()
def sweep(
    slug: Annotated[
        str | None, typer.Argument(help="Paper or notebook; with --resume, that of --out.")
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", help="name=values, such as seed=0:5 or budget=0.1,0.2."),
    ] = None,
    file: Annotated[Path | None, typer.Option("--grid", "-g", help="YAML file of names and values.")] = None,
    in_step: Annotated[
        bool, typer.Option("--zip", help="Values go in step instead of being crossed.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Runs at a time here [cores, as memory allows].")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option("--scheduler", help="Run on a dask.distributed scheduler, tcp://HOST:PORT.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the sweep [build/sweeps/SLUG-...].")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what is there, make what is missing.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: make failed runs again, too.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", "--force", help="Make all runs anew.")] = False,
    timeout: Annotated[float | None, typer.Option("--timeout", min=1, help="Seconds per run.")] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Memory per run, such as 800MB or 2GB.")
    ] = None,
    retries: Annotated[
        int, typer.Option("--retries", min=0, help="How often a run that was killed is begun again.")
    ] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the runs, start none.")] = False,
    as_json: _Json = False,
) -> None:
    """Run one notebook over a grid of parameters, and gather one table."""
    from labkit.lab import grid, project, sweeps

    texts = _given(parameter or [])
    grids: list[dict[str, Any]]
    if slug is None:
        if not (resume and out) or texts or file:
            raise ValueError("name a paper or a notebook; only --resume --out FOLDER knows them by itself")
        slug, grids = sweeps.recall(out)
    else:
        paper, path = project.resolve(slug)
        known, owner = grid.defaults(paper, path), paper.slug if paper else path.name
        grids = grid.read(file, known, owner) if file else [{}]
        grids = [{**block, **grid.from_text(texts, known, owner)} for block in grids]
        if not any(grids):
            raise ValueError("a sweep needs a grid: -p name=a,b,c or name=a:b:step, or --grid FILE")
    if dry_run:
        what = sweeps.plan(slug, grids, zip=in_step, out=out)
        if as_json:
            _show([{"run": run.key, **run.parameters} for run in what.runs])
        else:
            for run in what.runs:
                print(run.key)
            print(f"{len(what.runs)} runs of {what.slug}, into {what.folder}")
        return
    limit = None if memory is None else sweeps.megabytes(memory)
    table = sweeps.sweep(
        slug,
        grids,
        zip=in_step,
        jobs=jobs,
        scheduler=scheduler,
        out=out,
        resume=resume,
        retry_failed=retry_failed,
        fresh=fresh,
        timeout=timeout,
        memory=limit,
        retries=retries,
        progress=False if as_json else None,
    )
    if as_json:
        print(table.to_json(orient="records", indent=1))
    else:
        sweeps.show(table)
    if not (table["status"] == "ok").all():
        raise typer.Exit(1)


@app.command()
def refresh(
    slugs: Annotated[list[str], typer.Argument(help="Papers; `index` for the gallery alone.")],
    timeout: Annotated[float | None, typer.Option("--timeout", min=1, help="Seconds per run.")] = None,
    png: Annotated[bool, typer.Option("--png/--no-png", help="Draw static twins of the figures.")] = True,
) -> None:
    """Re-execute committed notebooks at their defaults and write them back clean; the gallery follows."""
    from labkit import papers
    from labkit.lab import gallery
    from labkit.lab.refresh import RefreshError, refresh_index
    from labkit.lab.refresh import refresh as do

    chosen = [slug for slug in slugs if slug != "index"]
    for slug in chosen:  # a misspelt name stops before the first run
        papers.load(slug)
    try:
        for slug in chosen:
            result = do(slug, timeout=timeout, png=png)
            print(f"{slug}: {result.summary()}, {result.seconds:.0f} s, {result.peak_memory_mb:.0f} MB")
        if refresh_index(timeout=timeout, png=png) is not None:
            print(f"{gallery.INDEX}: written")
    except RefreshError as error:
        _stop(str(error), code=1)
    if gallery.write_readme():
        print("README.md: gallery written")


@app.command()
def report(
    out: _Out = None,
    to: Annotated[Path | None, typer.Option("--to", help="Folder of the pages [OUT/report].")] = None,
    as_json: _Json = False,
) -> None:
    """Show the verdicts of all recorded runs, and write the collection and them as a site of static pages."""
    from labkit.lab import project, runner
    from labkit.lab.refresh import all_slugs
    from labkit.lab.report import show, write

    folder = out or project.default_out()
    results = runner.load_all(folder)
    if not results and (out is not None or as_json or not all_slugs()):
        raise ValueError(f"no runs are recorded under {folder}; `labkit run` makes some")
    if as_json:
        _show([{**item.record(), "verdicts": item.verdicts} for item in results])
        return
    page = write(folder, to)
    show(results)
    print(f"Report: {page}")


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Benchmarks; without one they are listed.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Run all of them.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes; prints, and records only with --out.")
    ] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda [a GPU if there is one].")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File of JSON lines to add to.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="An option of the benchmark's own, such as only=kernels."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """List the benchmarks, or run some and record what they measure; the site shows the records."""
    from labkit.lab import benchmarks

    known = benchmarks.found()
    if names and everything:
        raise ValueError("give names or --all, not both")
    chosen = list(known.values()) if everything else [benchmarks.get(name) for name in names or []]
    if not chosen:
        if as_json:
            _show([item.to_dict() for item in known.values()])
        else:
            benchmarks.show(list(known.values()))
        return
    further = [
        part for name, value in _given(option or [], "--option").items() for part in (f"--{name}", value)
    ]
    lines = [
        benchmarks.command(item, quick=quick, device=device, out=out, further=further) for item in chosen
    ]
    failed = []
    for item, line in zip(chosen, lines, strict=True):
        print(f"== {item.name}", flush=True)
        if benchmarks.run(line) != 0:
            failed.append(item.name)
    if failed:
        _stop(f"{', '.join(failed)} ended with an error", code=1)


@app.command()
def new(
    slug: Annotated[str, typer.Argument(help="Short name: lower case, digits, underscores.")],
    family: Annotated[str, typer.Option("--family", "-f", help="Family, such as kv or moe.")],
    title: Annotated[str, typer.Option("--title", help="Title of the paper.")] = "TODO: title",
    arxiv: Annotated[str, typer.Option("--arxiv", help="arXiv number.")] = "0000.00000",
) -> None:
    """Lay out a new paper: registry entry, module, notebook, tests. Nothing is overwritten."""
    from labkit.lab import scaffold

    for path in scaffold.create(slug, family, title=title, arxiv=arxiv):
        print(f"wrote {path}")
    print(f"Next: fill in the TODOs, then `labkit refresh {slug}` and `labkit check-notebook {slug}`")


@app.command("check-notebook")
def check_notebook(
    slugs: Annotated[list[str] | None, typer.Argument(help="Papers; all if none.")] = None,
    as_json: _Json = False,
) -> None:
    """Check committed notebooks: anatomy, claims, budgets, stale outputs. Each finding says what mends it."""
    from labkit import papers
    from labkit.lab import hygiene

    found = {slug: hygiene.check(papers.load(slug)) for slug in slugs or _all_with_notebook()}
    if as_json:
        _show({slug: [str(item) for item in items] for slug, items in found.items()})
    else:
        for slug, items in found.items():
            for item in items:
                print(f"{slug}: {item}")
        print(f"{len(found)} notebooks, {sum(map(len, found.values()))} findings")
    if any(found.values()):
        raise typer.Exit(1)


@app.command()
def doctor(as_json: _Json = False) -> None:
    """Say what is installed and found here, what is missing, and the command that mends it."""
    from labkit.lab import doctor as examine

    findings = examine.findings()
    if as_json:
        _show([vars(item) for item in findings])
    else:
        examine.show(findings)
    if any(item.state == "missing" and item.required for item in findings):
        raise typer.Exit(1)


def commands() -> dict[str, Callable[..., Any]]:
    """Names of the commands and the functions behind them."""
    return {_command_name(item): item.callback for item in app.registered_commands if item.callback}


if __name__ == "__main__":
    main()
