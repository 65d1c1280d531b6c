"""push_to_hub: the finished folder once, and nothing before the hub has answered."""

from __future__ import annotations

import fnmatch
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import HfApi, constants
from transformers import Trainer, TrainingArguments

from shell import TINY_RUN, refused, untrigger
from untrigger.defenses import ABL, Plain, SharedSurprise
from untrigger.defenses.shared_surprise import Flags
from untrigger.errors import InputError
from untrigger.models.collators import ChatCollator, Rows
from untrigger.models.loading import add_lora, load
from untrigger.models.scoring import TokenScores
from untrigger.rows.sample import Sample
from untrigger.training import hub_push
from untrigger.training.finetune import fine_tune
from untrigger.training.flagged_rows import FLAGGED_ROWS
from untrigger.training.hub_push import check_hub
from untrigger.training.settings import arguments
from untrigger.training.trainer import defended


@dataclass
class Hub:
    """Records what reaches it: the repositories that are opened, and the files of each upload."""

    opened: list[str] = field(default_factory=list)
    uploads: list[dict[str, bytes]] = field(default_factory=list)
    broken: str = ""

    def create_repo(self, _: HfApi, name: str, **options: Any) -> Any:
        assert options["exist_ok"]
        self.opened.append(name)
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, _: HfApi, *, repo_id: str, folder_path: Any, ignore_patterns: Sequence[str], **__: Any):
        if self.broken:
            raise OSError(self.broken)
        folder = Path(folder_path)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        # as huggingface_hub.utils.filter_repo_objects
        sent = {n: p for n, p in files.items() if not any(fnmatch.fnmatch(n, each) for each in ignore_patterns)}
        self.uploads.append({name: path.read_bytes() for name, path in sent.items()} | {"": repo_id.encode()})
        done: Future[None] = Future()
        done.set_result(None)
        return done


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **more: hub.create_repo(*args, **more))
    monkeypatch.setattr(HfApi, "upload_folder", lambda *args, **more: hub.upload_folder(*args, **more))
    return hub


