"""Write the report: a page that compares the paper's claims with the measurements, and the figures."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig

from alexnet_repro.claims.declared import read_declared
from alexnet_repro.claims.results import Result, read_results, shared_key
from alexnet_repro.configs import CHECKOUT
from alexnet_repro.data.split import Split
from alexnet_repro.errors import UserError
from alexnet_repro.files import refuse_other_content, write_json, written_whole
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.net.colour import colour_content
from alexnet_repro.page import figures, plots
from alexnet_repro.page.content import content, summary
from alexnet_repro.page.drawings import drawings, kernels_drawn
from alexnet_repro.page.markdown import claims_table, others_table, readme_blocks
from alexnet_repro.page.retrieval import look, nearest, retrieval_quality
from alexnet_repro.page.study import READING
from alexnet_repro.sharing.index import index
from alexnet_repro.sharing.similarity import FEWEST, similarity
from alexnet_repro.training.launcher import world
from alexnet_repro.training.measurement import fitting_store, load_run
from alexnet_repro.training.run_folder import named
from alexnet_repro.training.trainer import make_trainer

MARKS = ("<!-- {}, made by alexnet_repro.report: begin -->", "<!-- {}, made by alexnet_repro.report: end -->")
WAITING = (
    "Proxy only",
    "Not comparable",
    "Not run",
    "For the reader",
    "Quoted",
)  # claims without an answer, in this order
BEGINNINGS = {  # how one knows the report's files
    "index.html": b"<title>alexnet_repro",
    "report.md": b"# The paper's claims",
    "runs.csv": b"run,recipe,ablation",
}
QUERIES = 1000  # maximum number of queries for the retrieval quality


def report(cfg: DictConfig) -> dict[str, Any]:
    """Write index.html, report.md and figures/ to ``cfg.out``, and return the content of the page.

    Raises UserError for invalid options, folders without a finished run and damaged results.
    """
    runs = finished_runs(cfg)
    published = Path(str(cfg.results)) if cfg.results else CHECKOUT / "results"
    if cfg.results and not published.is_dir():
        raise UserError(
            f"there is no folder {published}", "set results= to a folder of results, for example results=results"
        )
    out = Path(str(cfg.out))
    refuse_files_of_others(out)
    if cfg.readme and not (CHECKOUT / "README.md").is_file():
        raise UserError(
            "readme=true updates the README of a checkout, but this package is not installed from a checkout"
        )
    if world(cfg) > 1:
        raise UserError("report works on one device", "remove placement")
    out.mkdir(parents=True, exist_ok=True)  # before half a minute of work
    ensembles = sorted({path for run in runs for path in run.parent.glob("ensemble-*.json")})
    results = read_results(*runs, *ensembles, *([published] if published.is_dir() else []))
    shown = next((run for run in runs if (run / "checkpoints" / "last.ckpt").is_file()), None)
    own: Result = next((r for r in results if shown and Path(r["file"]).parent == shown), Result())
    pictures = pictures_of(cfg, shown, own) if shown else {}
    pictures |= compared_seeds(cfg, runs, results)
    page = content(results, read_declared(published))
    page["figures"] = drawings(page, runs) | pictures
    page["shown"] = str(shown) if shown else None
    page["retrieval"] = own.get("retrieval")
    page["index"] = index(run for run in runs if (run / "checkpoints").is_dir())
    write(page, out)
    print(f"{summary(page)}\nwritten: {out / 'index.html'} and {out / 'report.md'}")
    if cfg.readme:
        page["figures"]["figure-2"][0].savefig(CHECKOUT / "docs" / "two-towers.png", dpi=150, facecolor="white")
        refresh_readme(content(read_results(published), read_declared(published)))
    if cfg.logger.get("wandb"):
        from alexnet_repro.page.wandb_report import publish

        print(f"published: {publish(page, cfg.logger.project, cfg.logger.entity)}")
    return page


def finished_runs(cfg: DictConfig) -> list[Path]:
    """Return the finished runs given by runs=, or all finished runs below runs/, latest first.

    Raises UserError for a folder without a finished run.
    """
    if cfg.runs is None:
        found = [path.parent for path in Path("runs").rglob("result.json")]
        return sorted(found, key=lambda run: -(run / "result.json").stat().st_mtime)
    runs = named(cfg.runs)
    for run in runs:
        if not (run / "result.json").is_file():
            raise UserError(
                f"{run} holds no finished run",
                "give folders written by train: runs=[runs/paper/seed-0,runs/paper-no_lrn/seed-0]",
            )
    return runs


def pictures_of(cfg: DictConfig, run: Path, result: Result) -> dict[str, tuple[Figure, str]]:
    """Draw Figures 3 and 4 for a run from its checkpoint and its store.

    Also writes the retrieval quality to ``result["retrieval"]``, and to retrieval.json in the run's folder unless that
    file already has the quality with more images.
    """
    try:
        model, trained = load_run(run)
    except UserError as error:
        print(f"no Figures 3 and 4: {error.problem}")
        return {}
    weight = model.net.get_parameter("conv1.weight")
    drawn = {"figure-3": kernels_drawn(weight, colour_content(weight, trained.net.get("towers", 1)), str(run))}
    if not isinstance(model.net, AlexNet):
        return drawn
    try:
        store = fitting_store(str(trained.data.store), model, run)
    except UserError as error:
        print(f"no Figure 4: {error.problem}")
        return drawn
    query_split, train_split = store.split(store.measured_split), store.split("train")
    trainer = make_trainer(cfg)
    queries = look(trainer, model, query_split, QUERIES, cfg.batch_size)
    images = look(trainer, model, train_split, cfg.images, cfg.batch_size)
    eight, five = (np.linspace(0, len(queries.labels) - 1, 2 * n + 1).astype(int)[1::2] for n in (8, 5))
    drawn["figure-4-left"] = (
        figures.figure_4_left(
            _pictures(query_split, queries.indices[eight]),
            queries.softmax[eight],
            queries.labels[eight].tolist(),
            model.class_names,
        ),
        f"Figure 4, left: {store.measured_split} images and the most probable labels according to {run}. Green: the correct label.",
    )
    found = nearest(queries.fc7[five], images.fc7)
    drawn["figure-4-right"] = (
        figures.figure_4_right(
            _pictures(query_split, queries.indices[five]),
            [_pictures(train_split, images.indices[line]) for line in found.numpy()],
            (images.labels[found] == queries.labels[five, None]).tolist(),
        ),
        f"Figure 4, right: {store.measured_split} images and the six nearest of {len(images.labels):,} training images, by "
        "Euclidean distance in fc7. Green: same class as the query.",
    )
    if result.get("retrieval", {}).get("images", 0) > len(images.labels):
        return drawn
    result["retrieval"] = retrieval_quality(queries, images, trained.seed)
    try:
        write_json(run / "retrieval.json", result["retrieval"])
    except OSError as error:  # someone else's run; the page has the numbers all the same
        print(f"{run / 'retrieval.json'} was not written: {error.strerror}")
    return drawn


def compared_seeds(cfg: DictConfig, runs: list[Path], results: list[Result]) -> dict[str, tuple[Figure, str]]:
    """Draw how alike the nets of one experiment with several seeds are: the experiment with the most seeds.

    Nothing if there are no two such runs with a checkpoint of AlexNet, or if their store is not there.
    """
    groups: dict[tuple[Any, ...], list[Result]] = {}
    with_checkpoint = {run for run in runs if (run / "checkpoints" / "last.ckpt").is_file()}
    for result in results:
        if Path(result["file"]).parent in with_checkpoint and result.get("net") == "alexnet" and cfg.similarity:
            groups.setdefault((result["ablation"], *shared_key(result)), []).append(result)
    by_seed = [{result["seed"]: result for result in group} for group in groups.values()]
    largest: dict[int, Result] = max(by_seed, key=lambda group: len(group), default={})
    members = [largest[seed] for seed in sorted(largest)]
    if len(members) < 2:
        return {}
    folders = [Path(result["file"]).parent for result in members]
    try:
        nets, configs = zip(*(load_run(folder) for folder in folders), strict=True)
        store = fitting_store(str(configs[0].data.store), nets[0], folders[0])
    except UserError as error:
        print(f"no comparison of seeds: {error.problem}")
        return {}
    split = store.split(store.measured_split)
    count = min(cfg.similarity, len(split))
    if count < FEWEST:
        return {}
    images = np.stack(_pictures(split, np.linspace(0, len(split) - 1, count).astype(int)))
    names, alike = similarity(nets, images, cfg.batch_size)
    seeds = ", ".join(str(result["seed"]) for result in members)
    where = f"{members[0]['recipe']}, {members[0]['ablation']}".removesuffix(", none")
    caption = (
        f"How alike the representations of nets with different seeds are ({where}, seeds {seeds}): linear CKA, unbiased, on {count} "
        f"{store.measured_split} images of {members[0]['data']}. 1: equal up to rotation and scale."
    )
    return {"similarity": (plots.similarity(names, alike), caption)}


def _pictures(split: Split, indices: Any) -> list[Any]:
    return [np.asarray(split[int(i)]) for i in indices]


def refuse_files_of_others(out: Path) -> None:
    """Raise UserError if the report would replace files in ``out`` that an earlier report did not write."""
    remedy = "choose another folder with out=FOLDER"
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder", remedy)
    for name, mark in BEGINNINGS.items():
        refuse_other_content(out / name, mark, "report", remedy)
    if (out / "figures").exists() and not any((out / name).exists() for name in BEGINNINGS):
        raise UserError(f"{out / 'figures'} is not a folder of an earlier report", remedy)


def write(page: dict[str, Any], out: Path) -> None:
    """Write a self-contained index.html, report.md and the PNG figures of report.md to ``out``."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    (out / "runs.csv").write_text(page["index"], encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("alexnet_repro", "page"),
        autoescape=lambda name: "html" in (name or ""),
        trim_blocks=True,
    )
    svgs, downloads = {}, {}
    for name, (figure, _) in page["figures"].items():
        figure.savefig(out / "figures" / f"{name}.png", dpi=150, facecolor="white")
        svgs[name] = svg(name, figure)
        downloads[name] = data_link(
            "image/svg+xml", svgs[name].replace("var(--ink)", plots.INK).replace("var(--muted)", plots.MUTED)
        )
    waiting: dict[str, list[Any]] = {}
    for row in page["rows"]:
        if not row["answers"]:
            section = re.split(r"[,.] ?", row["section"].replace("Section ", ""))[0]
            word = f"Section {section}" if section.isdigit() else section
            waiting.setdefault(f"{row['status'].capitalize()}: {word}", []).append(row)
    context = {
        **page,
        "svgs": svgs,
        "downloads": downloads,
        "reading": READING,
        "evidence": [row for row in page["rows"] if row["answers"] and row["kind"] != "count"],
        "counted": [row for row in page["rows"] if row["answers"] and row["kind"] == "count"],
        "waiting": dict(sorted(waiting.items(), key=lambda item: WAITING.index(item[0].partition(":")[0]))),
        "studies": [study | {"csv_link": data_link("text/csv", study["csv"])} for study in page["studies"]],
        "captions": {name: caption for name, (_, caption) in page["figures"].items()},
        "summary": summary(page),
        "index_link": data_link("text/csv", page["index"]),
        "claims_table": claims_table(page),
        "others_table": others_table(page),
    }
    for template, file in (("report.html.jinja", "index.html"), ("report.md.jinja", "report.md")):
        with written_whole(out / file) as whole:
            whole.write(environment.get_template(template).render(context).encode())


def data_link(kind: str, text: str) -> str:
    """Return a link that holds a file, so that the page needs no other file."""
    return f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"


def svg(name: str, figure: Figure) -> str:
    """Return a figure as an <svg> element with unique ids and the text colours of the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    tag, rest = text.split(">", 1)
    text = re.sub(r' (width|height)="[^"]*"', "", tag) + ">" + rest  # keep the viewBox
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace(plots.INK, "var(--ink)").replace(plots.MUTED, "var(--muted)")


def refresh_readme(page: dict[str, Any]) -> None:
    """Replace the blocks between MARKS in the checkout's README and in docs/numbers.md."""
    blocks = readme_blocks(page)
    for path in (CHECKOUT / "README.md", CHECKOUT / "docs" / "numbers.md"):
        text = new = path.read_text(encoding="utf-8") if path.is_file() else ""
        for name, block in blocks.items():
            begin, end = (mark.format(name) for mark in MARKS)
            if begin in new and end in new:
                before, after = new.split(begin)[0], new.split(end)[1]
                new = f"{before}{begin}\n{block}\n{end}{after}"
        if new != text:
            path.write_text(new, encoding="utf-8")
            print(f"updated: {path}")
