"""Reading, tokenising and measuring document sets."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megamf.compress.documents import load_documents, mean_loss, token_documents, token_windows
from megamf.errors import UserError

WORDS = ["[UNK]", "a", "b", "c", "d"]


@pytest.fixture
def tokenizer():
    fast = FastTokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]")


class Plain:
    """A tokenizer of the data room's form."""

    def encode(self, text):
        return [WORDS.index(word) for word in text.split()]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_reads_lines_files_and_folders_in_order(tmp_path, caplog):
    lines = write_lines(tmp_path / "x.jsonl", [{"body": "a b"}, {"body": " "}, {"other": 1}, {"body": "c"}])
    assert load_documents(lines, field="body") == ["a b", "c"]
    assert "2 bad documents" in caplog.text
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "2.txt").write_text("two")
    (folder / "1.txt").write_text("one\n\nhalf")
    assert load_documents(folder) == ["one\n\nhalf", "two"]
    assert load_documents(folder, blank_lines=True) == ["one", "half", "two"]
    assert load_documents([lines, folder], field="body", limit=3) == ["a b", "c", "one\n\nhalf"]


def test_too_few_documents_are_refused_with_the_count_and_the_reason(tmp_path):
    one = write_lines(tmp_path / "one.jsonl", [{"text": "a"}, {"txet": "b"}])
    with pytest.raises(UserError, match=r"holds 1 usable document, at least 2 .* line 2 .*malformed"):
        load_documents(one)
    assert load_documents(one, minimum=1) == ["a"]
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds 0 usable documents"):
        load_documents(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="no input at"):
        load_documents(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="limit of 1 documents is below the 2"):
        load_documents(one, limit=1)


def test_both_kinds_of_tokenizer_give_the_first_tokens(tokenizer):
    for kind in (tokenizer, Plain()):
        first, second = token_documents(["a b c d", "d"], kind, 3)
        assert first.tolist() == [1, 2, 3] and second.tolist() == [4] and first.dtype == torch.int64
    with pytest.raises(UserError, match="length=1"):
        token_documents(["a"], tokenizer, 1)
    with pytest.raises(UserError, match=r"document 1 .* gives no token"):
        token_documents(["a", "  "], tokenizer, 4)


def test_windows_hold_the_documents_and_their_ends():
    tokens = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6])]
    assert token_windows(tokens, 2, end=9).tolist() == [[1, 2], [3, 9], [4, 9], [5, 6]]
    assert token_windows(tokens, 4).tolist() == [[1, 2, 3, 4]]
    with pytest.raises(UserError, match="6 tokens together, one window needs 7"):
        token_windows(tokens, 7)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def test_mean_loss_is_the_mean_over_tokens_not_over_documents(model):
    tokens = [torch.arange(9) % 11, torch.tensor([3, 1]), torch.tensor([7]), torch.tensor([1, 10, 2, 2])]
    total, count = 0.0, 0
    with torch.no_grad():
        for row in tokens:
            probability = model(input_ids=row[None]).logits[0].softmax(-1)
            for t in range(len(row) - 1):
                total -= math.log(probability[t, row[t + 1]])
                count += 1
    model.train()
    for batch in (1, 3, 4):
        assert mean_loss(model, tokens, batch=batch) == pytest.approx(total / count, rel=1e-12)
    assert model.training


def test_mean_loss_refuses_what_it_cannot_measure(model):
    with pytest.raises(UserError, match="nothing to predict"):
        mean_loss(model, [torch.tensor([1])])
    with pytest.raises(UserError, match="token id 11, the model knows 11 ids"):
        mean_loss(model, [torch.tensor([1, 11])])