@pytest.fixture
def answering(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, which knows the user."""
    with serving(200) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        yield hub  # type: ignore[misc]


class serving:
    """A server on this machine that answers each request with one status."""

    def __init__(self, status: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def run(model: Path, rows: Sequence[Sample], out: Path, defense: Any, **settings: Any) -> None:
    chosen: dict[str, Any] = {"use_cpu": True, "per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 1}
    chosen |= {"push_to_hub": True, "hub_token": "hf_test"}
    fine_tune(model, rows, defense, out=out, **(chosen | settings))


@pytest.fixture
def flagging(monkeypatch: pytest.MonkeyPatch) -> SharedSurprise:
    """A defense that flags the last token of row 3."""

    def flag(_: SharedSurprise, scores: Sequence[TokenScores]) -> Flags:
        return Flags([0.0] * len(scores), {3: np.arange(len(scores[3].ids)) == 0}, {})

    monkeypatch.setattr(SharedSurprise, "flag_tokens", flag)
    return SharedSurprise(warmup_share=0.5)


def test_the_finished_folder_is_pushed_once_without_pickles(
    answering: Hub, flagging: SharedSurprise, tiny_model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    run(tiny_model, samples, out, flagging)
    (upload,) = answering.uploads
    assert upload.pop("") == b"me/mine" and set(answering.opened) == {"mine"}
    assert list(out.glob("checkpoint-*")) and list((out / "stages").iterdir()), "these stay here"
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", FLAGGED_ROWS} <= upload.keys()
    assert upload["README.md"] == (out / "README.md").read_bytes() and b"LoRA of rank 16" in upload["README.md"]
    assert upload["adapter_model.safetensors"] == (out / "adapter_model.safetensors").read_bytes()
    assert not [name for name in upload if "/" in name or name.endswith((".bin", ".pt", ".pth", ".lock"))]
    assert b"hf_test" not in b"".join(upload.values()), "the token is not a part of what is published"


@pytest.mark.parametrize("defense", [Plain(), ABL()], ids=["plain", "abl"])
def test_no_stage_is_pushed_and_hub_strategy_changes_nothing(
    defense: Any, answering: Hub, tiny_model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    run(tiny_model, samples, tmp_path / "out", defense, hub_strategy="all_checkpoints", hub_model_id="other")
    (upload,) = answering.uploads
    assert upload[""] == b"me/other" and "checkpoint" not in "".join(upload)


def test_a_run_that_was_not_pushed_is_pushed_by_resuming(
    answering: Hub, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ("train", tiny_data, "--model", tiny_model, "--out", out, "--defense", "plain", *TINY_RUN)
    pushing = ("--push_to_hub", "true", "--hub_token", "hf_test")
    answering.broken = "the line is cut\nand more"
    ended = untrigger(*words, *pushing)
    assert ended.code == 2 and ended.err.endswith(
        f"error: {out}: is finished, but was not pushed to me/out (the line is cut); run the command again with "
        "--resume (resume=True)\n"
    )
    weights = (out / "adapter_model.safetensors").read_bytes()
    assert (out / "README.md").is_file()
    answering.broken = ""
    ended = untrigger(*words, *pushing, "--resume")
    assert ended.code == 0 and "pushed to the hub\n" in ended.out
    assert answering.uploads[0]["adapter_model.safetensors"] == weights
    assert untrigger(*words, "--resume").code == 0, "the push is no setting of the run"
    assert len(answering.uploads) == 1


# --- a hub that is not there ------------------------------------------------------------------------


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def seconds_to_refuse(args: TrainingArguments, message: str) -> float:
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        check_hub(args)
    assert "\n" not in str(caught.value)
    return time.monotonic() - started


def test_a_hub_out_of_reach_is_named_within_seconds(
    silent_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path, push_to_hub=True, hub_token="hf_test", use_cpu=True)
    assert hub_push._PATIENCE <= 10
    monkeypatch.setattr(hub_push, "_PATIENCE", 0.3)
    for endpoint in ("http://127.0.0.1:9", silent_server, "http://no-such-host.invalid"):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        message = rf"^push_to_hub: {endpoint} is out of reach \(.+\); leave out push_to_hub, and push the folder later"
        assert seconds_to_refuse(args, message) < 8


def test_a_refused_or_missing_token_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(401) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        args = arguments(tmp_path, push_to_hub=True, hub_token="hf_test", use_cpu=True)
        seconds_to_refuse(args, r"^push_to_hub: the hub refuses the token \(.*401.*\); run `hf auth login`$")
    monkeypatch.setattr(hub_push, "get_token", lambda: None)
    args.hub_token = None
    seconds_to_refuse(args, r"^push_to_hub: there is no token for the hub; run `hf auth login`, or give hub_token$")
    args.push_to_hub = False
    check_hub(args)


def test_nothing_is_trained_or_written_without_a_hub(
    hub: Hub, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    words = (tiny_data, "--model", tiny_model, "--out", tmp_path / "out", "--push_to_hub", "true", "--hub_token", "x")
    refused(untrigger("train", *words), "http://127.0.0.1:9 is out of reach")
    refused(untrigger("scan", *words), "push_to_hub: a scan has no model to push")
    assert not (trained or hub.opened or hub.uploads or (tmp_path / "out").exists())


def test_a_repository_that_cannot_be_opened_is_named_before_the_training(
    answering: Hub, tiny_model: Path, samples: list[Sample], tmp_path: Path, monkeypatch: Any, trained: list[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("403 Forbidden")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(InputError, match=r"^push_to_hub: cannot create or open theirs/x \(403 Forbidden\); set hub_mo"):
        run(tiny_model, samples, tmp_path / "out", Plain(), hub_model_id="theirs/x")
    assert trained == []


# --- in a host --------------------------------------------------------------------------------------


def test_a_host_pushes_no_early_stage(
    hub: Hub, flagging: SharedSurprise, tiny_model: Path, samples: list[Sample], tmp_path: Path, monkeypatch: Any
) -> None:
    """What is pushed comes from the last stage, with the flagged rows beside it."""
    stages: list[int] = []
    train: Callable[..., Any] = Trainer.train

    def counted(trainer: Any, *args: Any, **more: Any) -> Any:
        stages.append(len(hub.uploads))
        return train(trainer, *args, **more)

    monkeypatch.setattr(Trainer, "train", counted)
    loaded = load(tiny_model)
    trainer = defended(Trainer)(
        add_lora(loaded.model, rank=2),  # type: ignore[arg-type]
        args=arguments(tmp_path / "out", max_steps=4, save_steps=1, push_to_hub=True, use_cpu=True),
        train_dataset=Rows(samples),
        data_collator=ChatCollator(loaded.processor),
        defense=flagging,
    )
    trainer.train()
    assert stages == [0, 0], "no upload before or during the first stage"
    assert hub.uploads and all(FLAGGED_ROWS in upload for upload in hub.uploads)
    assert json.loads(hub.uploads[-1][FLAGGED_ROWS])["row"] == 4
    assert trainer.args.push_to_hub
