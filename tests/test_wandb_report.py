"""Test logging and reports against a fake W&B service on loopback, which records all requests."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

KEY = "0123456789abcdef0123456789abcdef01234567"


class Service:
    """A fake of the parts of W&B's API that a report and a run of scalars use."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []  # path, body
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                service.sent.append((self.path, body.decode(errors="replace")))
                self.answer({"data": service.answer(body)} if self.path.endswith("graphql") else {})

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                service.sent.append((self.path, body.decode(errors="replace")))
                self.answer({})

            def do_GET(self) -> None:
                self.answer({})

            def answer(self, content: dict[str, Any]) -> None:
                data = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, body: bytes) -> dict[str, Any]:
        request = json.loads(body)
        query, v = request["query"], request.get("variables") or {}
        project = {"id": "UHJvajox", "internalId": "UHJvajox", "name": v.get("projectName") or v.get("project")}
        if "upsertView" in query:
            view = {key: v[key] for key in ("type", "name", "displayName", "description", "spec")}
            view |= {
                "id": "Vmlldzox",
                "updatedAt": "2026-01-01T00:00:00",
                "project": {**project, "entityName": v["entityName"]},
            }
            return {"upsertView": {"view": view, "inserted": True}}
        if "internalId" in query:
            return {"project": project}
        if "upsertBucket" in query:
            bucket = {
                "id": "QnVja2V0",
                "name": v["name"],
                "displayName": "run-1",
                "description": None,
                "sweepName": None,
            }
            bucket |= {"config": v.get("config"), "historyLineCount": 0}
            bucket["project"] = {**project, "entity": {"id": "RW50", "name": v.get("entity") or "me"}}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/up/{name}"} for name in v["files"]]
            return {"createRunFiles": {"runID": "QnVja2V0", "uploadHeaders": [], "files": files}}
        if "serverinfo" in query.lower():
            return {"serverInfo": {"features": [], "cliVersionInfo": None, "latestLocalVersionInfo": None}}
        if "viewer" in query.lower():
            me = {
                "id": "VXNlcjox",
                "flags": "{}",
                "entity": "me",
                "username": "me",
                "email": "a@b.c",
                "admin": False,
                "name": "me",
            }
            return {"viewer": {**me, "apiKeys": {"edges": []}, "teams": {"edges": []}}}
        if "models(" in query or "projects" in query.lower():
            return {"models": {"edges": [], "pageInfo": {"endCursor": None, "hasNextPage": False}}}
        return {}


@pytest.fixture
def service() -> Iterator[Service]:
    running = Service()
    yield running
    running.server.shutdown()


def run_as_a_user(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command with ``folder`` as its home, so that it reads no settings of this machine.

    Everything that the command writes is then below ``folder``, where a test can search it.
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    home = {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "XDG_CONFIG_HOME": str(folder / "config")}
    line = [sys.executable, "-m", *arguments]
    return subprocess.run(
        line, cwd=folder, env={**clean, **home, **environment}, capture_output=True, text=True, timeout=300, check=False
    )


def files_with_the_key(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.slow
def test_report_is_published(service: Service, tmp_path: Path) -> None:
    keys = {"WANDB_BASE_URL": service.url, "WANDB_API_KEY": KEY}
    done = run_as_a_user(tmp_path, "alexnet_repro.report", "logger=wandb", "logger.project=p", **keys)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"published: {service.url}/me/p/reports/", done.stdout), done.stdout
    (view,) = (json.loads(body)["variables"] for _, body in service.sent if "upsertView" in body)
    assert (view["entityName"], view["projectName"], view["type"]) == ("me", "p", "runs")
    spec = view["spec"]
    for word in (
        "40.7 / 18.2",
        "not run",
        "ten_crop/top1_error",
        "ten_crop/top5_error",
        "| no_lrn | ilsvrc2012 val | 42.1 | 19.4 |",
        "val/top1_error",
    ):
        assert word in spec, word
    kinds = re.findall(r'"viewType": ?"([^"]+)"', spec)
    assert kinds.count("Bar Chart") == 2
    assert kinds.count("Run History Line Plot") == 2
    assert "Run Comparer" in kinds
    assert "ablation" in spec[spec.index("grouping") :]
    assert files_with_the_key(tmp_path) == []
    assert KEY not in done.stdout + done.stderr
    assert (tmp_path / "report/index.html").is_file()


@pytest.mark.slow
def test_page_is_written_and_user_informed_without_an_api_key(tmp_path: Path) -> None:
    done = run_as_a_user(tmp_path, "alexnet_repro.report", "logger=wandb")
    assert done.returncode == 2
    assert "there is no API key" in done.stderr
    assert "wandb sync" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "report/index.html").is_file()


@pytest.mark.slow
def test_run_logs_the_metrics_that_the_report_uses(service: Service, small_store: Path, tmp_path: Path) -> None:
    keys = {"WANDB_BASE_URL": service.url, "WANDB_API_KEY": KEY}
    options = [
        "data=folder",
        f"data.store={small_store}",
        "trainer=cpu",
        "epochs=1",
        "batch_size=1",  # 12 updates; every tenth is logged
        "optim.lr=0.0001",
        "+ablation=no_lrn",
    ]
    done = run_as_a_user(tmp_path, "alexnet_repro.train", *options, "logger=wandb", "logger.project=p", "run=r", **keys)
    assert done.returncode == 0, done.stderr
    requests = [json.loads(body)["variables"] for _, body in service.sent if "upsertBucket" in body]
    config = json.loads(next(variables["config"] for variables in requests if variables.get("config")))
    assert config["ablation"]["value"] == "no_lrn"
    assert config["recipe"]["value"] == "paper"
    stream = "".join(body for path, body in service.sent if "file_stream" in path)
    for key in ("train/loss", "val/top1_error", "train/top1_error", "ten_crop/top1_error", "centre/top5_error"):
        assert key in stream, key
    assert files_with_the_key(tmp_path) == []
    assert KEY not in done.stdout + done.stderr
