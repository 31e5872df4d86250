"""Mixtures inside models: identities with PEFT and with hand-written adapters, routing, frozen weights, settings."""

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megamf.adapt.adamix import AdamixConfig, count, pairs_of, prepare, route
from megamf.adapt.finetune import Recipe, learning_rate, train
from megamf.adapt.loading import load_base, load_tokenizer
from megamf.adapt.mixture import merge
from megamf.adapt.tasks import Task, batches, shuffled
from megamf.errors import UserError

LABELS = {"classification": ["c0", "c1", "c2"]}
CASES = [
    ("bert", "classification", {}),
    ("bert", "regression", {"method": "adapter"}),
    ("llama", "generation", {}),
    ("llama", "classification", {"method": "adapter"}),
    ("molm", "generation", {}),
    ("molm", "generation", {"method": "adapter"}),
    ("molm", "classification", {"target_parameters": ("mlpf.experts.weight", "mlpf.output_experts.weight")}),
]


@pytest.fixture
def make(tiny_models, example_rows):
    """make(name, kind) -> a base model, its task and encoded examples, the same at every call."""

    def build(name, kind, number=12):
        tokenizer = load_tokenizer(tiny_models / name)
        task = Task(kind, tokenizer, 24, labels=LABELS.get(kind, []))
        torch.manual_seed(1)
        return load_base(tiny_models / name, task), task, task.encode(example_rows(kind, number), "rows")

    return build


def logits(model, task, examples):
    model.eval()
    with torch.no_grad():
        return task.outputs(model, task.batch(examples, torch.device("cpu")))[0]


def spread(model, seed=5):
    """Give every copy, B too, values of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pair in pairs_of(model):
            for parameter in (*pair.down.parameters(), *pair.up.parameters()):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(("name", "kind", "options"), CASES, ids=str)
def test_modes_merging_and_frozen_weights(make, name, kind, options):
    base, task, examples = make(name, kind)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    start = logits(base, task, examples)
    model = prepare(base, AdamixConfig(modules=3, rank=2, share="none", **options), kind)
    pairs = pairs_of(model)
    assert len(pairs) >= 2 and all(len(pair.down) == len(pair.up) == 3 for pair in pairs)
    if options.get("method") != "adapter":
        assert torch.allclose(logits(model, task, examples), start, atol=1e-6)
    spread(model)
    history = train(model, task, examples, Recipe(epochs=2, batch_size=4, lr=1e-2))
    assert len(history) == 6 and all(step["consistency"] > 0 for step in history)

    # Everything that was there before and is no task head has the same bits.
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain = lambda name: name.replace("base_model.model.", "").replace("base_layer.", "")  # noqa: E731
    after = {plain(name): tensor for name, tensor in model.state_dict().items()}
    frozen = [key for key in before if key in after and not key.startswith(("classifier", "score"))]
    assert len(frozen) > 10 and all(torch.equal(after[key], before[key]) for key in frozen)
    assert all("copies" in name or "classifier" in name or "score" in name for name in trained)

    merged = logits(model, task, examples)
    route(pairs, "fixed", index=1)
    fixed = logits(model, task, examples)
    route(pairs, "random", seed=1, step=2)
    drawn = logits(model, task, examples)
    route(pairs, "random", seed=1, step=2)
    assert torch.equal(drawn, logits(model, task, examples))
    assert not torch.allclose(merged, fixed, atol=1e-4) and not torch.allclose(fixed, drawn, atol=1e-4)
    numbers = count(model)
    merge(model)
    assert torch.allclose(logits(model, task, examples), merged, atol=1e-5)
    head = numbers["head"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == numbers["merged"] + head
    assert numbers["trained"] == 3 * numbers["merged"] + head


@pytest.mark.parametrize(
    ("name", "kind"), [("bert", "classification"), ("llama", "generation"), ("molm", "generation")]
)
def test_one_lora_copy_trains_as_plain_peft_does_step_by_step(make, name, kind):
    recipe = Recipe(epochs=2, batch_size=5, lr=3e-3, consistency=0.0, seed=3)
    base, task, examples = make(name, kind)
    torch.manual_seed(2)
    ours = prepare(base, AdamixConfig(modules=1, rank=2), kind)
    losses = [step["loss"] for step in train(ours, task, examples, recipe)]

    base, task, examples = make(name, kind)
    where = {"target_modules": None}
    if name == "molm":
        expert = ["attn.q_proj.experts.weight", "attn.q_proj.output_experts.weight"]
        where = {"target_modules": ["k_proj", "v_proj"], "target_parameters": expert}
    torch.manual_seed(2)
    purpose = "SEQ_CLS" if kind == "classification" else "CAUSAL_LM"
    plain = peft.get_peft_model(base, peft.LoraConfig(task_type=purpose, r=2, lora_alpha=4, **where))
    expected = plain_training(plain, task, examples, recipe)
    assert losses == expected and losses[-1] != losses[0]
    merge(ours)
    assert torch.equal(logits(ours, task, examples), logits(plain, task, examples))


def plain_training(model, task, examples, recipe):
    """The loop written down once more, without routing."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * -(-len(examples) // recipe.batch_size)
    losses = []
    torch.manual_seed(recipe.seed)
    model.train()
    for epoch in range(recipe.epochs):
        for part in batches(shuffled(examples, recipe.seed, epoch), recipe.batch_size):
            optimizer.param_groups[0]["lr"] = learning_rate(len(losses), steps, recipe)
            batch = task.batch(part, torch.device("cpu"))
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            if task.kind == "generation":
                wanted = batch["labels"][:, 1:] != -100
                loss = F.cross_entropy(output.logits[:, :-1][wanted], batch["labels"][:, 1:][wanted])
            else:
                loss = F.cross_entropy(output.logits, batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def test_one_adapter_copy_is_the_adapter_written_by_hand(make):
    base, task, examples = make("bert", "classification")
    torch.manual_seed(4)
    model = prepare(base, AdamixConfig("adapter", modules=1, rank=3), "classification")
    places = [base.bert.encoder.layer[i].output.dense for i in range(2)]
    expected, _, _ = make("bert", "classification")
    for i, place in enumerate(places):
        layer = expected.bert.encoder.layer[i].output
        layer.dense = nn.Sequential(layer.dense, Plain(place.bottleneck))
    result = logits(model, task, examples)
    assert torch.allclose(result, logits(expected, task, examples), atol=1e-6)
    assert not torch.allclose(result, logits(make("bert", "classification")[0], task, examples), atol=1e-6)


class Plain(nn.Module):
    def __init__(self, bottleneck):
        super().__init__()
        sides = bottleneck.down, bottleneck.up
        self.w = [tensor.detach().clone() for side in sides for tensor in (side.weight, side.bias)]

    def forward(self, h):
        down_w, down_b, up_w, up_b = self.w
        return h + F.gelu(h @ down_w.T + down_b) @ up_w.T + up_b


def test_identical_copies_are_one_copy_in_every_mode(make):
    results = []
    for copies in (1, 4):
        base, task, examples = make("llama", "generation")
        torch.manual_seed(6)
        config = AdamixConfig("adapter", modules=copies, rank=2, share="none", start="same" if copies > 1 else None)
        model = prepare(base, config, "generation")
        for mode in ("merged", "random", "fixed"):
            route(pairs_of(model), mode, seed=8, step=1)
            results.append(logits(model, task, examples))
    assert all(torch.allclose(result, results[0], atol=1e-6) for result in results)


def test_start_and_sharing(make):
    def copies(config):
        torch.manual_seed(0)
        return pairs_of(prepare(make("bert", "classification")[0], config, "classification"))[0]

    for method, start in (("lora", "same"), ("adapter", "own")):
        usual, named = copies(AdamixConfig(method)), copies(AdamixConfig(method, start=start))
        assert len(usual.down) == 4 and len(usual.up) == 1
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(usual.down.copies, named.down.copies))
        first, second = usual.down.copies[:2]
        assert torch.equal(first.weight, second.weight) == (start == "same")
    assert not torch.equal(*[one.weight for one in copies(AdamixConfig(modules=2, start="own")).down.copies])
    pair = copies(AdamixConfig(share="down"))
    assert len(pair.down) == 1 and len(pair.up) == 4


