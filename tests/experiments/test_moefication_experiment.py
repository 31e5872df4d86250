"""The stages and the page of the MoEfication experiment, on a tiny model."""

import json

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from megamf.experiments import _moefication_page as page
from megamf.experiments import moefication
from megamf.experiments.stages import Study

WORDS = [f"word{i}" for i in range(40)]


@pytest.fixture
def study(tmp_path):
    """Counting words, and a random Llama-like model with a tokenizer of whole words."""
    found = Study(tmp_path)
    found.path("corpora").mkdir()
    for name, count in (("train", 80), ("valid", 6)):
        rows = [json.dumps({"text": " ".join(WORDS[(s + i) % 40] for i in range(60))}) for s in range(count)]
        found.path(f"corpora/english-{name}.jsonl").write_text("\n".join(rows))
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1} | {w: i + 2 for i, w in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(found.path("tiny"))
    config = hf.LlamaConfig(
        vocab_size=42, hidden_size=16, intermediate_size=640, num_hidden_layers=1, num_attention_heads=2,
        hidden_act="silu", bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).save_pretrained(found.path("tiny"))
    return found


def test_stages_and_page(study, monkeypatch):
    trained = moefication.with_relu(study, "tiny", "relu", steps=2, documents=4)
    assert trained["steps"] == len(trained["losses"]) == 2
    results = {}
    for split in moefication.SPLITS:
        results[split] = moefication.curves(study, "relu", split, tokens=512, documents=4, epochs=1)
    for result in results.values():
        assert result["dense"] == pytest.approx(trained["after"], rel=1e-4)
        assert 0.1 < result["active"] < 0.9
        assert set(result["loss"]) == set(moefication.ROUTERS)
        for losses in result["loss"].values():
            assert [float(share) for share in losses] == list(moefication.SHARES)
    fitted = moefication.fitted(study, "relu", "clustering", tokens=512, documents=4, epochs=1)
    assert fitted["0.1"] != pytest.approx(results["clustering"]["loss"]["mlp"]["0.1"], rel=1e-6)
    without = moefication.without(study, "relu", documents=4)
    assert without != pytest.approx(trained["after"], rel=1e-5)
    tuned = moefication.tuned(study, "relu", tokens=512, documents=4, steps=2)
    speeds = moefication.whole_model_times(study, "tiny", share=0.25)
    assert [row["tokens"] for row in speeds] == [1, 16, 256] and all(row["sparse"] > 0 for row in speeds)
    one = moefication.ffn_times(16, 128, gated=False, activation="relu", tokens=(1, 2), repeats=2)
    stages = {f"relu-{split}": result for split, result in results.items()}
    stages |= {f"relu-{split}-fitted": fitted for split in results} | {"relu-without": without}
    stages |= {"relu": trained, "relu-tuned": tuned, "times": {"16 x 128": one}, "model-times": speeds}
    for name, result in stages.items():
        study.path(f"stages/{name}.json").write_text(json.dumps({"result": result, "seconds": 60.0}))
    page.write(study, study.path("page.md"), ["relu"], 1.0)
    text = study.path("page.md").read_text()
    assert "All stages took 11 minutes" in text
    assert f"{results['clustering']['loss']['mlp']['0.25']:.3f}" in text and "W2 fitted" in text
    assert study.path("page_relu.png").stat().st_size > 1000
