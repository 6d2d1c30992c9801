"""Against lm-eval's own `hf` backend: same model, same data, same texts, scores and log-likelihoods."""

from __future__ import annotations

import pytest
import torch

import fluid_model
from fluid_eval.benchmarks import datasets
from fluid_eval.common.spec import build_spec
from fluid_eval.results import run_folder
from fluid_eval.running.job import run

LIMIT = 3


@pytest.fixture(scope="module")
def hf(stories):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(stories), device="cpu", dtype="float32", batch_size=1)


def theirs(hf, tasks, data_dir, limit, new_tokens=None, num_fewshot=None, **chat):
    """lm-eval's own loop with its own backend over the same task files. chat: its settings for chat templates."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    from fluid_eval.common.paths import resource

    manager = TaskManager(
        include_path=str(resource("tasks")), include_defaults=False, metadata={"data_dir": str(data_dir)}
    )
    return evaluator.simple_evaluate(
        model=hf, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0, num_fewshot=num_fewshot,
        gen_kwargs={"max_gen_toks": new_tokens} if new_tokens else None, confirm_run_unsafe_code=True,
        **chat,
    )  # fmt: skip


def ours(stories, tasks, data_dir, folder, limit, new_tokens=None, num_fewshot=None):
    values = {
        "tasks": tasks, "model": {"path": str(stories)}, "data_dir": str(data_dir), "limit": limit,
        "max_new_tokens": new_tokens, "num_fewshot": num_fewshot, "allow_unsafe_code": True,
    }  # fmt: skip
    result = run(build_spec(values), folder)
    return result, {record["key"]: record for record in run_folder.read_samples(folder)}


@pytest.mark.slow
@pytest.mark.parametrize("shots", [0, None])
def test_generated_text_and_scores(hf, stories, few_rows, tmp_path, shots):
    """At the tasks' own five and four shots most prompts are cut, by both in the same way."""
    tasks = ["gsm8k", "math500", "humaneval"]
    length = 32
    expected = theirs(hf, tasks, few_rows, LIMIT, length, shots)
    result, samples = ours(stories, tasks, few_rows, tmp_path / "r", LIMIT, length, shots)
    for task in tasks:
        for example in expected["samples"][task]:
            record = samples[f"{task}/{example['doc_id']}"]
            assert record["prompt"] == example["arguments"][0][0]
            assert record["output"] == example["resps"][0][0]
            for metric in example["metrics"]:
                assert record["scores"][f"{metric},{example['filter']}"] == example[metric]
    for line in result["lines"]:
        assert line["score"] == expected["results"][line["task"]][f"{line['metric']},{line['filter']}"]
    if shots is None:
        assert all(samples[f"gsm8k/{n}"]["truncated"] > 0 for n in range(LIMIT))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shots", "subjects"), [("mmlu", 0, 57), ("mmlu_anatomy", None, 1)])
def test_mmlu_log_likelihoods(hf, stories, few_rows, tmp_path, name, shots, subjects):
    """Of every subject, and their groups; at the task's own five shots, whose prompts are cut, of one."""
    expected = theirs(hf, [name], few_rows, 1, num_fewshot=shots)
    result, samples = ours(stories, [name], few_rows, tmp_path / "r", 1, num_fewshot=shots)
    seen = 0
    for task, examples in expected["samples"].items():
        for example in examples:
            record = samples[f"{task}/{example['doc_id']}"]
            values = [value for ((value, _),) in example["resps"]]
            assert record["loglikelihoods"] == pytest.approx(values, abs=1e-4)
            assert record["greedy"] == [greedy for ((_, greedy),) in example["resps"]]
            seen += 1
    assert seen == subjects
    parts = {line["task"]: line["score"] for line in result["lines"] + result["parts"]}
    assert parts == {name: pytest.approx(row["acc,none"]) for name, row in expected["results"].items()}


def test_contexts_and_continuations_are_split_alike(hf, stories, tmp_path):
    from fluid_eval.results.run_folder import Run
    from fluid_eval.running.lm_eval_model import FluidLM
    from fluid_model import load_tokenizer

    spec = build_spec({"tasks": ["gsm8k"], "model": {"path": str(stories)}})
    lm = FluidLM(load_tokenizer(str(stories)), 512, None, Run(tmp_path / "r", spec), None)
    pairs = [("Answer:", " B"), ("ends in spaces  ", "word"), ("<s>has its own", " start"), ("é👋", " ß"), ("a\n", "b")]
    encoded = lm._encode_pairs(pairs)
    for pair in pairs:
        assert tuple(map(list, encoded[pair])) == hf._encode_pair(*pair)
    assert lm._encode_pairs([("", "word")])["", "word"] == (
        (1,),
        tuple(hf.tok_encode("word", add_special_tokens=False)),
    )
    assert lm.prefix_token_id == hf.prefix_token_id


