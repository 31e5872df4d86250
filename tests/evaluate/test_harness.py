"""lm-eval on a checkpoint, against lm-eval's own Hugging Face model on the exported folder."""

import json

import pytest
import torch

from megamf.errors import UserError

lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{q}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""

ROLLING = """
task: local_pages
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""

ANSWER = """
task: local_answer
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs:
  until: ["e"]
  do_sample: false
  max_gen_toks: 8
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte tokenizer, and three tasks on a page of the standard library's documentation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    root = tmp_path_factory.mktemp("tasks")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "<|endoftext|>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(root / "tokenizer.json"))
    pages = [json.__doc__, json.dumps.__doc__, json.loads.__doc__]
    rows = {
        "choice": [
            {"q": page[:20], "choices": [page[20:26], page[30:41], "x"], "gold": i % 2} for i, page in enumerate(pages)
        ],
        "pages": [{"page": page[:200]} for page in pages],
        "answer": [{"q": page[:15], "a": "?"} for page in pages],
    }
    for (name, lines), template in zip(rows.items(), (CHOICE, ROLLING, ANSWER)):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        (root / f"{name}.yaml").write_text(template.format(data=root / f"{name}.jsonl"))
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_the_same_as_the_exported_folder(folder, checkpoint, tmp_path):
    from lm_eval.models.huggingface import HFLM

    import megamf.hf  # noqa: F401
    from megamf.data.tokenizer import load_tokenizer
    from megamf.evaluate.harness import HarnessModel, run_tasks
    from megamf.evaluate.load import load_model
    from megamf.hf.convert import export_hf

    step, _ = checkpoint()
    tasks = ["local_choice", "local_pages", "local_answer"]
    model, _ = load_model(step, torch.float64)
    ours = run_tasks(model, load_tokenizer(folder / "tokenizer.json"), tasks, seq_len=48, batch=3, include_path=folder)
    out = export_hf(step, tmp_path / "hf", tokenizer=folder / "tokenizer.json").folder
    theirs_model = HFLM(
        pretrained=transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64),
        tokenizer=transformers.AutoTokenizer.from_pretrained(out),
        max_length=48,
        batch_size=1,
        device="cpu",
    )
    theirs = lm_eval.simple_evaluate(
        model=theirs_model,
        tasks=tasks,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder)),
        bootstrap_iters=0,
    )
    for task, metric in [
        ("local_choice", "acc,none"),
        ("local_choice", "acc_norm,none"),
        ("local_pages", "word_perplexity,none"),
        ("local_pages", "bits_per_byte,none"),
        ("local_answer", "exact_match,none"),
    ]:
        assert ours["results"][task][metric] == pytest.approx(theirs["results"][task][metric], rel=1e-9), metric
    json.dumps(ours)

    # Greedy text, request by request.
    adapter = HarnessModel(model, load_tokenizer(folder / "tokenizer.json"), seq_len=48, batch=3)
    requests = [
        lm_eval.api.instance.Instance("generate_until", {}, (prompt, {"until": ["e", "\n"], "max_gen_toks": 8}), 0)
        for prompt in ("def f(", "import ", "x")
    ]
    assert adapter.generate_until(requests) == theirs_model.generate_until(requests, disable_tqdm=True)


def test_an_unknown_task_is_named(model):
    from megamf.evaluate.harness import run_tasks

    with pytest.raises(UserError, match="unknown task no_such_task"):
        run_tasks(model, None, ["no_such_task"], seq_len=8, batch=1)