def test_consistency_changes_training_and_the_same_seed_repeats_it(make):
    def last(**changes):
        base, task, examples = make("bert", "regression")
        torch.manual_seed(0)
        model = prepare(base, AdamixConfig(modules=2, rank=2), "regression")
        return train(model, task, examples, Recipe(epochs=2, batch_size=4, lr=1e-2, **changes))[-1]

    assert last() == last() and last()["loss"] != last(seed=1)["loss"]
    assert last(consistency=0.0)["consistency"] == 0 and last(consistency=5.0)["loss"] != last()["loss"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modules": 0}, "modules=0"),
        ({"rank": 0}, "rank=0"),
        ({"method": "prefix"}, "prefix"),
        ({"share": "both"}, "both"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"method": "adapter", "alpha": 1.0}, "alpha"),
        ({"method": "adapter", "targets": ("query",)}, "targets"),
        ({"places": "mlp"}, "places"),
        ({"method": "full", "modules": 2}, "modules=2"),
        ({"start": "own", "modules": 1}, "start"),
        ({"start": "own", "share": "down"}, "share='down'"),
        ({"dropout": 0.1, "target_parameters": ("experts.weight",)}, "target_parameters"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(options, words):
    with pytest.raises(UserError, match=words):
        AdamixConfig(**options)


def test_places_that_do_not_exist(make):
    for config, words in (
        (AdamixConfig("adapter", places="nowhere"), "nowhere"),
        (AdamixConfig("adapter", places="("), "regular expression"),
        (AdamixConfig(targets=("nowhere",)), "nowhere"),
        (AdamixConfig(targets=("word_embeddings",)), "Embedding"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(make("bert", "classification")[0], config, "classification")
    base, _, _ = make("bert", "classification")
    base.config.model_type = "unheard-of"
    with pytest.raises(UserError, match="--places"):
        prepare(base, AdamixConfig("adapter"), "classification")


def test_unknown_mode_and_copy(make):
    pairs = pairs_of(prepare(make("bert", "classification")[0], AdamixConfig(modules=2), "classification"))
    with pytest.raises(UserError, match="copy 2"):
        route(pairs, "fixed", index=2)
    with pytest.raises(UserError, match="best"):
        route(pairs, "best")


@pytest.mark.parametrize(
    ("name", "kind", "method"),
    [
        ("bert", "classification", "lora"),
        ("bert", "classification", "adapter"),
        ("llama", "generation", "adapter"),
        ("molm", "generation", "lora"),
    ],
)
def test_a_base_in_bfloat16_has_modules_in_float32(tiny_models, example_rows, name, kind, method):
    task = Task(kind, load_tokenizer(tiny_models / name), 24, labels=LABELS.get(kind, []))
    base = load_base(tiny_models / name, task, torch.bfloat16)
    model = prepare(base, AdamixConfig(method, modules=2, rank=2), kind)
    pairs = pairs_of(model)
    assert {p.dtype for pair in pairs for p in (*pair.down.parameters(), *pair.up.parameters())} == {torch.float32}
    examples = task.encode(example_rows(kind, 12), "rows")
    history = train(model, task, examples, Recipe(epochs=8, batch_size=6, lr=3e-2))
    assert history[-1]["loss"] < history[0]["loss"]