def test_rolling_log_likelihood(hf, stories, tmp_path):
    """Whole texts, longer than the window, as perplexity tasks ask."""
    from lm_eval.api.instance import Instance

    from fluid_eval.common.progress import ProgressBar
    from fluid_eval.results.run_folder import Run
    from fluid_eval.running.lm_eval_model import FluidLM
    from fluid_eval.running.workers import open_pool
    from fluid_model import load_tokenizer

    spec = build_spec({"tasks": ["gsm8k"], "model": {"path": str(stories)}})
    pool, run = open_pool(spec), Run(tmp_path / "r", spec)
    run.begin({})
    lm = FluidLM(load_tokenizer(str(stories)), 512, lambda: pool, run, ProgressBar)
    texts = ["Once upon a time, there was a dog.", "They went to the park. " * 120]
    ask = [Instance("loglikelihood_rolling", {}, (text,), 0, ("t", 0, 1)) for text in texts]
    assert lm.loglikelihood_rolling(ask) == pytest.approx(hf.loglikelihood_rolling(ask), rel=1e-4)


def test_stop_strings_may_be_special_tokens(tmp_path, few_rows):
    """A chat model's <|im_end|> ends an answer although its text never shows; stories260K has no such token."""
    from lm_eval.models.huggingface import HFLM

    from .tiny import byte_tokenizer, llama_config, save_model

    folder = save_model(tmp_path / "m", llama_config(vocab_size=259, max_position_embeddings=2048))
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    checkpoint = fluid_model.load(str(folder))
    prompt = datasets.load_rows("gsm8k", "test", str(few_rows))[0]["question"]
    ids = tuple(tokenizer.encode(f"Question: {prompt}\nAnswer:"))
    engine = fluid_model.engine_for(checkpoint, fluid_model.ArSettings())
    (free,) = engine.generate([fluid_model.Request("x", ids, 12)])
    table = checkpoint.model.get_output_embeddings().weight
    with torch.no_grad():
        table[258] = 1.01 * table[free.ids[-1]]  # so that <|im_end|> is written where that token was
    checkpoint.model.save_pretrained(folder)
    backend = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    expected = theirs(backend, ["gsm8k"], few_rows, 4, 24, 0)
    values = {"tasks": ["gsm8k"], "model": str(folder), "data_dir": str(few_rows), "limit": 4, "max_new_tokens": 24}
    run(build_spec({**values, "num_fewshot": 0}), tmp_path / "r")
    records = {record["doc_id"]: record for record in run_folder.read_samples(tmp_path / "r")}
    for example in expected["samples"]["gsm8k"]:
        assert records[example["doc_id"]]["output"] == example["resps"][0][0]
    assert "stop" in {record["finish"] for record in records.values()}
    assert all(258 not in record["output_ids"][:-1] for record in records.values())


def test_our_tasks_are_lm_evals_own():
    """Prompts, stops, filters and metrics of the bundled task files, field by field against lm-eval's."""
    from pathlib import Path

    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    from fluid_eval.common.paths import resource

    theirs_dir, ours_dir = Path(lm_eval.tasks.__file__).parent, resource("tasks")
    pairs = {
        "gsm8k/gsm8k.yaml": "gsm8k/gsm8k.yaml",
        "humaneval/humaneval.yaml": "humaneval/humaneval.yaml",
        "humaneval/humaneval_instruct.yaml": "humaneval/humaneval_instruct.yaml",
        "math500/math500.yaml": "minerva_math/minerva_math500.yaml",
        **{f"mmlu/{f.name}": f"mmlu/default/{f.name}" for f in ours_dir.glob("mmlu/mmlu_*.yaml")},
    }
    assert len(pairs) == 61
    chosen = {"custom_dataset", "task", "task_alias", "num_fewshot", "metadata", "dataset_kwargs", "dataset_name"}
    chosen |= {"tag", "repeats", "training_split"}
    for mine, other in pairs.items():
        a, b = (load_yaml(root / name, resolve_func=False) for root, name in ((ours_dir, mine), (theirs_dir, other)))
        for name in (a.keys() | b.keys()) - chosen:
            assert comparable(name, a) == comparable(name, b), (mine, name)
        assert a["metadata"]["version"] == b["metadata"]["version"]


def comparable(name, config):
    """A field without what we mean to differ in: the answer's length, and which file a function stands in."""
    value = config.get(name)
    if name == "generation_kwargs":
        return {k: v for k, v in value.items() if k not in ("max_gen_toks", "temperature")}
    if name == "metric_list" and "pass" in str(value):
        return [{k: v for k, v in metric.items() if k not in ("metric", "k")} for metric in value]
    if name == "process_results" and "sandbox" in str(value):
        return None  # where lm-eval's metric takes program and tests as one text
    if name == "fewshot_config":
        return {k: v for k, v in value.items() if k != "samples"}
    return value.split(".")[-1] if isinstance(value, str) and "utils." in value else (
        [f["name"] for f in value] if name == "filter_list" and "build_predictions" in str(value) else value
    )  # fmt: skip
