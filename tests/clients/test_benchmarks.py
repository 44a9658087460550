"""Programs that measure servers and models, unmodified, against a real server."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.conftest import MODEL, ROOT

TOKENIZER = Path(os.environ.get("INFUSE_CACHE_DIR") or Path.home() / ".cache" / "infuse") / MODEL
"""The default model's, where the server has put it."""
TASKS = ROOT / "tests" / "api" / "lm_eval"
LOCUSTFILE = f"""
from locust import HttpUser, task

class Chat(HttpUser):
    asked = 0

    @task
    def chat(self):
        message = {{"role": "user", "content": "Hi"}}
        body = {{"model": "{MODEL}", "messages": [message], "max_tokens": 2}}
        self.client.post("/v1/chat/completions", json=body)
        self.asked += 1
        if self.asked == 3:
            self.environment.runner.quit()
"""


INFERENCE_PERF = ROOT / ".venv-inference-perf" / "bin" / "inference-perf"
"""It has an environment of its own, with a newer Python."""


def run(program: str | Path, *arguments: object, folder: Path) -> None:
    command = [str(Path(sys.executable).parent / program), *map(str, arguments)]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.client("lm-eval", "log-likelihoods, with `tokenizer_backend=remote`")
def test_lm_eval_scores_without_a_copy_of_the_tokenizer(
    api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    arguments = {"model": "sentiment", "base_url": f"{api}/completions", "max_length": 512}
    found = simple_evaluate(
        model="local-completions",
        model_args=arguments | {"tokenizer_backend": "remote"},
        tasks=["infuse_choice"],
        task_manager=TaskManager(include_path=str(TASKS)),
        bootstrap_iters=0,
    )

    assert found is not None
    assert found["results"]["infuse_choice"]["acc,none"] > 0.5


@pytest.mark.client("guidellm", "benchmarks of chat completions")
def test_guidellm_measures(url: str, tmp_path: Path) -> None:
    run(
        "guidellm",
        "run",
        f"--backend=kind=openai_http,target={url},model={MODEL}",
        "--profile=kind=synchronous",
        "--constraint=kind=max_requests,count=2",
        f"--tokenizer=kind=huggingface_auto,model={TOKENIZER}",
        "--data=kind=synthetic_text,prompt_tokens=16,output_tokens=4",
        f"--output=kind=json,path={tmp_path / 'report.json'}",
        "--disable-console",
        folder=tmp_path,
    )

    [benchmark] = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    assert len(benchmark["requests"]["successful"]) == 2


@pytest.mark.client("locust", "load by HTTP")
def test_locust_loads(url: str, tmp_path: Path, answered: Callable[[], float]) -> None:
    (tmp_path / "locustfile.py").write_text(LOCUSTFILE)

    # It ends with 1 where a request has failed.
    run("locust", "--headless", "--users=1", f"--host={url}", folder=tmp_path)

    assert answered() == 3


@pytest.mark.client("aiperf", "profiles of streamed chats")
def test_aiperf_profiles(url: str, tmp_path: Path) -> None:
    options = ["--model", MODEL, "--url", url, "--endpoint-type", "chat", "--streaming"]
    options += ["--tokenizer", TOKENIZER, "--isl", "16", "--osl", "4", "--request-count", "2"]

    run("aiperf", "profile", *options, "--ui", "none", "--artifact-dir", tmp_path, folder=tmp_path)

    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == 2


@pytest.mark.client("inference-perf", "load of streamed chats, split among adapters")
@pytest.mark.skipif(not INFERENCE_PERF.exists(), reason="inference-perf needs Python 3.12")
def test_inference_perf_loads_adapters(url: str, tmp_path: Path) -> None:
    names = ["sentiment", "support-intent"]
    config = {
        "api": {"type": "chat", "streaming": True},
        "data": {"type": "mock"},
        "load": {
            "type": "concurrent",
            "stages": [{"num_requests": 4, "concurrency_level": 2}],
            "num_workers": 1,
            "lora_traffic_split": [{"name": name, "split": 0.5} for name in names],
        },
        "server": {"model_name": MODEL, "base_url": url},
        "tokenizer": {"pretrained_model_name_or_path": str(TOKENIZER)},
        "storage": {"local_storage": {"path": str(tmp_path)}},
    }
    (tmp_path / "config.yml").write_text(json.dumps(config))

    run(INFERENCE_PERF, "--config_file", "config.yml", folder=tmp_path)

    report = json.loads((tmp_path / "summary_lifecycle_metrics.json").read_text())
    assert (report["successes"]["count"], report["failures"]["count"]) == (4, 0)
