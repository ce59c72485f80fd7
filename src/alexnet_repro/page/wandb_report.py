"""Publish the page's content as a W&B Report: the claims as text, beside panels over the project's runs.

Runs logged with logger=wandb have config.ablation, config.recipe and config.data.name, and the summaries
ten_crop/top1_error and centre/top1_error. A user's own panels can use the same names.
"""

from typing import Any

from alexnet_repro.errors import UserError
from alexnet_repro.page.content import claims_table, others_table


def publish(page: dict[str, Any], project: str, entity: str | None) -> str:
    """Save a report in a project of Weights & Biases and return its address.

    Raises UserError without wandb-workspaces, without an API key, or if the service cannot be reached.
    """
    import wandb

    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError:
        raise UserError(
            "a W&B Report needs the package wandb-workspaces", "install it with: pip install -e '.[report]'"
        ) from None
    try:
        has_key = wandb.login(prompt=False, verify=False)
    except Exception as error:
        raise UserError(f"W&B refuses the API key: {error}", "index.html and report.md are written") from None
    if not has_key:
        raise UserError(
            "a W&B Report needs the service, and there is no API key; index.html and report.md are written",
            "set WANDB_API_KEY or call wandb login; runs that were logged offline are uploaded by wandb sync FOLDER",
        )
    try:
        owner = entity or str(wandb.Api().default_entity)
        report = wr.Report(
            project=project,
            entity=owner,
            title="ImageNet Classification with Deep Convolutional Neural Networks, claim by claim",
            description="What the paper says, and what alexnet_repro measured.",
            width="fluid",
            blocks=blocks(page, wr),
        )
        report.save()
    except Exception as error:  # the client has no common error class: wandb's, requests' and its own ValueErrors
        said = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"W&B took no report: {type(error).__name__}: {said}",
            "index.html and report.md are written; see that logger.project and logger.entity name a project that has runs",
        ) from None
    return report.url


def blocks(page: dict[str, Any], wr: Any) -> list[Any]:
    """Return the parts of the report. wr: wandb_workspaces.reports.v2."""
    runs = wr.Runset(name="finished runs", filters="State = 'finished'", groupby=["config.ablation"])
    errors = (
        ("ten_crop/top1_error", "top-1 error, ten crops, %"),
        ("ten_crop/top5_error", "top-5 error, ten crops, %"),
    )
    bars = [
        wr.BarPlot(
            title=title,
            metrics=[wr.SummaryMetric(metric)],
            groupby=wr.Config("ablation"),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            layout=wr.Layout(x=9 * i, y=0, w=9, h=9),
        )
        for i, (metric, title) in enumerate(errors)
    ]
    beside = wr.MarkdownPanel(markdown=paper_lines(page), layout=wr.Layout(x=18, y=0, w=6, h=9))
    curves = [
        wr.LinePlot(
            title=title,
            x="epoch",
            y=[metric],
            groupby=wr.Config("ablation"),
            groupby_rangefunc="minmax",
            layout=wr.Layout(x=12 * i, y=0, w=12, h=9),
        )
        for i, (metric, title) in enumerate((("train/top1_error", "training"), ("val/top1_error", "validation")))
    ]
    return [
        wr.TableOfContents(),
        wr.H1("Claims"),
        wr.MarkdownBlock(claims_table(page)),
        *([wr.H1("What else was measured"), wr.MarkdownBlock(others_table(page))] if page["others"] else []),
        wr.H1("Errors by ablation"),
        wr.PanelGrid(runsets=[runs], panels=[*bars, beside]),
        wr.H1("Top-1 error by epoch"),
        wr.PanelGrid(runsets=[runs], panels=curves),
        wr.H1("Where runs differ"),
        wr.PanelGrid(
            runsets=[runs], panels=[wr.RunComparer(diff_only="split", layout=wr.Layout(x=0, y=0, w=24, h=12))]
        ),
    ]


def paper_lines(page: dict[str, Any]) -> str:
    """Return the paper's ImageNet errors by ablation, to set beside the bars."""
    lines = ["The paper, ten crops:", "", "| ablation | data | top-1 | top-5 |", "|---|---|---|---|"]
    lines += [f"| {name} | {data} | {one:.1f} | {five:.1f} |" for name, data, one, five in page["expected"]]
    return "\n".join(lines)
